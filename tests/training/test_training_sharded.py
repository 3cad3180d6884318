"""The training loop under FSDP, in mixed precision, with gradient checkpointing and compiled: as the plain run.

accelerate takes FSDP up on accelerators alone. Here it is told that there is one; all the rest, its own code and
torch's `fully_shard`, runs as it is, on CPUs.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from test_new_term import Guess
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessRaisedException
from transformers import AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.distributed import rank, world_size
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.training.config import TrainingConfig, parse_arguments
from lotlip_hf.training.log import LOG_NAME
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.terms import TERMS
from processes import run_processes
from seams import Near

pytestmark = pytest.mark.slow

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
BATCH_SIZE, NUM_RECORDS = 8, 30  # the fourth batch of an epoch is not full
RUN = {
    "data": "scenes",
    "eval_data": "scenes",
    "eval_steps": 2,
    "eval_samples": 6,
    "max_steps": 4,
    "log_steps": 1,
    "num_workers": 0,
    "num_long_texts": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    # a key's bias has no gradient but noise, which AdamW would make steps of
    "epsilon": 1e-4,
    "trackers": ["none"],
}
# Each is trained by one process and by two.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"save_steps": 2, "patience": 4, "terms": ["infonce", "guess:0.5"]},
    "cached": {
        "terms": ["sigmoid", "guess:0.5"],
        "grad_cache_chunk": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
    },
    "locked": {
        "terms": ["guess", "infonce"],
        "lock_vision": True,
        "unlocked_vision_layers": 1,
        "lock_text": True,
        "unlocked_text_layers": 1,
        "text_learning_rate": 1e-4,
        "logit_scale_learning_rate": 1e-2,
        "layer_decay": 0.5,
        "gradient_checkpointing": True,
        "max_steps": 2,
    },
    "frozen": {"lock_vision": True, "lock_text": True, "max_steps": 2},
    "taught": {"terms": ["instance", "structure"], "max_steps": 2},
    "dense": {
        "terms": ["infonce", "near", "distribution", "masked_words"],
        "term_options": ["masked_words.num_layers=1"],
        "grad_cache_chunk": 3,
        "max_steps": 2,
    },
}
# what `accelerate launch` sets
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
STATES = ["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "objective.pt"]
NOT_SUPPORTED = {
    "--fsdp_version 2": {"FSDP_VERSION": "1", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
    "--fsdp_offload_params": {"FSDP_OFFLOAD_PARAMS": "true"},
}


@mock.patch.dict(TERMS, {"guess": Guess, "near": Near})
def run(checkpoint: Path, output: Path, options: dict[str, Any]) -> None:
    """A run without dropout, so that it does not depend on how many processes share it."""
    is_taught = "instance" in options.get("terms", ())
    options = {"teacher": str(checkpoint), **options} if is_taught else options
    config = TrainingConfig(
        model=str(checkpoint),
        output=str(output),
        cache=str(output.parent / "states"),
        batch_size=BATCH_SIZE // world_size(),
        **{**RUN, **options},
    )
    model, processor = load_or_start_model(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if is_taught:  # by the model as it was
        model.text_projection.weight.data[:4] *= 3
    # it ends the processes' group, which the next run needs
    with mock.patch.object(PartialState, "destroy_process_group"):
        try:
            train(model, processor, scenes_dataset(NUM_RECORDS, 0), config, scenes_dataset(6, 1))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def log(output: Path) -> list[dict[str, Any]]:
    lines = (output / LOG_NAME).read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "samples_per_second"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """The same losses, retrieval and weights."""
    for expected, found in zip(log(one), log(other), strict=True):
        assert expected.keys() == found.keys()
        assert found == pytest.approx(expected, rel=0.0, abs=1e-5)
    checkpoint = max(one.glob("checkpoint-*")).name
    assert_same_weights(one / checkpoint, other / checkpoint)


def assert_same_weights(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    expected, found = (AutoModel.from_pretrained(checkpoint).state_dict() for checkpoint in (one, other))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0.0, atol=tolerance, msg=name)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Every accelerator of a process shares its settings with the first one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def one_process(official_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs by one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, options in RUNS.items():
        run(official_checkpoint, folder / name, options)
    return folder


# Several processes


def launched() -> dict[str, str]:
    """What a launcher sets; the group exists already."""
    number = str(rank())
    return {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": str(world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "ACCELERATE_USE_CPU": "true",
    }


def replicated(checkpoint: str, folder: str) -> None:
    """The run of "locked", by DDP."""
    with mock.patch.dict(os.environ, launched()):
        run(Path(checkpoint), Path(folder), RUNS["locked"])


def start_state(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """`AcceleratorState.__init__`, which leaves FSDP out on CPUs."""
    start_plain_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


start_plain_state = AcceleratorState.__init__


class Payload:
    """Unpickled by what trusts it, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.makedirs, (str(self.marker), 0o777, True)


