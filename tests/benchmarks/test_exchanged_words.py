"""`benchmarks/exchanged_words.py`, tiny: it trains a model in two stages and prints a row for each way."""

from pathlib import Path

import pytest

import exchanged_words
from lotlip_hf.scenes.dataset import scene
from lotlip_hf.scenes.small import small_model

pytestmark = pytest.mark.slow


def test_it_trains_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "3", "--num-training-scenes", "64", "--num-scenes", "24"]
    assert exchanged_words.main(["--train", str(tmp_path), *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("colour", "shape", "pattern", "any")) for line in lines) == 12
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_the_image_tower_learns_cells() -> None:
    """By chance, the loss is the logarithm of 8 colours x 6 shapes x 4 patterns x 3 numbers: 6.4."""
    model, _ = small_model()
    assert exchanged_words.learn_cells(model, [scene(index) for index in range(500)], steps=150) < 4
