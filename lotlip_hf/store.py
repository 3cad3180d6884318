"""The cache of embeddings on disk, known by the encoder that made them and by what they are of."""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from .files import is_own_file, own_folder, set_aside

logger = logging.getLogger(__name__)

FILE = "embeddings.sqlite3"
# Vectors that are added together lie in one block. `entries` says which row of which block is whose.
TABLES = (
    "CREATE TABLE encoders (id INTEGER PRIMARY KEY, made_by TEXT NOT NULL UNIQUE, dim INTEGER NOT NULL)",
    "CREATE TABLE blocks (id INTEGER PRIMARY KEY, encoder INTEGER NOT NULL, vectors BLOB NOT NULL)",
    "CREATE TABLE entries (encoder INTEGER NOT NULL, key BLOB NOT NULL, stamp TEXT NOT NULL, error TEXT, "
    "block INTEGER, row INTEGER, PRIMARY KEY (encoder, key)) WITHOUT ROWID",
)
# Stamps of the embeddings of texts: whether the text was cut
CUT, WHOLE = "cut", ""
PAGE_SIZE = 16384  # bytes: a block of 32 embeddings takes a few pages
WAIT = 600  # seconds for another process's transaction
LOOKED_UP = 500  # keys of one query, at most; SQLite takes 999 values
MAX_BLOCK = 1 << 27  # bytes, far above what is written
BLOCK_ROWS = 1 << 20  # the most rows of a block: a place is a block's number times this, and the row


class Held(NamedTuple):
    """
    What the store holds of some keys.

    Args:
        places (`dict[str, int]`): by key, where its embedding is, for [`EmbeddingStore.vectors`].
        errors (`dict[str, str]`): by key, why it has no embedding.
        stamps (`dict[str, str]`): by key, the text that was added with either.
    """

    places: dict[str, int]
    errors: dict[str, str]
    stamps: dict[str, str]