@mock.patch.dict(TERMS, {"guess": Guess, "near": Near})
def resumed(folder: str) -> None:
    with (
        mock.patch.dict(os.environ, {**launched(), **FSDP}),
        mock.patch.object(AcceleratorState, "__init__", start_state),
    ):
        config = parse_arguments(["--output", folder, "--resume"])
        train(*load_or_start_model(config), scenes_dataset(NUM_RECORDS, 0), config, scenes_dataset(6, 1))


def sharded(checkpoint: str, folder: str) -> dict[str, Any]:
    """All runs, by FSDP, and what was sharded; what is not supported is said."""
    source, output = Path(checkpoint), Path(folder)
    answers: dict[str, Any] = {}
    clip = Accelerator.clip_grad_norm_

    def look(accelerator: Accelerator, parameters: Any, *args: Any) -> Any:
        """Between the backward pass and the step every parameter is in its place."""
        (model,) = accelerator._models
        answers["whole"] = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        answers["units"] = [isinstance(layer, FSDPModule) for layer in layers]
        return clip(accelerator, parameters, *args)

    with (
        mock.patch.dict(os.environ, {**launched(), **FSDP}),
        mock.patch.object(AcceleratorState, "__init__", start_state),
        mock.patch.object(Accelerator, "clip_grad_norm_", look),
    ):
        for name, options in RUNS.items():
            run(source, output / name, options)
            answers[f"{name} whole"] = answers["whole"]
        run(source, output / "bf16", {**RUNS["plain"], "mixed_precision": "bf16", "max_steps": 2})

        # the last checkpoint is lost
        if rank() == 0:
            shutil.copytree(output / "plain" / "checkpoint-4", output / "undisturbed")
            shutil.rmtree(output / "plain" / "checkpoint-4")
        torch.distributed.barrier()
        run(source, output / "plain", {**RUNS["plain"], "resume": True})

        for number, (message, settings) in enumerate(NOT_SUPPORTED.items()):
            with mock.patch.dict(os.environ, settings), pytest.raises(ValueError, match=message):
                run(source, output / str(number), {})
        with pytest.raises(ValueError, match="ema_decay"):
            run(source, output / "averaged", {"ema_decay": 0.9})
        for teacher in ("self", "ema"):
            with pytest.raises(ValueError, match="teacher"):
                run(source, output / teacher, {**RUNS["taught"], "teacher": teacher})
        with pytest.raises(ValueError, match="text_dtype"):
            run(source, output / "mixed", {"lock_text": True, "text_dtype": "bfloat16"})
    return answers


