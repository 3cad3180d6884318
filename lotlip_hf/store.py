"""The cache of embeddings on disk, in a SQLite file."""

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np

from .files import is_own_file, own_folder, set_aside

logger = logging.getLogger(__name__)

FILE = "embeddings.sqlite3"
# A block contains the vectors of one call of `add`. `entries` maps each key to a block and a row of the block.
TABLES = (
    "CREATE TABLE encoders (id INTEGER PRIMARY KEY, made_by TEXT NOT NULL UNIQUE, dim INTEGER NOT NULL)",
    "CREATE TABLE blocks (id INTEGER PRIMARY KEY, encoder INTEGER NOT NULL, vectors BLOB NOT NULL)",
    "CREATE TABLE entries (encoder INTEGER NOT NULL, key BLOB NOT NULL, stamp TEXT NOT NULL, error TEXT, "
    "block INTEGER, row INTEGER, PRIMARY KEY (encoder, key)) WITHOUT ROWID",
)
# Stamps of embeddings of texts: the tokenizer truncated the text or not
CUT, WHOLE = "cut", ""
PAGE_SIZE = 16384  # bytes: a block of 32 embeddings fills a few pages
WAIT = 600  # seconds to wait for the transaction of another process
LOOKED_UP = 500  # maximum number of keys in one query; SQLite's limit is 999 values
MAX_BLOCK = 1 << 27  # bytes; written blocks are far smaller
BLOCK_ROWS = 1 << 20  # maximum number of rows in a block; location = block number * BLOCK_ROWS + row


class Held(NamedTuple):
    """
    The stored entries of some keys.

    Args:
        locations (`dict[str, int]`): Location of each key's embedding, for [`EmbeddingStore.vectors`].
        errors (`dict[str, str]`): Reason for each key without an embedding.
        stamps (`dict[str, str]`): Stamp of each key, such as a modification time; see [`EmbeddingStore.add`].
    """

    locations: dict[str, int]
    errors: dict[str, str]
    stamps: dict[str, str]