class EmbeddingStore:
    """
    Embeddings by one encoder in a folder, which may hold those by others too; used as a context manager.

    It is a SQLite file: what was added survives the process and the machine, and several processes may read and add.
    A file that this class did not write or that is damaged is renamed, with a warning, and the store begins empty.

    Args:
        folder (`Path`): where the file is; made on entering.
        made_by (`str`): the encoder's fingerprint, and what else decides on the embeddings.
        dim (`int`): the number of dimensions P of its embeddings.
        root (`Path`, *optional*):
            The folder that the user named, by default `folder`. What lies between the two may not be a link.
        advice (`str`, *optional*): what the error says to do if the folder cannot be written to.

    Raises:
        OSError: on entering or adding, if the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        made_by: str,
        dim: int,
        *,
        root: Path | None = None,
        advice: str = "choose a folder that can be written to",
    ) -> None:
        self.folder = folder
        self.made_by = made_by
        self.dim = dim
        self.root = folder if root is None else root
        self.advice = advice

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    def __enter__(self) -> "EmbeddingStore":
        with self._written():
            own_folder(self.root, *self.folder.relative_to(self.root).parts)
            try:
                self._connect()
            except (sqlite3.DatabaseError, _ForeignError) as error:
                if isinstance(error, sqlite3.OperationalError):  # a full disk, no permission, a lock
                    raise
                self._set_aside(error)
                self._connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        if isinstance(error, sqlite3.DatabaseError | _ForeignError) and not isinstance(
            error, sqlite3.OperationalError
        ):
            self._set_aside(error)
            raise OSError(f"{self.path}: was damaged; run the same again.") from error

    def held(self, keys: Iterable[str]) -> Held:
        """
        What is held of these keys.

        Args:
            keys (`Iterable[str]`): the keys.

        Returns:
            [`Held`]: those that are there.
        """
        query = (
            "SELECT key, CAST(substr(stamp, 1, 1000) AS TEXT), CAST(substr(error, 1, 1000) AS TEXT), "
            f"CAST(block AS INTEGER) * {BLOCK_ROWS} + CAST(row AS INTEGER) FROM entries "
            "WHERE encoder = ? AND typeof(key) = 'blob'"
        )
        wanted = set(keys)
        values: list[Any] = [self._encoder]
        if len(wanted) <= LOOKED_UP:  # more are found sooner by reading all
            query += f" AND key IN ({', '.join('?' * len(wanted))})"
            values += map(os.fsencode, wanted)
        held = Held({}, {}, {})
        try:
            for name, stamp, error, place in self._connection.execute(query, values):
                if (key := os.fsdecode(name)) not in wanted:
                    continue
                if error is not None:
                    held.errors[key] = error
                elif place is not None:
                    held.places[key] = place
                held.stamps[key] = stamp
        except sqlite3.OperationalError as error:  # a text that is none
            raise _ForeignError(str(error)) from error
        return held

    def add(self, keys: Sequence[str], vectors: np.ndarray, stamps: Sequence[str] | None = None) -> None:
        """
        Adds embeddings, which replace earlier ones of the same keys. All are there afterwards, or none.

        Args:
            keys (`Sequence[str]`): N keys.
            vectors (`np.ndarray`): their embeddings, of shape [N, P].
            stamps (`Sequence[str]`, *optional*): N texts to keep with them.
        """
        stamps = [""] * len(keys) if stamps is None else stamps
        vectors = np.ascontiguousarray(vectors, dtype="<f4")
        if len(keys) > BLOCK_ROWS:
            raise ValueError(f"`keys` are {len(keys)}; add at most {BLOCK_ROWS} at a time.")
        if vectors.shape != (len(keys), self.dim):
            raise ValueError(f"`vectors` must have the shape [{len(keys)}, {self.dim}], got {list(vectors.shape)}.")
        with self._transaction() as connection:
            insert = "INSERT INTO blocks (encoder, vectors) VALUES (?, ?)"
            block = connection.execute(insert, (self._encoder, vectors.tobytes())).lastrowid
            connection.executemany(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, NULL, ?, ?)",
                [
                    (self._encoder, os.fsencode(key), stamp, block, row)
                    for row, (key, stamp) in enumerate(zip(keys, stamps, strict=True))
                ],
            )

    @contextmanager
    def adding(self, size: int) -> Iterator[Callable[[str, np.ndarray, str], None]]:
        """
        Adds embeddings as they come, so many at a time, and what is left when the context ends, by an error too.

        Args:
            size (`int`): how many are added together.

        Yields:
            `Callable`: takes a key, its embedding [P] and its stamp.
        """
        waiting: list[tuple[str, np.ndarray, str]] = []

        def add_waiting() -> None:
            if waiting:
                keys, vectors, stamps = zip(*waiting, strict=True)
                waiting.clear()
                self.add(keys, np.stack(vectors), stamps)

        def add(key: str, vector: np.ndarray, stamp: str = "") -> None:
            waiting.append((key, vector, stamp))
            if len(waiting) == size:
                add_waiting()

        try:
            yield add
        finally:
            add_waiting()

    def add_error(self, key: str, error: str, stamp: str = "") -> None:
        """Adds the reason why a key has no embedding."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, NULL, NULL)",
                (self._encoder, os.fsencode(key), stamp, error),
            )

    def keep(self, keys: Iterable[str]) -> None:
        """Drops all entries but those of `keys`, and the blocks that none is left of."""
        query = "SELECT key FROM entries WHERE encoder = ?"
        rows = self._connection.execute(query, (self._encoder,))
        names = {os.fsencode(key) for key in keys}
        others = [name for (name,) in rows if name not in names]
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM entries WHERE encoder = ? AND key = ?", [(self._encoder, name) for name in others]
            )
            connection.execute(
                "DELETE FROM blocks WHERE encoder = ? AND id NOT IN "
                "(SELECT block FROM entries WHERE encoder = ? AND block IS NOT NULL)",
                (self._encoder, self._encoder),
            )

    def blocks(self, numbers: Iterable[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """
        Embeddings block by block, one in memory at a time.

        Args:
            numbers (`Iterable[int]`, *optional*): the blocks; by default all, in the order in which they were added.

        Yields:
            `tuple[int, np.ndarray]`: the block's number and its embeddings, float32, of shape [N, P].
        """
        query = "SELECT id, vectors FROM blocks WHERE encoder = ? AND length(vectors) <= ?"
        values = (self._encoder, MAX_BLOCK)
        if numbers is None:
            rows: Iterable[tuple[int, bytes]] = self._connection.execute(query, values)
        else:
            rows = (
                row
                for n in numbers
                for row in self._connection.execute(f"{query} AND id = ?", (*values, n)).fetchall()
            )
        for number, vectors in rows:
            if not isinstance(vectors, bytes) or len(vectors) % (4 * self.dim):
                raise _ForeignError("a block is no matrix of embeddings")
            block = np.frombuffer(vectors, "<f4").reshape(-1, self.dim)
            if not np.isfinite(block).all():
                raise _ForeignError("an embedding is not finite")
            yield number, block

    def vectors(self, places: Sequence[int]) -> np.ndarray:
        """
        Embeddings by their places.

        Args:
            places (`Sequence[int]`): N places, as [`held`] gives them.

        Returns:
            `np.ndarray`: float32, of shape [N, P].
        """
        numbers, rows = np.divmod(np.asarray(places, np.int64), BLOCK_ROWS)
        result = np.empty((len(places), self.dim), np.float32)
        found = 0
        for number, block in self.blocks(np.unique(numbers).tolist()):
            own = np.flatnonzero(numbers == number)
            if rows[own].max() >= len(block):
                break
            result[own] = block[rows[own]]
            found += len(own)
        if found < len(places):
            raise _ForeignError("an entry names a row that is not there")
        return result

    def similarities(self, places: Sequence[int], query: np.ndarray) -> np.ndarray:
        """
        The cosine similarities of embeddings, read block by block.

        Args:
            places (`Sequence[int]`): N places, as [`held`] gives them.
            query (`np.ndarray`): a normalised embedding, float32, of shape [P].

        Returns:
            `np.ndarray`: float32, of shape [N].
        """
        numbers, rows = np.divmod(np.asarray(places, np.int64), BLOCK_ROWS)
        order = np.argsort(numbers, kind="stable")
        bounds = numbers[order]
        result = np.full(len(places), np.nan, np.float32)
        for number, block in self.blocks():
            own = order[slice(*np.searchsorted(bounds, (number, number + 1)))]
            scores = block @ query
            if len(own) and rows[own].max() >= len(scores):
                raise _ForeignError("an entry names a row that is not there")
            result[own] = scores[rows[own]]
        if np.isnan(result).any():
            raise _ForeignError("an entry names a block that is not there")
        return result

    def contents(self) -> list[tuple[str, int, int, int]]:
        """
        What the file holds.

        Returns:
            `list[tuple]`: for each encoder `made_by`, the number of dimensions, of embeddings, and of errors.
        """
        return self._connection.execute(
            "SELECT made_by, dim, count(block), count(error) FROM encoders LEFT JOIN entries ON encoder = id "
            "GROUP BY id ORDER BY id"
        ).fetchall()

    def _use_wal(self) -> None:
        """Sets the journal's mode; SQLite does not wait if several processes do so with a new file at once."""
        for tries_left in range(40, -1, -1):
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if not tries_left:
                    raise
                time.sleep(0.05)

    def _connect(self) -> None:
        for end in ("", "-wal", "-shm", "-journal"):
            if not is_own_file(self.folder / f"{FILE}{end}"):
                raise _ForeignError(f"{FILE}{end} is a link or no file")
        is_new = not self.path.exists()
        self._connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        try:
            self._connection.execute("PRAGMA trusted_schema = OFF")
            self._connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
            self._use_wal()
            self._connection.execute("PRAGMA synchronous = NORMAL")
            with self._transaction() as connection:
                schema = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")
                tables = tuple(sql for (sql,) in schema.fetchmany(len(TABLES) + 1))
                if not tables:
                    for sql in TABLES:
                        connection.execute(sql)
                elif tables != TABLES:  # a view or a trigger would run the SQL of its author
                    raise _ForeignError("it has other tables")
                insert = "INSERT OR IGNORE INTO encoders (made_by, dim) VALUES (?, ?)"
                connection.execute(insert, (self.made_by, self.dim))
                query = "SELECT id, dim FROM encoders WHERE made_by = ?"
                ((self._encoder, dim),) = connection.execute(query, (self.made_by,)).fetchall()
                if dim != self.dim:
                    raise _ForeignError(f"its embeddings have {dim} dimensions, the encoder's {self.dim}")
        except BaseException:
            self._connection.close()
            raise
        if is_new and (old := [path.name for path in self.folder.iterdir() if (path / "entries.jsonl").is_file()]):
            logger.warning("%s: indexes of an older version are not read; remove %s.", self.folder, ", ".join(old))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._written():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:  # SQLite ends it by itself on some errors
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _written(self) -> Iterator[None]:
        """An error in this context says which folder cannot be written to, and what to do."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            if isinstance(error, OSError) and error.errno is None:  # it says so already
                raise
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{self.folder}: cannot keep embeddings there ({reason}); {self.advice}.") from error

    def _set_aside(self, reason: object) -> None:
        for end in ("", "-wal", "-shm", "-journal"):
            path = self.folder / f"{FILE}{end}"
            if os.path.lexists(path):
                set_aside(path)
        logger.warning("%s: %s. It is renamed, and its embeddings are computed again.", self.path, reason)


class _ForeignError(Exception):
    """A file that this class did not write; the message says what is wrong."""
