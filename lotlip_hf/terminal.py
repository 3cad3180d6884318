"""Output of commands: text without control characters, and errors as messages and exit statuses."""

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

from .files import printable

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
STYLES = {"bold": "\x1b[1m", "red": "\x1b[31m", "yellow": "\x1b[33m"}
RESET = "\x1b[0m"
# tqdm moves the cursor by these, in separate writes
CURSOR = re.compile(r"(\n|\x1b\[A)+")


class PrintableStream:
    """
    A text stream on which control characters do nothing: they are spelt as escapes ([`~lotlip_hf.files.printable`]).
    Line ends, tabs, and what progress bars move the cursor by go through; colours are left out.

    Args:
        stream (`TextIO`): the stream to write to, which has all other attributes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text; returns its length."""
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
    """Prints a text whose headings, which are lines without indent that end in a colon, are bold on a terminal."""
    stream = stream or sys.stdout
    for line in text.splitlines(keepends=True):
        if line.rstrip().endswith(":") and not line.startswith(" "):
            write_styled(line, "bold", stream)
        else:
            stream.write(line)


class PrintableFormatter(logging.Formatter):
    """A log's lines: texts and paths among the arguments are one line each, and further lines are set in."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as text."""
        shown = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            shown.args = tuple(printable(one) if isinstance(one, str | os.PathLike) else one for one in record.args)
        return printable_lines(super().format(shown))


def printable_lines(value: object) -> str:
    """
    A message of several lines, of which all but the first are set in: no part of it can pass for another message.

    Args:
        value (`object`): a text or an error.

    Returns:
        `str`: its lines, each [`~lotlip_hf.files.printable`].
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
    What is printed in this context goes through [`PrintableStream`], also by libraries, and this package's log is
    printed by [`PrintableFormatter`].

    Args:
        log_format (`str`, *optional*, defaults to `"%(message)s"`): of the log's lines.
    """
    if isinstance(sys.stderr, PrintableStream):  # a command within a command
        yield
        return
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout, sys.stderr = map(PrintableStream, before)
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    there = [handler for handler in handlers if getattr(handler, "stream", None) in before]
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


def run(program: str, command: Callable[[], int | None]) -> int:
    """
    Runs a command.

    Args:
        program (`str`): its name, which messages begin with.
        command (`Callable`): what it does; returns the exit status, or nothing for 0.

    Returns:
        `int`: the exit status: 2 after an error that it prints; 128 and the signal's number if it was interrupted, 130
        for Ctrl-C; 141 if the output's reader has stopped reading.
    """
    with printable_output(f"{program}: %(message)s"):
        try:
            status = command() or 0
            sys.stdout.flush()  # here, where its errors are met
            return status
        except KeyboardInterrupt as interrupt:
            print(f"{program}: interrupted.", file=sys.stderr)
            return 128 + getattr(interrupt, "signum", signal.SIGINT)  # as an interrupted training names it
        except BrokenPipeError:
            # The reader has stopped (`| head`). The rest of the buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (ImportError, OSError, ValueError) as error:
            sys.stderr.write(f"{program}: ")
            write_styled("error:", "red", sys.stderr)
            print(f" {printable_lines(error)}", file=sys.stderr)
            return 2