class EmbeddingStore:
    """
    Embeddings of one encoder, in a SQLite file that several encoders may share. A store is a context manager.

    Added embeddings survive a crash of the process or the machine. Several processes may read and add at the same
    time. A damaged file, or one that this class did not write, is renamed with a warning, and the store starts empty.

    Args:
        folder (`Path`): Folder of the file, created on entering.
        made_by (`str`): Fingerprint of the encoder, with all settings that change the embeddings.
        dim (`int`): Number of dimensions P of the embeddings.
        dtype (`str`, *optional*, defaults to `"float32"`): Type in the file: `"float32"`, or `"bfloat16"` for half
            the size. `bfloat16` is appended to `made_by`. Embeddings are read as float32.
        root (`Path`, *optional*, defaults to `folder`): Folder given by the user. Links between `root` and `folder`
            are renamed, not followed.
        advice (`str`, *optional*, defaults to `"pass a writable folder"`): Advice in the error if the folder is
            not writable.

    Raises:
        `OSError`: On entering or adding, if the folder is not writable.
    """

    def __init__(
        self,
        folder: Path,
        made_by: str,
        dim: int,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        root: Path | None = None,
        advice: str = "pass a writable folder",
    ) -> None:
        self.folder = folder
        self.made_by = made_by if dtype == "float32" else f"{made_by}-{dtype}"
        self.dim = dim
        self.stored_as = "<f4" if dtype == "float32" else "<u2"  # NumPy has no bfloat16
        self.root = folder if root is None else root
        self.advice = advice

    @property
    def path(self) -> Path:
        """Path of the SQLite file."""
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
            raise OSError(f"{self.path} was damaged and is renamed. Run the same command again.") from error

    def held(self, keys: Iterable[str]) -> Held:
        """
        Returns the entries of some keys.

        Args:
            keys (`Iterable[str]`): Keys.

        Returns:
            [`Held`]: The entries. Keys that are not stored are left out.
        """
        query = (
            "SELECT key, CAST(substr(stamp, 1, 1000) AS TEXT), CAST(substr(error, 1, 1000) AS TEXT), "
            f"CAST(block AS INTEGER) * {BLOCK_ROWS} + CAST(row AS INTEGER) FROM entries "
            "WHERE encoder = ? AND typeof(key) = 'blob'"
        )
        wanted = set(keys)
        values: list[Any] = [self._encoder]
        if len(wanted) <= LOOKED_UP:  # reading all entries is faster for more keys
            query += f" AND key IN ({', '.join('?' * len(wanted))})"
            values += map(os.fsencode, wanted)
        held = Held({}, {}, {})
        try:
            for name, stamp, error, location in self._connection.execute(query, values):
                if (key := os.fsdecode(name)) not in wanted:
                    continue
                if error is not None:
                    held.errors[key] = error
                elif location is not None:
                    held.locations[key] = location
                held.stamps[key] = stamp
        except sqlite3.OperationalError as error:  # a stored text is not valid UTF-8
            raise _ForeignError(str(error)) from error
        return held

    def add(self, keys: Sequence[str], vectors: np.ndarray, stamps: Sequence[str] | None = None) -> None:
        """
        Adds embeddings in one transaction, and replaces earlier ones with the same keys.

        Args:
            keys (`Sequence[str]`): N keys.
            vectors (`np.ndarray`): Embeddings [N, P].
            stamps (`Sequence[str]`, *optional*): N stamps, which are saved with the keys, such as modification times.
        """
        stamps = [""] * len(keys) if stamps is None else stamps
        vectors = np.ascontiguousarray(vectors, dtype="<f4")
        content = vectors if self.stored_as == "<f4" else _to_bfloat16(vectors)
        if len(keys) > BLOCK_ROWS:
            raise ValueError(f"`keys` has {len(keys)} keys. Add at most {BLOCK_ROWS} at a time.")
        if vectors.shape != (len(keys), self.dim):
            raise ValueError(f"`vectors` must have the shape [{len(keys)}, {self.dim}], got {list(vectors.shape)}.")
        with self._transaction() as connection:
            insert = "INSERT INTO blocks (encoder, vectors) VALUES (?, ?)"
            block = connection.execute(insert, (self._encoder, content.tobytes())).lastrowid
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
        Collects embeddings and adds them in blocks. The last block, which may be smaller, is added when the context
        ends, also after an error.

        Args:
            size (`int`): Number of embeddings in a block.

        Yields:
            `Callable`: Function of a key, its embedding [P] and its stamp.
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
        """Adds a key that has no embedding because of `error`."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, NULL, NULL)",
                (self._encoder, os.fsencode(key), stamp, error),
            )

    def keep(self, keys: Iterable[str]) -> None:
        """Deletes all entries except those of `keys`, and blocks without entries."""
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
        Reads the embeddings block by block, with one block in memory at a time.

        Args:
            numbers (`Iterable[int]`, *optional*): Block numbers. By default all blocks are read, in the order in which
                they were added.

        Yields:
            `tuple[int, np.ndarray]`: Block number, and the float32 embeddings [N, P] of the block.
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
            if not isinstance(vectors, bytes) or len(vectors) % (np.dtype(self.stored_as).itemsize * self.dim):
                raise _ForeignError("a block is not a matrix of embeddings")
            block = np.frombuffer(vectors, self.stored_as).reshape(-1, self.dim)
            block = block if self.stored_as == "<f4" else (block.astype("<u4") << 16).view("<f4")
            if not np.isfinite(block).all():
                raise _ForeignError("an embedding is not finite")
            yield number, block

    def vectors(self, locations: Sequence[int]) -> np.ndarray:
        """
        Reads the embeddings at some locations.

        Args:
            locations (`Sequence[int]`): N locations from [`held`].

        Returns:
            `np.ndarray`: Float32 embeddings [N, P].
        """
        numbers, rows = np.divmod(np.asarray(locations, np.int64), BLOCK_ROWS)
        result = np.empty((len(locations), self.dim), np.float32)
        found = 0
        for number, block in self.blocks(np.unique(numbers).tolist()):
            own = np.flatnonzero(numbers == number)
            if rows[own].max() >= len(block):
                break
            result[own] = block[rows[own]]
            found += len(own)
        if found < len(locations):
            raise _ForeignError("an entry names a missing row")
        return result

    def similarities(self, locations: Sequence[int], query: np.ndarray) -> np.ndarray:
        """
        Computes cosine similarities of stored embeddings and a query, block by block.

        Args:
            locations (`Sequence[int]`): N locations from [`held`].
            query (`np.ndarray`): Float32 embedding [P].

        Returns:
            `np.ndarray`: Float32 similarities [N].
        """
        numbers, rows = np.divmod(np.asarray(locations, np.int64), BLOCK_ROWS)
        order = np.argsort(numbers, kind="stable")
        bounds = numbers[order]
        result = np.full(len(locations), np.nan, np.float32)
        for number, block in self.blocks():
            own = order[slice(*np.searchsorted(bounds, (number, number + 1)))]
            scores = block @ query
            if len(own) and rows[own].max() >= len(scores):
                raise _ForeignError("an entry names a missing row")
            result[own] = scores[rows[own]]
        if np.isnan(result).any():
            raise _ForeignError("an entry names a missing block")
        return result

    def contents(self) -> list[tuple[str, int, int, int]]:
        """
        Lists the encoders in the file.

        Returns:
            `list[tuple]`: `made_by`, number of dimensions, number of embeddings and number of errors of each encoder.
        """
        return self._connection.execute(
            "SELECT made_by, dim, count(block), count(error) FROM encoders LEFT JOIN entries ON encoder = id "
            "GROUP BY id ORDER BY id"
        ).fetchall()

    def _use_wal(self) -> None:
        """Sets the journal mode. Retries, because SQLite fails at once if two processes set the mode of a new file."""
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
                raise _ForeignError(f"{FILE}{end} is a link or not a regular file")
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
                elif tables != TABLES:  # a view or a trigger could run foreign SQL
                    raise _ForeignError("the file has other tables")
                insert = "INSERT OR IGNORE INTO encoders (made_by, dim) VALUES (?, ?)"
                connection.execute(insert, (self.made_by, self.dim))
                query = "SELECT id, dim FROM encoders WHERE made_by = ?"
                ((self._encoder, dim),) = connection.execute(query, (self.made_by,)).fetchall()
                if dim != self.dim:
                    raise _ForeignError(f"the stored embeddings have {dim} dimensions, not {self.dim}")
        except BaseException:
            self._connection.close()
            raise
        if is_new and (old := [path.name for path in self.folder.iterdir() if (path / "entries.jsonl").is_file()]):
            logger.warning("%s: indexes of an older version are not read. Delete %s.", self.folder, ", ".join(old))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._written():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:  # SQLite itself rolls back on some errors
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Adds the name of the folder and the advice to a write error."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            if isinstance(error, OSError) and error.errno is None:  # already has the advice
                raise
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{self.folder}: cannot save embeddings there ({reason}); {self.advice}.") from error

    def _set_aside(self, reason: object) -> None:
        for end in ("", "-wal", "-shm", "-journal"):
            path = self.folder / f"{FILE}{end}"
            if os.path.lexists(path):
                set_aside(path)
        logger.warning("%s: %s. The file is renamed, and all embeddings are computed again.", self.path, reason)


def text_digest(text: str) -> str:
    """Returns the key of a text: 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _to_bfloat16(vectors: np.ndarray) -> np.ndarray:
    """Rounds finite float32 values to the nearest bfloat16, the upper 16 bits of a float32."""
    bits = vectors.view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


class _ForeignError(Exception):
    """Raised for a file that is damaged or that this class did not write."""
