"""Reads untrusted files safely, escapes texts for terminals and Markdown, and writes files atomically."""

import contextlib
import errno
import json
import logging
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# Default limit in bytes of a file, a line or a record that is read into memory
MAX_BYTES = 1 << 28
# Maximum number of characters of a text. Tokenizers need about 30 bytes per character, even if they truncate the text.
MAX_CHARACTERS = 1 << 24
PARTIAL = ".partial"
DAMAGED = ".damaged"


class OutsideError(ValueError):
    """Raised for a path that leads out of the allowed folder."""


class FileError(ValueError):
    """
    Raised for a file that is refused.

    Args:
        path (`str` or `os.PathLike`): File.
        reason (`str`): Reason, without a full stop.
    """

    def __init__(self, path: str | os.PathLike, reason: str) -> None:
        super().__init__(f"{printable(os.fspath(path))}: {reason}.")
        self.reason = reason


def printable(value: object) -> str:
    """
    Escapes a text for a terminal: control characters, line ends and marks of writing direction.

    Args:
        value (`object`): Text, path, or any other object that has a `str()`.

    Returns:
        `str`: One line of printable characters.

    Example:

    ```python
    >>> from lotlip_hf.files import printable

    >>> printable("cat\\x1b[2J.png")
    'cat\\\\x1b[2J.png'
    ```
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(value))


def markdown_text(value: object) -> str:
    """
    Escapes a text for Markdown: paragraphs, headings and table cells, but not code spans, which show escapes.

    Args:
        value (`object`): Text, path, or any other object that has a `str()`.

    Returns:
        `str`: One line of printable characters with escaped Markdown and HTML.

    Example:

    ```python
    >>> from lotlip_hf.files import markdown_text

    >>> markdown_text("<b>dog</b> | [park](http://a.b)")
    '&lt;b&gt;dog&lt;/b&gt; \\\\| \\\\[park\\\\](http://a.b)'
    ```
    """
    text = printable(value).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]{}|!~$])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)  # an underscore inside a word is not markup
    return re.sub(r"^(\d*)([-+=#](?!\d)|[.)](?!\S))", r"\1\\\2", text)  # list, heading or rule


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks."""
    return " ".join(str(error).split())


def inside(folder: str | os.PathLike, path: str | os.PathLike) -> str:
    """
    Joins a folder and a path, and checks that the file is in the folder after links are resolved.

    Args:
        folder (`str` or `os.PathLike`): Folder.
        path (`str` or `os.PathLike`): Path relative to the folder, or absolute.

    Returns:
        `str`: The joined path; its links are not resolved.

    Raises:
        `OutsideError`: If the file is not in the folder.
        `ValueError`: If `path` is not a valid path.
    """
    joined = os.path.join(folder, path)
    root, target = os.path.realpath(folder), os.path.realpath(joined)
    if os.path.commonpath((root, target)) != root:
        raise OutsideError(f"{printable(path)} leads out of {printable(folder)}.")
    return joined


def is_inside(folders: Iterable[str | os.PathLike], path: str | os.PathLike) -> bool:
    """
    Tells whether a file is in one of several folders after links are resolved.

    Args:
        folders (`Iterable[str]`): Folders.
        path (`str` or `os.PathLike`): Absolute path of the file, or path relative to the working directory.

    Returns:
        `bool`: Whether the file is in one of the folders.
    """
    file = os.path.join(os.getcwd(), path)  # `abspath` would shorten `link/..` to the folder of the link
    for folder in folders:
        with contextlib.suppress(OutsideError):
            inside(folder, file)
            return True
    return False


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """
    Opens a regular file for reading. Refuses devices and pipes without waiting for a writer.

    Args:
        path (`str` or `os.PathLike`): File.

    Returns:
        `BinaryIO`: The open file.

    Raises:
        `OSError`: If the file cannot be opened or is a folder.
        `FileError`: If the file is a device or a pipe.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise FileError(path, "not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def is_own_file(path: Path) -> bool:
    """Tells whether a file is safe to write to: it is missing, or a regular file without links to it."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def set_aside(path: Path) -> Path:
    """Renames an unusable file or link, and returns the new path."""
    aside = path.with_name(f"{path.name}{DAMAGED}-{uuid.uuid4().hex[:8]}")
    os.rename(path, aside)
    return aside


