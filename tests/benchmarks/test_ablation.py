"""`benchmarks/ablation.py`, tiny: trains what is missing and nothing twice, and reports what there is."""

import json
import socket
from pathlib import Path

import datasets
import pytest
from PIL import Image

from scripts import load_script

pytestmark = pytest.mark.slow


def test_a_study_and_another_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ablation = load_script("benchmarks/ablation.py")
    results = tmp_path / "results" / "ablation.jsonl"
    arguments = "--steps 2 --num-scenes 16 --batch-size 8 --eval-samples 12 --seeds 0 --only short mask-off".split()
    arguments += ["--results", str(results)]
    assert ablation.main(arguments) == 0
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert [entry["setting"] for entry in entries] == ["short", "mask-off"]
    assert all(0 <= entry["results"][name] <= 1 for entry in entries for name in ablation.RECALLS)
    content = results.read_text()
    assert str(tmp_path) not in content
    assert socket.gethostname() not in content
    with Image.open(results.with_suffix(".png")) as picture:
        assert min(picture.size) > 300
    capsys.readouterr()

    assert ablation.main(arguments) == 0
    assert results.read_text() == content
    assert "| 2 corners, mask off |" in capsys.readouterr().out
