"""
Strategies that draw the texts of a step. To add a strategy, write a file in this folder and list it in `STRATEGIES`.

A strategy is a frozen dataclass whose fields have the names of options of `TrainingConfig`. A strategy is called with
the records of a batch and one random generator per record, and returns the texts of each record. The seed of a
generator is (seed, epoch, record id), so that a resumed run draws the same texts. Unless a strategy mixes texts of
different records, the number of processes does not change the texts. A strategy may have a method
`negative(record, text, rng)`, which gives a negative of the record the form of its texts.
"""

from typing import Any

from .mixed import Mixed
from .sub_captions import SubCaptions
from .whole_captions import WholeCaptions

STRATEGIES: dict[str, type[Any]] = {
    "sub_captions": SubCaptions,
    "mixed": Mixed,
    "whole_captions": WholeCaptions,
}
