"""`benchmarks/peak.py`, tiny."""

import json
from pathlib import Path

import pytest

import peak

pytestmark = pytest.mark.slow


def test_it_measures_and_keeps_the_result(tmp_path: Path) -> None:
    results = tmp_path / "results" / "peak.jsonl"
    arguments = [
        "--size",
        "tiny",
        "--batch-size",
        "4",
        "--repeats",
        "2",
        "--only",
        "sdpa",
        "unpadded",
        "--device",
        "cpu",
        "--results",
        str(results),
    ]
    assert peak.main(arguments) == 0
    (entry,) = (json.loads(line) for line in results.read_text().splitlines())
    ways = {"sdpa": 3, "unpadded": 2}
    assert [name.partition(": ")[0] for name in entry["works"]] == [way for way in ways for _ in range(ways[way])]
    assert not entry["notes"]
    for work in entry["works"].values():
        assert work["samples_per_second"] == pytest.approx(4 / work["seconds"])
        assert work["fraction_of_peak"] > 0
    assert entry["times_the_official_step"] > 0
