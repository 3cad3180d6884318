"""A new way to draw captions is a class in a file, and a line in `STRATEGIES`; it may mix within a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from lotlip_hf import cli
from lotlip_hf.data.record import Record, Texts
from lotlip_hf.data.sampling import STRATEGIES, SubCaptions
from lotlip_hf.training.config import TrainingConfig, parse_arguments
from seams import train_alone_and_together


@dataclass(frozen=True)
class Pairs:
    """Two images that follow each other lend each other a long text; both are on one process."""

    num_long_texts: int = 3

    def __call__(self, records: Sequence[Record], rngs: Sequence[Random]) -> list[Texts]:
        drawn = SubCaptions(self.num_long_texts)(records, rngs)
        lent = [drawn[min(index ^ 1, len(drawn) - 1)].long[0] for index in range(len(drawn))]
        return [texts._replace(long=[*texts.long, other]) for texts, other in zip(drawn, lent, strict=True)]


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the strategy."""
    STRATEGIES["pairs"] = Pairs
    return cli.main(argv)


def test_a_strategy_takes_the_options_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "pairs", Pairs)
    assert parse_arguments("--captions pairs --num-long-texts 2".split()).draw() == Pairs(2)
    assert TrainingConfig(num_sentences=1, captioners=[1]).draw() == SubCaptions(num_sentences=1, captioners=(1,))
    for flags, word in (("pairs --captioners 0", "captioners"), ("words", "captions")):
        with pytest.raises(ValueError, match=word):
            parse_arguments(["--captions", *flags.split()])


@pytest.mark.slow
def test_one_process_and_two_train_with_it(tmp_path: Path) -> None:
    flags = ("--model", "scenes", "--captions", "pairs", "--num-long-texts", "1")
    train_alone_and_together(__name__, tmp_path, *flags)
