"""Heads of self-supervised terms."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from ...distributed import sum_over_ranks

EPSILON = 1e-5


class BatchNorm(nn.Module):
    """
    Normalises features [n, width] over the samples of all processes, as `torch.nn.BatchNorm1d` does in training.

    Args:
        width (`int`): Number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        number = sum_over_ranks(features.new_tensor(len(features)))
        centred = features - sum_over_ranks(features.sum(0)) / number
        variance = sum_over_ranks(centred.square().sum(0)) / number
        return centred * (variance + EPSILON).rsqrt() * self.weight + self.bias


def make_head(sizes: Sequence[int], bias: bool) -> nn.Sequential:
    """
    Creates linear layers with [`BatchNorm`] and ReLU between them.

    Args:
        sizes (`Sequence[int]`): Widths of the input, of the hidden layers and of the output.
        bias (`bool`): Whether the linear layers have biases.
    """
    if min(sizes) < 1:
        raise ValueError(f"`width` and `output` must be at least 1, got {', '.join(map(str, sizes[1:]))}.")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), BatchNorm(outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-2])