def own_folder(root: Path, *names: str) -> Path:
    """
    Creates the folder `root/name/...` with its parents. If the path of one of `names` is a file or a link, it is
    renamed with a warning.

    Args:
        root (`Path`): Folder given by the user.
        names (`str`): Names of the nested folders below `root`.

    Returns:
        `Path`: The innermost folder.

    Raises:
        `OSError`: If a folder cannot be created.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root
    for name in names:
        folder = folder / name
        set_aside_unless_folder(folder)
        folder.mkdir(exist_ok=True)
    return folder


def set_aside_unless_folder(path: Path) -> None:
    """Renames a file or link (also a link to a folder) at the path of a new folder, and logs a warning."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        reason = "is a link, which is not followed" if path.is_symlink() else "is not a folder"
        logger.warning("%s %s. It is renamed to %s.", path, reason, set_aside(path).name)


def read_regular(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """
    Reads a whole regular file, up to a maximum size.

    Args:
        path (`str` or `os.PathLike`): File.
        limit (`int`, *optional*, defaults to 256 MiB): Maximum size in bytes.

    Returns:
        `bytes`: Contents of the file.

    Raises:
        `OSError`: If the file cannot be read.
        `FileError`: If the file is larger than `limit` or not a regular file.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else b""
        if len(content) > limit or (not content and os.fstat(file.fileno()).st_size):
            raise FileError(path, f"larger than {limit:,} bytes")
        return content


def parse_json(data: str | bytes) -> Any:
    """
    Parses JSON from an untrusted source.

    Args:
        data (`str` or `bytes`): JSON text.

    Returns:
        `Any`: The value.

    Raises:
        `ValueError`: If the text is not JSON, not Unicode, or nested too deeply for Python's parser.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_tensors(path: str | os.PathLike, limit: int = MAX_BYTES) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """
    Reads a safetensors file from an untrusted source.

    Args:
        path (`str` or `os.PathLike`): File.
        limit (`int`, *optional*, defaults to 256 MiB): Maximum size in bytes.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]`: The tensors on the CPU, and the texts beside them.

    Raises:
        `OSError`: If the file cannot be read.
        `FileError`: If the file is larger than `limit`, not such a file, or has numbers that are not finite.
    """
    from safetensors.torch import load  # imports torch

    content = read_regular(path, limit)
    try:
        tensors = load(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if not all(one.isfinite().all() for one in tensors.values()):
            raise ValueError("its numbers are not finite")
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:  # those of torch for unknown types
        raise FileError(path, f"not a usable file of safetensors ({printable(error)})") from error
    return tensors, header.get("__metadata__") or {}


def write_tensors(
    path: str | os.PathLike, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors, and texts beside them, to a safetensors file, atomically."""
    from safetensors.torch import save

    with replacing(Path(path)) as file:
        file.write(save({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, metadata))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """
    Opens a temporary file, which is renamed to `path` when it is complete and on disk.

    Args:
        path (`Path`): File to write. An existing file or link is replaced.

    Yields:
        `BinaryIO`: The open temporary file.

    Raises:
        `OSError`: If the file cannot be written.
    """
    # A unique name: several processes may write to the same `path`.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # without errno the message is already complete
            raise OSError(f"{path}: cannot be written ({error.strerror or error}).") from error
        raise


def publish(written: Path, target: Path) -> None:
    """Syncs a file or folder to disk, and renames it to `target`, which must be free or an empty folder."""

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    for path in (*written.rglob("*"), written):
        sync(path)
    os.replace(written, target)
    sync(target.parent)


@contextlib.contextmanager
def all_or_nothing(target: Path) -> Iterator[Path]:
    """
    Provides a temporary path for a file or folder, which is renamed to `target` if the context ends without an error.

    Args:
        target (`Path`): Final path, which must be free or an empty folder.

    Yields:
        `Path`: Temporary path to write to.

    Raises:
        `OSError`: If the file or folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        path = Path(temporary) / target.name
        try:
            yield path
            publish(path, target)
        except Exception as error:
            # A failed write raises `SafetensorError` in safetensors, and a plain `Exception` in tokenizers.
            if isinstance(error, SafetensorError) or type(error) is Exception:
                raise OSError(f"{target}: cannot be written ({printable(error)}).") from error
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(f"{target}: cannot be written ({error.strerror or error}).") from error
            raise


def check_output(output: str | os.PathLike, *, overwrite: bool = False, folder: bool = False) -> None:
    """
    Checks before long work that an output can be written.

    Args:
        output (`str` or `os.PathLike`): Path of the output.
        overwrite (`bool`, *optional*, defaults to `False`): Whether the file may exist.
        folder (`bool`, *optional*, defaults to `False`): Whether the output is a folder. An empty folder may exist,
            and the parents of the folder may be missing.

    Raises:
        `FileExistsError`: If the output exists and must not be overwritten.
        `NotADirectoryError`: If the parent folder of a file is missing, or a parent is a file.
    """
    path = Path(output).absolute()
    above = next((one for one in path.parents if one.exists()), path)
    if not above.is_dir():
        raise NotADirectoryError(f"{output}: {above} is a file. Choose another folder.")
    if folder:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{output}: exists already. Choose another name or delete it.")
        return
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or pipe"
        raise FileExistsError(f"{output} is {kind}. Choose the name of a file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists already. Choose another name or pass --overwrite (`overwrite=True`).")
    if above != path.parent:
        raise NotADirectoryError(f"{path.parent}: no such folder. Create it, or choose another path for {path.name}.")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    with replacing(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode())


class LineError(ValueError):
    """
    Raised for a damaged line of a JSON lines file. An incomplete last line does not count as damaged.

    Args:
        path (`Path`): File.
        number (`int`): Line number, from 1.
        line (`bytes`): Contents of the line.
    """

    def __init__(self, path: Path, number: int, line: bytes) -> None:
        super().__init__(f"{path}, line {number} is damaged: {line[:80]!r}.")
        self.path, self.number, self.line = path, number, line


def read_json_lines(
    path: Path, fits: Callable[[int, Any], bool] = lambda number, value: True, limit: int = MAX_BYTES
) -> Iterator[tuple[bytes, Any]]:
    """
    Reads a JSON lines file. Skips an incomplete last line, so that [`append_json_line`] may write at the same time.

    Args:
        path (`Path`): File.
        fits (`Callable[[int, Any], bool]`, *optional*): Check of a line, by its number (from 1) and its value.
        limit (`int`, *optional*, defaults to 256 MiB): Maximum length of a line in bytes.

    Yields:
        `tuple[bytes, Any]`: Line with its line end, and its value.

    Raises:
        `OSError`: If the file cannot be read.
        `LineError`: If a line is not JSON, fails the check or is too long.
    """
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(limit), b""), 1):
            if not line.endswith(b"\n") and len(line) < limit:
                return
            try:
                value = parse_json(line)
            except ValueError as error:
                raise LineError(path, number, line) from error
            if not line.endswith(b"\n") or not fits(number, value):
                raise LineError(path, number, line)
            yield line, value


def append_json_line(path: Path, value: Any, *, sync: bool = False) -> None:
    """
    Appends a value to a JSON lines file. Replaces an incomplete last line, which a killed process may have left.

    Args:
        path (`Path`): File, created with the first line.
        value (`Any`): Value to append.
        sync (`bool`, *optional*, defaults to `False`): Whether to wait until the line is on disk.

    Raises:
        `OSError`: If the line cannot be written. Earlier lines stay intact.
    """
    line = json.dumps(value).encode() + b"\n"
    try:
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
                file.seek(0)
                size = file.read().rfind(b"\n") + 1
                file.truncate(size)
            try:
                while line:
                    line = line[file.write(line) :]
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error}).") from error
