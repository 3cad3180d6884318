"""A new term of the objective is a module in a file, and a line in `TERMS`; it may have weights of its own."""

from pathlib import Path

import pytest
import torch

from lotlip_hf import cli
from lotlip_hf.training.log import read_log
from lotlip_hf.training.terms import TERMS
from seams import train_alone_and_together
from tiny_terms import Guess


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the term."""
    TERMS["guess"] = Guess
    return cli.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [(), ("--grad-cache-chunk", "2")])
def test_one_process_and_two_train_with_it(cache: tuple[str, ...], tmp_path: Path) -> None:
    flags = ("--model", "scenes", "--terms", "infonce", "guess:0.5", "--term-options", "guess.power=4", *cache)
    checkpoint = train_alone_and_together(__name__, tmp_path, *flags)
    first, *_ = read_log(checkpoint.parent)
    shares = [first[f"loss_{name}"] for name in ("infonce_short", "infonce_long", "guess")]
    assert first["loss"] == pytest.approx(sum(shares))
    state = torch.load(checkpoint / "state" / "objective.pt")
    assert set(state) == {"terms.guess.map.weight"}
