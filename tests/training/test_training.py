"""The training loop in real processes: killed and resumed, stopped, shared by several, and fed with what is broken."""

import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from threading import Timer
from time import sleep
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    get_scheduler,
)

import processes
import tiny
import tiny_clip
from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPProcessor, LoTLIPTokenizer
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.records import load_records
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.training import checkpoint, loop, signals, stages
from lotlip_hf.training.batches import num_steps
from lotlip_hf.training.checkpoint import checkpoint_step, list_checkpoints
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.log import RunLog, read_log
from lotlip_hf.training.loop import Interrupted, NonFiniteLossError, train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import Objective, batch_loss
from lotlip_hf.training.optim import freeze
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.views import Views
from lotlip_hf.training.validation import validate
from processes import TIME_LIMIT, Ended, Started
from scripts import REPOSITORY, load_script
from shards import write_shard

TRAIN = "examples/train.py"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "a . red green blue round square small large old new cup tree house road lamp bird river is of in".split()
IMAGE_SIDE = 32


pytestmark = pytest.mark.usefixtures("alone")


# What a run starts from


def make_checkpoint(
    folder: Path, dropout: float = 0.0, backbone: str = "vit", corners: int = 2, **vision_options: Any
) -> Path:
    """A tiny random model with its processor."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    tokenizer = LoTLIPTokenizer.from_pretrained(folder, model_max_length=30)
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=side)
    torch.manual_seed(0)
    text_config = tiny.text_config(num_corner_tokens=corners)
    text_config.backbone_config.hidden_dropout_prob = dropout
    vision_config = tiny.vision_config(backbone, **{"pooling": None, **vision_options})
    config = LoTLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=24)
    LoTLIPModel(config).save_pretrained(folder)
    LoTLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def rows(number: int) -> list[dict[str, Any]]:
    """Random pictures and captions that have nothing to do with each other."""
    generator = random.Random(7)

    def sentence(words: int) -> str:
        return " ".join(generator.choices(WORDS[2:], k=words))

    pixels = np.random.default_rng(7).integers(0, 256, (number, IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    made = []
    for index in range(number):
        file = io.BytesIO()
        Image.fromarray(pixels[index]).save(file, "png")
        long_captions = [". ".join(sentence(generator.randint(2, 6)) for _ in range(5)) for _ in range(2)]
        record = {"id": f"r{index:03}", "short_caption": sentence(3), "long_captions": long_captions}
        made.append({"png": file.getvalue(), **record})
    return made


def make_folder(folder: Path, number: int = 24) -> Path:
    """A folder of pictures with metadata."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w") as lines:
        for row in rows(number):
            (folder / f"{row['id']}.png").write_bytes(row.pop("png"))
            lines.write(json.dumps({"file_name": f"{row['id']}.png", **row}) + "\n")
    return folder


def make_shards(folder: Path, sizes: Sequence[int] = (7, 5, 9, 6)) -> Path:
    """WebDataset shards of unequal lengths."""
    folder.mkdir(parents=True)
    made = iter(rows(sum(sizes)))
    for number, size in enumerate(sizes):
        write_shard(folder / f"{number}.tar", [(row.pop("png"), row) for row in islice(made, size)])
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, with dropout, `plain`, without, `records` and `shards`. Nobody writes to it."""
    folder = tmp_path_factory.mktemp("start")
    make_checkpoint(folder / "model", dropout=0.2)
    make_checkpoint(folder / "plain")
    make_folder(folder / "records")
    make_folder(folder / "few", 10)
    make_folder(folder / "odd", 27)
    make_shards(folder / "shards")
    return folder


def arguments(output: Path, **options: Any) -> list[str]:
    """A command line of a short run; a list is several values, `None` leaves the option out."""
    defaults = {
        "num_workers": 0,
        "batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "log_steps": 1,
        "trackers": "none",
        "num_long_texts": 2,
        "num_sentences": 2,
    }
    flags = []
    for name, value in {"output": output, **defaults, **options}.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            flags += [f"--{name}", *(str(value) for value in values)]
    return flags


def config(output: Path, **options: Any) -> TrainingConfig:
    """The same in Python."""
    defaults = {"num_workers": 0, "batch_size": 4, "max_steps": 8, "learning_rate": 1e-3, "log_steps": 1}
    return TrainingConfig(**{**defaults, "output": str(output), "trackers": [], "num_long_texts": 2, **options})


# Real processes


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_line(log: RunLog, entry: Any) -> None:
    with open(log.path, "a") as file:
        file.write(json.dumps(entry)[:20])
    die()


# name of a moment: the function whose n-th call is it, and what happens then in its place
MOMENTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "step": (loop._Run, "_take_step", lambda *_: die()),
    "log": (RunLog, "write", half_a_line),
    "evaluation": (loop, "validate", lambda *_: die()),
    "weights saved": (Accelerator, "save_state", lambda *_: die()),
    "all but named": (checkpoint, "publish", lambda *_: die()),
    "removal": (checkpoint, "remove_checkpoint", lambda *_: die()),
    "stage kept": (stages, "write_json", lambda *_: die()),
}


class Moment(NamedTuple):
    """The n-th time, from 1, that something is about to happen."""

    name: str
    n: int


def at(moment: Moment) -> None:
    """Has this process do at a moment what `MOMENTS` says."""
    owner, name, action = MOMENTS[moment.name]
    function, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return (action if calls[0] == moment.n else function)(*args, **kwargs)

    setattr(owner, name, counted)


def slow_step(seconds: float) -> None:
    """Makes each step take longer."""
    take_step = loop._Run._take_step

    def slow(*args: Any) -> None:
        sleep(seconds)
        take_step(*args)

    loop._Run._take_step = slow


def slow_step_and_kill(seconds: float, after: float) -> None:
    """Kills the process so many seconds after its first step began, wherever it is then."""
    slow_step(seconds)
    take_step = loop._Run._take_step
    timer = Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True

    def timed(*args: Any) -> None:
        if timer.ident is None:
            timer.start()
        take_step(*args)

    loop._Run._take_step = timed


class Training(Started):
    """Processes of `examples/train.py`; `prepare(*args)` is called in the first of them."""

    def __init__(
        self,
        argv: list[str],
        folder: Path,
        num_processes: int = 1,
        prepare: Callable[..., None] | None = None,
        *args: Any,
    ) -> None:
        super().__init__(TRAIN, argv, folder, num_processes, prepare, *args)

    def wait_for_steps(self, output: Path, steps: int) -> None:
        """Until the log holds so many steps."""
        self.wait_until(lambda: (output / "log.jsonl").exists() and len(read_log(output)) >= steps)


def run(
    argv: list[str], folder: Path, num_processes: int = 1, prepare: Callable[..., None] | None = None, *args: Any
) -> Ended:
    return Training(argv, folder, num_processes, prepare, *args).wait()


def finish(argv: list[str], folder: Path, num_processes: int = 1) -> str:
    """Runs to the end, which must be a good one; what it wrote."""
    return processes.finish(TRAIN, argv, folder, num_processes).text


# What two runs have in common


def log_of(output: Path) -> list[dict[str, Any]]:
    """The log, less what no two runs share."""
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in read_log(output)]


def assert_same(first: Any, second: Any, where: str) -> None:
    """Bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for name in first:
            assert_same(first[name], second[name], f"{where}/{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}/{index}")
    else:
        assert first == second, where


