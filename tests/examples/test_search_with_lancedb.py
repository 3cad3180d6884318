"""`examples/search_with_lancedb.py` and its benchmark, with the real LanceDB."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lotlip_hf import load_encoder
from scripts import load_script
from tiny_clip import save_clip

pytest.importorskip("lancedb", reason="needs lancedb: pip install '.[test]'")

pytestmark = pytest.mark.slow
DIM = 16


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("examples/search_with_lancedb.py")


def unit_rows(number: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((number, DIM), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_shard(
    path: Path, ids: list[str], vectors: np.ndarray, years: list[int], fingerprint: str = "abc", **more: str
) -> Path:
    """A shard as `lotlip embed` writes it: with metadata of its own beside those of the model."""
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table({"id": ids, "embedding": vector, "year": pa.array(years, pa.int64())})
    metadata = {"model": "tiny", "fingerprint": fingerprint, "records": str(len(ids)), **more}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def exact(ids: list[str], vectors: np.ndarray, query: np.ndarray, top: int) -> list[str]:
    return [ids[index] for index in np.argsort(-(vectors @ query))[:top]]


def test_rows_are_found_filtered_and_replaced(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ENOUGH_ROWS", 1000)
    monkeypatch.setattr(script, "ROWS_PER_PARTITION", 300)
    ids, vectors = [f"{number}" for number in range(900)], unit_rows(900, 0)
    years = [2000 + number % 3 for number in range(900)]
    folder, path = tmp_path / "shards", tmp_path / "images.lance"
    for part in range(2):
        own = slice(part * 450, (part + 1) * 450)
        write_shard(folder / f"part-{part}.parquet", ids[own], vectors[own], years[own])
    table = script.add_shards(path, script.find_shards([folder]), progress=False)
    query = unit_rows(1, 1)[0]
    found = script.search(table, query, 7)  # exact, as there is no index yet
    assert [row["id"] for row in found] == exact(ids, vectors, query, 7)
    assert [row["score"] for row in found] == pytest.approx(sorted(vectors @ query)[:-8:-1], abs=1e-4)
    assert set(found[0]) == {"score", "id", "year"}

    # A shard with new rows, and with other embeddings of known ones; the table gets its index.
    new_ids, new_vectors = [f"{number}" for number in range(800, 1400)], unit_rows(600, 2)
    write_shard(folder / "part-2.parquet", new_ids, new_vectors, [2009] * 600, last="yes")
    for _ in range(2):  # the second time, nothing changes
        table = script.add_shards(path, script.find_shards([folder / "part-2.parquet"]), progress=False)
        assert table.count_rows() == 1400
        stats = table.index_stats("embedding_idx")
        assert (stats.num_indexed_rows, stats.num_unindexed_rows) == (1400, 0)
    ids, vectors = [*ids[:800], *new_ids], np.concatenate([vectors[:800], new_vectors])
    years = [*years[:800], *[2009] * 600]
    for query in unit_rows(5, 3):
        expected = exact(ids, vectors, query, 10)
        assert len({row["id"] for row in script.search(table, query, 10)} & set(expected)) >= 9
        chosen = [index for index, year in enumerate(years) if year == 2001]
        expected = exact([ids[index] for index in chosen], vectors[chosen], query, 10)
        found = script.search(table, query, 10, "year = 2001")
        assert {row["year"] for row in found} == {2001}
        assert len({row["id"] for row in found} & set(expected)) >= 9


def test_shards_of_another_model_or_with_other_columns_are_refused(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "images.lance"
    good = write_shard(tmp_path / "good.parquet", ["a"], unit_rows(1, 0), [2000])
    script.add_shards(path, [good], progress=False)
    other = write_shard(tmp_path / "other.parquet", ["b"], unit_rows(1, 1), [2000], "other")
    wide = write_shard(tmp_path / "wide.parquet", ["c"], np.ones((1, 32), np.float32), [2000])
    no_shard = tmp_path / "no.parquet"
    pq.write_table(pa.table({"id": ["d"]}), no_shard)
    for shard, word in ((other, "model"), (wide, "columns"), (no_shard, "lotlip embed")):
        with pytest.raises(ValueError, match=word):
            script.add_shards(path, [good, shard], progress=False)
    assert script.open_table(path).count_rows() == 1
    with pytest.raises(ValueError, match=r"\.lance"):
        script.add_shards(tmp_path / "images", [good], progress=False)
    with pytest.raises(ValueError, match="--add"):
        script.add_shards(path, [], progress=False)


def test_repeated_ids_have_one_row(script: Any, tmp_path: Path) -> None:
    rows = unit_rows(3, 0)
    shard = write_shard(tmp_path / "part.parquet", ["a", "b", "a"], rows, [1, 2, 3])
    for _ in range(2):  # the second time, the ids are known
        table = script.add_shards(tmp_path / "images.lance", [shard], progress=False)
        assert sorted((row["id"], row["year"]) for row in script.search(table, rows[0])) == [("a", 3), ("b", 2)]


def test_refused_shards_leave_no_table(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "images.lance"
    good = write_shard(tmp_path / "good.parquet", ["a"], unit_rows(1, 0), [2000])
    other = write_shard(tmp_path / "other.parquet", ["b"], unit_rows(1, 1), [2000], "other")
    with pytest.raises(ValueError, match="model"):
        script.add_shards(path, [good, other], progress=False)
    with pytest.raises(ValueError, match="--add"):
        script.add_shards(path, [], progress=False)
    assert script.add_shards(path, [other], progress=False).count_rows() == 1


def test_a_text_is_searched_by_the_model_of_the_table(
    script: Any,
    official_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = load_encoder(official_checkpoint, device="cpu")
    texts = ["A cat.", "The red car stands in front of a house.", "A dog."]
    vectors = np.asarray(encoder.encode_texts(texts, progress=False))  # stand-ins for images
    fingerprint = encoder.fingerprint("image")
    write_shard(tmp_path / "shards" / "part-0.parquet", ["cat\x1b", "car", "dog"], vectors, [1, 2, 3], fingerprint)
    words = ["--table", str(tmp_path / "images.lance")]
    script.main([*words, "--add", str(tmp_path / "shards")])
    assert "3 rows" in capsys.readouterr().out
    script.main([*words, "--model", str(official_checkpoint), "--top", "2", "--where", "year < 3", "A cat."])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in found] == ["cat\x1b", "car"]
    assert found[0] == {"score": 1.0, "id": "cat\x1b", "year": 1}
    save_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match="model"):
        script.main([*words, "--model", str(tmp_path / "clip"), "A cat."])
    with pytest.raises(SystemExit):
        script.main([*words, "A cat."])
    assert "--model" in capsys.readouterr().err


def test_the_benchmark_measures_recall_against_all_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load_script("benchmarks/lancedb_million.py")
    result = benchmark.main(["--rows", "11000", "--dim", "8", "--queries", "5", "--probes", "2", "3"])
    assert json.loads(capsys.readouterr().out) == result
    assert [search["probes"] for search in result["searches"]] == [2, 3]
    for search in result["searches"]:
        assert search["recall@10"] == 1  # no index yet: LanceDB's search and ours are both exact
        assert search["query_ms_median"] > 0