@pytest.fixture(scope="module")
def two_processes(official_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs by two processes under FSDP, and what the first one answered."""
    folder = tmp_path_factory.mktemp("two")
    answers = run_processes(sharded, 2, folder, str(official_checkpoint), str(folder))
    assert answers[0] == answers[1]
    return folder, answers[0]


@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_is_that_of_one_process(
    name: str, one_process: Path, two_processes: tuple[Path, dict[str, Any]]
) -> None:
    assert_same_run(one_process / name, two_processes[0] / name)


def test_all_but_scalars_is_sharded_layer_by_layer(two_processes: tuple[Path, dict[str, Any]]) -> None:
    answers = two_processes[1]
    guess, bias = "objective.terms.guess.map.weight", "objective.terms.sigmoid.logit_bias"
    assert answers["plain whole"] == ["logit_scale", guess]
    assert answers["cached whole"] == ["logit_scale", bias, guess]
    assert len(answers["units"]) > 2
    assert all(answers["units"])


def test_a_sharded_checkpoint_is_a_plain_one(two_processes: tuple[Path, dict[str, Any]]) -> None:
    checkpoint = two_processes[0] / "cached" / "checkpoint-2"
    model, info = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    assert model.config.architectures == ["LoTLIPModel"]
    assert model.config.auto_map["AutoModel"] == "modeling_lotlip.LoTLIPModel"
    assert (checkpoint / "modeling_lotlip.py").is_file()


@pytest.mark.parametrize("name", STATES)
def test_nothing_in_a_sharded_checkpoint_is_unpickled(
    name: str, two_processes: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The first process reads it and stops, and its launcher stops the other."""
    shutil.copytree(two_processes[0] / "plain", tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-4" / "state"
    files = {file.name for file in state.iterdir() if file.suffix != ".json"}
    assert files == {*STATES, "random_states_0.pkl", "random_states_1.pkl"}
    torch.save(Payload(tmp_path / "marker"), state / name)
    with pytest.raises(ProcessRaisedException, match="CheckpointError"):
        run_processes(resumed, 2, tmp_path, str(tmp_path / "run"))
    assert not (tmp_path / "marker").exists()


def test_a_sharded_run_resumes(two_processes: tuple[Path, dict[str, Any]]) -> None:
    folder = two_processes[0]
    assert_same_weights(folder / "undisturbed", folder / "plain" / "checkpoint-4", tolerance=0.0)
    assert [line["step"] for line in log(folder / "plain") if "loss" in line] == [1, 2, 3, 4]


def test_sharded_bfloat16_is_near_float32(two_processes: tuple[Path, dict[str, Any]]) -> None:
    folder = two_processes[0]
    exact, near = ([line["loss"] for line in log(folder / name) if "loss" in line][:2] for name in ("plain", "bf16"))
    assert near == pytest.approx(exact, rel=0.01)
    assert near != exact
    weights = AutoModel.from_pretrained(folder / "bf16" / "checkpoint-2", dtype="auto").state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_gradient_checkpointing_over_processes(one_process: Path, official_checkpoint: Path, tmp_path: Path) -> None:
    """With a locked image tower, and the text tower run twice in a step, by DDP."""
    output = tmp_path / "run"
    run_processes(replicated, 2, tmp_path, str(official_checkpoint), str(output))
    assert_same_run(one_process / "locked", output)


# One process


@pytest.mark.parametrize("locked", [{}, {"lock_vision": True}, {"lock_vision": True, "unlocked_vision_layers": 1}])
def test_gradient_checkpointing_changes_nothing(
    locked: dict[str, Any], official_checkpoint: Path, tmp_path: Path
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []
    clip = Accelerator.clip_grad_norm_

    def look(accelerator: Accelerator, parameters: Any, *args: Any) -> Any:
        (model,) = accelerator._models
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return clip(accelerator, parameters, *args)

    with mock.patch.object(Accelerator, "clip_grad_norm_", look):
        for is_on in (False, True):
            options = {"max_steps": 1, "gradient_checkpointing": is_on, **locked}
            run(official_checkpoint, tmp_path / str(is_on), options)
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any(name.startswith("vision_model") for name in plain) == (locked != {"lock_vision": True})
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0.0, atol=1e-6, msg=name)


def test_float16_needs_a_gpu(official_checkpoint: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16"):
        run(official_checkpoint, tmp_path / "run", {"mixed_precision": "fp16"})
    assert not (tmp_path / "run").exists()


@pytest.mark.same_bits
def test_compiled_for_every_length(official_checkpoint: Path, tmp_path: Path) -> None:
    """Traced, but run as it is: machine code of it takes minutes to make, and is for torch's own tests."""
    options = {"save_steps": 2, "num_long_texts": 3, "grad_cache_chunk": 4, "ema_decay": 0.9}
    run(official_checkpoint, tmp_path / "plain", options)

    graphs: list[int] = []  # how many there are, before each batch and at the end
    lengths: set[int] = set()
    compile_module, collate = nn.Module.compile, LoTLIPCollator.__call__

    def trace(module: nn.Module, **kwargs: Any) -> None:
        compile_module(module, backend="eager", **kwargs)

    def look(collator: LoTLIPCollator, *args: Any) -> Any:
        graphs.append(counters["stats"]["unique_graphs"])
        batch = collate(collator, *args)
        lengths.add(batch["long_input_ids"].shape[-1])
        return batch

    torch._dynamo.reset()
    counters.clear()
    output = tmp_path / "run"
    with mock.patch.object(nn.Module, "compile", trace), mock.patch.object(LoTLIPCollator, "__call__", look):
        run(official_checkpoint, output, {"compile": True, **options})
        graphs.append(counters["stats"]["unique_graphs"])
        (output / "checkpoint-4").rename(tmp_path / "undisturbed")
        run(official_checkpoint, output, {"compile": True, "resume": True, **options})
    none, first, second, evaluated, *rest = graphs[:7]
    assert len(lengths) > 2
    assert none == 0 < first == second  # the second step adds nothing
    assert evaluated <= second + 1
    assert set(rest) == {evaluated}  # nor do the others, of which the last has fewer records
    assert_same_run(tmp_path / "plain", output)
    assert_same_weights(tmp_path / "undisturbed", output / "checkpoint-4", tolerance=0.0)
