"""
How the texts of a training step are drawn: one file and one line in `STRATEGIES` for each strategy.

A strategy is a frozen dataclass whose fields are options of `TrainingConfig`, by name. Called with the records of a
process's batch and a random generator for each, it draws the texts of each. A generator is seeded by (seed, epoch,
record id) alone, so draws are the same in a resumed run, and, if texts of a batch are not mixed, for any number of
processes.
"""

from typing import Any

from .sub_captions import SubCaptions
from .whole_captions import WholeCaptions

STRATEGIES: dict[str, type[Any]] = {"sub_captions": SubCaptions, "whole_captions": WholeCaptions}
