"""What others wrote runs no code and leads no writer out of its folder: resumed runs, archives, checkpoints' code."""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, BertModel, CLIPModel, dynamic_module_utils

import tiny
import tiny_clip
from lotlip_hf import LoTLIPModel, LoTLIPProcessor, cli
from lotlip_hf.conversion.common import ConversionError
from lotlip_hf.conversion.open_clip import read_open_clip
from lotlip_hf.conversion.torchscript import read_torchscript
from lotlip_hf.loading import load_model
from lotlip_hf.training.checkpoint import STATE
from lotlip_hf.training.fsdp import prepare_sharding
from scripts import load_script

TRAIN = "examples/train.py"
RUN = (
    *("--data", "scenes", "--max-steps", "2", "--save-steps", "1", "--batch-size", "2", "--num-workers", "0"),
    *("--num-long-texts", "1", "--trackers", "none", "--log-steps", "1", "--terms", "sigmoid", "--ema-decay", "0.9"),
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


@pytest.mark.slow
def test_a_state_holds_tensors_and_numbers(finished: Path) -> None:
    files = [file for file in state_files(finished) if file.exists()]
    assert len(files) == 5  # the optimiser, the random numbers, the scheduler, the objective, the averaged weights
    with torch.serialization.safe_globals([]):
        for file in files:
            if not file.name.startswith("random_states"):  # NumPy's arrays, which accelerate allows
                torch.load(file, weights_only=True)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "scheduler.pt", "0-progress.json"])
def test_a_state_is_files(name: str, make: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture) -> None:
    """None is waited for, or read without an end."""
    file = run / "checkpoint-2" / STATE / name
    file.unlink()
    make(file)
    assert train("--output", run, "--resume") == 2
    assert "checkpoint-2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "5", ""], ids=range(4))
def test_a_progress_that_is_none(content: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "checkpoint-2" / STATE / "0-progress.json").write_text(content)
    assert train("--output", run, "--resume") == 2
    assert "checkpoint-2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "epoch", "next_batch", "stream", "counts", "window", "data"])
def test_a_progress_of_wrong_types(name: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    file = run / "checkpoint-2" / STATE / "0-progress.json"
    progress = json.loads(file.read_text())
    for value in ("x", None, -5, 10**30, [1], {"a": "b"}):
        file.write_text(json.dumps({**progress, name: value}))
        assert train("--output", run, "--resume") == 2, value
        assert "checkpoint-2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ['{"step": 1, "loss": "x"}', '{"step": 1, "long_image_to_text_r1": [1]}', "[" * 100_000], ids=range(3)
)
def test_a_log_of_wrong_types(line: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "log.jsonl").write_text(f"{line}\n")
    assert train("--output", run, "--resume") == 2
    assert "log.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_options_that_are_nested_deep(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "training_config.yaml").write_text("[" * 100_000)
    assert train("--output", run, "--resume") == 2
    assert "training_config.yaml" in capsys.readouterr().err


def test_a_pipe_is_no_log(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "log.jsonl").unlink()
    os.mkfifo(run / "log.jsonl")
    assert train("--output", run, "--resume") == 2
    assert "log.jsonl" in capsys.readouterr().err


# Checkpoints with code of their own

CODE = """
from pathlib import Path
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
Path({marker!r}).touch()
class Config(CLIPConfig):
    model_type = "own-code"
class Model(CLIPModel):
    config_class = Config
class ImageProcessor(CLIPImageProcessor): pass
class Tokenizer(CLIPTokenizer): pass
class Processor(CLIPProcessor): pass
"""
AUTO_MAP = {
    "AutoConfig": "own.Config",
    **dict.fromkeys(("AutoModel", "AutoModelForImageTextToText"), "own.Model"),
    "AutoTokenizer": ["own.Tokenizer", None],
    "AutoImageProcessor": "own.ImageProcessor",
    "AutoProcessor": "own.Processor",
}
CONFIGS = {
    "config.json": {"model_type": "own-code", "architectures": ["LoTLIPModel"]},
    "tokenizer_config.json": {"tokenizer_class": "OwnTokenizer"},
    "preprocessor_config.json": {"image_processor_type": "OwnImageProcessor"},
    "processor_config.json": {"processor_class": "OwnProcessor"},
}


def with_code(folder: Path, marker: Path, *files: str) -> Path:
    """The folder, whose configurations of these names ask for code that makes a file."""
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for name in files or CONFIGS:
        there = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**there, **CONFIGS[name], "auto_map": AUTO_MAP}))
    return folder


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What code in a checkpoint makes; all questions on the terminal are answered with yes."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()
    assert sys.stdin.tell() == 0  # nothing was asked


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    return tmp_path / "pictures"


