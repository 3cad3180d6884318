"""Patches and tokens in training: what `embed` makes of them, in chunks, with frozen towers, and in two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config, log_of

from lotlip_hf import cli
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.scenes.small import small_model
from lotlip_hf.training.data import load_data
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import Objective, embed
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms.infonce import InfoNCE
from seams import Near, assert_same_in_chunks, train_alone_and_together

pytestmark = pytest.mark.usefixtures("alone")


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the term."""
    TERMS["near"] = Near
    return cli.main(argv)


def make_batch(processor: Any, num_long: int, **options: Any) -> Any:
    return LoTLIPCollator(processor, SubCaptions(num_long), **options)([*scenes_dataset(5)])


@pytest.mark.parametrize("num_long", [0, 2])
def test_tokens_of_short_and_long_texts(num_long: int) -> None:
    model, processor = small_model(hidden_size=32, num_hidden_layers=1)
    batch = make_batch(processor, num_long, num_negatives=2, return_texts=True)
    with torch.no_grad():
        embeds = embed(model.eval(), batch, Near.needs | {"text_embeds"})
    assert embeds.keys() == Near.needs | {"text_embeds"}
    tokens, mask = embeds["token_embeds"], embeds["token_mask"]
    assert tokens.shape[:3] == mask.shape == (5, 1 + num_long, mask.shape[2])
    for row, texts in enumerate(batch["texts"]):
        for number, text in enumerate(texts[: 1 + num_long]):
            inputs = processor(text=[text], return_tensors="pt")
            with torch.no_grad():
                expected = model(**inputs, output_token_embeds=True).token_embeds[0]
            assert mask[row, number].sum() == len(expected)
            torch.testing.assert_close(tokens[row, number][mask[row, number]], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, :, 0], embeds["text_embeds"], atol=1e-5, rtol=0)
    assert embeds["patch_embeds"].shape[:2] == (5, model.config.vision_config.num_patches)


def test_gradient_caching() -> None:
    model, processor = small_model(hidden_size=32, num_hidden_layers=1)
    batch = make_batch(processor, 2)
    objective = Objective({"infonce": InfoNCE(), "near": Near()})
    assert_same_in_chunks(model, batch, objective, "loss_near")


def test_a_frozen_tower_is_computed_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TERMS, "near", Near)
    logs = []
    for terms in (["infonce", "near"], ["infonce"]):
        options = {
            "lock_vision": True,
            "lock_text": True,
            "lock_corner_tokens": True,
            "cache": str(tmp_path / "cache"),
        }
        made = config(tmp_path / terms[-1], model="scenes", data="scenes", num_scenes=8, terms=terms, **options)
        train(*load_or_start_model(made), load_data(made)[0], made)
        logs.append(log_of(tmp_path / terms[-1])[0])
        assert ("patch_embeds" in (printed := capsys.readouterr().out)) == ("near" in terms)
        assert ("token_embeds" in printed) == ("near" in terms)
    assert logs[0]["loss"] - logs[0]["loss_near"] == pytest.approx(logs[1]["loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    train_alone_and_together(__name__, tmp_path, "--model", "scenes", "--terms", "infonce", "near:0.5")
