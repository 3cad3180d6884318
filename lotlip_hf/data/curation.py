"""
MetaCLIP's balancing: keeps records so that each entry of a list is matched about equally often.

An entry matches a text that contains it between spaces. With n(e) matches of an entry e in all texts, each match keeps
its record with probability t / max(n(e), t). A record without a match is dropped.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from datasets import Dataset, IterableDataset
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader

from ..files import PARTIAL, FileError, is_own_file, parse_json, printable, publish, read_regular, write_json
from ..terminal import ignore_signals, progress_bar
from .record import Record, RecordError, check_record
from .records import without_images

MAX_ENTRIES = 5_000_000
MAX_WORDS = 64  # of an entry
PART = 10_000  # records of a table that are read at a time; of a stream, it is a shard
BATCH = 16  # records of a stream
SAVE_SECONDS = 5
TITLES = ("Counting", "Drawing")  # of both passes over the records
STATE, IDS, LOCK = "state.json", "ids", "lock"
PUNCTUATION = re.compile(r"[,.;:?!`]")
WHITE = str.maketrans("\t\r\n", "   ")


def spaced(text: str) -> str:
    """Returns a text with a space at both ends and around punctuation marks, and without tabs and line ends."""
    return " " + PUNCTUATION.sub(r" \g<0> ", text.translate(WHITE)) + " "


class Entries:
    """
    A list of entries, and the search for them.

    Args:
        names (`Iterable[str]`): The entries. Empty and repeated ones are left out.

    Attributes:
        names (`list[str]`): The entries without empty and repeated ones.

    Raises:
        `ValueError`: If there is no entry, there are too many, or an entry has too many words.

    Example:

    ```python
    >>> from lotlip_hf.data.curation import Entries

    >>> Entries(["cat", "red car", "car"]).matches("A red car, and a cat.")
    [0, 1, 2]
    ```
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        lengths: dict[str, set[int]] = {}  # numbers of words of the entries that start with a word
        for name in names:
            if not name or name in self._numbers:
                continue
            self._numbers[name] = len(self._numbers)
            words = name.split(" ")
            if len(words) > MAX_WORDS or len(self._numbers) > MAX_ENTRIES:
                limit = f"{MAX_WORDS} words an entry" if len(words) > MAX_WORDS else f"{MAX_ENTRIES:,} entries"
                raise ValueError(f"`metadata`: more than {limit}, at {printable(name[:50])}.")
            if len(words) > 1:
                lengths.setdefault(words[0], set()).add(len(words))
        if not self._numbers:
            raise ValueError("`metadata` has no entries. Write one a line.")
        self.names = list(self._numbers)
        self._lengths = {word: sorted(numbers) for word, numbers in lengths.items()}

    @classmethod
    def read(cls, file: str | os.PathLike) -> "Entries":
        """
        Reads a text file with one entry a line. White space at the ends of lines is removed.

        Args:
            file (`str` or `os.PathLike`): File, of at most 256 MiB.

        Returns:
            [`Entries`]: The entries.

        Raises:
            `OSError`: If the file cannot be read.
            `ValueError`: If the file is too large, not UTF-8, or its entries are refused by [`Entries`].
        """
        try:
            lines = read_regular(file).decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"`metadata`: {printable(file)} is not a text in UTF-8 ({error.reason}).") from error
        return cls(line.strip() for line in lines)

    def matches(self, text: str) -> list[int]:
        """
        Returns the entries that match a text, each once.

        Args:
            text (`str`): Text.

        Returns:
            `list[int]`: Indices of the entries in `names`, sorted.
        """
        words = spaced(text).split(" ")[1:-1]
        found = {self._numbers[word] for word in words if word in self._numbers}
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                number = self._numbers.get(" ".join(words[start : start + length]))
                if number is not None:
                    found.add(number)
        return sorted(found)


def probabilities(counts: Sequence[int], t: float) -> list[float]:
    """Returns t / max(n, t) for each number of matches n."""
    return [t / max(count, t) for count in counts]


def keep_probability(matches: Iterable[Iterable[int]], chances: Sequence[float]) -> float:
    """Returns the probability that at least one match of the texts of a record keeps it."""
    dropped = 1.0
    for text in matches:
        for entry in text:
            dropped *= 1 - chances[entry]
    return 1 - dropped


