"""Files and names from outside: which may be opened, how much is read, how they are shown; and files written whole."""

import contextlib
import errno
import json
import logging
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

# Bytes of a file, a line or a record that are read into memory at once, where no option says otherwise
MAX_BYTES = 1 << 28
# Characters of a text that is encoded. Tokenizers take about thirty bytes for each, however few tokens are kept.
MAX_CHARACTERS = 1 << 24
PARTIAL = ".partial"
DAMAGED = ".damaged"


class OutsideError(ValueError):
    """A path that leads out of the folder that it must lie in."""


class FileError(ValueError):
    """
    A file that is not read.

    Args:
        path (`str` or `os.PathLike`): the file.
        reason (`str`): why.
    """

    def __init__(self, path: str | os.PathLike, reason: str) -> None:
        super().__init__(f"{printable(os.fspath(path))}: {reason}.")
        self.reason = reason


def printable(value: object) -> str:
    """
    A text as one line that a terminal shows and does not act on.

    Args:
        value (`object`): a text, a path, or anything with `str()`.

    Returns:
        `str`: the text; control characters, line ends and marks of writing direction are spelt as escapes.

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
    A text as one line that Markdown and HTML show as it is, in a paragraph, a heading or a cell of a table. Not for a
    code span, where escapes are no escapes.

    Args:
        value (`object`): a text, a path, or anything with `str()`.

    Returns:
        `str`: [`printable`] text with its markup escaped.

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
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)  # inside a word it is no markup
    return re.sub(r"^(\d*)([-+=#](?!\d)|[.)](?!\S))", r"\1\\\2", text)  # a list, a heading or a rule


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def inside(folder: str | os.PathLike, path: str | os.PathLike) -> str:
    """
    The path of a file that must lie in a folder, links followed.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        path (`str` or `os.PathLike`): relative to the folder, or absolute.

    Returns:
        `str`: `folder` and `path` joined.

    Raises:
        OutsideError: if the file lies elsewhere.
        ValueError: if it is no path at all.
    """
    joined = os.path.join(folder, path)
    root, target = os.path.realpath(folder), os.path.realpath(joined)
    if os.path.commonpath((root, target)) != root:
        raise OutsideError(f"{printable(path)} leads out of {printable(folder)}.")
    return joined


def lies_in(folders: Iterable[str | os.PathLike], path: str | os.PathLike) -> bool:
    """
    Whether a file lies in one of several folders, links followed.

    Args:
        folders (`Iterable[str]`): the folders.
        path (`str` or `os.PathLike`): the file; a relative path starts from the working directory.

    Returns:
        `bool`: whether it does.
    """
    file = os.path.join(os.getcwd(), path)  # not `abspath`, which would take `link/..` for the folder of the link
    for folder in folders:
        with contextlib.suppress(OutsideError):
            inside(folder, file)
            return True
    return False


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """
    Opens a file to read, unless it is a device or a pipe; never waits for a writer.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        `BinaryIO`: the open file.

    Raises:
        OSError: if it cannot be opened, or is a folder.
        FileError: if it is a device or a pipe.
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
    """Whether a file may be written to: it is missing, or a regular file that has no other name."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def set_aside(path: Path) -> Path:
    """Renames a file that cannot be used, or the link itself, and returns its new path."""
    aside = path.with_name(f"{path.name}{DAMAGED}-{uuid.uuid4().hex[:8]}")
    os.rename(path, aside)
    return aside


def own_folder(root: Path, *names: str) -> Path:
    """
    A folder to write to, made if need be.

    Args:
        root (`Path`): a folder that the user named.
        names (`str`): the folders below it, one in the other; what there is no folder is renamed, with a warning.

    Returns:
        `Path`: the folder.

    Raises:
        OSError: if it cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root
    for name in names:
        folder = folder / name
        set_aside_no_folder(folder)
        folder.mkdir(exist_ok=True)
    return folder


def set_aside_no_folder(path: Path) -> None:
    """Renames what lies where a folder is to be made and is none, a link to one too, with a warning."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        reason = "is a link, which is not followed" if path.is_symlink() else "is no folder"
        logger.warning("%s %s; it is now %s.", path, reason, set_aside(path).name)


def read_regular(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """
    Reads a file whole, unless it is too large.

    Args:
        path (`str` or `os.PathLike`): the file.
        limit (`int`, *optional*, defaults to 256 MiB): the most bytes that are read.

    Returns:
        `bytes`: its contents.

    Raises:
        OSError: if it cannot be read.
        FileError: if it is larger, or not a regular file.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else b""
        if len(content) > limit or (not content and os.fstat(file.fileno()).st_size):
            raise FileError(path, f"larger than {limit:,} bytes")
        return content


