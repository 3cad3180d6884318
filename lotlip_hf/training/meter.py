"""Means of a run's losses, and its speed, since the last line of the log."""

import time
from collections.abc import Sequence
from typing import Any


class Meter:
    """
    Sums over batches; the arguments are those of an earlier meter ([`Meter.state`]) to go on from.

    Args:
        sums: Of the loss and of its shares of short and of long texts.
        batches: Batches added.
        samples: Their samples.
        seconds: The time that they took.
    """

    def __init__(
        self, sums: Sequence[float] = (0.0, 0.0, 0.0), batches: int = 0, samples: int = 0, seconds: float = 0.0
    ) -> None:
        self.sums, self.batches, self.samples, self.seconds = list(sums), batches, samples, seconds
        self.restart()

    def state(self) -> dict[str, Any]:
        """The arguments of a meter that goes on from here."""
        return {"sums": self.sums, "batches": self.batches, "samples": self.samples, "seconds": self.seconds}

    def add(self, losses: Sequence[float], samples: int) -> None:
        """Adds a batch: its losses, as `sums`, its samples, and the time since the last one."""
        self.sums = [total + loss for total, loss in zip(self.sums, losses, strict=True)]
        self.batches += 1
        self.samples += samples
        self.seconds += time.perf_counter() - self.start
        self.restart()

    def restart(self) -> None:
        """Leaves the time since the last batch out."""
        self.start = time.perf_counter()

    def values(self) -> dict[str, float]:
        """The mean losses and the samples per second."""
        names = ("loss", "loss_short", "loss_long")
        means = {name: total / self.batches for name, total in zip(names, self.sums, strict=True)}
        return {**means, "samples_per_second": self.samples / self.seconds}