def draw(seed: int, record_id: str) -> float:
    """Returns a number in [0, 1) for a record, the same in every process and order."""
    digest = hashlib.blake2b(f"curate\0{seed}\0{record_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass
class Curation:
    """
    The result of [`curate`].

    Args:
        entries (`list[str]`): The entries.
        counts (`list[int]`): Matches of each entry in the texts of all records.
        kept_counts (`list[int]`): Matches of each entry in the texts of the kept records.
        records (`dict[str, int]`): Numbers of records: `kept`, `dropped` by a draw, `unmatched` and `broken`.
    """

    entries: list[str]
    counts: list[int]
    kept_counts: list[int]
    records: dict[str, int]


class _Part(NamedTuple):
    """The result of a part of the records in one of both passes."""

    counts: Counter[int]
    records: Counter[str]
    ids: list[str]


@dataclass
class _Parts:
    """Counts (without `chances`) or draws the records of each part."""

    records: Dataset | IterableDataset
    entries: Entries
    seed: int
    on_error: str
    chances: list[float] | None = None

    def __len__(self) -> int:
        return -(-len(self.records) // PART) if isinstance(self.records, Dataset) else self.records.num_shards

    def __getitem__(self, number: int) -> _Part | Exception:
        try:  # a DataLoader would wrap an error of its worker
            return self._result(number)
        except Exception as error:
            return error

    def _result(self, number: int) -> _Part:
        part = _Part(Counter(), Counter(), [])
        for record in self._checked(number, part.records):
            texts = [record["short_caption"], *record["long_captions"]]
            matches = list(map(self.entries.matches, texts))
            if self.chances is not None:
                if not any(matches):
                    part.records["unmatched"] += 1
                    continue
                if draw(self.seed, record["id"]) >= keep_probability(matches, self.chances):
                    part.records["dropped"] += 1
                    continue
                part.records["kept"] += 1
                part.ids.append(record["id"])
            for text in matches:
                part.counts.update(text)
        return part

    def _checked(self, number: int, numbers: Counter[str]) -> Iterator[Record]:
        if isinstance(self.records, Dataset):
            records = self.records.select(range(number * PART, min(len(self.records), (number + 1) * PART)))
        else:
            # `iter(shard)` would give the records of a shard to the first worker only.
            batches = self.records.shard(self.records.num_shards, number).iter(BATCH)
            records = (
                dict(zip(batch, values, strict=True))
                for batch in batches
                for values in zip(*batch.values(), strict=True)
            )
        for record in cast(Iterable[dict[str, Any]], records):
            try:
                checked = check_record({**record, "image": None})
                if re.search(r"[\r\n\ud800-\udfff]", checked["id"]):
                    raise RecordError(f"record {printable(checked['id'])}: the id has a line break or a surrogate.")
            except RecordError:
                if self.on_error == "raise":
                    raise
                numbers["broken"] += 1
            else:
                yield checked


def _same(value: Any) -> Any:
    return value


def curate(
    records: Dataset | IterableDataset,
    entries: Entries,
    output: str | os.PathLike,
    *,
    t: float = 20_000,
    seed: int = 0,
    on_error: str = "raise",
    num_workers: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Curation:
    """
    Writes the ids of balanced records to a file, one a line in the order of the records, and replaces an existing one.

    The records are read twice: to count the matches of the entries, and to draw. The draw of a record depends on the
    seed, its id and its texts, so that order, shards and processes do not change the ids. The state is kept in
    `<output>.partial`, so that the same call continues after an interruption, from the shard of a stream or the 10,000
    records of a table that were being read. Memory does not grow with the number of records.

    Args:
        records (`Dataset` or `IterableDataset`): Records ([`~lotlip_hf.data.records.load_records`]). All short and
            long captions are matched. Images are not decoded.
        entries (`Entries`): The entries.
        output (`str` or `os.PathLike`): Text file to write.
        t (`float`, *optional*, defaults to 20000): Number of matches from which on the matches of an entry are drawn.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"` stops at a broken record, `"skip"` counts and
            drops it. A record is broken, too, if its id has a line break.
        num_workers (`int`, *optional*, defaults to 0): Number of processes that match; 0 uses this process.
        options (`Mapping[str, Any]`, *optional*): Values by name that an interrupted call must share to be continued.

    Returns:
        [`Curation`]: The numbers of matches and records.

    Raises:
        `RecordError`: If a record is broken and `on_error` is `"raise"`.
        `ValueError`: If the interrupted call had other options, another process writes the same output, or no record
            is kept.
        `OSError`: If a file cannot be written.
    """
    output = Path(output)
    parts = _Parts(without_images(records), entries, seed, on_error)
    digest = hashlib.blake2b("\n".join(entries.names).encode(errors="surrogatepass"), digest_size=8).hexdigest()
    data = {"num_records": len(records)} if isinstance(records, Dataset) else {"num_shards": records.num_shards}
    identity = {**(options or {}), "metadata": digest, "t": t, "seed": seed, **data}
    folder = output.with_name(f"{output.name}{PARTIAL}")
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            return _curate(parts, _State(folder, identity, len(entries.names)), output, num_workers)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another process. Wait for it, or choose another output.") from error


def _curate(parts: _Parts, state: "_State", output: Path, num_workers: int) -> Curation:
    """Counts, draws, and moves the ids to `output`."""
    while state.passes < len(TITLES):
        if state.passes:
            parts.chances = probabilities(state.counts[0], state.identity["t"])
        loader = DataLoader(
            parts,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            sampler=range(state.part, len(parts)),
            num_workers=num_workers,
            collate_fn=_same,
            worker_init_fn=ignore_signals,
        )
        title = TITLES[state.passes]
        with progress_bar(total=len(parts), initial=state.part, desc=title, unit="part", delay=2) as bar:
            for part in loader:
                if isinstance(part, Exception):
                    state.save()
                    raise part
                state.add(part)
                bar.update()
        state.next()
    state.finish(output)
    numbers = {name: state.records[name] for name in ("kept", "dropped", "unmatched", "broken")}
    return Curation(parts.entries.names, *state.counts, numbers)


class _State:
    """
    The state of a curation in a folder: the number of finished passes, the number of finished parts of the next pass,
    and their results. Ids are appended to a file; those after the last saved length are dropped when it is read.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], num_entries: int) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.passes, self.part, self.length = 0, 0, 0
        self.counts = [0] * num_entries, [0] * num_entries
        self.records: Counter[str] = Counter()
        if (folder / STATE).exists():
            self._read()
        if not is_own_file(folder / IDS):
            raise FileError(folder / IDS, f"a link or no regular file. Delete {folder} to start again")
        self._ids = open(folder / IDS, "ab")
        self._ids.truncate(self.length)
        self._saved = time.monotonic()

    def _read(self) -> None:
        path = self.folder / STATE
        try:
            state = parse_json(read_regular(path))
        except FileError:
            raise
        except ValueError:
            state = None
        match state:
            case {
                "identity": dict(identity),
                "position": [int() as passes, int() as part, int() as length],
                "counts": [list(counts), list(kept)],
                "records": dict(records),
            } if all(isinstance(one, int) for one in (*counts, *kept, *records.values())):
                pass
            case _:
                raise ValueError(f"{path} is damaged. Delete {self.folder} to start again.")
        names = identity.keys() | self.identity.keys()
        if changed := sorted(name for name in names if identity.get(name) != self.identity.get(name)):
            raise ValueError(
                f"{self.folder} is from an interrupted run with another `{changed[0]}`: "
                f"{printable(identity.get(changed[0]))}, now {printable(self.identity.get(changed[0]))}. Use the same "
                "options, or delete the folder."
            )
        size = (self.folder / IDS).stat().st_size if (self.folder / IDS).is_file() else 0
        if {len(counts), len(kept)} != {len(self.counts[0])} or min(passes, part) < 0 or not 0 <= length <= size:
            raise ValueError(f"{path} is damaged. Delete {self.folder} to start again.")
        self.passes, self.part, self.length = passes, part, length
        self.counts, self.records = (counts, kept), Counter(records)

    def add(self, part: _Part) -> None:
        """Adds the result of the next part, and saves the state every few seconds."""
        counts = self.counts[self.passes]
        for entry, count in part.counts.items():
            counts[entry] += count
        if self.passes:
            self.records.update(part.records)
            self._ids.write("".join(f"{one}\n" for one in part.ids).encode())
        self.part += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def next(self) -> None:
        """Begins the next pass."""
        self.passes, self.part = self.passes + 1, 0
        self.save()

    def save(self) -> None:
        """Saves the state."""
        self._ids.flush()
        os.fsync(self._ids.fileno())
        self.length = self._ids.tell()
        position = [self.passes, self.part, self.length]
        write_json(
            self.folder / STATE,
            {"identity": self.identity, "position": position, "counts": self.counts, "records": self.records},
        )
        self._saved = time.monotonic()

    def finish(self, output: Path) -> None:
        """Renames the file of ids to `output` and removes the folder. Raises a `ValueError` if there are no ids."""
        self._ids.close()
        (self.folder / STATE).unlink()  # first: without the file of ids, it could not be continued
        if self.length:
            publish(self.folder / IDS, output)
        for name in (IDS, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # files of others are not removed
            self.folder.rmdir()
        if not self.length:
            option, advice = "metadata", "Add entries that captions contain as words, in the same case."
            if self.records["dropped"]:
                option, advice = "t", "Pass a larger number."
            unmatched = self.records["unmatched"]
            raise ValueError(f"`{option}`: no record is kept, {unmatched:,} have no match. {advice}")
