"""Search millions of embedded images with LanceDB: an index of the shards that `lotlip embed` writes.

    lotlip embed --model checkpoint --data "shards/*.tar" --keep year:int64 --output embeddings
    python examples/search_with_lancedb.py --table images.lance --add embeddings
    python examples/search_with_lancedb.py --table images.lance --model checkpoint --where "year > 2020" "A red tram."

`--add` takes folders or files. Rows with a known id are replaced, others are added, so a folder can be added again
when it has new shards. The table is a folder, which refuses shards and queries of another model. Needs `lancedb`.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lancedb.index import BTree, IvfPq

from lotlip_hf.encoder import Encoder, load_encoder
from lotlip_hf.search import encode_query
from lotlip_hf.terminal import printable_output, progress_bar

# Below this number of rows, an exact search takes milliseconds, and there are too few vectors to train an index.
ENOUGH_ROWS = 20_000
ROWS_PER_PARTITION = 4096
DIMS_PER_BYTE = 4  # of the compressed vectors; 8 halves the index, and needs a larger `REFINE`
PROBES = 48  # partitions that a query reads
REFINE = 20  # times `top` candidates are compared again, by their full vectors
METADATA = (b"model", b"revision", b"fingerprint")  # of the schema of shards


def open_table(path: Path) -> Any:
    """Opens a table, or returns `None` if it does not exist."""
    tables = lancedb.connect(path.parent)
    return tables.open_table(path.stem) if path.exists() else None


def find_shards(paths: Iterable[Path]) -> list[Path]:
    """Returns the Parquet files in folders, and those that are given."""
    return [shard for path in paths for shard in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]


def add_shards(path: Path, shards: Sequence[Path], progress: bool = True) -> Any:
    """
    Adds the rows of shards to a table, and replaces those with the same id. Builds the index of a table that has
    enough rows, or adds the new rows to it.

    Args:
        path (`Path`): Table, a folder `NAME.lance`. It is created if it does not exist.
        shards (`Sequence[Path]`): Parquet files with the columns `id` and `embedding`, and others for filters.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `Table`: The table of LanceDB.

    Raises:
        `ValueError`: If there are no shards, or one has other columns than the table, or embeddings of another model.
    """
    if path.suffix != ".lance":
        raise ValueError(f"{path}: the name of a table ends in .lance. Pass {path}.lance.")
    if not shards:
        raise ValueError("--add: the folders contain no .parquet files. Pass the --output of `lotlip embed --data`.")
    table = open_table(path)
    wanted = schema_of(shards[0]) if table is None else table.schema
    for shard in shards:  # check all before the table is made or changed
        schema = schema_of(shard)
        if schema.metadata[b"fingerprint"] != (wanted.metadata or {}).get(b"fingerprint"):
            made_by = [(one.metadata or {}).get(b"model", b"?").decode() for one in (schema, wanted)]
            raise ValueError(
                f"{shard}: its model is {made_by[0]}, that of {path} is {made_by[1]}. Use another --table."
            )
        if not schema.equals(wanted):
            raise ValueError(f"{shard}: has the columns {schema.names}, {path} has {wanted.names}, or other types.")
    if table is None:
        table = lancedb.connect(path.parent).create_table(path.stem, schema=wanted)
        table.create_index("id", config=BTree())  # finds the rows to replace
    for number, shard in enumerate(progress_bar(shards, desc="Adding shards", unit="shard", shown=progress), 1):
        rows = pq.read_table(shard).replace_schema_metadata(table.schema.metadata)
        last = {name: row for row, name in enumerate(rows["id"].to_pylist())}  # of rows with one id, keep the last
        rows = rows.take(list(last.values())) if len(last) < len(rows) else rows
        table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
        if number % 100 == 0:
            table.optimize()  # else finding known ids takes longer with each shard
    count, dim = table.count_rows(), table.schema.field("embedding").type.list_size
    if count >= ENOUGH_ROWS and not any(index.columns == ["embedding"] for index in table.list_indices()):
        partitions, parts = max(1, count // ROWS_PER_PARTITION), max(1, dim // DIMS_PER_BYTE)
        config = IvfPq(distance_type="cosine", num_partitions=partitions, num_sub_vectors=parts)
        table.create_index("embedding", config=config)
    table.optimize()  # merges small files, and adds new rows to the indexes
    return table


def schema_of(shard: Path) -> pa.Schema:
    """Returns the schema of a shard, with the metadata of its model alone."""
    schema = pq.read_schema(shard)
    found = schema.metadata or {}
    if (
        b"fingerprint" not in found
        or not {"id", "embedding"} <= set(schema.names)
        or not (pa.types.is_fixed_size_list(schema.field("embedding").type))
    ):
        raise ValueError(f"{shard}: not a shard of `lotlip embed --data`, which has columns `id` and `embedding`.")
    return schema.with_metadata({key: found[key] for key in METADATA if key in found})


def search(table: Any, query: np.ndarray, top: int = 5, where: str | None = None) -> list[dict[str, Any]]:
    """
    Searches the rows of a table that are most similar to an embedding.

    Args:
        table (`Table`): Table from [`add_shards`] or [`open_table`].
        query (`np.ndarray`): Embedding [P].
        top (`int`, *optional*, defaults to 5): Maximum number of rows.
        where (`str`, *optional*): Condition in SQL on the columns, such as `year > 2020 AND licence = 'by'`.

    Returns:
        `list[dict[str, Any]]`: The rows, best first: `score` (cosine), `id` and further columns.
    """
    columns = [name for name in table.schema.names if name != "embedding"]
    found = table.search(query, vector_column_name="embedding").distance_type("cosine").select([*columns, "_distance"])
    if where is not None:
        found = found.where(where)
    rows = found.nprobes(PROBES).refine_factor(REFINE).limit(top).to_list()
    return [{"score": round(1 - row.pop("_distance"), 4), **row} for row in rows]


def check_model(table: Any, encoder: Encoder) -> None:
    """Raises a `ValueError` if another model made the embeddings of a table."""
    metadata = table.schema.metadata
    if metadata[b"fingerprint"].decode() != encoder.fingerprint("image"):
        model = metadata[b"model"].decode()
        raise ValueError(
            f"{encoder.name} is not the model of the table. Pass --model {model}, or use another --table."
        )


@printable_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Adds shards to a table, or prints the rows that fit a text, one JSON object a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="folder of the table, NAME.lance")
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="folders of shards, or shards")
    parser.add_argument("text", nargs="?", help="description to search for")
    parser.add_argument("--model", help="checkpoint that made the shards; needed to search")
    parser.add_argument("--where", help="condition in SQL on the columns of the shards")
    parser.add_argument("--top", type=int, default=5, help="number of rows to show")
    arguments = parser.parse_args(argv)
    if (arguments.text is None) != (arguments.model is None) or not (arguments.add or arguments.text):
        parser.error("pass shards with --add, or a text and --model to search")
    if arguments.add:
        table = add_shards(arguments.table, find_shards(arguments.add))
        print(f"{table.count_rows()} rows in {arguments.table}.")
    if arguments.text is None:
        return
    table = open_table(arguments.table)
    if table is None:
        parser.error(f"--table {arguments.table}: no such table. Add shards with --add")
    encoder = load_encoder(arguments.model)
    check_model(table, encoder)
    query = encode_query(encoder, arguments.text)
    for row in search(table, query, arguments.top, arguments.where):
        print(json.dumps(row, default=str))


if __name__ == "__main__":
    main()
