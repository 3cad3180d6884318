"""`benchmarks/training_step.py`, tiny."""

import json
from pathlib import Path

import pytest

from scripts import load_script


@pytest.mark.slow
def test_it_measures_a_step_and_keeps_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load_script("benchmarks/training_step.py")
    results = tmp_path / "results" / "steps.jsonl"
    arguments = ["--size", "tiny", "--batch-size", "4", "--steps", "2", "--device", "cpu", "--results", str(results)]
    for number_of_texts in (0, 2):
        assert module.main([*arguments, "--num-long-texts", str(number_of_texts)]) == 0
    without, with_long = (json.loads(line) for line in results.read_text().splitlines())
    for entry in (without, with_long):
        assert entry["samples_per_second"] == pytest.approx(4 / entry["seconds_per_step"])
        share = entry["teraflops_per_second"] / entry["matmul_peak_teraflops_per_second"]
        assert 0 < entry["fraction_of_peak"] == pytest.approx(share)
    operations = [entry["teraflops_per_second"] * entry["seconds_per_step"] for entry in (without, with_long)]
    assert operations[1] > 2 * operations[0]  # 2 x 126 tokens beside 24
    assert f"{with_long['samples_per_second']:.1f} samples/s" in capsys.readouterr().out
