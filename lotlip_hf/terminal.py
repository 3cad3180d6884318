"""Output of commands: text without control characters, styles, tables, progress bars, errors and exit statuses."""

import contextlib
import itertools
import logging
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from typing import Any, Literal

from .files import printable

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
STYLES = {"bold": "\x1b[1m", "red": "\x1b[31m", "yellow": "\x1b[33m"}
RESET = "\x1b[0m"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
# Line below the header of a table
RULE = re.compile(r"^-+(?:  -+)*$", re.MULTILINE)
# Cursor movements of tqdm, which writes them separately
CURSOR = re.compile(r"(\n|\x1b\[A)+")


class PrintableStream:
    """
    A text stream that writes control characters as escapes ([`~lotlip_hf.files.printable`]) and removes colours. Line
    ends, tabs and the cursor movements of progress bars are kept.

    Args:
        stream (`TextIO`): Stream to write to. All other attributes are those of `stream`.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text and returns its length."""
        shown = text
        if not CURSOR.fullmatch(text):
            start = "\r" if text.startswith("\r") else ""
            parts = re.split(r"([\n\t])", COLOUR.sub("", text.removeprefix(start)))
            shown = start + "".join(part if part in ("\n", "\t") else printable(part) for part in parts)
        self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes each text."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_styled(text: str, style: Literal["bold", "red", "yellow"], stream: Any) -> None:
    """
    Writes a text, in a style if the stream is a terminal and neither `NO_COLOR` nor `TERM=dumb` is set.

    Args:
        text (`str`): Text to write. A [`PrintableStream`] removes colours and control characters from it.
        style (`str`): `"bold"`, `"red"` or `"yellow"`.
        stream (`TextIO`): Stream to write to.
    """
    terminal = stream._stream if isinstance(stream, PrintableStream) else stream
    is_styled = terminal.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    terminal.write(STYLES[style] if is_styled else "")
    stream.write(text)
    terminal.write(RESET if is_styled else "")


def print_headed(text: str, stream: Any = None) -> None:
    """Prints a text. On a terminal, headings are bold: lines without indent that end in a colon."""
    stream = stream or sys.stdout
    for line in text.splitlines(keepends=True):
        if line.rstrip().endswith(":") and not line.startswith(" "):
            write_styled(line, "bold", stream)
        else:
            stream.write(line)


