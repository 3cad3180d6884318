"""Measures `examples/search_with_lancedb.py` on a million vectors: recall, time of a query, size, memory.

    python benchmarks/lancedb_million.py --rows 1000000 --dim 512 --queries 200

The vectors are random: each is a point near one of `rows / 100` centres, at 0.7 times the spread of the centres.
Coordinate i of the centres and of the points has the standard deviation 1 / sqrt(i), as principal components of
embeddings fall, and a random rotation mixes the coordinates. Queries are further points of the same distribution. The
true neighbours are found by comparing all vectors. Prints one JSON object.
"""

import argparse
import importlib.util
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHARD_ROWS = 10_000
NEIGHBOURS = 10
ROWS_PER_CENTRE = 100
SPREAD = 0.7


def example() -> ModuleType:
    """Imports the example that is measured."""
    path = Path(__file__).resolve().parents[1] / "examples" / "search_with_lancedb.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(rows: int, dim: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields an endless sequence of blocks [10000, P] of normalised vectors."""
    rng = np.random.default_rng(seed)
    scale = (1 / np.sqrt(np.arange(1, dim + 1))).astype(np.float32)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    centres = rng.standard_normal((max(1, rows // ROWS_PER_CENTRE), dim), np.float32)
    while True:
        own = rng.integers(len(centres), size=SHARD_ROWS)
        points = (centres[own] + SPREAD * rng.standard_normal((SHARD_ROWS, dim), np.float32)) * scale @ rotation
        yield points / np.linalg.norm(points, axis=1, keepdims=True)


def write_shards(folder: Path, rows: int, dim: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes shards, and returns queries [Q, P] and the row numbers [Q, 10] of their true neighbours."""
    blocks = draw(rows, dim)
    queries = next(blocks)[:num_queries]
    best = np.full((num_queries, 0), 0, np.int64)
    scores = np.full((num_queries, 0), 0, np.float32)
    vector = pa.list_(pa.float32(), dim)
    metadata = {"model": "random", "fingerprint": f"random-{rows}-{dim}"}
    schema = pa.schema([("id", pa.string()), ("embedding", vector), ("year", pa.int64())], metadata=metadata)
    for start in range(0, rows, SHARD_ROWS):
        block = next(blocks)[: rows - start]
        numbers = np.arange(start, start + len(block))
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), dim)
        columns = [pa.array(numbers.astype(str)), vectors, pa.array(2000 + numbers % 25)]
        pq.write_table(pa.table(columns, schema=schema), folder / f"part-{start // SHARD_ROWS:05d}.parquet")
        scores = np.concatenate([scores, queries @ block.T], axis=1)
        best = np.concatenate([best, np.broadcast_to(numbers, (num_queries, len(block)))], axis=1)
        order = np.argsort(-scores, axis=1)[:, :NEIGHBOURS]
        scores, best = (np.take_along_axis(one, order, axis=1) for one in (scores, best))
    return queries, best


def size_of(folder: Path) -> float:
    """Size of the files in a folder in GB."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 3)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Builds the table, measures, and prints and returns the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the shards and the table are written (default: temporary)")
    arguments = parser.parse_args(argv)
    script = example()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        (folder / "shards").mkdir()
        queries, expected = write_shards(folder / "shards", arguments.rows, arguments.dim, arguments.queries)
        started = time.perf_counter()
        table = script.add_shards(folder / "images.lance", script.find_shards([folder / "shards"]))
        built = time.perf_counter() - started
        shutil.rmtree(folder / "shards")
        script.search(table, queries[0], NEIGHBOURS)  # opens the index
        seconds, found = [], 0
        for query, numbers in zip(queries, expected, strict=True):
            started = time.perf_counter()
            rows = script.search(table, query, NEIGHBOURS)
            seconds.append(time.perf_counter() - started)
            found += len({int(row["id"]) for row in rows} & set(numbers.tolist()))
        started = time.perf_counter()
        rows = [script.search(table, query, NEIGHBOURS, "year = 2003") for query in queries[:20]]
        filtered = (time.perf_counter() - started) / len(rows)
        disk = [size_of(folder)]
        table.optimize(cleanup_older_than=timedelta(0))  # deletes earlier versions, which LanceDB keeps for a week
        disk.append(size_of(folder))
        result = {
            "rows": arguments.rows,
            "dim": arguments.dim,
            "recall@10": round(found / expected.size, 4),
            "query_ms_median": round(1000 * float(np.median(seconds)), 2),
            "query_ms_p95": round(1000 * float(np.quantile(seconds, 0.95)), 2),
            "filtered_query_ms_mean": round(1000 * filtered, 2),
            "build_s": round(built, 1),
            "disk_gb": disk[1],
            "disk_gb_with_earlier_versions": disk[0],
            "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
        }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
