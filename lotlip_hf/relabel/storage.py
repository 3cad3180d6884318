"""Reads the images of a run, and removes the folders of this machine from published texts."""

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import printable
from ..images import image_source, read_image_bytes
from .config import RelabelConfig

# Control characters except line ends and tabs, and marks of writing direction
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")
# Storage errors that may be transient. They stop the run, which can be continued, instead of skipping an image.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN}


class Storage:
    """Reads images. A damaged image is skipped; a missing folder or a transient error stops the run."""

    def __init__(self, config: RelabelConfig) -> None:
        self.data, self.limit = config.data, config.max_image_bytes
        self.folders = {path for path in (config.data, config.image_folder) if path and os.path.exists(path)}
        self.base = image_base(config)
        above = (self.base, os.path.dirname(os.path.abspath(config.data)), config.image_folder, config.image_root)
        spelled = {spell(path) for path in above if path for spell in (os.path.abspath, os.path.realpath)}
        spelled |= set(map(printable, spelled))  # paths in error messages are printable
        above = sorted(map(re.escape, spelled - {os.sep}), key=len, reverse=True)
        self._above = re.compile(rf"({'|'.join(above) or '(?!)'})(?:({re.escape(os.sep)})|(?![\w-]|\.[\w.]))")

    def name(self, path: str) -> str:
        """Returns the published path of an image: relative to the image folder, or only the file name."""
        path = os.path.abspath(path)
        if self.base is None or os.path.commonpath((self.base, path)) != self.base:
            return os.path.basename(path)
        return Path(os.path.relpath(path, self.base)).as_posix()

    def without_folders(self, text: str) -> str:
        """Removes the folders of this machine from a text."""
        return self._above.sub(lambda found: "" if found[2] else ".", text)

    def read(self, image: Any) -> Any:
        """Reads the bytes of an image file once, so that the caption and the digest belong to the same contents."""
        path = file_of(image)
        if path is None:
            return image
        return {"bytes": read_image_bytes(path, self.limit), "path": self.name(path)}

    def was_read(self, image: Any) -> None:
        """Records the folder of a readable image; if it is missing later, `check` stops the run."""
        if path := file_of(image):
            self.folders.add(os.path.dirname(os.path.abspath(path)))

    def check(self, image: Any, error: Exception) -> None:
        """Raises an `OSError` if an image is unreadable because of a missing folder or a transient error."""
        cause = error if isinstance(error, OSError) else error.__cause__
        folder = os.path.dirname(os.path.abspath(image_source(image).path or ""))
        is_gone = any(not os.path.exists(one) for one in {folder, self.data} & self.folders)
        if is_gone or isinstance(cause, MemoryError) or getattr(cause, "errno", None) in TRANSIENT:
            raise OSError(
                f"{self.data}: images have become unreadable ({as_text(error)}). The captions so far are saved. Run "
                "the same command to resume."
            ) from error


def image_base(config: RelabelConfig) -> str | None:
    """Returns the folder that published paths of images are relative to; `None` for data on the Hub."""
    data = config.data
    if not os.path.isdir(data):
        fixed = re.split(r"[*?\[{]", data, maxsplit=1)[0]
        data = os.path.dirname(fixed) or "." if fixed != data or os.path.exists(data) else None
    base = config.image_root or config.image_folder or data
    return None if base is None else os.path.abspath(base)


def file_of(image: Any) -> str | None:
    """Returns the path of an image file; `None` for images in memory, web addresses and missing images."""
    source = image_source(image).source
    return source if isinstance(source, str) and not source.startswith(("http://", "https://")) else None


def digest(content: bytes) -> str:
    """Returns a digest of the contents of a file."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def as_text(value: Any) -> str:
    """Converts a value to valid UTF-8; file names may contain other bytes."""
    return os.fsencode(str(value)).decode(errors="backslashreplace")


def raw_caption(record: Mapping[str, Any]) -> str:
    """Returns the short caption of a record, or an empty text."""
    caption = record["short_caption"]
    return writable(caption) if isinstance(caption, str) and caption.strip() else ""


def long_captions(record: Mapping[str, Any]) -> list[str]:
    """Returns the long captions of a record; empty for missing ones."""
    return [writable(caption) if isinstance(caption, str) else "" for caption in record["long_captions"] or ()]


def writable(text: str) -> str:
    """Replaces control characters and lone surrogates, which JSON allows."""
    return CONTROLS.sub(" ", text.replace("\r\n", "\n")).encode(errors="replace").decode()
