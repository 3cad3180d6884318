"""The start of both projections in closed form, and dropout of image states."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_frozen import BOTH, assert_same_losses, run
from test_outcome import computed_states, loaded
from test_training import arguments, finish, log_of, make_checkpoint, make_folder

from lotlip_hf import LoTLIPModel
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.images import ImageError
from lotlip_hf.modeling.modeling_lotlip import ResidualMLP
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.frozen import KeyedRecords
from lotlip_hf.training.linear_heads import PairStates
from lotlip_hf.training.ridge import check_projections, ridge_projections, start_projections

pytestmark = pytest.mark.usefixtures("alone")

WIDTH, IMAGE_WIDTH = 12, 20
DIMS = [8, 12, 30]  # below, at and above the width of texts


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`, without corner tokens, `corners`, with 2, and `records`. Read-only."""
    folder = tmp_path_factory.mktemp("ridge")
    make_checkpoint(folder / "plain", corners=0)
    make_checkpoint(folder / "corners")
    make_folder(folder / "records", 27)
    return folder


def drawn(number: int, seed: int) -> PairStates:
    """Images and texts that depend linearly on the same values, each with a common direction."""
    fixed, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    to_image, to_text = torch.randn(8, IMAGE_WIDTH, generator=fixed), torch.randn(8, WIDTH, generator=fixed)
    meaning = torch.randn(number, 8, generator=generator)
    noise = [0.02 * torch.randn(number, WIDTH, generator=generator) for _ in range(2)]
    text = 3 + meaning @ to_text
    return PairStates(1 + meaning @ to_image, text + noise[0], text + noise[1])


@pytest.mark.parametrize("dim", DIMS)
def test_the_start_alone_finds_held_out_pairs(dim: int) -> None:
    image, text = ridge_projections(drawn(300, 1), dim)
    held = drawn(100, 2)
    found = recalls(held.image @ image.T, held.long @ text.T)
    by_chance = recalls(held.image @ torch.randn(dim, IMAGE_WIDTH).T, held.long @ torch.randn(dim, WIDTH).T)
    for direction in ("image_to_text_r1", "text_to_image_r1"):
        assert found[direction] > 0.9
        assert by_chance[direction] < 0.3


@pytest.mark.parametrize("keys", [["a", "a"], [ImageError("x.png", "empty")] * 2, ["a", ImageError("x.png", "empty")]])
def test_a_start_needs_two_readable_pictures(keys: list[Any]) -> None:
    records, config, cpu = Dataset.from_dict({"id": ["1", "2"]}), TrainingConfig(), torch.device("cpu")
    with pytest.raises(ValueError, match="head_start"):
        start_projections(Any, KeyedRecords(records, keys), {}, config, cpu)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dim", DIMS)
def test_the_projections_are_those_of_a_naive_program(dim: int) -> None:
    pairs = drawn(200, 1)
    image, text = (weight.double().numpy() for weight in ridge_projections(pairs, dim, seed=3))
    x, *both = (states.double().numpy() for states in pairs)
    y = np.mean([states / np.linalg.norm(states, axis=1, keepdims=True) for states in both], 0)
    xc, yc = x - x.mean(0), y - y.mean(0)
    # a ridge regression is one of least squares with further rows
    rows = np.sqrt(0.1 * len(x) * xc.var(0).mean()) * np.eye(IMAGE_WIDTH)
    regression = np.linalg.lstsq(np.vstack([xc, rows]), np.vstack([yc, np.zeros((IMAGE_WIDTH, WIDTH))]))[0]
    axes = np.linalg.svd(yc)[2][:dim]
    kept = axes.T @ axes  # Q^T Q, the identity from the width on
    without = [np.eye(len(mean)) - np.outer(mean, mean) / (mean @ mean) for mean in (x.mean(0), y.mean(0))]
    expected = without[0] @ regression @ kept @ without[1]
    image /= np.linalg.norm(image.T @ text) / np.linalg.norm(expected)  # the cosine has no scale
    assert image.T @ text == pytest.approx(expected, abs=1e-6)
    assert text.T @ text == pytest.approx(without[1] @ kept @ without[1], abs=1e-5)
    if dim == WIDTH:
        assert text == pytest.approx(without[1], abs=1e-5)
        assert image == pytest.approx(regression.T @ without[0], abs=1e-6)


