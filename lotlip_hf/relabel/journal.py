"""Journals of a run, which survive its being killed."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import PARTIAL, LineError, append_json_line, parse_json, read_json_lines, read_regular

NONE = type(None)
# The forms of a journal's lines, for `fits`
HEADER = {"records": str}
CAPTION = ({"text": str, "attempts": int, "reasons": [str], "earlier_reasons": [str]}, {"skip": str})
GROUP = {"group": int, "captions": [CAPTION]}


class DamagedError(ValueError):
    """
    A file of a run that is not as a run writes it.

    Args:
        path (`Path`): the file.
        reason (`str`): what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: damaged ({reason}). Choose another --output.")
        self.path, self.reason = path, reason


def fits(value: Any, form: Any) -> bool:
    """
    Whether a value of JSON has a form.

    Args:
        value (`Any`): the value.
        form (`Any`):
            A type; a list of one form, that of all items; a dictionary of forms, those of keys that must be there, or
            of `str` to the form of all values; or a tuple of forms, of which one is to fit.

    Returns:
        `bool`: whether it does.
    """
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        pairs = ((one, form[str]) for one in value.values()) if str in form else _pairs(value, form)
        return all(fits(one, wanted) for one, wanted in pairs)
    return isinstance(value, form) and not (isinstance(value, bool) and form is int)


def _pairs(value: Mapping[str, Any], form: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The value and the form of each key of a form; no form fits a key that is missing."""
    return ((value[key], form[key]) if key in value else (None, ()) for key in form)


def read_json(path: Path, form: Any) -> Any:
    """
    Reads what [`~lotlip_hf.files.write_json`] wrote.

    Args:
        path (`Path`): the file.
        form (`Any`): what the value must fit, as [`fits`] takes it.

    Raises:
        DamagedError: if it is no JSON of that form.
    """
    try:
        value = parse_json(read_regular(path))
    except (FileNotFoundError, ValueError) as error:
        raise DamagedError(path, "missing" if isinstance(error, FileNotFoundError) else str(error)) from error
    if not fits(value, form):
        raise DamagedError(path, "other fields or types than a run writes")
    return value


class Journal:
    """
    The captions of a chunk by one captioner, a line a group, in the order in which they were answered. The file takes
    its name when it is whole. What an interruption left half-written is cut off.

    Args:
        path (`Path`): the file.
        header (`Mapping[str, Any]`): the expected first line; a mismatch restarts the journal.

    Attributes:
        groups (`dict[int, list[dict[str, Any]]]`): the captions of each group that was answered, by its number.
        header (`dict[str, Any]`): the first line.
        is_whole (`bool`): whether every group was answered.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.partial = path, path.with_suffix(PARTIAL)
        self.is_whole = path.exists()
        self.header, self.groups = dict(header), {}
        self._lock = threading.Lock()
        self._size = 0
        lines = read_json_lines(
            path if self.is_whole else self.partial, lambda number, value: fits(value, GROUP if number > 1 else HEADER)
        )
        with contextlib.suppress(FileNotFoundError, LineError):
            for line, value in lines:
                if not self._size:
                    self.header = value
                else:
                    self.groups[value["group"]] = value["captions"]
                self._size += len(line)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Prepares it for `add`. If its header says anything else, it begins anew."""
        is_new = not self._size or any(self.header.get(name) != value for name, value in header.items())
        if is_new:
            self.header |= header
            self.groups, self._size = {}, 0
        with open(self.partial, "ab") as file:
            file.truncate(self._size)
        if is_new:
            append_json_line(self.partial, self.header, sync=True)

    def add(self, group: int, captions: list[dict[str, Any]]) -> None:
        """
        Keeps what a group was answered; several threads may call it.

        Raises:
            OSError: if it cannot be written; the message names the file.
        """
        with self._lock:
            append_json_line(self.partial, {"group": group, "captions": captions}, sync=True)
            self.groups[group] = captions

    def complete(self) -> None:
        """Gives it its name."""
        os.replace(self.partial, self.path)
        self.is_whole = True

    def captions(self) -> list[dict[str, Any]]:
        """One of each record."""
        return [caption for group in sorted(self.groups) for caption in self.groups[group]]
