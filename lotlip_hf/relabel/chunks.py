"""Splits the records of a run into chunks, each of which is captioned by one process and becomes one shard."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from tqdm import tqdm

from ..files import write_json
from .config import RelabelConfig
from .journal import HIDDEN, NONE, DamagedError, Journal, changed, fits, read_json

Records = Dataset | IterableDataset | list[dict[str, Any]]

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
PART = {"records": int}  # form (see `fits`) of the file with the length of a part


class Chunk(NamedTuple):
    """Consecutive records that become one shard."""

    name: str
    records: list[dict[str, Any]]

    def header(self) -> dict[str, Any]:
        """Returns the first line of the chunk's journals, with a digest of the ids of its records."""
        ids = json.dumps([str(record["id"]) for record in self.records]).encode()
        return {"records": hashlib.blake2b(ids, digest_size=16).hexdigest()}


class Share:
    """
    The chunks of one process.

    The chunks of a part are numbered. A part is a file of a stream; without streaming, all records are one part. The
    name of a chunk determines its process.

    Args:
        config (`RelabelConfig`): Options of the run.
        records (`Records`): Records of all processes.
        rank (`int`): Index of this process.
        world_size (`int`): Number of processes.
    """

    def __init__(self, config: RelabelConfig, records: Records, rank: int, world_size: int) -> None:
        self.config, self.size = config, config.shard_size
        self.records, self.rank, self.world_size = records, rank, world_size
        self.parts = records.num_shards if isinstance(records, IterableDataset) else 1
        # With fewer files than processes, each process reads all files.
        self.is_shared = self.parts < world_size
        if not isinstance(records, IterableDataset):
            self._keep_length(0, len(records))

    def chunks(self, is_done: Callable[[str, list[dict[str, Any]] | None], bool], bar: tqdm) -> Iterator[Chunk]:
        """Yields the unfinished chunks of this process, in order."""
        for part in self._own_parts():
            bar.set_postfix_str(f"file {part + 1}/{self.parts}" if self.parts > 1 else "")
            own = self._own_sizes(part)
            if (
                isinstance(self.records, IterableDataset)
                and own is not None
                and all(is_done(name, None) for name in own)
            ):
                bar.update(sum(own.values()))
                continue
            for start, size, rows in self._slices(part):
                name = f"{part:05d}-{start // self.size:05d}"
                if not self._is_own(name):
                    continue
                if is_done(name, rows):
                    bar.update(size)
                else:
                    yield Chunk(name, self._rows(start) if rows is None else rows)

    def names(self) -> list[str] | None:
        """Returns the names of the chunks of all processes, or `None` if the length of a part is unknown."""
        sizes = [self._sizes(part) for part in range(self.parts)]
        return None if None in sizes else [name for part in sizes for name in part or ()]

    def total(self) -> int | None:
        """Returns the number of records of this process, or `None` if the length of a part is unknown."""
        sizes = [self._own_sizes(part) for part in self._own_parts()]
        return None if None in sizes else sum(sum(part.values()) for part in sizes if part)

    def _slices(self, part: int) -> Iterator[tuple[int, int, list[dict[str, Any]] | None]]:
        """Yields start, size and rows of each chunk. Rows of a table are `None`, as reading them may load images."""
        if not isinstance(self.records, IterableDataset):
            for start in range(0, len(self.records), self.size):
                rows = self.records[start : start + self.size] if isinstance(self.records, list) else None
                yield start, min(self.size, len(self.records) - start), rows
            return
        stream, length = iter(self.records.shard(self.parts, part)), 0
        while rows := list(itertools.islice(stream, self.size)):
            yield length, len(rows), rows
            length += len(rows)
        self._keep_length(part, length)

    def _rows(self, start: int) -> list[dict[str, Any]]:
        assert isinstance(self.records, Dataset)
        columns = self.records[start : start + self.size]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _own_parts(self) -> range:
        return range(self.parts) if self.is_shared else range(self.rank, self.parts, self.world_size)

    def _is_own(self, name: str) -> bool:
        return not self.is_shared or sum(map(int, name.split("-"))) % self.world_size == self.rank

    def _sizes(self, part: int) -> dict[str, int] | None:
        """Returns the number of records in each chunk of a part, or `None` if the length of the part is unknown."""
        length = self._length(part)
        starts = range(0, length or 0, self.size)
        sizes = {f"{part:05d}-{n:05d}": min(self.size, (length or 0) - start) for n, start in enumerate(starts)}
        return None if length is None else sizes

    def _own_sizes(self, part: int) -> dict[str, int] | None:
        sizes = self._sizes(part)
        return sizes and {name: size for name, size in sizes.items() if self._is_own(name)}

    def _length_file(self, part: int) -> Path:
        return Path(self.config.output, HIDDEN, f"part-{part:05d}.json")

    def _length(self, part: int) -> int | None:
        path = self._length_file(part)
        return read_json(path, PART)["records"] if path.exists() else None

    def _keep_length(self, part: int, length: int) -> None:
        kept = self._length(part)
        if kept is None:
            write_json(self._length_file(part), {"records": length})
        elif kept != length:
            raise changed(self.config.data, f"there were {kept}, now there are {length}")


def shard_path(config: RelabelConfig, name: str) -> Path:
    """Returns the path of a chunk's shard. The shard exists when the chunk is finished."""
    return Path(config.output, "data", name + SUFFIXES[config.format])


def sidecar_path(config: RelabelConfig, name: str) -> Path:
    """Returns the path of the JSON file with the statistics and skipped records of a shard."""
    return Path(config.output, HIDDEN, f"{name}.json")


def journal_path(config: RelabelConfig, name: str, number: int) -> Path:
    """Returns the path of the journal of a chunk and a captioner."""
    return Path(config.output, HIDDEN, f"{name}-captioner-{number}.jsonl")


def open_journal(config: RelabelConfig, chunk: Chunk, number: int) -> Journal:
    """Opens the journal of a chunk and a captioner. Raises a `ValueError` if it belongs to other records."""
    path, header = journal_path(config, chunk.name, number), chunk.header()
    journal = Journal(path, header)
    if journal.header["records"] != header["records"]:
        raise changed(config.data, f"chunk {chunk.name} has other ids")
    if journal.is_whole and (
        len(journal.captions()) != len(chunk.records)
        or not fits(journal.header, {"group_size": int, "revision": (str, NONE)})
    ):
        raise DamagedError(path, "the captions belong to other records")
    return journal
