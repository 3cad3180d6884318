"""Negatives, regions and tags in training: what `embed` makes of them, with kept states, in chunks, in whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config, log_of
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

from lotlip_hf import LoTLIPTrainer, cli
from lotlip_hf.data.collator import RIDERS, LoTLIPCollator, ModelInputs
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.distributed import world_size
from lotlip_hf.encoder import Encoder
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.scenes.small import small_model
from lotlip_hf.states import FrozenStates
from lotlip_hf.training.checkpoint import CheckpointError
from lotlip_hf.training.data import load_data
from lotlip_hf.training.data_checks import warn_of_data
from lotlip_hf.training.frozen import add_states
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import Objective, embed
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.views import Views
from seams import assert_same_in_chunks, train_alone_and_together

pytestmark = pytest.mark.usefixtures("alone")
NAMES = ("text_embeds", *RIDERS, *RIDERS.values(), "boxes", "corner_embeds", "image_embeds")


class Contrast(nn.Module):
    """The short text of an image against the negatives of its record, for records that have some."""

    needs = frozenset({"image_embeds", "text_embeds", "negative_embeds", "negative_mask", "tags"})

    def forward(self, views: Views) -> torch.Tensor:
        texts = torch.cat([views["text_embeds"][:, :1], views["negative_embeds"]], 1)
        mask = F.pad(views["negative_mask"], (1, 0), value=True)
        logits = (10 * texts @ views["image_embeds"].unsqueeze(2)).squeeze(2).masked_fill(~mask, -torch.inf)
        has_tags = (views["tags"] != 0).any(1)
        return -(logits.log_softmax(1)[:, 0] * has_tags).sum() * world_size() / views.num_samples


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the term."""
    TERMS["contrast"] = Contrast
    return cli.main(argv)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return small_model(hidden_size=32, num_hidden_layers=1)


def some_records(number: int = 5) -> list[dict[str, Any]]:
    """The second record has one negative and one region, the third none."""
    records = [dict(row) for row in scenes_dataset(number)]
    records[1]["negatives"] = records[1]["negatives"][:1]
    records[1]["regions"] = records[1]["regions"][:1]
    records[2]["negatives"] = records[2]["regions"] = None
    return records


def make_batch(pair: tuple[Any, Any], num_long: int, cache: Path | None, **options: Any) -> dict[str, Any]:
    frozen = () if cache is None else ("text",)
    collator = LoTLIPCollator(pair[1], SubCaptions(num_long), frozen=frozen, return_texts=True, **options)
    batch = collator(some_records())
    states = {} if cache is None else {"text": FrozenStates(Encoder(*pair), "text", cache)}
    return dict(add_states(batch, states))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("num_long", [0, 2])
