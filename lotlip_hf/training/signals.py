"""Interrupts of a training run, which saves a checkpoint before it stops."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C reaches the processes twice, from the terminal and from their launcher.
SAME_SIGNAL_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """
    A signal has stopped a training run, which has saved a checkpoint unless a second signal came.

    Args:
        signum (`int`): number of the signal, SIGINT or SIGTERM. A command that ends so has the status 128 + `signum`.
        message (`str`, *optional*): what has stopped.
    """

    def __init__(self, signum: int, message: str = "Stopped at once, without a checkpoint.") -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """
    The list that the first SIGINT or SIGTERM is put into; a second one raises [`Interrupted`]. Other threads than the
    main one receive no signals, and change no handlers.
    """
    received: list[int] = []
    first_at = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first_at
        if not received:
            received.append(number)
            first_at = time.monotonic()
            # not by the logger, whose stream may be in the middle of a line
            os.write(2, b"\nStopping after this step; the checkpoint is being written. Once more stops at once.\n")
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
