"""Runs with a teacher: its embeddings are the targets of terms, in one process and two, killed and resumed."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from test_training import (
    Moment,
    arguments,
    assert_same_run,
    at,
    config,
    log_of,
    make_checkpoint,
    make_folder,
    make_shards,
)
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

import tiny_clip
from lotlip_hf import LoTLIPModel
from lotlip_hf.cli import main as lotlip
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.mappings import MissingColumn
from lotlip_hf.data.record import RecordError
from lotlip_hf.distributed import world_size
from lotlip_hf.scenes.small import small_model
from lotlip_hf.store import EmbeddingStore
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.data import load_data
from lotlip_hf.training.log import read_log
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import embed
from lotlip_hf.training.teachers import make_teacher
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms.views import Views
from processes import Started, finish
from shards import write_shard

TEXT_TERMS = ["instance", "structure:0.5"]


class Near(nn.Module):
    """The squared distances of the images, the texts or both from the teacher's embeddings."""

    def __init__(self, of: str = "both") -> None:
        super().__init__()
        self.names = [f"{kind}_embeds" for kind in ("image", "text") if of in (kind, "both")]
        self.needs = frozenset({*self.names, *(f"teacher_{name}" for name in self.names)})

    def forward(self, views: Views) -> torch.Tensor:
        assert all(views[f"teacher_{name}"].dtype == torch.float32 for name in self.names)
        distances = torch.zeros(())
        for name in self.names:
            target = views[f"teacher_{name}"]
            distances = distances + (views[name][:, : target.shape[1]] - target).square().sum()
        return distances * world_size() / views.num_samples


NEAR = {"terms": ["near"]}


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the term."""
    TERMS["near"] = Near
    return lotlip(["train", *argv])


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "near", Near)


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student `model`, with dropout; the teachers `clip` and `lotlip` and the wider `scenes`; and `records`."""
    folder = tmp_path_factory.mktemp("teachers")
    make_checkpoint(folder / "model", dropout=0.2)
    tiny_clip.save_clip(folder / "clip")
    make_checkpoint(folder / "lotlip", backbone="dinov2")
    for part in small_model(hidden_size=32, num_hidden_layers=1):
        part.save_pretrained(folder / "scenes")
    make_folder(folder / "records", 27)
    make_shards(folder / "shards")
    return folder


def options_of(start: Path, teacher: str = "clip", **options: Any) -> dict[str, Any]:
    kind = teacher if teacher in ("self", "ema", "columns") else start / teacher
    names = {"model": start / "model", "data": start / "records", "teacher": kind}
    return {**{name: str(path) for name, path in names.items()}, "terms": TEXT_TERMS, **options}


def run(output: Path, **options: Any) -> tuple[LoTLIPModel, list[dict[str, Any]]]:
    made = config(output, **options)
    model, processor = load_or_start_model(made)
    train(model, processor, load_data(made)[0], made)
    return model, log_of(output)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("teacher", ["clip", "lotlip"])
def test_a_teacher_embeds_as_its_model_does(teacher: str, cached: bool, start: Path, tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path)} if cached else {"no_cache": True}
    made = config(tmp_path / "run", **{**options_of(start, teacher, **cache), **NEAR})
    student, student_processor = load_or_start_model(made)
    state = torch.get_rng_state()
    needs = ("teacher_image_embeds", "teacher_text_embeds")
    taught = make_teacher(made, student, needs, Accelerator(cpu=True))
    assert taught is not None
    records = taught.start(student, load_data(made)[0])
    collator = LoTLIPCollator(student_processor, made.draw(), return_texts=True, read_for_teacher=taught.read)
    batch = collator([records[index] for index in range(3)])
    batch["texts"] = [
        ["a cat", "a photo of the red car. A house and the dog."],
        ["the dog", "a"],
        ["a cat", "x " * 99],
    ]
    negatives = {"texts": [[*row, "the car"] for row in batch["texts"]], "negative_mask": torch.ones(3, 1)}
    targets = taught.targets({**batch, **negatives})
    assert torch.equal(torch.get_rng_state(), state)
    model, processor = (each.from_pretrained(start / teacher) for each in (AutoModel, AutoProcessor))
    flat = [text for row in batch["texts"] for text in row]
    inputs = processor(text=flat, return_tensors="pt", padding=True, truncation=True)
    texts = F.normalize(model.eval().get_text_features(**inputs).pooler_output, dim=-1).unflatten(0, (3, 2))
    pictures = [Image.open(start / "records" / f"r{index:03}.png") for index in range(3)]
    inputs = processor.image_processor(images=pictures, return_tensors="pt")
    images = F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
    for name, expected in zip(needs, (images, texts), strict=True):
        torch.testing.assert_close(targets[name], expected.detach(), atol=1e-6, rtol=0)
        assert not targets[name].requires_grad
        assert not targets[name].is_inference()


