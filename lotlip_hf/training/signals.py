"""Signals that stop a run after it has saved a checkpoint."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Repeated signals within this time are ignored: the terminal and the launcher both send Ctrl-C.
SAME_SIGNAL_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """
    A signal stopped a run. The run saved a checkpoint, unless a second signal stopped it at once.

    Args:
        signum (`int`): Number of the signal, SIGINT or SIGTERM. The exit status of the command is 128 + `signum`.
        message (`str`, *optional*): The message.
    """

    def __init__(self, signum: int, message: str = "Stopped at once, without a checkpoint.") -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """
    Yields a list to which the first SIGINT or SIGTERM is appended. A second signal raises [`Interrupted`]. Outside the
    main thread the list stays empty, because other threads receive no signals.
    """
    received: list[int] = []
    first_at = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first_at
        if not received:
            received.append(number)
            first_at = time.monotonic()
            # Do not use the logger here, as its stream may be in the middle of a line.
            os.write(2, b"\nStopping after this step and saving a checkpoint. Press Ctrl-C again to stop at once.\n")
        elif time.monotonic() - first_at > SAME_SIGNAL_SECONDS:
            raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