def text_table(
    head: Sequence[Sequence[str]], body: Sequence[Sequence[str]], left: Collection[int] = (0,), rule: bool = True
) -> str:
    """
    Returns a table with aligned columns.

    Args:
        head (`Sequence[Sequence[str]]`): Header rows. The first of two groups columns with the same title.
        body (`Sequence[Sequence[str]]`): Rows of cells.
        left (`Collection[int]`, *optional*, defaults to `(0,)`): Columns that are aligned left; others are aligned
            right, as numbers are.
        rule (`bool`, *optional*, defaults to `True`): Whether to add a line below the header.

    Returns:
        `str`: The table.
    """
    rows = [[printable(cell) for cell in row] for row in (*head[-1:], *body)]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    groups = []
    for title, items in itertools.groupby(enumerate(head[0]), key=lambda item: item[1]) if len(head) > 1 else ():
        columns = [column for column, _ in items]
        span = sum(widths[column] for column in columns) + 2 * (len(columns) - 1)
        title = printable(title)
        widths[columns[-1]] += max(0, _width(title) - span)
        groups.append(title.center(max(span, _width(title)) - _width(title) + len(title)))
    lines = ["  ".join(groups).rstrip()] if groups else []
    for row in rows:
        padded = [(cell, " " * (width - _width(cell))) for cell, width in zip(row, widths, strict=True)]
        aligned = (cell + pad if column in left else pad + cell for column, (cell, pad) in enumerate(padded))
        lines.append("  ".join(aligned).rstrip())
    if rule:
        lines.insert(len(head), "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _width(text: str) -> int:
    """Number of terminal cells of a text. Wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in text)
    return len(text) + wide - sum(unicodedata.combining(one) > 0 for one in text)


def print_tables(text: str) -> None:
    """Prints tables, which blank lines separate. On a terminal, headers are bold."""
    for number, block in enumerate(text.split("\n\n")):
        rule = RULE.search(block)
        start = rule.start() if rule else 0
        sys.stdout.write("\n" if number else "")
        write_styled(block[:start], "bold", sys.stdout)
        sys.stdout.write(f"{block[start:]}\n")


def progress_bar(iterable: Iterable[Any] | None = None, *, unit: str, shown: bool = True, **settings: Any) -> Any:
    """
    Returns a progress bar on standard error with a description, a count, the rate and the remaining time.

    Args:
        iterable (`Iterable`, *optional*): Items to count. Without it, call `update`.
        unit (`str`): Singular of what is counted, such as `"image"`.
        shown (`bool`, *optional*, defaults to `True`): Whether to show the bar.
        **settings: Arguments of `tqdm`, such as `desc` and `total`.

    Returns:
        `tqdm`: The progress bar.
    """
    from tqdm.auto import tqdm

    total = len(iterable) if isinstance(iterable, Sized) else settings.get("total")
    style = {"unit": f" {unit}s", "bar_format": BAR if total else None, "dynamic_ncols": True}
    return tqdm(iterable, disable=not shown, **style, **settings)


class PrintableFormatter(logging.Formatter):
    """Formats log records: each text or path among the arguments is one line, and further lines are indented."""

    def format(self, record: logging.LogRecord) -> str:
        shown = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            shown.args = tuple(printable(one) if isinstance(one, str | os.PathLike) else one for one in record.args)
        return printable_lines(super().format(shown))


def printable_lines(value: object) -> str:
    """
    Returns a message with all lines but the first indented, so that no line looks like another message.

    Args:
        value (`object`): Text or error.

    Returns:
        `str`: The lines, each [`~lotlip_hf.files.printable`].
    """
    first, *others = map(printable, str(value).split("\n"))
    return "\n".join([first, *(line if line.startswith(" ") else f"  {line}" for line in others)])


class _LogHandler(logging.StreamHandler):
    """Prints warnings in yellow."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            super().emit(record)
            return
        try:
            write_styled(self.format(record) + self.terminator, "yellow", self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def printable_output(log_format: str = "%(message)s") -> Iterator[None]:
    """
    Prints all output of this context through [`PrintableStream`], that of libraries included, and the log of this
    package with [`PrintableFormatter`].

    Args:
        log_format (`str`, *optional*, defaults to `"%(message)s"`): Format of log records.
    """
    if isinstance(sys.stderr, PrintableStream):  # a command that another command called
        yield
        return
    before = sys.stdout, sys.stderr
    streams = [stream or open(os.devnull, "w") for stream in before]  # `None` if the descriptor is closed
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout, sys.stderr = map(PrintableStream, streams)
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    there = [handler for handler in handlers if getattr(handler, "stream", None) in streams]
    for handler in there:
        handler.stream = PrintableStream(handler.stream)  # pyright: ignore[reportAttributeAccessIssue]
    logger, handler = logging.getLogger("lotlip_hf"), _LogHandler()
    handler.setFormatter(PrintableFormatter(log_format))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for handler in there:
            handler.stream = handler.stream._stream  # pyright: ignore[reportAttributeAccessIssue]
        sys.stdout, sys.stderr = before


def ignore_signals(worker: int) -> None:
    """Makes a worker of a `DataLoader` ignore Ctrl-C and SIGTERM, because the main process stops its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def run(program: str, command: Callable[[], int | None]) -> int:
    """
    Runs a command.

    Args:
        program (`str`): Name of the command, which starts each message.
        command (`Callable`): Function of the command, which returns the exit status, or `None` for 0.

    Returns:
        `int`: The exit status: 2 after an error, which is printed; 128 plus the signal's number after an interruption,
        130 for Ctrl-C; 141 if the output pipe was closed.
    """
    with printable_output(f"{program}: %(message)s"):
        try:
            status = command() or 0
            sys.stdout.flush()  # raises here if the pipe is closed
            return status
        except KeyboardInterrupt as interrupt:
            print(f"{program}: interrupted.", file=sys.stderr)
            return 128 + getattr(interrupt, "signum", signal.SIGINT)  # `signum` is set by the training
        except BrokenPipeError:
            # the pipe was closed (`| head`): discard the rest of the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (ImportError, OSError, ValueError) as error:
            sys.stderr.write(f"{program}: ")
            write_styled("error:", "red", sys.stderr)
            print(f" {printable_lines(error)}", file=sys.stderr)
            return 2
