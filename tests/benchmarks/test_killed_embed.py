"""`benchmarks/killed_embed.py` with few pictures: a real `torchrun`, killed."""

from pathlib import Path

import pytest

import killed_embed

pytestmark = pytest.mark.slow


def test_a_killed_torchrun_ends_in_the_same_rows(official_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", official_checkpoint, "--folder", tmp_path / "run", "--images", 120, "--shard-size", 5]
    found = killed_embed.main([str(one) for one in arguments])
    assert found["rows"] == 119
    assert found["same_ids"]
    assert found["largest_difference"] < 1e-5
    assert 0 < found["shards_at_kill"] == found["kept_shards"] < found["shards"] == 24
    assert len(found["skipped"]) == 1