def test_riders_are_embedded_as_alone(num_long: int, kept: bool, small: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = small
    plain = make_batch(small, num_long, tmp_path if kept else None)
    batch = make_batch(small, num_long, tmp_path if kept else None, num_negatives=2, num_regions=3)
    with torch.no_grad():
        expected, embeds = (embed(model.eval(), each, NAMES) for each in (plain, batch))
        inputs = processor(text=[text for row in batch["texts"] for text in row[-5:]], return_tensors="pt")
        alone = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1).unflatten(0, (5, 5))
    riders = torch.cat([embeds.pop("negative_embeds"), embeds.pop("region_embeds")], dim=1)
    torch.testing.assert_close(riders, alone, atol=1e-6, rtol=0)
    masks = torch.cat([embeds.pop("negative_mask"), embeds.pop("box_mask")], dim=1).int().tolist()
    assert masks[1:3] == [[1, 0, 1, 0, 0], [0] * 5]
    assert masks[0][:2] == [1, 1]
    assert embeds.pop("boxes").shape == (5, 3, 4)
    assert embeds.keys() == expected.keys()
    assert ("corner_embeds" in embeds) == (num_long > 0 and not kept)
    for name, value in expected.items():
        torch.testing.assert_close(embeds[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("num_long", [0, 2])
def test_gradient_caching_with_negatives(num_long: int, kept: bool, small: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = small
    batch = make_batch(small, num_long, tmp_path if kept else None, num_negatives=2, return_tags=True)
    objective = Objective({"infonce": InfoNCE(), "contrast": Contrast()})
    loss = assert_same_in_chunks(model, batch, objective, "loss_contrast")
    assert loss > 0


def run(output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[dict[str, Any]]:
    monkeypatch.setitem(TERMS, "contrast", Contrast)
    made = config(output, **{"model": "scenes", "data": "scenes", "num_scenes": 10, "max_steps": 3, **options})
    model, processor = load_or_start_model(made)
    records, eval_records = load_data(made)
    train(model, processor, records, made, eval_records)
    return log_of(output)


LOCKED = {"lock_text": True, "lock_corner_tokens": True}
RUNS: dict[str, dict[str, Any]] = {
    "long texts": {**LOCKED, "eval_data": "scenes", "eval_samples": 6},
    "short texts, in chunks": {**LOCKED, "num_long_texts": 0, "grad_cache_chunk": 2, "lock_vision": True},
}


@pytest.mark.parametrize("kind", RUNS)
def test_kept_states_give_the_losses_of_computed_ones(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"terms": ["infonce", "contrast:0.5"], "num_negatives": 2, "batch_size": 4, **RUNS[kind]}
    computed = run(tmp_path / "computed", monkeypatch, no_cache=True, **options)
    kept = run(tmp_path / "kept", monkeypatch, cache=str(tmp_path / "cache"), **options)
    for expected, line in zip(computed, kept, strict=True):
        assert line == pytest.approx(expected, abs=1e-5, rel=0)
    assert computed[0]["loss_contrast"] > 0


def test_a_weight_of_0_and_negatives_leave_the_other_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in small_model(hidden_size=96, seed=3):
        part.save_pretrained(tmp_path / "teacher")
    options = {"teacher": str(tmp_path / "teacher"), "no_cache": True, "batch_size": 5, "num_negatives": 2}
    without, zero, beside = (
        run(tmp_path / str(number), monkeypatch, **options, terms=["infonce", "instance", *terms])
        for number, terms in enumerate(([], ["contrast:0"], ["contrast"]))
    )
    assert zero == without
    # The teacher has targets of the texts, and not of negatives.
    for name in ("loss_instance", "loss_infonce_short", "loss_infonce_long"):
        assert beside[0][name] == pytest.approx(without[0][name], abs=1e-5)


def test_the_trainer_gets_no_negatives_unless_its_collator_draws_them(small: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = small
    records = scenes_dataset(8)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", per_device_train_batch_size=4, per_device_eval_batch_size=4
    )
    data = {"train_dataset": records, "eval_dataset": records}
    trainer = LoTLIPTrainer(model, args, processing_class=processor, **data)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() <= {*ModelInputs.__annotations__, "return_loss"}
    assert model(**batch).loss.isfinite()
    expected = trainer.evaluate()
    collator = LoTLIPCollator(processor, num_negatives=1, return_tags=True)
    objective = Objective({"infonce": InfoNCE(), "contrast": Contrast()})
    trainer = LoTLIPTrainer(model, args, collator, objective=objective, **data)
    recalls = {name: value for name, value in trainer.evaluate().items() if "_r" in name and "_to_" in name}
    assert recalls == {name: expected[name] for name in recalls}
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_role_that_no_record_has_is_named(small: tuple[Any, Any]) -> None:
    records = scenes_dataset(12)
    options = {"model": "scenes", "data": "scenes", "num_sentences": 1, "batch_size": 4}

    def named(records: Any) -> list[str]:
        warnings = warn_of_data(*small, records, config(Path("unused"), **options), 3, terms={"contrast": Contrast()})
        return [role for role in ("negatives", "tags") for text in warnings if f"`{role}`" in text]

    assert named(records) == []
    assert named(records.remove_columns("negatives")) == ["negatives"]
    assert named(records.remove_columns(["negatives", "tags"])) == ["negatives", "tags"]


def test_a_resumed_run_wants_a_vocabulary_of_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tags.txt"
    file.write_text("red\ngreen\nblue\n")
    options = {"terms": ["infonce", "tags"], "term_options": [f"tags.vocabulary={file}"]}
    run(tmp_path / "run", monkeypatch, **options)
    file.write_text("red\ngreen\n")
    with pytest.raises(CheckpointError, match="vocabulary"):
        run(tmp_path / "run", monkeypatch, **options, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--num-long-texts 1", "--num-long-texts 0 --grad-cache-chunk 3"])
def test_one_process_and_two_train_with_negatives(flags: str, tmp_path: Path) -> None:
    words = ("--model", "scenes", "--terms", "infonce", "contrast", "--num-negatives", "2", *flags.split())
    train_alone_and_together(__name__, tmp_path, *words)
