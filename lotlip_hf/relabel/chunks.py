"""A run's records in chunks: each makes a shard, is the work of one process, and has journals of its own."""

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
PART = {"records": int}  # the form of a file that says how long a part is, for `fits`


class Chunk(NamedTuple):
    """Successive records that make a shard."""

    name: str
    records: list[dict[str, Any]]

    def header(self) -> dict[str, Any]:
        """What the chunk's journals begin with."""
        ids = json.dumps([str(record["id"]) for record in self.records]).encode()
        return {"records": hashlib.blake2b(ids, digest_size=16).hexdigest()}


class Share:
    """
    What this process does. Chunks are numbered through a part: a stream's file, or all that is no stream. Each is
    one process's, by its number alone.
    """

    def __init__(self, config: RelabelConfig, records: Records, rank: int, world_size: int) -> None:
        self.data, self.size, self.hidden = config.data, config.shard_size, Path(config.output, HIDDEN)
        self.records, self.rank, self.world_size = records, rank, world_size
        self.parts = records.num_shards if isinstance(records, IterableDataset) else 1
        # with fewer files than processes, all read all of them
        self.is_shared = self.parts < world_size
        if not isinstance(records, IterableDataset):
            self._keep_length(0, len(records))

    def chunks(self, is_done: Callable[[str, list[dict[str, Any]] | None], bool], bar: tqdm) -> Iterator[Chunk]:
        """The chunks of this process that are not done, in order."""
        for part in self._own_parts():
            bar.set_postfix_str(f"file {part + 1}/{self.parts}" if self.parts > 1 else "")
            length = self._length(part)
            if isinstance(self.records, IterableDataset):
                if length is not None and all(is_done(name, None) for name, _ in self._own_chunks(part, length)):
                    bar.update(sum(size for _, size in self._own_chunks(part, length)))
                else:
                    yield from self._stream(part, is_done, bar)
                continue
            for name, size in self._own_chunks(part, len(self.records)):
                start = int(name.split("-")[1]) * self.size
                # a table's rows are not read, for images may be in them
                at_hand = self.records[start : start + size] if isinstance(self.records, list) else None
                if is_done(name, at_hand):
                    bar.update(size)
                else:
                    yield Chunk(name, at_hand or _rows(self.records, start, start + size))

    def _stream(
        self, part: int, is_done: Callable[[str, list[dict[str, Any]] | None], bool], bar: tqdm
    ) -> Iterator[Chunk]:
        assert isinstance(self.records, IterableDataset)
        stream, length = iter(self.records.shard(self.parts, part)), 0
        while rows := list(itertools.islice(stream, self.size)):
            name = _chunk_name(part, length // self.size)
            length += len(rows)
            if self._is_own(name) and is_done(name, rows):
                bar.update(len(rows))
            elif self._is_own(name):
                yield Chunk(name, rows)
        self._keep_length(part, length)

    def names(self) -> list[str] | None:
        """Of all processes' chunks; `None` if a part has not been read to its end."""
        lengths = [self._length(part) for part in range(self.parts)]
        if None in lengths:
            return None
        return [name for part, length in enumerate(lengths) for name, _ in self._chunks(part, length or 0)]

    def total(self) -> int | None:
        """Records of this process; `None` if a part has not been read to its end."""
        lengths = {part: self._length(part) for part in self._own_parts()}
        if None in lengths.values():
            return None
        return sum(size for part, length in lengths.items() for _, size in self._own_chunks(part, length or 0))

    def _own_parts(self) -> range:
        return range(self.parts) if self.is_shared else range(self.rank, self.parts, self.world_size)

    def _chunks(self, part: int, length: int) -> list[tuple[str, int]]:
        starts = range(0, length, self.size)
        return [(_chunk_name(part, start // self.size), min(self.size, length - start)) for start in starts]

    def _own_chunks(self, part: int, length: int) -> list[tuple[str, int]]:
        return [(name, size) for name, size in self._chunks(part, length) if self._is_own(name)]

    def _is_own(self, name: str) -> bool:
        return not self.is_shared or sum(map(int, name.split("-"))) % self.world_size == self.rank

    def _length(self, part: int) -> int | None:
        path = self.hidden / f"part-{part:05d}.json"
        return read_json(path, PART)["records"] if path.exists() else None

    def _keep_length(self, part: int, length: int) -> None:
        kept = self._length(part)
        if kept is None:
            write_json(self.hidden / f"part-{part:05d}.json", {"records": length})
        elif kept != length:
            raise changed(self.data, f"there were {kept} and are {length}")


def _rows(records: Dataset, start: int, stop: int) -> list[dict[str, Any]]:
    columns = records[start:stop]
    return [{name: column[row] for name, column in columns.items()} for row in range(stop - start)]


def _chunk_name(part: int, number: int) -> str:
    return f"{part:05d}-{number:05d}"


def shard_path(config: RelabelConfig, name: str) -> Path:
    """The shard of a chunk, which is there when all work on the chunk is done."""
    return Path(config.output, "data", name + SUFFIXES[config.format])


def sidecar_path(config: RelabelConfig, name: str) -> Path:
    """The file beside a shard that holds its statistics and what was skipped."""
    return Path(config.output, HIDDEN, f"{name}.json")


def journal_path(config: RelabelConfig, name: str, number: int) -> Path:
    """The journal of a chunk and a captioner."""
    return Path(config.output, HIDDEN, f"{name}-captioner-{number}.jsonl")


def open_journal(config: RelabelConfig, chunk: Chunk, number: int) -> Journal:
    """Opens the journal of a chunk and a captioner; one of other records is refused."""
    path, header = journal_path(config, chunk.name, number), chunk.header()
    journal = Journal(path, header)
    if journal.header["records"] != header["records"]:
        raise changed(config.data, f"those of {chunk.name} are others")
    if journal.is_whole and (
        len(journal.captions()) != len(chunk.records)
        or not fits(journal.header, {"group_size": int, "revision": (str, NONE)})
    ):
        raise DamagedError(path, "captions of other records")
    return journal
