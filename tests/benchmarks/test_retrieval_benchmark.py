"""`benchmarks/retrieval.py`, small: what it measures, and how little memory a large search needs."""

import json
import sys
from pathlib import Path

import pytest

import retrieval
from measure import peak_memory

pytestmark = pytest.mark.slow
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory where Linux keeps it")


@LINUX
def test_it_measures_and_keeps_the_result(tmp_path: Path) -> None:
    results = tmp_path / "results" / "retrieval.jsonl"
    sizes = ["--images", "40", "--texts", "90", "--dim", "8", "--block-size", "32"]
    assert retrieval.main([*sizes, "--repeats", "2", "--threads", "1", "--results", str(results)]) == 0
    (result,) = (json.loads(line) for line in results.read_text().splitlines())
    assert (result["images"], result["texts"], result["dim"], result["block_size"]) == (40, 90, 8, 32)
    assert 0 < result["peak_beyond_embeddings_mib"] < 1024
    assert result["times_the_product"].keys() == {"recalls", "retrieval_metrics"}


@LINUX
def test_a_large_search_holds_only_blocks() -> None:
    # all similarities would be 1.5 GiB, or 0.4 GiB as booleans
    assert peak_memory(retrieval.make_retrieval, 20_000, 20_000, 16, retrieval.BLOCK_SIZE) < 256
