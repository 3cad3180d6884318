"""A new term of the objective is a module in a file, and a line in `TERMS`; it may have weights of its own."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lotlip_hf import cli
from lotlip_hf.distributed import world_size
from lotlip_hf.training.log import read_log
from lotlip_hf.training.terms import TERMS
from lotlip_hf.training.terms.views import Views
from seams import train_alone_and_together


class Guess(nn.Module):
    """The distance of the short texts from what a matrix makes of the images, weighted by `labels`, if any."""

    needs = frozenset({"image_embeds", "text_embeds", "labels"})

    def __init__(self, projection_dim: int = 5, power: int = 2) -> None:
        super().__init__()
        self.map = nn.Linear(projection_dim, projection_dim, bias=False)
        self.power = power

    def forward(self, views: Views) -> torch.Tensor:
        images = views.all("image_embeds")
        guesses = self.map(views["image_embeds"] - images.mean(0))
        distances = (guesses - views["text_embeds"][:, 0]).abs().pow(self.power).sum(1)
        return (views.get("labels", 1) * distances).sum() * world_size() / len(images)


def main(argv: list[str]) -> int:
    """The command, as a process runs it that knows the term."""
    TERMS["guess"] = Guess
    return cli.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        ("--terms infonce guess:0.5", ["infonce_short", "infonce_long", "guess"]),
        ("--terms guess --grad-cache-chunk 2", ["guess"]),  # which needs neither corner tokens nor the logit scale
    ],
)
def test_one_process_and_two_train_with_it(flags: str, shares: list[str], tmp_path: Path) -> None:
    words = ("--model", "scenes", *flags.split(), "--term-options", "guess.power=4")
    checkpoint = train_alone_and_together(__name__, tmp_path, *words)
    first, *_ = read_log(checkpoint.parent)
    assert first["loss"] == pytest.approx(sum(first[f"loss_{name}"] for name in shares))
    assert set(torch.load(checkpoint / "state" / "objective.pt")) == {"terms.guess.map.weight"}
