"""What a run keeps in `<output>/.relabel`, so that it can go on: its options and the captions so far."""

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import PARTIAL, LineError, append_json_line, parse_json, read_json_lines, read_regular, write_json
from .config import RelabelConfig

HIDDEN = ".relabel"

NONE = type(None)
# The forms of a journal's lines, for `fits`
HEADER = {"records": str}
CAPTION = ({"text": str, "attempts": int, "reasons": [str], "earlier_reasons": [str]}, {"skip": str})
GROUP = {"group": int, "captions": [CAPTION]}
IDENTITY = {"options": dict, "captioners": [{"model": str}]}


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
    Whether a value of JSON has a form: a type; a list of one form, that of all items; a dictionary of forms, those of
    keys that must be there, or of `str` to the form of all values; or a tuple of forms, of which one is to fit.
    """
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(fits(one, form[str]) for one in value.values())
        return all(key in value and fits(value[key], wanted) for key, wanted in form.items())
    return isinstance(value, form) and not (isinstance(value, bool) and form is int)


def read_json(path: Path, form: Any) -> Any:
    """Reads what `write_json` wrote; a `DamagedError` if it does not fit the form."""
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


def keep_identity(config: RelabelConfig) -> None:
    """
    Compares the options with those that the output was begun with, as far as something was done with them: those of
    a captioner that has not begun may change, and so may all while nothing has.
    """
    hidden = Path(config.output, HIDDEN)
    path = hidden / "config.json"
    identity = {"options": config.identity(), "captioners": config.captioner_identities()}
    identity = json.loads(json.dumps(identity))
    has_shards = any(Path(config.output, "data").glob("[!.]*"))
    if path.exists():
        begun = read_json(path, IDENTITY)
        has_begun = [
            has_shards or any(hidden.glob(f"*-captioner-{number}.*")) for number in range(len(begun["captioners"]))
        ]
        changed = []
        if any(has_begun):
            changed += _changes("", begun["options"], identity["options"])
        for number, (before, is_kept) in enumerate(zip(begun["captioners"], has_begun, strict=True)):
            after = identity["captioners"][number : number + 1]
            if is_kept and not after:
                changed.append(f"captioner {number} ({before['model']}) is left out")
            elif is_kept:
                changed += _changes(f"captioner {number}: ", before, after[0])
        if has_shards and len(identity["captioners"]) > len(begun["captioners"]):
            changed.append("there are more captioners")
        if changed:
            raise ValueError(
                f"{config.output} was begun with other options: {'; '.join(changed)}. Give the same, or choose "
                "another --output."
            )
        if begun == identity:
            return
        for part in hidden.glob("part-*.json") if not any(has_begun) else ():
            part.unlink(missing_ok=True)
    write_json(path, identity)


def _changes(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The options that both have and that differ."""
    changed = []
    for name in sorted(before.keys() & after.keys()):
        if name in ("policies", "rules") and isinstance(before[name], Mapping):
            changed += _changes(f"{what}{name}: ", before[name], after[name])  # a newer version may have more of them
        elif before[name] != after[name]:
            changed.append(f"{what}`{name}` was {before[name]!r} and is {after[name]!r}")
    return changed


def changed(data: str, how: str) -> ValueError:
    """The error for records that are others than the output was begun with."""
    return ValueError(f"{data}: the records have changed since the output was begun: {how}. Choose another --output.")
