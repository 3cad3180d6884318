"""`benchmarks/retrieval.py`, small: what it measures, and how little memory a large search needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import load_script

pytestmark = pytest.mark.slow
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory where Linux keeps it")


@LINUX
def test_it_measures_and_keeps_the_result(tmp_path: Path) -> None:
    module = load_script("benchmarks/retrieval.py")
    results = tmp_path / "results" / "retrieval.jsonl"
    sizes = ["--images", "40", "--texts", "90", "--dim", "8", "--block-size", "32"]
    assert module.main([*sizes, "--repeats", "2", "--threads", "1", "--results", str(results)]) == 0
    (result,) = (json.loads(line) for line in results.read_text().splitlines())
    assert (result["images"], result["texts"], result["dim"], result["block_size"]) == (40, 90, 8, 32)
    assert 0 < result["peak_beyond_embeddings_mib"] < 1024
    assert result["times_the_product"].keys() == {"recalls", "retrieval_metrics"}


@LINUX
def test_a_large_search_holds_only_blocks() -> None:
    # all similarities would be 1.5 GiB, or 0.4 GiB as booleans
    script = Path(load_script("benchmarks/retrieval.py").__file__)
    sizes = ["--images", "20000", "--texts", "20000", "--dim", "16", "--threads", "1"]
    command = [sys.executable, str(script), "--memory", *sizes]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    held = json.loads(finished.stdout)
    assert held["embeddings_mib"] == pytest.approx(2 * 20000 * 16 * 4 / 2**20, abs=0.1)
    assert held["peak_beyond_embeddings_mib"] < 256
