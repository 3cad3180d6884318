"""Output of commands: text without control characters, and errors as messages and exit statuses."""

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from .files import printable

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
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
    logger, handler = logging.getLogger("lotlip_hf"), logging.StreamHandler()
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
        `int`: the exit status: 2 after an error that it prints, 130 if it was interrupted (143 by SIGTERM), 141 if the
        output's reader has stopped reading.
    """
    with printable_output(f"{program}: %(message)s"):
        try:
            status = command() or 0
            sys.stdout.flush()  # here, where its errors are met
            return status
        except KeyboardInterrupt as error:
            print(f"{program}: interrupted.", file=sys.stderr)
            return 128 + getattr(error, "signum", signal.SIGINT)
        except BrokenPipeError:
            # The reader has stopped (`| head`). The rest of the buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (ImportError, OSError, ValueError) as error:
            print(f"{program}: error: {printable_lines(error)}", file=sys.stderr)
            return 2
