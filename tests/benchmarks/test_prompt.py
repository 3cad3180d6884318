"""`benchmarks/prompt.py` on a tiny checkpoint."""

from pathlib import Path

import pytest

from scripts import load_script


@pytest.mark.slow
def test_each_command_is_timed(official_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_script("benchmarks/prompt.py").main
    results = main(["--model", str(official_checkpoint), "--num-images", "3", "--runs", "1"])
    assert [row["command"].rpartition(": ")[2] for row in results] == [
        "lotlip --help",
        "first search",
        "second search",
        "search by an image",
        "100 queries",
    ]
    assert all(0 < row["least_s"] <= row["median_s"] <= row["most_s"] for row in results)
    assert len(capsys.readouterr().out.splitlines()) == 5
