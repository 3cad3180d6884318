"""Files of benchmarks: lookup of images by name, and reading of texts and JSON."""

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
    Finds files by name, and lists each folder only once.

    Args:
        roots (`Sequence[str]`): Folders that must contain the images, after links are resolved.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = roots
        self._folders: dict[Path, dict[str, str]] = {}

    def find(self, *paths: Path) -> str | None:
        """
        Returns the first of these files that exists, or `None`. Unicode normalisation and the case of the extension
        may differ, because some systems change them when they unpack archives. A name without extension matches an
        image with any extension.

        Raises:
            `ValueError`: If the file is outside of the roots.
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
        """Returns the images in a folder whose names are not in `known`."""
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
    """Whether a file name has the extension of an image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions()


def shown(names: Sequence[str], most: int = 3) -> str:
    """Lists the first names and the number of further ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_bytes(path: Path | zipfile.Path) -> bytes:
    """Reads a file, and raises an error if it is too large."""
    if isinstance(path, Path):
        return read_regular(path, MAX_FILE_BYTES)
    if path.root.getinfo(path.at).file_size > MAX_FILE_BYTES:
        raise ValueError(f"{printable(path)} is larger than {MAX_FILE_BYTES:,} bytes. Replace the file.")
    return path.read_bytes()


def read_text(path: Path | zipfile.Path) -> str:
    """Reads a UTF-8 text file. Errors name the file."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file. Errors name the file."""
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download it again.") from error


def field_of(row: Any, key: str, where: object) -> Any:
    """Returns a field of a row, or raises an error with its location if it is missing."""
    if not isinstance(row, Mapping) or key not in row:
        raise ValueError(f"{where} is not a JSON object with {key!r}. Add the field.")
    return row[key]


def string_of(row: Any, key: str, where: object) -> str:
    """Returns a string field of a row, or raises an error with its location."""
    value = field_of(row, key, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {value!r:.80} instead of a string.")
    return value


def caption_of(value: Any, where: object) -> str | None:
    """Returns a caption or `None`, or raises an error if the value has another type."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: the caption is {value!r:.80} instead of a string.")
    return value
