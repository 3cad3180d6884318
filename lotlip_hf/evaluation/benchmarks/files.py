"""Files of benchmarks: texts and JSON in them, and images that are looked up by name."""

import os
import unicodedata
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.records import check_inside
from ...files import parse_json, printable, read_regular
from ...images import MAX_FILE_BYTES, image_extensions


class ImageFinder:
    """
    Looks files up in folders that are listed once each.

    Args:
        roots (`Sequence[str]`): the folders that images must lie in, links followed.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots
        self._folders: dict[Path, dict[str, str]] = {}

    def find(self, *paths: Path) -> str | None:
        """
        The first of these files that is there. Its name may be spelled with other code points for the same letters, as
        some systems unpack archives, and its extension in capitals; a name without one stands for an image's.

        Raises:
            ValueError: if it lies outside of the roots.
        """
        for path in paths:
            names = self._names(path.parent)
            for spelling in (path.name, _spelling(path.name)):
                if spelling in names:
                    found = str(path.parent / names[spelling])
                    check_inside(found, self._roots)
                    return found
        return None

    def others(self, folder: Path, known: Collection[str]) -> list[str]:
        """The images in a folder that are none of those known by name."""
        spellings = {_spelling(name) for name in known}
        spellings |= {os.path.splitext(name)[0] for name in spellings}
        images = {name for name in self._names(folder).values() if is_image_name(name)}
        return sorted(
            name for name in images if not {_spelling(name), os.path.splitext(_spelling(name))[0]} & spellings
        )

    def _names(self, folder: Path) -> dict[str, str]:
        if folder not in self._folders:
            listed = sorted(os.listdir(folder)) if folder.is_dir() else []
            names = {name: name for name in listed}
            for name in listed:
                names.setdefault(_spelling(name), name)
            for name in filter(is_image_name, listed):
                names.setdefault(os.path.splitext(_spelling(name))[0], name)
            self._folders[folder] = names
        return self._folders[folder]


def _spelling(name: str) -> str:
    stem, extension = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + (".jpg" if extension.lower() == ".jpeg" else extension.lower())


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions()


def shown(names: Sequence[str], most: int = 3) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_bytes(path: Path | zipfile.Path) -> bytes:
    """A file's contents, or an error if it is too large."""
    if isinstance(path, Path):
        return read_regular(path, MAX_FILE_BYTES)
    if path.root.getinfo(path.at).file_size > MAX_FILE_BYTES:
        raise ValueError(f"{printable(path)}: larger than {MAX_FILE_BYTES:,} bytes.")
    return path.read_bytes()


def read_text(path: Path | zipfile.Path) -> str:
    """A text file in UTF-8, or an error that names it."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}).") from error


def read_json(path: Path) -> Any:
    """A JSON file, or an error that names it."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error}).") from error


def field_of(row: Any, key: str, where: object) -> Any:
    """A value of a row, or an error that says where it is missing."""
    if not isinstance(row, Mapping) or key not in row:
        raise ValueError(f"{where}: expected a JSON object with {key!r}.")
    return row[key]


def string_of(row: Any, key: str, where: object) -> str:
    """A string of a row, or an error that says where it is missing, or something else."""
    value = field_of(row, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be a string, got {value!r:.80}.")
    return value


def caption_of(value: Any, where: object) -> str | None:
    """A caption, `None` where it is missing, or an error if it is something else."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: expected a caption, a string, got {value!r:.80}.")
    return value
