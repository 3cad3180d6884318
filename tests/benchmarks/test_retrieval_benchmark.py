"""`benchmarks/retrieval.py`, small: what it measures, and how little memory a large search needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import load_script

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory where Linux keeps it")


@LINUX
@pytest.mark.slow
def test_it_measures_and_keeps_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load_script("benchmarks/retrieval.py")
    results = tmp_path / "results" / "retrieval.jsonl"
    sizes = ["--images", "40", "--texts", "90", "--dim", "8", "--block-size", "32"]
    results.parent.mkdir()
    results.write_text("{}\n")
    assert module.main([*sizes, "--repeats", "2", "--threads", "1", "--results", str(results)]) == 0
    earlier, result = (json.loads(line) for line in results.read_text().splitlines())
    assert earlier == {}
    assert (result["images"], result["texts"], result["dim"], result["block_size"]) == (40, 90, 8, 32)
    assert result["repeats"] == 2
    assert result["embeddings_mib"] == round(130 * 8 * 4 / 2**20, 1)
    assert 0 < result["peak_beyond_embeddings_mib"] < 1024
    assert result["machine"]["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    for name in ("recalls", "retrieval_metrics"):
        share = result["seconds"][name] / result["seconds"]["product"]
        assert result["times_the_product"][name] == pytest.approx(share, rel=0.9)  # of rounded seconds
    assert "MiB beyond the embeddings" in capsys.readouterr().out


def test_its_embeddings_are_pairs() -> None:
    module = load_script("benchmarks/retrieval.py")
    images, texts, owners = module.make_embeddings(50, 120, 32)
    assert images.shape == (50, 32)
    assert texts.shape == (120, 32)
    assert sorted(set(owners.tolist())) == list(range(50))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(120))
    own, others = (images[owners] * texts).sum(1).mean(), (images[owners.flip(0)] * texts).sum(1).mean()
    assert own > others + 0.1


@LINUX
@pytest.mark.slow
def test_a_large_search_holds_only_blocks() -> None:
    # all similarities would be 1.5 GiB, or 0.4 GiB as booleans
    script = Path(load_script("benchmarks/retrieval.py").__file__)
    sizes = ["--images", "20000", "--texts", "20000", "--dim", "16", "--threads", "1"]
    command = [sys.executable, str(script), "--memory", *sizes]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    held = json.loads(finished.stdout)
    assert held["embeddings_mib"] == pytest.approx(2 * 20000 * 16 * 4 / 2**20, abs=0.1)
    assert held["peak_beyond_embeddings_mib"] < 256
