"""A new pooling is a function, and a line in `POOLINGS`."""

from pathlib import Path

import pytest
import torch

from lotlip_hf import cli
from lotlip_hf.modeling.backbones_lotlip import POOLINGS
from seams import save_model, train_alone_and_together


def largest(states: torch.Tensor, mask: torch.Tensor | None, index: torch.Tensor | None) -> torch.Tensor:
    """The largest value of each feature over the text."""
    return (states if mask is None else states.masked_fill(~mask.bool().unsqueeze(-1), -torch.inf)).amax(1)


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the pooling."""
    POOLINGS["largest"] = largest
    return cli.main(argv)


@pytest.mark.slow
def test_one_process_and_two_train_and_evaluate_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POOLINGS, "largest", largest)
    model = save_model(tmp_path / "model", pooling="largest")
    train_alone_and_together(__name__, tmp_path, "--model", str(model))