def parse_json(data: str | bytes) -> Any:
    """
    Parses JSON from outside.

    Args:
        data (`str` or `bytes`): the text.

    Returns:
        `Any`: the value.

    Raises:
        ValueError: if it is not JSON, not Unicode, or nested deeper than Python's parser goes.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """
    A file to write that takes its name when it is whole, whenever the process or the machine stops.

    Args:
        path (`Path`): the file; what there is stays until then. A link there is replaced, not followed.

    Raises:
        OSError: if it cannot be written; the message names it.
    """
    # several processes may write the same
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # not one that says already what happened
            raise OSError(f"{path}: cannot be written ({error.strerror or error}).") from error
        raise


def publish(written: Path, target: Path) -> None:
    """Gives a file or folder its name when all of it is on the disk; what there is must be an empty folder."""

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
    A path to write a folder or file to that becomes `target` when it is whole, by [`publish`].

    Args:
        target (`Path`): a name that is free, or an empty folder.

    Raises:
        OSError: if it cannot be written; the message names it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        path = Path(temporary) / target.name
        try:
            yield path
            publish(path, target)
        except Exception as error:
            # safetensors has an error of its own for what cannot be written, and tokenizers raises `Exception` itself
            if isinstance(error, SafetensorError) or type(error) is Exception:
                raise OSError(f"{target}: cannot be written ({printable(error)}).") from error
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(f"{target}: cannot be written ({error.strerror or error}).") from error
            raise


def check_output(output: str | os.PathLike, *, overwrite: bool = False, folder: bool = False) -> None:
    """
    Finds out before the long work whether its result can be written.

    Args:
        output (`str` or `os.PathLike`): the file to be.
        overwrite (`bool`, *optional*, defaults to `False`): whether the file may be there already.
        folder (`bool`, *optional*, defaults to `False`):
            Whether it is a folder, made with those above it. It may be there if it is empty.

    Raises:
        FileExistsError: if something is there already that is not to be overwritten.
        NotADirectoryError: if its folder is not there, or the path leads through a file.
    """
    path = Path(output).absolute()
    above = next((one for one in path.parents if one.exists()), path)
    if not above.is_dir():
        raise NotADirectoryError(f"{output}: {above} is a file; choose another folder.")
    if folder:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{output}: exists already; choose another name or remove it.")
        return
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{output}: {'a folder' if path.is_dir() else 'a device or pipe'}, not a file to write.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists already; choose another name, or --overwrite (`overwrite=True`).")
    if above != path.parent:
        raise NotADirectoryError(f"{path.parent}: no such folder to write {path.name} in.")


def write_json(path: Path, value: Any) -> None:
    """Writes a value by [`replacing`]."""
    with replacing(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1).encode())


class LineError(ValueError):
    """
    A line of a file of JSON lines that is damaged, but for a last one that was written in part.

    Args:
        path (`Path`): the file.
        number (`int`): the line, from 1.
        line (`bytes`): what it holds.
    """

    def __init__(self, path: Path, number: int, line: bytes) -> None:
        super().__init__(f"{path}, line {number}: damaged, got {line[:80]!r}.")
        self.path, self.number, self.line = path, number, line


def read_json_lines(
    path: Path, fits: Callable[[int, Any], bool] = lambda number, value: True, limit: int = MAX_BYTES
) -> Iterator[tuple[bytes, Any]]:
    """
    Reads JSON lines, also while [`append_json_line`] writes them: half a line at the end is left out.

    Args:
        path (`Path`): the file.
        fits (`Callable[[int, Any], bool]`, *optional*): whether the value of a line, numbered from 1, is as expected.
        limit (`int`, *optional*, defaults to 256 MiB): the most bytes of a line.

    Returns:
        `Iterator[tuple[bytes, Any]]`: each line with its end, and its value.

    Raises:
        OSError: if the file cannot be read.
        LineError: at a line that is no JSON, does not fit, or is too long.
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
    Appends a value to a file of JSON lines. It replaces half a line at the end, which a killed process may have left.

    Args:
        path (`Path`): the file; made with the first line.
        value (`Any`): the value.
        sync (`bool`, *optional*, defaults to `False`): whether to wait until the disk holds it.

    Raises:
        OSError: if it cannot be written; the message names the file, and the lines before are intact.
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
