"""Reports of a run: mean losses in the log and in accelerate's trackers, and the training curve."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers.utils import logging

from .config import TrainingConfig
from .log import CURVE_NAME, LOG_NAME, RECALLS, RunLog, draw_curve, read_log
from .validation import RECALL_KEYS

logger = logging.get_logger(__name__)


@dataclass
class Meter:
    """Sums of losses, samples and seconds over the batches since the last line of the log."""

    sums: dict[str, float] = field(default_factory=dict)
    batches: int = 0
    samples: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Restarts the clock, so that the time since the last batch is not counted."""
        self.start = time.perf_counter()

    def add(self, losses: Mapping[str, float], samples: int) -> None:
        """Adds a batch and the time since the last batch."""
        self.sums = {name: self.sums.get(name, 0.0) + loss for name, loss in losses.items()}
        self.batches += 1
        self.samples += samples
        self.seconds += time.perf_counter() - self.start
        self.restart()

    def values(self) -> dict[str, float]:
        """Returns the mean losses and the samples per second."""
        means = {name: total / self.batches for name, total in self.sums.items()}
        return {**means, "samples_per_second": self.samples / self.seconds}


@dataclass
class Best:
    """The step of the evaluation with the highest score, and the number of evaluations after it."""

    step: int | None = None
    score: float = -math.inf
    since: int = 0

    def add(self, step: int, recalls: Mapping[str, float]) -> bool:
        """Adds an evaluation. Returns whether its score, the mean of the recalls by long captions, is the highest."""
        score = sum(recalls[name] for name in RECALL_KEYS["long"]) / len(RECALL_KEYS["long"])
        is_best = score > self.score
        if is_best:
            self.step, self.score = step, score
        self.since = 0 if is_best else self.since + 1
        return is_best


class Tracking:
    """The log and the trackers of a run. Errors in writing them do not stop the run."""

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, step: int) -> None:
        self.accelerator = accelerator
        self.output = Path(config.output)
        self.is_broken = False
        self.log = None
        if accelerator.is_main_process:
            self.log = RunLog(self.output / LOG_NAME)
            self.log.truncate(step)  # a resumed run writes the later lines again
        plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in vars(config).items()}
        accelerator.init_trackers("lotlip", config=plain)

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns the lines of evaluations in the log. Only the main process has a log."""
        if self.log is None or not self.log.path.exists():
            return []
        return [line for line in read_log(self.log.path) if not RECALLS.keys().isdisjoint(line)]

    def write(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Writes values to the log (on the main process) and to the trackers. Only the first error is reported."""
        error = None
        try:
            if self.log is not None:
                self.log.write({"step": step, "epoch": epoch, **values})
        except OSError as caught:
            error = caught
        try:
            self.accelerator.log(dict(values), step=step)
        except Exception as caught:  # every tracker raises its own exception classes
            error = error or caught
        if error is not None and not self.is_broken:
            self.is_broken = True
            logger.error(f"The log cannot be written ({error}). The run continues, but lines will be missing.")

    def close(self) -> None:
        """Closes the trackers and draws the curve."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # every tracker raises its own exception classes
                logger.error(f"Tracker {tracker.name!r} cannot be closed, so values may be missing ({error}).")
        if self.log is not None and self.log.path.exists():
            try:
                draw_curve(self.log.path, self.output / CURVE_NAME)
            except (ImportError, OSError, ValueError) as error:
                logger.warning(f"{CURVE_NAME} was not drawn: {error}")