KINDS: dict[str, dict[str, Any]] = {
    "terms alone": {},
    "with the paper's": {"terms": [*TEXT_TERMS, "infonce"], "teacher": "lotlip"},
    "frozen language model, as in stage 1": {"lock_text": True, "grad_cache_chunk": 3},
    "short captions": {"num_long_texts": 0, "num_workers": 2, "mixed_precision": "bf16"},
    "images": {
        **NEAR,
        "term_options": ["near.of=image"],
        "patch_dropout": 0.5,
        "num_workers": 2,
        "grad_cache_chunk": 3,
    },
    "images, frozen towers": {**NEAR, "lock_vision": True, "lock_text": True, "lock_corner_tokens": True},
    "images of a stream": {**NEAR, "data": "shards", "streaming": True, "lock_vision": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_embeddings_give_the_losses_of_computed_ones(
    kind: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(start, **KINDS[kind])
    options |= {name: str(start / options[name]) for name in ("teacher", "data")}
    options["max_steps"] = 9  # with the uneven last batch of an epoch
    _, computed = run(tmp_path / "computed", **options, no_cache=True)
    added: list[int] = []
    add = EmbeddingStore.add
    monkeypatch.setattr(EmbeddingStore, "add", lambda *args: added.append(len(args[1])) or add(*args))
    numbers = []
    for name in ("kept", "again"):
        _, log = run(tmp_path / name, **options, cache=str(tmp_path / "cache"))
        numbers.append(sum(added))
        for expected, line in zip(computed, log, strict=True):
            assert line == pytest.approx(expected, abs=1e-6, rel=0)
    assert 0 < numbers[0] == numbers[1]
    assert {f"loss_{name.partition(':')[0]}" for name in options["terms"] if name != "infonce"} <= log[0].keys()


def test_a_teacher_is_not_part_of_a_run(start: Path, tmp_path: Path) -> None:
    """Not of the model, the optimiser or a checkpoint; and the image tower, which no term needs, keeps its bits."""
    before = LoTLIPModel.from_pretrained(start / "model")
    model, _ = run(tmp_path / "run", **options_of(start), cache=str(tmp_path / "cache"))
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    after = dict(LoTLIPModel.from_pretrained(checkpoint).named_parameters())
    trained = {name for name, weight in before.named_parameters() if not torch.equal(after[name], weight)}
    assert any(name.startswith("text_model.") for name in trained)
    assert not any(name.startswith(("vision_model.", "visual_projection.")) for name in trained)
    state = torch.load(checkpoint / "state" / "optimizer.bin")
    assert len(state["state"]) == sum(each.requires_grad for each in model.parameters())
    assert not torch.load(checkpoint / "state" / "objective.pt")


# The model as it started, and its moving average


@pytest.mark.parametrize("locked", [{}, {"lock_vision": True, "lock_text": True, "lock_corner_tokens": True}])
def test_the_model_is_its_own_teacher(locked: dict[str, Any], start: Path, tmp_path: Path) -> None:
    """Without dropout the first step has nothing to learn; the teacher stays as it was, and sees whole pictures."""
    model = str(make_checkpoint(tmp_path / "plain"))
    drop = {} if locked else {"patch_dropout": 0.5}
    options = options_of(start, "self", **{**NEAR, "model": model, "cache": str(tmp_path), **locked, **drop})
    trained, log = run(tmp_path / "run", **{**options, "terms": ["near", "infonce"]})
    if not drop:
        assert log[0]["loss_near"] == pytest.approx(0, abs=1e-9)
    assert log[-1]["loss_near"] > 1e-4
    before = LoTLIPModel.from_pretrained(model)
    state = torch.load(list_checkpoints(tmp_path / "run")[-1] / "state" / "teacher.pt")
    for name, weight in before.named_parameters():
        assert torch.equal(state[f"module.{name}"], weight), name
    assert not torch.equal(trained.text_projection.weight, before.text_projection.weight)


def test_a_model_as_teacher_embeds_whole_pictures_in_chunks(start: Path, tmp_path: Path) -> None:
    made = config(tmp_path / "run", **options_of(start, "self", **NEAR, patch_dropout=0.5, grad_cache_chunk=2))
    model, processor = load_or_start_model(made)  # with dropout
    names = ("image_embeds", "text_embeds")
    teacher = make_teacher(made, model, [f"teacher_{name}" for name in names], Accelerator(cpu=True))
    assert teacher is not None
    records = teacher.start(model.train(), load_data(made)[0])
    collate = partial(LoTLIPCollator, processor, made.draw())
    batches = [
        collator([records[index] for index in range(5)])
        for collator in (collate(), collate(patch_dropout=0.5, patch_size=model.config.vision_config.patch_size))
    ]
    assert "kept_patches" in batches[1]
    negatives: dict[str, Any] = {"negative_mask": torch.ones(5, 1)}
    for name in ("long_input_ids", "long_attention_mask"):
        negatives[name] = torch.cat([batches[1][name], batches[1][name][:, :1]], dim=1)
    targets = teacher.targets({**batches[1], **negatives})
    with torch.no_grad():
        expected = embed(model.eval(), batches[0], names)
    for name in names:
        torch.testing.assert_close(targets[f"teacher_{name}"], expected[name], atol=1e-6, rtol=0)


def test_a_moving_average_is_that_of_ema_decay(start: Path, tmp_path: Path) -> None:
    options = options_of(start, "ema", **NEAR, teacher_momentum=0.75, ema_decay=0.75, gradient_accumulation_steps=2)
    run(tmp_path / "run", **{**options, "terms": ["near", "infonce"], "mixed_precision": "bf16"})
    state = list_checkpoints(tmp_path / "run")[-1] / "state"
    teacher, averaged = (torch.load(state / f"{name}.pt") for name in ("teacher", "averaged"))
    assert teacher["n_averaged"] == 8
    assert all(torch.equal(teacher[name], averaged[name]) for name in averaged)


# Columns


def embedded(start: Path, folder: Path) -> pd.DataFrame:
    """Records with the embeddings that `lotlip embed` wrote, joined as docs/objective.md does."""
    metadata = start / "records" / "metadata.jsonl"
    for inputs, name in (
        (f"--images {start}/records", "images"),
        (f"--texts {metadata} --column short_caption", "texts"),
    ):
        words = f"embed --model {start}/clip {inputs} --output {folder}/{name}.parquet --dtype float32"
        assert lotlip(words.split()) == 0
    images, texts = (pd.read_parquet(folder / f"{name}.parquet") for name in ("images", "texts"))
    records = pd.read_json(metadata, lines=True, dtype=False)
    records["image_vector"] = records["file_name"].map(images.set_index("file")["embedding"])
    records["text_vector"] = texts["embedding"]
    return records


COLUMNS = {**NEAR, "teacher_image_column": "image_vector", "teacher_text_column": "text_vector"}


def write(records: pd.DataFrame, kind: str, folder: Path, pictures: Path) -> str:
    """Writes records as a file of a kind."""
    file = folder / f"records.{kind}"
    if kind == "parquet":
        records.to_parquet(file)
        return str(file)
    rows = json.loads(records.to_json(orient="records", double_precision=15))
    if kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "csv":
        with open(file, "w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(rows[0])
            writer.writerows([v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows)
    else:
        write_shard(file, [((pictures / row.pop("file_name")).read_bytes(), row) for row in rows])
    return str(file)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_a_teacher_computed_before(streaming: bool, start: Path, tmp_path: Path) -> None:
    """In each format, with evaluation records that have no such columns."""
    shared = {"num_long_texts": 0, "streaming": streaming, "image_folder": str(start / "records")}
    shared |= {"eval_data": str(start / "records"), "eval_samples": 4, "num_workers": 1}
    records = embedded(start, tmp_path)
    given = options_of(start, **shared, **NEAR, no_cache=True)
    _, expected = run(tmp_path / "computed", **given)
    assert expected[0]["loss_near"] > 0.1
    kinds = ("jsonl", "csv", "parquet", *(["tar"] if streaming else []))
    for kind in kinds:
        data = write(records, kind, tmp_path, start / "records")
        options = options_of(start, "columns", **{**shared, **COLUMNS, "data": data})
        _, log = run(tmp_path / kind, **options)
        for one, other in zip(expected, log, strict=True):
            assert one == pytest.approx(other, abs=1e-5, rel=0), kind


def test_broken_embeddings_are_broken_records(start: Path, tmp_path: Path) -> None:
    vector = [0.2] * tiny_clip.PROJECTION_DIM
    vectors = [
        vector,
        vector[1:],
        [*vector[1:], float("nan")],
        None,
        "no",
        [*vector[1:], "1"],
        [],
        [1e39] * 24,
        vector,
        [0] * 24,
    ]
    rows = [json.loads(line) for line in open(start / "records" / "metadata.jsonl")]
    file = tmp_path / "records.jsonl"
    options = options_of(start, "columns", **{**COLUMNS, "term_options": ["near.of=image"], "data": str(file)})
    options |= {"image_folder": str(start / "records"), "teacher_text_column": None, "batch_size": 10, "max_steps": 1}
    for is_streamed in (False, True):
        with open(file, "w") as lines:
            for row, value in zip(rows, vectors, strict=False):
                lines.write(json.dumps({**row, "image_vector": value}) + "\n")
        name = str(is_streamed)
        _, log = run(tmp_path / name, **options, streaming=is_streamed, on_error="skip")
        assert (log[0]["records"], log[0]["broken_records"]) == (10, 8)
        with pytest.raises(RecordError, match="teacher_image_embeds"):
            run(tmp_path / f"{name} raised", **options, streaming=is_streamed)
    with pytest.raises(MissingColumn, match="teacher-image-column"):
        run(tmp_path / "missing", **{**options, "teacher_image_column": "other"})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"teacher": "columns"}, "teacher_text_column"),
        ({"teacher": "columns", "teacher_text_column": "a", "teacher_image_column": "b"}, "teacher_image_column"),
        ({"teacher": "self", "teacher_text_column": "a"}, "teacher_text_column"),
        ({"teacher": "self", "teacher_momentum": 0.5}, "teacher_momentum"),
        ({"teacher": "ema", "teacher_momentum": 1.0}, "teacher_momentum"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(Path("run"), model="model", terms=["instance"], **options)


def test_a_weight_of_0_leaves_the_bits(start: Path, tmp_path: Path) -> None:
    options = options_of(start)
    del options["teacher"]
    first, log = run(tmp_path / "first", **{**options, "terms": ["infonce"]})
    second, other = run(tmp_path / "second", **{**options, "terms": ["infonce", "instance:0", "structure:0"]})
    assert log == other
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_a_teacher_of_another_width_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="projection_dim"):
        run(tmp_path / "run", **options_of(start, "scenes"), no_cache=True)


def test_a_student_learns_from_a_teacher_on_scenes(start: Path, tmp_path: Path) -> None:
    """Stage 1 of ProCLIP: no contrastive term, a frozen encoder, and both terms fall in a few steps."""
    for part in small_model(0, hidden_size=32, num_hidden_layers=1, seed=1):
        part.save_pretrained(tmp_path / "student")
    flags = "--lock-text --data scenes --num-scenes 64 --batch-size 16 --max-steps 40 --log-steps 8 --num-workers 0 "
    flags += "--learning-rate 1e-2 --trackers none --terms instance structure:20"
    paths = {"model": tmp_path / "student", "teacher": start / "scenes", "cache": tmp_path, "output": tmp_path / "run"}
    argv = [*flags.split(), *(f"--{name}={path}" for name, path in paths.items())]
    assert lotlip(["train", *argv]) == 0
    first, *_, last = [entry for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert last["loss_instance"] < 0.2 * first["loss_instance"]
    assert last["loss_structure"] < 0.7 * first["loss_structure"]


# Real processes

# Kinds of teachers, with their options
TAUGHT: dict[str, dict[str, Any]] = {
    "kept": {},
    "computed": {"no_cache": True},
    "kept, frozen image tower": {"lock_vision": True},
    "self": {"teacher": "self", "terms": ["near", "infonce"]},
    "ema": {
        "teacher": "ema",
        "teacher_momentum": 0.75,
        "terms": ["near", "infonce"],
        "gradient_accumulation_steps": 2,
    },
    "columns": {"teacher": "columns", **COLUMNS},
}


def taught(kind: str, start: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """The options of a kind, with a cache or columns in the folder."""
    made = {**options_of(start, **NEAR), "cache": folder / "cache", **options, **TAUGHT[kind]}
    if made.get("no_cache"):
        del made["cache"]
    if kind == "columns":
        folder.mkdir(exist_ok=True)
        made["data"] = write(embedded(start, folder), "parquet", folder, start / "records")
        made["image_folder"] = start / "records"
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TAUGHT if kind != "columns"])
def test_a_killed_run_resumes_bitwise(kind: str, start: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, with chunks, and with dropout in the student."""
    for name in ("undisturbed", "killed"):
        options = taught(kind, start, tmp_path / name, save_steps=2, grad_cache_chunk=3)
        argv = arguments(tmp_path / name, **options)
        if name == "undisturbed":
            finish(__name__, argv, tmp_path)
    killed = Started(__name__, argv, tmp_path, 1, at, Moment("step", 6)).wait()
    assert killed.codes == [-9], killed.text
    finish(__name__, ["--output", str(tmp_path / "killed"), "--resume"], tmp_path)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("grad_cache_chunk", [None, 2])
@pytest.mark.parametrize("kind", ["kept", "self", "ema", "columns"])
def test_two_processes_train_as_one(kind: str, grad_cache_chunk: int | None, start: Path, tmp_path: Path) -> None:
    """With the uneven last batch of an epoch; the pairs of the structure term are those of both processes."""
    model = make_checkpoint(tmp_path / "plain")  # without dropout
    shared = {"model": model, "epsilon": 1e-3, "grad_cache_chunk": grad_cache_chunk}
    options = taught(kind, start, tmp_path / "shared", **shared)
    if kind != "columns":
        options["terms"] = [*options["terms"], *TEXT_TERMS]
    for number, name in ((1, "alone"), (2, "together")):
        finish(__name__, arguments(tmp_path / name, **options, batch_size=8 // number), tmp_path, number)
    one, two = (AutoModel.from_pretrained(list_checkpoints(tmp_path / name)[-1]) for name in ("alone", "together"))
    for expected, line in zip(log_of(tmp_path / "alone"), log_of(tmp_path / "together"), strict=True):
        assert line == pytest.approx(expected, abs=1e-5, rel=0)
    for (name, weight), other in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(other, weight, atol=1e-5, rtol=0, msg=name)
