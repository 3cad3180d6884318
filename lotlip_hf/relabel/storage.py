"""Reading the images of a run, and what of their paths is published."""

import errno
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from ..files import printable
from ..images import image_source, read_image_bytes
from .config import RelabelConfig

# Control characters but line ends and tabs, and marks that turn the direction of what follows
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")
# Errors of a storage that may be gone in a minute: the run stops, and no image is skipped.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN}


class Storage:
    """
    The folders that the images are read from. An image is skipped for good only if the image is at fault: if a folder
    goes away, the run stops.
    """

    def __init__(self, config: RelabelConfig) -> None:
        self.data, self.limit = config.data, config.max_image_bytes
        self.folders = {path for path in (config.data, config.image_folder) if path and os.path.exists(path)}
        self.base = image_base(config)
        above = (self.base, os.path.dirname(os.path.abspath(config.data)), config.image_folder, config.image_root)
        spelled = {spell(path) for path in above if path for spell in (os.path.abspath, os.path.realpath)}
        spelled |= set(map(printable, spelled))  # as messages have them
        above = sorted(map(re.escape, spelled - {os.sep}), key=len, reverse=True)
        self._above = re.compile(rf"({'|'.join(above) or '(?!)'})(?:({re.escape(os.sep)})|(?![\w.-]))")

    def name(self, path: str) -> str:
        """A path as it is published: from the image folder on, or the file's own name."""
        path = os.path.abspath(path)
        if self.base is None or os.path.commonpath((self.base, path)) != self.base:
            return os.path.basename(path)
        return Path(os.path.relpath(path, self.base)).as_posix()

    def unplaced(self, text: str) -> str:
        """A text as it is published: without the folders that the data lie in."""
        return self._above.sub(lambda found: "" if found[2] else ".", text)

    def read(self, image: Any) -> Any:
        """The image with its file's bytes: the same bytes are captioned and digested."""
        path = file_of(image)
        if path is None:
            return image
        return {"bytes": read_image_bytes(path, self.limit), "path": self.name(path)}

    def was_read(self, image: Any) -> None:
        """Remembers the folder of an image that was there."""
        if path := file_of(image):
            self.folders.add(os.path.dirname(os.path.abspath(path)))

    def check(self, image: Any, error: Exception) -> None:
        """Raises an `OSError` if what went wrong with the image may be well in a minute."""
        cause = error if isinstance(error, OSError) else error.__cause__
        folder = os.path.dirname(os.path.abspath(image_source(image).path or ""))
        is_gone = any(not os.path.exists(one) for one in {folder, self.data} & self.folders)
        if is_gone or isinstance(cause, MemoryError) or getattr(cause, "errno", None) in TRANSIENT:
            raise OSError(
                f"{self.data}: images cannot be read any more ({as_text(error)}). What was done is kept; the same "
                "command goes on from there."
            ) from error


def image_base(config: RelabelConfig) -> str | None:
    """The folder that paths of images in the output start from; `None` for data on the Hub."""
    data = config.data
    if not os.path.isdir(data):
        fixed = re.split(r"[*?\[{]", data, maxsplit=1)[0]
        data = os.path.dirname(fixed) or "." if fixed != data or os.path.exists(data) else None
    base = config.image_root or config.image_folder or data
    return None if base is None else os.path.abspath(base)


def file_of(image: Any) -> str | None:
    """The path of a stored image's file; `None` if its bytes are at hand, it is on the web, or there is none."""
    source = image_source(image).source
    return source if isinstance(source, str) and not source.startswith(("http://", "https://")) else None


def digest(content: bytes) -> str:
    """Identifies the contents of a file."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def as_text(value: Any) -> str:
    """A value as a text that can be written, whatever bytes a file's name holds."""
    return os.fsencode(str(value)).decode(errors="backslashreplace")


def writable(text: str) -> str:
    """A text without the control characters and halves of surrogate pairs that JSON may hold."""
    return CONTROLS.sub(" ", text.replace("\r\n", "\n")).encode(errors="replace").decode()