def read_part(file: Path) -> Any:
    """What a file of a checkpoint holds, less the time that the run took."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".bin", ".pkl", ".pt"):
        return torch.load(file, weights_only=False)
    if file.name.endswith("progress.json"):
        progress = json.loads(file.read_text())
        progress["window"].pop("seconds")
        return progress
    return file.read_bytes()


def assert_same_run(first: Path, second: Path) -> None:
    """The same last checkpoint, with all its state, and the same log."""
    one, other = list_checkpoints(first)[-1], list_checkpoints(second)[-1]
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    assert files == sorted(str(file.relative_to(other)) for file in other.rglob("*") if file.is_file())
    assert any(name.endswith("optimizer.bin") for name in files)
    for name in files:
        if not name.endswith(".yaml"):  # names the output
            assert_same(read_part(one / name), read_part(other / name), name)
    assert log_of(first) == log_of(second)
    assert not list(second.glob("*.partial"))


# Killed and resumed

KILLED = {
    "everything": {
        "data": "records",
        "gradient_accumulation_steps": 2,
        "grad_cache_chunk": 3,
        "ema_decay": 0.9,
        "eval_data": "few",
        "eval_steps": 3,
        "log_steps": 3,
        "warmup_steps": 2,
    },
    "workers": {"data": "records", "num_workers": 2, "terms": "sigmoid", "patch_dropout": 0.5, "drop_last": True},
    "stream, workers": {"data": "shards", "shuffle_buffer": 5, "num_workers": 2, "log_steps": 5},
}
# One after the other; the first is before there is a checkpoint.
KILLS = [
    Moment("step", 2),
    Moment("all but named", 1),
    Moment("weights saved", 2),
    Moment("step", 2),
    Moment("removal", 1),
    Moment("log", 1),
]


def options_of(start: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The options with their data where it is."""
    return {
        name: start / value if name in ("data", "eval_data") and value else value for name, value in options.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLED)
def test_a_killed_run_resumes_bitwise(kind: str, start: Path, tmp_path: Path) -> None:
    options = {"model": start / "model", "save_steps": 2, **options_of(start, KILLED[kind])}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(arguments(undisturbed, **options), tmp_path)
    argv = arguments(killed, **options)
    kills = [*KILLS, Moment("evaluation", 1), Moment("evaluation", 1)] if "eval_data" in options else KILLS
    for number, moment in enumerate(kills):
        is_anew = "--resume" in argv and not list_checkpoints(killed)
        ended = run(argv, tmp_path, 1, at, moment)
        assert ended.codes == [-signal.SIGKILL], (moment, ended.text)
        if moment.name == "all but named":
            assert list(killed.glob("*.partial"))
        argv = ["--output", str(killed), "--resume"]
        if number == 0:
            assert not list_checkpoints(killed)
        assert ("new run" in ended.text) == is_anew
    assert "Resuming from" in finish(argv, tmp_path)
    assert_same_run(undisturbed, killed)


@pytest.mark.slow
def test_a_stopped_run_saves_and_resumes_bitwise(start: Path, tmp_path: Path) -> None:
    """The signal goes to the whole group, the loader's workers too, and twice, as from a terminal and a launcher."""
    options = {"model": start / "model", "data": start / "records", "num_workers": 2, "max_steps": 12, "log_steps": 5}
    undisturbed = tmp_path / "undisturbed"
    finish(arguments(undisturbed, **options), tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT):
        stopped = tmp_path / number.name
        started = Training(arguments(stopped, **options), tmp_path, 1, slow_step, 0.2)
        started.wait_for_steps(stopped, 1)
        for _ in range(2):
            os.killpg(started.processes[0].pid, number)
        ended = started.wait()
        assert ended.codes == [128 + number], ended.text
        assert ended.text.count("Stopping after this step") == 1
        assert "--resume" in ended.text
        assert "Traceback" not in ended.text
        (saved,) = list_checkpoints(stopped)
        assert 5 <= (checkpoint_step(saved.name) or 0) < 12
        finish(["--output", str(stopped), "--resume"], tmp_path)
        assert_same_run(undisturbed, stopped)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(start: Path, tmp_path: Path) -> None:
    options = {"model": start / "model", "data": start / "records", "max_steps": 1000}
    started = Training(arguments(tmp_path / "run", **options), tmp_path, 1, slow_step_without_grace, 3.0)
    started.wait_for_steps(tmp_path / "run", 1)
    sleep(0.3)  # into the next step
    for _ in range(2):
        os.kill(started.processes[0].pid, signal.SIGTERM)
        sleep(0.3)
    ended = started.wait()
    assert ended.codes == [128 + signal.SIGTERM]
    assert not list_checkpoints(tmp_path / "run")


