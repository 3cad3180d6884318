"""What others wrote runs no code and leads no writer out of its folder: resumed runs, archives, checkpoints' code."""

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn

from lotlip_hf.training.checkpoint import STATE
from lotlip_hf.training.setup import prepare_sharding
from scripts import load_script

TRAIN = "examples/train.py"
RUN = (
    *("--data", "scenes", "--max-steps", "2", "--save-steps", "1", "--batch-size", "2", "--num-workers", "0"),
    *("--num-long-texts", "1", "--trackers", "none", "--log-steps", "1", "--loss", "sigmoid", "--ema-decay", "0.9"),
)


class Payload:
    """Unpickled by what trusts it, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """accelerate keeps its state for all of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(*argv: str | Path) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return load_script(TRAIN).main([str(argument) for argument in argv])


# Runs


@pytest.fixture(scope="module")
def finished(official_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that has a state."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train("--model", official_checkpoint, "--output", output, *RUN) == 0
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def state_files(run: Path) -> list[Path]:
    """Those that can hold a pickle, and names that accelerate and torch read if they are there."""
    state = run / "checkpoint-2" / STATE
    there = [file for file in state.iterdir() if file.suffix not in (".json", ".safetensors")]
    others = (
        "custom_checkpoint_0.pkl",
        "pytorch_model.bin",
        "sampler.bin",
        "dl_state_dict.bin",
        "scaler.pt",
        ".metadata",
    )
    return [*there, *(state / name for name in others)]


def test_a_state_holds_tensors_and_numbers(finished: Path) -> None:
    files = [file for file in state_files(finished) if file.exists()]
    assert len(files) == 5  # the optimiser, the random numbers, the scheduler, the objective, the averaged weights
    with torch.serialization.safe_globals([]):
        for file in files:
            if not file.name.startswith("random_states"):  # NumPy's arrays, which accelerate allows
                torch.load(file, weights_only=True)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "zip"])
def test_nothing_in_a_resumed_run_is_unpickled(
    write: object, finished: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One file after the other, and all of them; where the weights are a pickle, too."""
    marker = tmp_path / "marker"
    state = run / "checkpoint-2" / STATE
    files = state_files(run)
    for changed in (*([file] for file in files), [*files, state / "model.safetensors"]):
        shutil.rmtree(state)
        shutil.copytree(finished / "checkpoint-2" / STATE, state)
        for file in changed:
            if file.name in ("pytorch_model.bin", "model.safetensors"):
                (state / "model.safetensors").unlink(missing_ok=True)
            if file.name != "model.safetensors":
                with open(file, "wb") as opened:
                    write(Payload(marker), opened)  # type: ignore[operator]
        is_read = any((finished / "checkpoint-2" / STATE / file.name).exists() for file in changed) or any(
            file.name in ("pytorch_model.bin", "custom_checkpoint_0.pkl") for file in changed
        )
        assert train("--output", run, "--resume") == (2 if is_read else 0), changed
        error = capsys.readouterr().err
        assert not is_read or f"{run / 'checkpoint-2'} cannot be read" in error
        assert "weights_only" not in error  # torch's advice to trust the file
        assert not marker.exists(), changed


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_what_unpickles_its_checkpoints_is_refused(kind: DistributedType) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=kind)
    with pytest.raises(ValueError, match="--use_fsdp"):
        prepare_sharding(nn.Linear(1, 1), nn.Linear(1, 1), accelerator)  # pyright: ignore[reportArgumentType]


def test_a_state_of_an_older_version_is_said(run: Path, capsys: pytest.CaptureFixture) -> None:
    state = run / "checkpoint-2" / STATE
    (state / "scheduler.pt").rename(state / "custom_checkpoint_0.pkl")
    assert train("--output", run, "--resume") == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log.jsonl", "curve.png", "training_config.yaml", "checkpoint-1", "lotlip", "new"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_writes_into_its_own_folder_alone(
    name: str, resume: bool, run: Path, official_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = outside / "thesis"
    if (run / name).is_dir():
        shutil.copytree(run / name, target)
        shutil.rmtree(run / name)
    else:
        target.write_bytes((run / name).read_bytes() if (run / name).exists() else b"half a line")
        (run / name).unlink(missing_ok=True)
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    os.symlink(os.path.relpath(target, run) if resume else target, run / name)
    options = ("--resume",) if resume else ("--model", official_checkpoint, *RUN)
    assert train("--output", run, *options) == 2
    assert f"{name} leads out of" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}


def test_a_pipe_is_no_log(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "log.jsonl").unlink()
    os.mkfifo(run / "log.jsonl")
    assert train("--output", run, "--resume") == 2
    assert "log.jsonl" in capsys.readouterr().err
