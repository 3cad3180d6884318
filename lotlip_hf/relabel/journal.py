"""The files in `<output>/.relabel` from which a run resumes: its options and its captions so far."""

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
# Forms (see `fits`) of the lines of a journal
HEADER = {"records": str}
CAPTION = ({"text": str, "attempts": int, "reasons": [str], "earlier_reasons": [str]}, {"skip": str})
GROUP = {"group": int, "captions": [CAPTION]}
IDENTITY = {"options": dict, "captioners": [{"model": str}]}


class DamagedError(ValueError):
    """
    Raised for a damaged or foreign file in the output of a run.

    Args:
        path (`Path`): File.
        reason (`str`): Reason.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged ({reason}). Choose another --output.")
        self.path, self.reason = path, reason


def fits(value: Any, form: Any) -> bool:
    """
    Returns whether a JSON value has a form. A form is a type, `[form of all items]`, `{required_key: form of value}`,
    `{str: form of all values}`, or a tuple of alternative forms.
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
    """Reads a JSON file. Raises a `DamagedError` if the value does not have the form."""
    try:
        value = parse_json(read_regular(path))
    except (FileNotFoundError, ValueError) as error:
        raise DamagedError(path, "missing" if isinstance(error, FileNotFoundError) else str(error)) from error
    if not fits(value, form):
        raise DamagedError(path, "unknown fields or types")
    return value


class Journal:
    """
    The captions of a chunk by one captioner, as JSON lines.

    Each line is a group, in the order in which the groups were captioned. An incomplete last line is ignored. The file
    is renamed to its final name when it is complete.

    Args:
        path (`Path`): Final path of the file.
        header (`Mapping[str, Any]`): Expected first line; a mismatch restarts the journal.

    Attributes:
        groups (`dict[int, list[dict[str, Any]]]`): Captions of each finished group, by its number.
        header (`dict[str, Any]`): First line.
        is_whole (`bool`): Whether all groups are finished.
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
        """Prepares the journal for `add`. Clears the journal if its header differs."""
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
        Saves the captions of a group. Several threads may call this method at the same time.

        Raises:
            `OSError`: If the file cannot be written.
        """
        with self._lock:
            append_json_line(self.partial, {"group": group, "captions": captions}, sync=True)
            self.groups[group] = captions

    def complete(self) -> None:
        """Renames the file to its final name."""
        os.replace(self.partial, self.path)
        self.is_whole = True

    def captions(self) -> list[dict[str, Any]]:
        """Returns the caption of each record, in the order of the records."""
        return [caption for group in sorted(self.groups) for caption in self.groups[group]]


def keep_identity(config: RelabelConfig) -> None:
    """
    Saves the options of a new run, or compares them with those of the run to resume. Raises a `ValueError` if existing
    captions depend on a changed option. The options of a captioner may change until it has written a caption.
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
                changed.append(f"captioner {number} ({before['model']}) is missing")
            elif is_kept:
                changed += _changes(f"captioner {number}: ", before, after[0])
        if has_shards and len(identity["captioners"]) > len(begun["captioners"]):
            changed.append("there are more captioners")
        if changed:
            raise ValueError(
                f"{config.output} belongs to a run with other options: {'; '.join(changed)}. Use the same options, or "
                "choose another --output."
            )
        if begun == identity:
            return
        for part in hidden.glob("part-*.json") if not any(has_begun) else ():
            part.unlink(missing_ok=True)
    write_json(path, identity)


def _changes(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Describes the options that are in both mappings and differ."""
    changed = []
    for name in sorted(before.keys() & after.keys()):
        if name in ("policies", "rules") and isinstance(before[name], Mapping):
            changed += _changes(f"{what}{name}: ", before[name], after[name])  # newer versions may have more entries
        elif before[name] != after[name]:
            changed.append(f"{what}`{name}` was {before[name]!r} and is now {after[name]!r}")
    return changed


def changed(data: str, how: str) -> ValueError:
    """Creates the error for records that differ from those of the existing output."""
    return ValueError(f"{data}: the records have changed since the run began: {how}. Choose another --output.")