def test_the_seed_alone_determines_the_start() -> None:
    state = torch.get_rng_state()
    pairs = drawn(50, 1)
    first, again, other = (ridge_projections(pairs, 30, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def assert_same_weights(one: LoTLIPModel, other: LoTLIPModel) -> None:
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_a_run_starts_once(start: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"head_start": "ridge", "cache": str(tmp_path / "cache"), "save_steps": 2, **BOTH}
    fixed, _, _ = run(tmp_path / "fixed", start, max_steps=1, learning_rate=0.0, ema_decay=0.5, **options)
    saved = LoTLIPModel.from_pretrained(list_checkpoints(tmp_path / "fixed")[-1])
    assert_same_weights(saved, fixed)  # the averaged weights start there too
    states = computed_states(start / "plain", [*loaded(start)])
    image, text = ridge_projections(states, 24)
    found = fixed.visual_projection.weight.T @ fixed.text_projection.weight
    torch.testing.assert_close(found, image.T @ text, atol=1e-4, rtol=0)
    trained, log, _ = run(tmp_path / "run", start, max_steps=4, **options)
    list_checkpoints(tmp_path / "run")[-1].rename(tmp_path / "last")
    resumed, again, _ = run(tmp_path / "run", start, max_steps=4, resume=True, **options)
    assert again[-2:] == log[-2:]
    assert_same_weights(resumed, trained)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"head_start": "ridge", "lock_text": True}, "head_start"),
        ({"head_start": "ridge", "lock_vision": True}, "head_start"),
        ({"state_dropout": 0.5}, "state_dropout"),
        ({"state_dropout": 1.0, "lock_vision": True}, "state_dropout"),
    ],
)
def test_options_that_need_locked_towers(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TrainingConfig(model="m", data="d", **options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"head_start": "ridge", "no_cache": True}, "no_cache"),
        ({"head_start": "ridge", "model": "corners"}, "corner tokens"),
        ({"head_start": "ridge", "unlocked_text_layers": 1}, "head_start"),
        ({"state_dropout": 0.5, "no_cache": True}, "state_dropout"),
        ({"state_dropout": 0.5, "unlocked_vision_layers": 1}, "state_dropout"),
    ],
)
def test_towers_that_are_computed_in_every_step(
    options: dict[str, Any], word: str, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=word):
        run(tmp_path / "run", start, max_steps=2, **BOTH, **options)


@pytest.mark.parametrize(
    ("part", "head", "word"),
    [
        ("text_projection", ResidualMLP(32, 24, 1, 2), "text_projection"),
        ("text_projection", torch.nn.Identity(), "projection_dim"),
        ("visual_projection", torch.nn.Identity(), "head_start"),
    ],
)
def test_projections_that_are_not_linear(part: str, head: torch.nn.Module, word: str, start: Path) -> None:
    model = LoTLIPModel.from_pretrained(start / "plain")
    check_projections(model)
    setattr(model, part, head)
    with pytest.raises(ValueError, match=word):
        check_projections(model)


def test_state_dropout(start: Path, tmp_path: Path) -> None:
    """Only training drops, the same values with gradient caching, and a resumed run has the same bits."""
    options = {"cache": str(tmp_path / "cache"), "max_steps": 4, "eval_data": "records", "eval_samples": 9, **BOTH}
    logs = {
        share: run(tmp_path / f"fixed-{share}", start, state_dropout=share, learning_rate=0.0, **options)[1]
        for share in (0.0, 0.5)
    }
    assert logs[0.0][0]["loss"] != logs[0.5][0]["loss"]
    assert logs[0.0][-1] == logs[0.5][-1]  # the evaluation
    assert "long_text_to_image_r1" in logs[0.5][-1]
    options |= {"state_dropout": 0.5, "save_steps": 2}
    _, log, _ = run(tmp_path / "whole", start, **options)
    options["grad_cache_chunk"] = 3
    trained, in_chunks, _ = run(tmp_path / "chunks", start, **options)
    assert_same_losses(log, in_chunks, 1e-5)
    list_checkpoints(tmp_path / "chunks")[-1].rename(tmp_path / "last")
    resumed, _, _ = run(tmp_path / "chunks", start, resume=True, **options)
    assert_same_weights(resumed, trained)


@pytest.mark.slow
def test_two_processes_start_as_one(start: Path, tmp_path: Path) -> None:
    options = {"model": start / "plain", "data": start / "records", "max_steps": 3, "head_start": "ridge"}
    options |= {**dict.fromkeys(BOTH, True), "learning_rate": 0, "eval_data": start / "records"}
    products = []  # the signs of principal components are free
    for number in (1, 2):
        output = tmp_path / f"{number}"
        finish(arguments(output, cache=output / "cache", batch_size=8 // number, **options), tmp_path, number)
        model = LoTLIPModel.from_pretrained(list_checkpoints(output)[-1])
        products.append(model.visual_projection.weight.T @ model.text_projection.weight)
    assert_same_losses(log_of(tmp_path / "1"), log_of(tmp_path / "2"), 1e-4)
    torch.testing.assert_close(*products, atol=1e-4, rtol=0)