COMMANDS = {
    "search": "search --model {evil} --images {pictures} text",
    "demo": "demo --model {evil} --images {pictures}",
    "embed": "embed --model {evil} --images {pictures} --output {out}",
    "evaluate": "evaluate --model {evil} --task scenes --num-images 2",
    "prompts": "prompts --model {evil} --data {classes} --output {out}",
    "push": "push {evil} --repo-id ada/evil --dry-run {out}",
    "train": "train --model {evil} --data scenes --output {out}",
    "train, text": "train --text-model {evil} --image-model {good} --data scenes --output {out}",
    "train, image": "train --text-model {bert} --image-model {evil} --data scenes --output {out}",
    "convert onnx": "convert onnx --model {evil} --output {out}",
    "convert openvino": "convert openvino --model {evil} --output {out}",
    "relabel": "relabel --captioner {evil} --tokenizer {good} --data {pictures} --short-column none --output {out}",
    "relabel, tokenizer": "relabel --captioner {good} --tokenizer {evil} --data {pictures} --short-column none "
    "--output {out}",
    "convert official": "convert official --checkpoint {official}/model.pt --tokenizer {evil} --output {out} "
    "--open-clip-config {official}/open_clip_config.json",
    "convert --reverse": "convert official --reverse --checkpoint {evil} --output {out}",
}
PROGRAMS = {
    "examples/finetune_lora.py": "--model {evil} --data scenes --output {out}",
    "examples/finetune_with_trainer.py": "--model {evil} --data scenes --output_dir {out}",
    "examples/finetune_sentence_transformers.py": "--model {evil} --data scenes --output_dir {out}",
    "examples/align_text_encoder.py": "--student {good} --teacher {evil} --prompts {prompts} --output {out}",
    "examples/swap_text_encoder.py": "--model {evil} --output {out}.png",
    "examples/space/app.py": "--model {evil}",
}


@pytest.fixture
def words(
    golden: Path, official_checkpoint: Path, pictures: Path, marker: Path, tmp_path: Path
) -> Callable[[str], list[str]]:
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    shutil.copytree(pictures, tmp_path / "classes" / "cat")
    BertModel(tiny.text_config().backbone_config).save_pretrained(tmp_path / "bert")
    places = {
        "bert": tmp_path / "bert",
        "classes": tmp_path / "classes",
        "evil": with_code(tmp_path / "evil", marker),
        "good": official_checkpoint,
        "official": golden / "official-corners2",
        "pictures": pictures,
        "prompts": tmp_path / "prompts.txt",
        "out": tmp_path / "out",
    }
    return lambda text: [word.format(**places) for word in text.split()]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_checkpoints_code(
    command: str, words: Callable[[str], list[str]], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(words(COMMANDS[command])) == 2
    assert "trust_remote_code" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_runs_a_checkpoints_code(
    program: str, words: Callable[[str], list[str]], capsys: pytest.CaptureFixture
) -> None:
    """Some end by an error, which Python prints."""
    try:
        status, error = load_script(program.split(",")[0]).main(words(PROGRAMS[program])), ""
    except (OSError, ValueError, SystemExit) as caught:
        status, error = 1, str(caught)
    assert status in (1, 2)
    assert "trust_remote_code" in capsys.readouterr().err + error


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json", "processor_config.json"])
def test_no_part_of_a_checkpoint_brings_code(name: str, marker: Path, tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path / "clip", tiny_clip.clip_model())
    assert isinstance(load_model(tmp_path / "clip")[0], CLIPModel)
    (tmp_path / "clip" / "processor_config.json").unlink()
    tiny_clip.image_processor().save_pretrained(tmp_path / "clip")
    with_code(tmp_path / "clip", marker, name)
    # transformers' own tokenizer of a CLIP goes before the one that is named
    known = name == "tokenizer_config.json"
    with nullcontext() if known else pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path / "clip")


def test_a_lotlip_processor_asks_nothing(official_checkpoint: Path, marker: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(official_checkpoint, tmp_path / "lotlip"))
    for load in (AutoProcessor.from_pretrained, LoTLIPProcessor.from_pretrained):
        assert isinstance(load(folder), LoTLIPProcessor)  # it names its own code, which is installed
    assert isinstance(AutoModel.from_pretrained(folder), LoTLIPModel)
    with_code(folder, marker, "config.json", "tokenizer_config.json")
    with pytest.raises(ValueError, match="trust_remote_code"):
        LoTLIPProcessor.from_pretrained(folder)


# TorchScript, as OpenAI published CLIP


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).half()
        self.register_buffer("number", torch.tensor(7))
        self.register_buffer("view", torch.arange(12.0).view(3, 4)[1:, ::2])
        self.no_weight = torch.ones(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class HostileLayer(nn.Module):
    """As it is loaded by TorchScript, it writes a file."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.marker = marker

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight, self.marker, self.training = state
        torch.save(torch.ones(1), self.marker)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("traced", [True, False])
def test_an_archive_is_read_as_torchscript_reads_it(traced: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"a": Layer()})["a"]).float()
    model[1].linear.half()
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    script = torch.jit.trace(model, torch.ones(1, 3)) if traced else torch.jit.script(nn.Sequential(Layer(), Layer()))
    torch.jit.save(script, tmp_path / "archive.pt")
    expected, found = torch.jit.load(tmp_path / "archive.pt").state_dict(), read_torchscript(tmp_path / "archive.pt")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archives_code_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    script = torch.jit.script(HostileLayer(str(marker)))
    script.save(tmp_path / "archive.pt")
    with pytest.raises(ConversionError, match="archive.pt"):
        read_open_clip(tmp_path / "archive.pt")
    assert not marker.exists()
    torch.jit.load(tmp_path / "archive.pt")
    assert marker.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_in_an_archives_pickle_runs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.jit.script(Layer()).save(tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        for name in good.namelist():
            is_pickle = name.endswith("/data.pkl")
            archive.writestr(name, pickle.dumps(Payload(marker)) if is_pickle else good.read(name))
    with pytest.raises(ConversionError, match="mkdir"):
        read_open_clip(tmp_path / "archive.pt")
    assert not marker.exists()
