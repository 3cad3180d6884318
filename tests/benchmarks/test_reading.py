"""`benchmarks/reading.py`, with few images."""

import json
from pathlib import Path

import pytest
import torch

import reading


def test_it_measures_and_keeps_the_result(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    results = tmp_path / "reading.jsonl"
    assert reading.main(["--num-images", "2", "--repeats", "1", "--only", "640x480", "--results", str(results)]) == 0
    torch.set_num_threads(threads)
    (entry,) = (json.loads(line) for line in results.read_text().splitlines())
    assert {"lotlip-hf", "lotlip-hf, crop and flip", "Pillow and NumPy"} <= entry["images_per_second"].keys()
    assert len(entry["images_per_second"]) + len(entry["notes"]) == len(reading.WAYS)
    assert all(rate > 0 for rate in entry["images_per_second"].values())
    assert entry["difference"]["max"] == pytest.approx(0, abs=1e-3)
    assert isinstance(entry["machine"]["features"], list)
