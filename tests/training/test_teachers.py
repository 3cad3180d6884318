"""Runs with a teacher: its embeddings are the targets of terms, in one process and two, killed and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import (
    Moment,
    Training,
    arguments,
    assert_same_run,
    at,
    config,
    finish,
    log_of,
    make_checkpoint,
    make_folder,
)
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

import tiny_clip
from lotlip_hf import LoTLIPModel
from lotlip_hf.cli import main as lotlip
from lotlip_hf.scenes.small import small_model
from lotlip_hf.store import EmbeddingStore
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.data import load_data
from lotlip_hf.training.log import read_log
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.teachers import Teacher

TERMS = ["instance", "structure:0.5"]


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
    return folder


def options_of(start: Path, teacher: str = "clip", **options: Any) -> dict[str, Any]:
    names = {"model": start / "model", "data": start / "records", "teacher": start / teacher}
    return {**{name: str(path) for name, path in names.items()}, "terms": TERMS, **options}


def run(output: Path, **options: Any) -> tuple[LoTLIPModel, list[dict[str, Any]]]:
    made = config(output, **options)
    model, processor = load_or_start_model(made)
    train(model, processor, load_data(made)[0], made)
    return model, log_of(output)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("teacher", ["clip", "lotlip"])
def test_a_teacher_reads_texts_as_its_model_does(teacher: str, cached: bool, start: Path, tmp_path: Path) -> None:
    texts = [["a cat", "a photo of the red car. A house and the dog."], ["the dog", "a"], ["a cat", "x " * 99]]
    cache = {"cache": str(tmp_path)} if cached else {"no_cache": True}
    made = config(tmp_path / "run", **options_of(start, teacher, **cache))
    student = LoTLIPModel.from_pretrained(start / "model")
    state = torch.get_rng_state()
    embeds = Teacher(made, student.config, torch.device("cpu")).text_embeds(texts)
    assert torch.equal(torch.get_rng_state(), state)
    model, processor = (each.from_pretrained(start / teacher) for each in (AutoModel, AutoProcessor))
    flat = [text for row in texts for text in row]
    inputs = processor(text=flat, return_tensors="pt", padding=True, truncation=True)
    expected = F.normalize(model.eval().get_text_features(**inputs).pooler_output, dim=-1)
    torch.testing.assert_close(embeds, expected.detach().unflatten(0, (3, 2)), atol=1e-6, rtol=0)
    assert not embeds.requires_grad


KINDS: dict[str, dict[str, Any]] = {
    "terms alone": {},
    "with the paper's": {"terms": [*TERMS, "infonce"], "teacher": "lotlip"},
    "frozen language model, as in stage 1": {"lock_text": True, "grad_cache_chunk": 3},
    "short captions": {"num_long_texts": 0, "num_workers": 2, "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_embeddings_give_the_losses_of_computed_ones(
    kind: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(start, **KINDS[kind])
    options["teacher"] = str(start / options["teacher"])
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
    assert {"loss_instance", "loss_structure"} <= log[0].keys()


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


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_a_killed_run_resumes_bitwise(cached: bool, start: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, with chunks, and with dropout in the student."""
    options = options_of(start, save_steps=2, grad_cache_chunk=3, data=str(start / "records"))
    for name in ("undisturbed", "killed"):
        options |= {"cache": tmp_path / name / "cache"} if cached else {"no_cache": True}
        argv = arguments(tmp_path / name, **options)
        if name == "undisturbed":
            finish(argv, tmp_path)
    killed = Training(argv, tmp_path, 1, at, Moment("step", 6)).wait()
    assert killed.codes == [-9], killed.text
    finish(["--output", str(tmp_path / "killed"), "--resume"], tmp_path)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("grad_cache_chunk", [None, 2])
def test_two_processes_train_as_one(grad_cache_chunk: int | None, start: Path, tmp_path: Path) -> None:
    """With the uneven last batch of an epoch; the pairs of the structure term are those of both processes."""
    model = make_checkpoint(tmp_path / "plain")  # without dropout
    options = options_of(start, model=str(model), epsilon=1e-3, grad_cache_chunk=grad_cache_chunk)
    options["cache"] = tmp_path / "cache"
    for number, name in ((1, "alone"), (2, "together")):
        finish(arguments(tmp_path / name, **options, batch_size=8 // number), tmp_path, number)
    one, two = (AutoModel.from_pretrained(list_checkpoints(tmp_path / name)[-1]) for name in ("alone", "together"))
    for expected, line in zip(log_of(tmp_path / "alone"), log_of(tmp_path / "together"), strict=True):
        assert line == pytest.approx(expected, abs=1e-5, rel=0)
    for (name, weight), other in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(other, weight, atol=1e-5, rtol=0, msg=name)
