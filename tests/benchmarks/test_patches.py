"""`benchmarks/patches.py`, tiny: what it keeps, prints and draws."""

import json
from pathlib import Path

import pytest

import patches
from lotlip_hf.scenes.small import small_model

pytestmark = pytest.mark.slow


def test_it_measures_keeps_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = small_model()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    results, plot = tmp_path / "patches.jsonl", tmp_path / "patches.png"
    files = ["--results", str(results), "--plot", str(plot)]
    sizes = ["--num-images", "12", "--size", "tiny", "--batch-size", "2", "--repeats", "1"]
    assert patches.main([str(tmp_path / "model"), *sizes, *files]) == 0
    (result,) = (json.loads(line) for line in results.read_text().splitlines())
    assert [(row["method"], row["depth"], row["share"]) for row in result["rows"]] == patches.SETTINGS
    assert all(0 <= row["r1"] <= 100 and row["images_per_second"] > 0 for row in result["rows"])
    assert plot.stat().st_size > 10_000
    capsys.readouterr()
    assert patches.main(["--report", *files]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]) == 12
