"""What a run keeps as it goes: journals that survive being killed."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..files import PARTIAL, parse_json


def read_json(path: Path) -> Any:
    """
    Reads what [`~lotlip_hf.files.write_json`] wrote.

    Raises:
        ValueError: if it is no JSON; the message names the file and says what to do.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}). Choose another --output.") from error


class Journal:
    """
    The captions of a chunk by one captioner, a line a group, in the order in which they were answered. It takes its
    name when it is whole. What an interruption left half-written is cut off.

    Args:
        path: The file.
        header: What the first line must say, or nobody will go on from here.

    Attributes:
        groups: The captions of each group that was answered, by its number.
        header: The first line.
        is_whole: Whether every group was answered.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.partial = path, path.with_suffix(PARTIAL)
        self.is_whole = path.exists()
        self.header, self.groups = dict(header), {}
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._error: OSError | None = None
        self._size = 0
        for line in _whole_lines(path if self.is_whole else self.partial):
            if not self._size:
                self.header = json.loads(line)
            else:
                answered = json.loads(line)
                self.groups[answered["group"]] = answered["captions"]
            self._size += len(line)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Opens it for `add`. If its header says anything else, it begins anew."""
        is_new = not self._size or any(self.header.get(name) != value for name, value in header.items())
        if is_new:
            self.header |= header
            self.groups, self._size = {}, 0
        self._file = open(self.partial, "ab")
        self._file.truncate(self._size)
        if is_new:
            self._append(self.header)

    def add(self, group: int, captions: list[dict[str, Any]]) -> None:
        """
        Keeps what a group was answered; several threads may call it.

        Raises:
            OSError: if it cannot be written; the message names the file.
        """
        with self._lock:
            self._append({"group": group, "captions": captions})
            self.groups[group] = captions

    def complete(self) -> None:
        """Gives it its name."""
        self.close()
        os.replace(self.partial, self.path)
        self.is_whole = True

    def close(self) -> None:
        """Ends writing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def captions(self) -> list[dict[str, Any]]:
        """One of each record."""
        return [caption for group in sorted(self.groups) for caption in self.groups[group]]

    def _append(self, value: Mapping[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        assert self._file is not None
        try:
            self._file.write(json.dumps(value, sort_keys=True).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._error = _unwritten(self.partial, error)  # what is half-written must stay at the end
            raise self._error from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file up to the first that is no JSON object."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or not isinstance(json.loads(line), dict):
                    return
            except ValueError:
                return
            yield line


def _unwritten(path: Path, error: OSError) -> OSError:
    reason = error.strerror or error
    return OSError(
        f"{path}: cannot be written ({reason}). What was done is kept; the same command goes on from there."
    )
