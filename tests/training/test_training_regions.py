"""Regions in training: whole runs with the heads of `region_text` and `regions`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import config, log_of

from lotlip_hf import LoTLIPModel, LoTLIPProcessor, cli
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.regions import load_pooler, load_queries, match, overlaps, to_corners
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.scenes.small import small_model
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.data import load_data
from lotlip_hf.training.data_checks import warn_of_data
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import embed
from lotlip_hf.training.terms.region_text import RegionText
from lotlip_hf.training.terms.regions import Regions
from seams import train_alone_and_together

pytestmark = pytest.mark.usefixtures("alone")
SMALL = ["region_text.width=8", "region_text.grounding=0.5", "regions.width=8", "regions.layers=1"]
OPTIONS: dict[str, Any] = {"terms": ["infonce", "region_text", "regions"], "term_options": SMALL, "num_regions": 3}


def run(output: Path, **options: Any) -> list[dict[str, Any]]:
    made = config(output, **{"model": "scenes", "data": "scenes", "num_scenes": 12, "max_steps": 4, **options})
    train(*load_or_start_model(made), load_data(made)[0], made)
    return log_of(output)


def test_a_resumed_run_continues_its_heads(tmp_path: Path) -> None:
    whole = run(tmp_path / "run", save_steps=2, **OPTIONS)
    last = list_checkpoints(tmp_path / "run")[-1]
    kept = torch.load(last / "state" / "objective.pt")
    assert {name.split(".")[1] for name in kept} == {"region_text", "regions"}
    shutil.rmtree(last)
    assert run(tmp_path / "run", save_steps=2, resume=True, **OPTIONS)[-1] == pytest.approx(whole[-1])
    torch.testing.assert_close(torch.load(last / "state" / "objective.pt"), kept)
    assert not any("pooler" in name or "queries" in name for name in LoTLIPModel.from_pretrained(last).state_dict())
    assert load_pooler(last)(torch.rand(1, 9, 96), torch.rand(1, 2, 4)).shape == (1, 2, 96)
    assert load_queries(last)(torch.rand(1, 9, 96))[0].shape == (1, 5, 4)


def test_frozen_towers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The states of texts are kept, those of images cannot be: a term needs the patches."""
    locked = {"lock_vision": True, "lock_text": True, "lock_corner_tokens": True, **OPTIONS}
    kept, computed = (
        run(tmp_path / name, **locked, **cached)
        for name, cached in {"kept": {"cache": str(tmp_path / "cache")}, "computed": {"no_cache": True}}.items()
    )
    assert "patch_embeds" in capsys.readouterr().out
    for line, expected in zip(kept, computed, strict=True):
        assert line == pytest.approx(expected, abs=1e-5, rel=0)


def test_regions_that_no_record_has_are_named() -> None:
    options = {"model": "scenes", "data": "scenes", "num_sentences": 1, "batch_size": 4}
    terms = {"region_text": RegionText(projection_dim=8, width=8), "regions": Regions(projection_dim=8, width=8)}
    records = scenes_dataset(12)
    for given, number in ((records, 0), (records.remove_columns("regions"), 2)):
        warnings = warn_of_data(
            *small_model(hidden_size=32, num_hidden_layers=1), given, config(Path("x"), **options), 3, terms=terms
        )
        assert sum("`regions`" in text for text in warnings) == number


def test_more_regions_than_queries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="regions.queries"):
        run(tmp_path, terms=["regions"], term_options=["regions.width=8", "regions.queries=2"], num_regions=3)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--num-long-texts 0 --grad-cache-chunk 3"])
def test_one_process_and_two_train_with_regions(flags: str, tmp_path: Path) -> None:
    words = ["--model", "scenes", "--terms", *OPTIONS["terms"], "--term-options", *SMALL, *flags.split()]
    train_alone_and_together("lotlip_hf.cli", tmp_path, *words)


@pytest.mark.slow
def test_boxes_of_new_scenes_are_found(tmp_path: Path) -> None:
    """From random weights, in 150 steps."""
    flags = "--model scenes --max-steps 150 --terms regions"
    flags += " --term-options regions.width=64 regions.layers=2 regions.description=0"
    checkpoint, batch, seen = trained(tmp_path, flags, {"patch_embeds"})
    boxes, _ = load_queries(checkpoint)(seen["patch_embeds"])
    mask = batch["box_mask"]
    ious = overlaps(to_corners(boxes).unsqueeze(2), batch["boxes"].unsqueeze(1))[0]  # [B, Q, R]
    chosen = match(-ious.masked_fill(~mask.unsqueeze(1), 0.0))
    found = ious.gather(1, chosen.unsqueeze(1)).squeeze(1)[mask].mean().item()
    assert found > 0.5


@pytest.mark.slow
def test_regions_of_new_scenes_find_their_texts(trained_on_scenes: Path, tmp_path: Path) -> None:
    """Among about 800 regions, from trained weights, in 200 steps."""
    flags = f"--model {trained_on_scenes} --max-steps 200 --warmup-steps 20 --terms infonce region_text regions"
    flags += " --term-options region_text.width=64 regions.width=64 regions.layers=2"
    checkpoint, batch, seen = trained(tmp_path, flags, {"patch_embeds", "region_embeds"})
    mask, keys = batch["box_mask"], batch["region_keys"]
    regions = load_pooler(checkpoint)(seen["patch_embeds"], batch["boxes"])[mask]
    found = (regions @ seen["region_embeds"][mask].T).argmax(1)
    recall = (keys[mask][found] == keys[mask]).float().mean().item()
    chance = (keys[mask][:, None] == keys[mask]).float().mean().item()
    assert recall > 0.03 > 10 * chance


def trained(output: Path, flags: str, names: set[str]) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """The checkpoint of a run, 200 new scenes, and embeddings of them by its model."""
    words = f"train {flags} --data scenes --num-scenes 1000 --num-long-texts 0 --batch-size 64"
    words += f" --learning-rate 2e-3 --num-workers 0 --trackers none --num-regions 5 --output {output}"
    assert cli.main(words.split()) == 0
    checkpoint = list_checkpoints(output)[-1]
    model, processor = LoTLIPModel.from_pretrained(checkpoint), LoTLIPProcessor.from_pretrained(checkpoint)
    batch = LoTLIPCollator(processor, num_regions=5)([*scenes_dataset(1200)][1000:])
    with torch.no_grad():
        return checkpoint, batch, embed(model.eval(), batch, names)