def slow_step_without_grace(seconds: float) -> None:
    signals.SAME_SIGNAL_SECONDS = 0.0
    slow_step(seconds)


def test_train_raises_after_a_signal(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python, with the handlers as before; a thread has none."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "clamp_logit_scale", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_here(tmp_path / "run", start)
    assert isinstance(stopped.value, Interrupted)
    assert stopped.value.signum == signal.SIGTERM
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(loop, "clamp_logit_scale", lambda _: None)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(run_here, tmp_path / "thread", start, max_steps=1).result()
    assert list_checkpoints(tmp_path / "thread")


# Several processes

SHARED = {
    "uneven last batch": {"num_epochs": 2, "max_steps": None, "eval_data": "few", "eval_steps": 4},
    "cached, accumulated": {
        "grad_cache_chunk": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "warmup_steps": 2,
    },
    "sigmoid": {"terms": "sigmoid", "learning_rate": 1e-2, "text_learning_rate": 1e-3},
    "locked": {"lock_vision": True, "ema_decay": 0.8, "patch_dropout": 0.5},
    "unlocked": {"lock_text": True, "unlocked_text_layers": 1, "layer_decay": 0.5, "logit_scale_learning_rate": 1e-2},
    "short captions alone": {"num_long_texts": 0},
    "dinov2": {"model": "dinov2", "max_steps": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_train_as_one(kind: str, start: Path, tmp_path: Path) -> None:
    """The same curve, weights and recalls as one process with the doubled batch."""
    # With a small epsilon AdamW makes steps of one size of gradients that are rounding errors, and of doubled ones.
    options = {"model": start / "plain", "data": start / "odd", "epsilon": 1e-3, **options_of(start, SHARED[kind])}
    if options["model"] == "dinov2":
        options["model"] = make_checkpoint(tmp_path / "dinov2", backbone="dinov2")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finish(arguments(alone, **{**options, "batch_size": 8}), tmp_path)
    text = finish(arguments(shared, **options), tmp_path, num_processes=2)
    assert text.count("The model is in") == 1
    one, two = log_of(alone), log_of(shared)
    assert len(one) == len(two)
    for expected, line in zip(one, two, strict=True):
        assert line == pytest.approx(expected, abs=1e-5, rel=0)
    first, second = list_checkpoints(alone)[-1], list_checkpoints(shared)[-1]
    for name in ("model.safetensors", "state/model.safetensors"):
        weights, others = load_file(first / name), load_file(second / name)
        assert weights.keys() == others.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(
                others[key], tensor, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key} {text}"
            )
    if kind == "sigmoid":
        biases = [
            torch.load(path / "state" / "objective.pt")["terms.sigmoid.logit_bias"].item() for path in (first, second)
        ]
        assert biases[1] == pytest.approx(biases[0], abs=1e-6)
        assert abs(biases[0] + 10) > 0.005  # it is trained


@pytest.mark.slow
def test_killed_processes_resume_bitwise(start: Path, tmp_path: Path) -> None:
    options = {"model": start / "model", "save_steps": 2, **options_of(start, KILLED["everything"])}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(arguments(undisturbed, **options), tmp_path, 2)
    argv = arguments(killed, **options)
    for moment in (Moment("step", 4), Moment("all but named", 1)):
        ended = run(argv, tmp_path, 2, at, moment)
        assert ended.codes[0] == -signal.SIGKILL, ended.text
        assert ended.codes[1] != 0
        argv = ["--output", str(killed), "--resume"]
    ended = run(argv, tmp_path, 1)
    assert ended.codes == [2]
    assert "processes" in said(ended)
    finish(argv, tmp_path, 2)
    assert_same_run(undisturbed, killed)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(start: Path, tmp_path: Path) -> None:
    options = {"model": start / "model", "data": start / "records", "max_steps": 1000}
    started = Training(arguments(tmp_path / "run", **options), tmp_path, 2, slow_step, 0.05)
    started.wait_for_steps(tmp_path / "run", 1)
    os.kill(started.processes[1].pid, signal.SIGTERM)
    ended = started.wait()
    assert ended.codes == [128 + signal.SIGTERM] * 2, ended.text
    assert len(list_checkpoints(tmp_path / "run")) == 1


# What is broken


def test_weights_that_are_not_finite_are_not_saved(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and the gradient of the step that made them so may well have been finite."""

    def ruin(model: LoTLIPModel) -> None:
        with torch.no_grad():
            model.text_projection.weight[0, 0] = torch.inf

    monkeypatch.setattr(loop, "clamp_logit_scale", ruin)
    with pytest.raises(NonFiniteLossError, match="weights"):
        run_here(tmp_path / "run", start, save_steps=1)
    assert not list_checkpoints(tmp_path / "run")


def said(ended: Ended) -> str:
    """The one line that says what is wrong."""
    (line,) = [line for line in ended.text.splitlines() if line.startswith("lotlip: error: ")]
    assert "Traceback" not in ended.text
    return line


def plant_nan(in_gradient: bool, at_step: int) -> None:
    """Has a step of this process meet a value that is not a number, in the gradient alone or in the loss."""
    take_step = loop._Run._take_step

    def poisoned(self: Any, batches: Any) -> None:
        if self.step + 1 == at_step and in_gradient:
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        elif self.step + 1 == at_step:
            batches[0]["pixel_values"].fill_(float("nan"))
        take_step(self, batches)

    loop._Run._take_step = poisoned


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_gradient", "num_processes"), [(False, 1), (False, 2), (True, 2)], ids=["loss-1", "loss-2", "gradient-2"]
)
def test_a_loss_that_is_not_finite_stops_the_run(
    in_gradient: bool, num_processes: int, start: Path, tmp_path: Path
) -> None:
    """In the first process alone, where there are two."""
    output = tmp_path / "run"
    options = {"model": start / "plain", "data": start / "records", "save_steps": 2, "ema_decay": 0.5}
    ended = run(arguments(output, **options), tmp_path, num_processes, plant_nan, in_gradient, 4)
    assert ended.codes == [2] * num_processes, ended.text
    errors = {line for line in ended.text.splitlines() if line.startswith("lotlip: error: ")}
    (line,) = errors
    assert ("gradient" if in_gradient else "loss") in line
    assert str(output / "checkpoint-2") in line
    listed = json.loads((output / "not-finite-4.json").read_text())
    assert len(listed["ids"]) == len(set(listed["ids"])) == 4 * num_processes
    assert all(record_id in line for record_id in listed["ids"])
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2"]
    assert not list(output.glob("*.partial"))
    assert [line["step"] for line in read_log(output)] == [1, 2, 3]
    # and the run can go on
    finish(["--output", str(output), "--resume"], tmp_path, num_processes)
    assert [line["step"] for line in read_log(output)] == list(range(1, 9))


def fail_to_write(owner: str, name: str, calls: Sequence[int], error: str) -> None:
    """The disk is full at these calls, counted from 1."""
    module = {"accelerator": Accelerator, "model": LoTLIPModel}[owner]
    function, count = getattr(module, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] in calls:
            raise {"torch": RuntimeError, "system": OSError}[error]("[Errno 28] No space left on device")
        return function(*args, **kwargs)

    setattr(module, name, failing)


def train_here(output: Path, start: Path, **options: Any) -> int:
    """`examples/train.py` in this process."""
    return load_script(TRAIN).main(
        arguments(output, **options_of(start, {"model": start / "plain", "data": "records", **options}))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "error"), [("accelerator", "save_state", "torch"), ("model", "save_pretrained", "system")]
)
def test_a_full_disk_in_the_middle_does_not_end_the_run(
    owner: str, name: str, error: str, start: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    argv = arguments(output, model=start / "plain", data=start / "records", save_steps=2)
    ended = run(argv, tmp_path, 2, fail_to_write, owner, name, [2], error)
    assert ended.codes == [0, 0], ended.text
    (complaint,) = [line for line in ended.text.splitlines() if "No space left" in line]
    assert "checkpoint-4" in complaint
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-6", "checkpoint-8"]
    assert not list(output.glob("*.partial"))


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_an_error(start: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = arguments(output, model=start / "plain", data=start / "records", save_steps=3)
    ended = run(argv, tmp_path, 1, fail_to_write, "accelerator", "save_state", [3], "torch")
    assert ended.codes == [2]
    assert "checkpoint-8" in said(ended)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-3", "checkpoint-6"]
    finish(["--output", str(output), "--resume"], tmp_path)
    finish(arguments(tmp_path / "undisturbed", model=start / "plain", data=start / "records", save_steps=3), tmp_path)
    assert_same_run(tmp_path / "undisturbed", output)


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RunLog.write

    def failing(log: RunLog, entry: dict[str, Any]) -> None:
        if entry["step"] in (2, 3):
            raise OSError("[Errno 28] No space left on device")
        write(log, entry)

    monkeypatch.setattr(RunLog, "write", failing)
    run_here(tmp_path / "run", start, max_steps=4)
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB: a checkpoint takes 1."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small file system takes rights that this user has not")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills(small_disk: Path, start: Path, tmp_path: Path) -> None:
    """Checkpoints until there is no room, with a log and TensorBoard on the same disk; those that fitted are whole."""
    output = small_disk / "run"
    options = {"model": start / "plain", "data": start / "records", "trackers": "tensorboard", "save_total_limit": 0}
    ended = run(arguments(output, **options, save_steps=1), tmp_path)
    assert ended.codes == [2]
    assert "checkpoint-8" in said(ended)
    whole = list_checkpoints(output)
    assert 1 <= len(whole) < 7
    assert not list(output.glob("*.partial"))
    assert read_log(output)[0]["step"] == 1
    LoTLIPModel.from_pretrained(whole[-1])
    ended = run(["--output", str(output), "--resume"], tmp_path)
    assert ended.codes == [2]
    assert "GB" in said(ended)
    assert list_checkpoints(output) == whole
    for path in whole[:-1]:
        shutil.rmtree(path)
    finish(["--output", str(output), "--resume", "--save-steps", "100"], tmp_path)
    assert list_checkpoints(output)[-1].name == "checkpoint-8"


@pytest.mark.slow
def test_a_broken_record_saves_what_was_trained(start: Path, tmp_path: Path) -> None:
    """In a loader's worker of one process of two; the resumed run leaves the record out."""
    data = make_folder(tmp_path / "records")
    broken = data / "r005.png"
    broken.write_bytes(broken.read_bytes()[:100])
    options = {"model": start / "plain", "data": data, "num_workers": 1, "max_steps": None, "num_epochs": 2}
    ended = run(arguments(tmp_path / "run", **options), tmp_path, 2)
    assert ended.codes == [2, 2], ended.text
    errors = [line for line in ended.text.splitlines() if line.startswith("lotlip: error: ")]
    assert sum("r005" in line for line in errors) == 1
    assert sum("Another process" in line for line in errors) == 1
    assert "Traceback" not in ended.text
    steps = len(read_log(tmp_path / "run"))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{steps}"] * bool(steps)
    finish(["--output", str(tmp_path / "run"), "--resume", "--on-error", "skip"], tmp_path, 2)
    last = read_log(tmp_path / "run")[-1]
    assert (last["step"], last["records"], last["broken_images"]) == (6, 48, 2)


def test_a_truncated_shard_saves_what_was_trained(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, output = make_shards(tmp_path / "shards"), tmp_path / "run"
    shard = data / "3.tar"
    shard.write_bytes(shard.read_bytes()[:8000])
    assert train_here(output, start, data=data, shuffle_buffer=1) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lotlip: error: ")]
    assert "3.tar" in line
    steps = len(read_log(output))
    assert steps > 0
    assert [path.name for path in list_checkpoints(output)] == [f"checkpoint-{steps}"]


@pytest.mark.slow
def test_skipped_records_are_counted_once(start: Path, tmp_path: Path) -> None:
    """What a loader reads ahead is not counted, nor what a resumed run reads again."""
    data = make_shards(tmp_path / "shards")
    shard = data / "2.tar"
    shard.write_bytes(shard.read_bytes()[:8000])
    options = {"model": start / "plain", "data": data, "num_workers": 2, "on_error": "skip", "save_steps": 3}
    options["shuffle_buffer"] = 1
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(arguments(undisturbed, **options), tmp_path)
    ended = run(arguments(killed, **options), tmp_path, 1, at, Moment("step", 6))
    assert ended.codes == [-signal.SIGKILL]
    finish(["--output", str(killed), "--resume"], tmp_path)
    assert_same_run(undisturbed, killed)
    lines = read_log(killed)
    assert lines[-1]["broken_shards"] >= 1
    assert all(later["records"] > line["records"] for line, later in zip(lines, lines[1:], strict=False))
    assert all(line["records"] <= 4 * line["step"] for line in lines)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "run"
    assert train_here(output, start, model=start / "model", save_steps=4) == 0
    last = output / "checkpoint-8"
    for name in ("model.safetensors", "optimizer.bin", "scheduler.pt", "0-progress.json", "random_states_0.pkl"):
        file = last / "state" / name
        content = file.read_bytes()
        file.write_bytes(content[:50])
        assert load_script(TRAIN).main(["--output", str(output), "--resume"]) == 2
        assert str(last) in capsys.readouterr().err.splitlines()[-1]
        file.write_bytes(content)
    shutil.rmtree(last)
    assert load_script(TRAIN).main(["--output", str(output), "--resume"]) == 0
    assert list_checkpoints(output)[-1] == last


WRONG = {
    "no such data": ({"data": "nowhere"}, "nowhere"),
    "no such model": ({"model": "nowhere"}, "nowhere"),
    "no model": ({"model": None}, "`model`"),
    "one encoder": ({"model": None, "text_model": "x"}, "`image_model`"),
    "no data": ({"data": None}, "`data`"),
    "no such column": ({"short_column": "shortt"}, "'shortt'"),
    "too many layers": ({"lock_vision": True, "unlocked_vision_layers": 3}, "`unlocked_vision_layers`"),
    "too long": ({"max_text_length": 1000}, "`max_text_length`"),
    "no batch": ({"drop_last": True, "batch_size": 25}, "`batch_size`"),
    "no length": ({"data": "shards", "max_steps": None}, "`max_steps`"),
    "long warm-up": ({"max_steps": None, "warmup_steps": 7}, "`warmup_steps`"),
    "unknown tracker": ({"trackers": "tensorbord"}, "tensorbord"),
    "no such tracker": ({"trackers": "comet_ml"}, "comet_ml"),
    "no such captioner": ({"captioners": 5}, "5"),
    "other corners": ({"num_corner_tokens": 3}, "`num_corner_tokens`"),
    "other pooling": ({"image_pooling": "mean"}, "`image_pooling`"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said_in_one_line(
    kind: str, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(start)  # where there is no `nowhere`
    options, words = WRONG[kind]
    assert train_here(tmp_path / "run", start, **options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lotlip: error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not list_checkpoints(tmp_path / "run")


def rewrite(data: Path, change: Callable[[list[dict[str, Any]]], list[Any]]) -> Path:
    """Changes the rows of a folder's metadata; texts are lines as they are."""
    file = data / "metadata.jsonl"
    rows = change([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return data


def only(column: str) -> Callable[[list[dict[str, Any]]], list[Any]]:
    return lambda rows: [{name: row[name] for name in ("file_name", column)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "options"),
    [
        ("short_caption", {"num_long_texts": 0}),
        ("long_captions", {}),
        ("long_captions", {"short_column": "none"}),
        ("long_captions", {"short_column": "none", "num_long_texts": 0}),
    ],
)
def test_one_kind_of_caption_is_enough(column: str, options: dict[str, Any], start: Path, tmp_path: Path) -> None:
    data = rewrite(make_folder(tmp_path / "data", 8), only(column))
    assert train_here(tmp_path / "run", start, data=data, **{"max_steps": 1, **options}) == 0


@pytest.mark.parametrize(
    ("change", "options", "word"),
    [
        (only("short_caption"), {}, "--long-columns"),
        (only("short_caption"), {"long_columns": "captions"}, "--long-columns"),
        (only("long_captions"), {"num_long_texts": 0}, "--short-column"),
        (only("long_captions"), {"short_column": "caption"}, "--short-column"),
        (only("long_captions"), {"image_column": "picture"}, "--image-column"),
        (lambda rows: [{**rows[0], "short_caption": None}], {}, "r000"),
        (lambda rows: [{**rows[0], "file_name": "missing.png"}], {}, "missing.png"),
        (lambda rows: ['{"file_name": '], {}, "metadata.jsonl"),
        (lambda rows: [], {}, "data"),
    ],
)
@pytest.mark.parametrize("name", ["data", "eval_data"])
@pytest.mark.parametrize("streaming", [False, True])
def test_data_is_looked_at_before_a_model_is_loaded(
    change: Callable[[list[dict[str, Any]]], list[Any]],
    options: dict[str, Any],
    word: str,
    name: str,
    streaming: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {"data": make_folder(tmp_path / "good", 4), **options}
    options[name] = rewrite(make_folder(tmp_path / "data", 4), change)
    flags = arguments(tmp_path / "run", model="nowhere", **options)
    assert load_script(TRAIN).main([*flags, *(["--streaming"] if streaming else [])]) == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_splits_of_a_folder_are_named(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split, 4)
    data = tmp_path / "data"
    for options, words in (
        ({"data": data}, "--split"),
        ({"data": data / "train", "eval_data": data}, "--eval-split"),
        ({"data": data, "split": "train", "eval_data": data, "eval_split": "test"}, "--eval-split"),
    ):
        assert train_here(tmp_path / "run", start, **options) == 2
        assert words in capsys.readouterr().err
    made = config(tmp_path / "run", data=str(data), split="train", eval_data=str(data), eval_split="validation")
    records, eval_records = load_data(made)
    assert Path(next(iter(records))["image"]).parent.name == "train"
    assert Path(next(iter(eval_records))["image"]).parent.name == "val"  # pyright: ignore[reportArgumentType]
    # what is no split is the usual one
    others = {"data": str(data / "val"), "eval_data": str(data / "train")}
    made = config(tmp_path / "run", **others, split="train", eval_split="validation")
    assert [len(records) for records in load_data(made)] == [4, 4]  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_another_run_is_not_overwritten(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "run"
    assert train_here(output, start, max_steps=2) == 0
    before = log_of(output)
    assert train_here(output, start, max_steps=2) == 2
    assert "checkpoint-2" in capsys.readouterr().err
    assert log_of(output) == before
    # resumed where nothing is left to do, from a folder that was moved
    moved = output.rename(tmp_path / "moved")
    assert load_script(TRAIN).main(["--output", str(moved), "--resume", "--log-steps", "5"]) == 0
    assert log_of(moved) == before
    assert load_script(TRAIN).main(["--output", str(moved), "--resume", "--learning-rate", "0.5"]) == 2
    assert "`learning_rate`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`batch_size`"):
        changed = config(moved, resume=True, max_steps=2, batch_size=5)
        train(*load_or_start_model(config(tmp_path, model=str(start / "plain"))), load_records(start / "few"), changed)


@pytest.mark.slow
def test_a_resumed_run_wants_the_same_records_and_workers(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = make_folder(tmp_path / "records")
    assert train_here(tmp_path / "run", start, data=data, max_steps=2) == 0
    lines = (data / "metadata.jsonl").read_text().splitlines(keepends=True)
    (data / "metadata.jsonl").write_text("".join(lines[:-1]))
    assert load_script(TRAIN).main(["--output", str(tmp_path / "run"), "--resume"]) == 2
    assert "`num_records`" in capsys.readouterr().err
    assert train_here(tmp_path / "stream", start, data="shards", max_steps=2) == 0
    argv = ["--output", str(tmp_path / "stream"), "--resume", "--num-workers", "1"]
    assert load_script(TRAIN).main(argv) == 2
    assert "`num_workers`" in capsys.readouterr().err


# What a run computes


def run_here(output: Path, start: Path, **options: Any) -> tuple[LoTLIPModel, Path]:
    """The model after a run in this process, and the last checkpoint."""
    options = {"model": str(start / "plain"), "data": str(start / "records"), **options}
    made = config(output, **options)
    model, processor = load_or_start_model(made)
    records, eval_records = load_data(made)
    return model, train(model, processor, records, made, eval_records)


@pytest.mark.slow
def test_the_loop_is_a_plain_loop(start: Path, tmp_path: Path) -> None:
    """Loss, decay, clipping, learning rates, averages: against a loop of a few lines, over two epochs."""
    options = {
        "learning_rate": 1e-2,
        "text_learning_rate": 3e-3,
        "image_learning_rate": 1e-3,
        "corner_learning_rate": 3e-2,
        "logit_scale_learning_rate": 2e-2,
        "layer_decay": 0.5,
        "weight_decay": 0.3,
        "beta1": 0.8,
        "beta2": 0.98,
        "epsilon": 1e-6,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "ema_decay": 0.7,
        "max_steps": 9,
        "gradient_accumulation_steps": 1,
    }
    model, checkpoint_folder = run_here(tmp_path / "run", start, **options)

    plain, processor = load_or_start_model(config(tmp_path, model=str(start / "plain")))
    records = load_records(start / "records")
    collator = LoTLIPCollator(processor, SubCaptions(num_long_texts=2))
    groups = []
    for name, parameter in plain.named_parameters():
        part = ".".join(name.split(".")[:2])
        own = {"text_model.backbone": 3e-3, "vision_model.backbone": 1e-3, "text_model.corner_embeds": 3e-2}
        rate = (own | {"logit_scale": 2e-2}).get(part, 1e-2)
        rate *= 0.5 ** (2 * ("embeddings." in name) + (".0." in name))  # of two layers
        groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.3 if parameter.ndim > 1 else 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.98), eps=1e-6)
    scheduler = get_scheduler("cosine", optimizer, 2, 9)
    average: dict[str, torch.Tensor] = {}
    plain.train()
    for step, line in enumerate(log_of(tmp_path / "run")):
        epoch, number = divmod(step, 6)
        order = np.random.default_rng([0, epoch]).permutation(24)
        collator.set_epoch(epoch)
        batch = collator([records[int(i)] for i in order[4 * number : 4 * number + 4]])
        loss = plain(**batch).loss
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert line["learning_rate"] == pytest.approx(max(scheduler.get_last_lr()))
        with torch.no_grad():
            plain.logit_scale.clamp_(max=math.log(100))
        now = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        average = {name: now[name] if not average else 0.7 * average[name] + 0.3 * now[name] for name in now}
    # the averaged weights are the model that is saved, the last ones are what a resumed run goes on with
    saved = LoTLIPModel.from_pretrained(checkpoint_folder).state_dict()
    kept = load_file(checkpoint_folder / "state" / "model.safetensors")
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=2e-5, rtol=0)
        torch.testing.assert_close(saved[name], average[name], atol=2e-5, rtol=0)
    for name, tensor in kept.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_logit_scale_stays_below_its_limit(start: Path, tmp_path: Path) -> None:
    model, _ = load_or_start_model(config(tmp_path, model=str(start / "plain")))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100) + 1)
    made = config(tmp_path / "run", model=str(start / "plain"), max_steps=2, max_grad_norm=0)
    _, processor = load_or_start_model(made)
    train(model, processor, load_records(start / "records"), made)
    assert model.logit_scale.item() <= math.log(100) + 1e-6
    assert read_log(tmp_path / "run")[0]["logit_scale"] == pytest.approx(100, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit", "dinov2", "siglip", "clip"])
@pytest.mark.parametrize("unlocked", [0, 1])
def test_a_locked_tower_stays_bit_for_bit(backbone: str, unlocked: int, start: Path, tmp_path: Path) -> None:
    """But for its last layers, where these are unlocked, and what follows them."""
    folder = make_checkpoint(tmp_path / "model", dropout=0.1, backbone=backbone)
    before = load_file(folder / "model.safetensors")
    options = {"unlocked_vision_layers": unlocked, "cache": str(tmp_path / "cache"), "max_steps": 2}
    model, saved = run_here(tmp_path / "run", start, model=str(folder), lock_vision=True, **options)
    after = load_file(saved / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    tower = {name for name in after if name.startswith("vision_model.")}
    last = {name for name in tower if ".1." in name and ".0." not in name}
    behind = {
        name
        for name in tower
        if "post_layernorm" in name
        or ".head." in name
        or name.endswith(("backbone.layernorm.weight", "backbone.layernorm.bias"))
    }
    if backbone in ("vit", "dinov2", "clip"):
        assert behind
    assert "logit_scale" in moved
    assert any(name.startswith("text_model.") for name in moved)
    if not unlocked:
        assert not moved & tower
    else:
        assert last
        # a key's bias moves no softmax
        assert {n for n in last | behind if "k_proj.bias" not in n and "key.bias" not in n} <= moved
        assert moved & tower <= last | behind


@pytest.mark.parametrize("backbone", tiny.VISION_BACKBONES)
@pytest.mark.parametrize(
    ("num_long_texts", "needs"),
    [
        (0, InfoNCE.needs),
        (2, InfoNCE.needs),
        (2, {"image_embeds"}),
        (2, {"text_embeds"}),
        (2, {"corner_embeds", "text_embeds"}),
    ],
)
def test_every_trained_parameter_has_a_gradient(backbone: str, num_long_texts: int, needs: set[str]) -> None:
    """One without a gradient stops `DistributedDataParallel`."""

    class Sums(nn.Module):
        def forward(self, views: Views) -> torch.Tensor:
            return torch.stack([each.sum() for each in views.values()]).sum()

    Sums.needs = frozenset(needs)
    model = LoTLIPModel(tiny.config("bert", backbone))
    objective = Objective({"sums": Sums()})
    freeze(model, TrainingConfig(num_long_texts=num_long_texts), objective.needs)
    for tower, embeds in (("vision_model", "image_embeds"), ("text_model", "text_embeds")):
        assert any(p.requires_grad for p in model.get_submodule(tower).parameters()) == (embeds in needs)
    batch = {"input_ids": tiny.input_ids(3, 5), "pixel_values": tiny.pixel_values(3)}
    if num_long_texts:
        batch["long_input_ids"] = tiny.input_ids(3, num_long_texts, 8)
    batch_loss(model, batch, objective)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_run_of_two_encoders(start: Path, tmp_path: Path) -> None:
    """LiT: a text encoder and an image encoder from their own folders; the image encoder's weights stay."""
    torch.manual_seed(3)
    text, image = tmp_path / "text", tmp_path / "image"
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    BertModel(BertConfig(**small, vocab_size=len(SPECIAL + WORDS), max_position_embeddings=40)).save_pretrained(text)
    (text / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    BertTokenizer.from_pretrained(text).save_pretrained(text)
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(image)
    side = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=side).save_pretrained(image)
    options = {"num_corner_tokens": 1, "max_text_length": 20, "lock_vision": True, "max_steps": 2}
    encoders = {"model": None, "text_model": str(text), "image_model": str(image), "cache": str(tmp_path / "cache")}
    model, saved = run_here(tmp_path / "run", start, **encoders, **options)
    assert model.config.text_config.num_corner_tokens == 1
    before, after = load_file(image / "model.safetensors"), load_file(saved / "model.safetensors")
    kept = {name.split("backbone.")[1]: tensor for name, tensor in after.items() if name.startswith("vision_model.")}
    same = [name for name, tensor in before.items() if torch.equal(kept[name], tensor)]
    assert sorted(same) == sorted(before)
    assert AutoProcessor.from_pretrained(saved).tokenizer.model_max_length == 20


@pytest.mark.slow
def test_a_run_of_a_clips_two_encoders(start: Path, tmp_path: Path) -> None:
    """CLIP's own tokenizer and [EOT] pooling; corner tokens are learnt behind [EOT]."""
    tiny_clip.save_clip(tmp_path / "clip")
    clip = str(tmp_path / "clip")
    model, saved = run_here(
        tmp_path / "run", start, model=None, text_model=clip, image_model=clip, num_corner_tokens=1, max_steps=2
    )
    assert model.config.text_config.pooling == "eos"
    processor = AutoProcessor.from_pretrained(saved)
    assert isinstance(processor.tokenizer, CLIPTokenizer)
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings == 77
    loaded = AutoModel.from_pretrained(saved)
    inputs = processor(text=["a cat. a dog", "a photo of the red car " * 30], return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 77)
    with torch.no_grad():
        features = loaded.get_text_features(**inputs).pooler_output
        expected = model.eval().get_text_features(**inputs).pooler_output
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_is_the_model_that_was_trained(start: Path, tmp_path: Path) -> None:
    model, saved = run_here(tmp_path / "run", start, max_text_length=12, max_steps=3)
    processor = AutoProcessor.from_pretrained(saved)
    assert processor.tokenizer.model_max_length == 12
    picture = str(start / "records" / "r000.png")
    inputs = processor(text=["a red cup. a blue tree", "road " * 30], images=[picture], return_tensors="pt")
    with torch.no_grad():
        expected, outputs = model.eval()(**inputs), AutoModel.from_pretrained(saved)(**inputs)
    torch.testing.assert_close(outputs.text_embeds, expected.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs.image_embeds, expected.image_embeds, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_what_is_written_and_when(start: Path, tmp_path: Path) -> None:
    options = {"eval_data": str(start / "few"), "eval_samples": 7, "eval_steps": 4, "log_steps": 3}
    _, last = run_here(tmp_path / "run", start, **options, save_steps=2, save_total_limit=2, max_steps=10)
    assert last == tmp_path / "run" / "checkpoint-10"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-8", "checkpoint-10"]
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in lines if "long_image_to_text_r1" in line] == [4, 8, 10]
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_infonce_short"] + lines[0]["loss_infonce_long"])
    assert len(lines[-1]) == 12 + len(("step", "epoch"))
    assert lines[-1]["long_image_to_text_r10"] == 1.0  # of 7
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    assert (tmp_path / "run" / "training_config.yaml").exists()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_epochs": 1.5}, 7),
        ({"num_epochs": 2, "gradient_accumulation_steps": 3}, 3),
        ({"num_epochs": 0.01}, 1),
        ({"num_epochs": 1, "drop_last": True}, 4),
        ({"num_epochs": 1, "max_steps": 9}, 9),
    ],
)
def test_epochs_and_accumulation_make_the_steps(options: dict[str, Any], steps: int, start: Path) -> None:
    """24 records in batches of 5: 5 batches an epoch, 4 with `drop_last`."""
    made = TrainingConfig(batch_size=5, **options)
    assert num_steps(load_records(start / "records"), made, num_processes=1) == steps


def test_an_evaluation_takes_records_without_long_captions(start: Path, tmp_path: Path) -> None:
    made = config(tmp_path, model=str(start / "plain"), eval_samples=6)
    model, processor = load_or_start_model(made)
    records = [dict(record) for record in load_records(start / "few").select(range(6))]
    whole = validate(model, processor, Dataset.from_list(records), made)
    records[2]["long_captions"] = []
    assert validate(model, processor, Dataset.from_list(records), made).keys() == whole.keys()


@pytest.mark.slow
def test_a_failed_evaluation_keeps_what_was_trained(start: Path, tmp_path: Path) -> None:
    """The resumed run evaluates first."""
    data = make_folder(tmp_path / "eval", 10)
    content = (data / "r003.png").read_bytes()
    (data / "r003.png").write_bytes(b"no picture")
    output = tmp_path / "run"
    options = {"model": start / "plain", "data": start / "records", "eval_data": data, "eval_steps": 3}
    ended = run(arguments(output, **options), tmp_path, 2)
    assert ended.codes == [2, 2]
    assert "r003" in ended.text
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-3"]
    (data / "r003.png").write_bytes(content)
    finish(["--output", str(output), "--resume"], tmp_path, 2)
    assert [line["step"] for line in read_log(output) if "long_image_to_text_r1" in line] == [3, 6, 8]


# As users start it


@pytest.mark.slow
def test_launcher(start: Path, tmp_path: Path) -> None:
    """accelerate's, which sets its own variables and then starts that of torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    options = {"model": start / "plain", "data": start / "odd", "eval_data": start / "few", "epsilon": 1e-3}
    argv = arguments(tmp_path / "launched", **options, num_epochs=1, max_steps=None)
    command = [
        sys.executable,
        "-m",
        *launcher.split(),
        "--main_process_port",
        str(port),
        str(REPOSITORY / TRAIN),
        *argv,
    ]
    done = subprocess.run(command, timeout=TIME_LIMIT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The model is in") == 1
    finish(arguments(tmp_path / "alone", **options, num_epochs=1, max_steps=None, batch_size=8), tmp_path)
    for expected, line in zip(log_of(tmp_path / "alone"), log_of(tmp_path / "launched"), strict=True):
        assert line == pytest.approx(expected, abs=1e-5, rel=0)


@pytest.mark.slow
def test_killed_again_and_again_at_random(start: Path, tmp_path: Path) -> None:
    options = {"model": start / "model", "save_steps": 3, "max_steps": 12, **options_of(start, KILLED["everything"])}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(arguments(undisturbed, **options), tmp_path)
    argv, generator, kills = arguments(killed, **options), random.Random(0), 0
    for _ in range(100):
        # 12 steps take 1.8 seconds or more, so it is killed more than twice; later delays let a slow machine end, too.
        after = generator.uniform(0.1, 0.4) * (1 + kills)
        if run(argv, tmp_path, 1, slow_step_and_kill, 0.15, after).codes == [0]:
            break
        kills += 1
        argv = ["--output", str(killed), "--resume"]
    assert kills > 2
    assert_same_run(undisturbed, killed)
