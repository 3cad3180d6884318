"""`benchmarks/peak.py`, tiny."""

import json
from pathlib import Path

import pytest
import torch

import peak


@pytest.mark.slow
def test_it_measures_and_keeps_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "peak.jsonl"
    arguments = ["--size", "tiny", "--batch-size", "4", "--repeats", "2", "--device", "cpu", "--results", str(results)]
    for number_of_texts in (0, 1, 2):
        assert peak.main([*arguments, "--num-long-texts", str(number_of_texts)]) == 0
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    printed = capsys.readouterr().out
    operations = []
    for entry in entries:
        assert list(entry["works"]) == ["training step", "long texts", "images"]
        for name, work in entry["works"].items():
            assert work["samples_per_second"] == pytest.approx(4 / work["seconds"])
            share = work["teraflops_per_second"] / entry["matmul_peak_teraflops_per_second"]
            assert 0 < work["fraction_of_peak"] == pytest.approx(share)
            assert f"{name}: {work['samples_per_second']:.1f} samples/s" in printed
        operations.append([work["teraflops_per_second"] * work["seconds"] for work in entry["works"].values()])
    assert operations[1][0] > 2 * operations[0][0]  # 126 tokens beside 24
    assert operations[1][1:] == pytest.approx(operations[0][1:])  # the same encoding
    assert [entry["times_the_official_step"] is None for entry in entries] == [True, False, True]


def test_the_largest_batch_that_fits() -> None:
    tried = []

    def run(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > 100:
            raise torch.OutOfMemoryError

    assert peak.largest_that_fits(run, 1024) == 64
    assert tried == [1024, 512, 256, 128, 64]
    with pytest.raises(torch.OutOfMemoryError):
        peak.largest_that_fits(lambda batch_size: run(101), 4)
