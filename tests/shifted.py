"""Weights at other addresses, as another allocator or a mapped file would have them."""

import random
from typing import Any

import torch
from torch import nn

ALIGNMENT = 64  # bytes, of what torch allocates: widths of vector registers start there


class ShiftWeights:
    """
    A hook before the forward pass of any module: moves each of its weights, once, to an address that is no multiple
    of 64 bytes. Which one is drawn, so that of two copies of a model no two weights lie alike. Values stay.
    """

    def __init__(self) -> None:
        self.draw = random.Random(0)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        with torch.inference_mode(False):  # else the weights could not be trained later
            for parameter in module.parameters(recurse=False):
                if type(parameter) is nn.Parameter and parameter.device.type == "cpu" and _is_alone(parameter):
                    parameter.data = self.shifted(parameter.data)

    def shifted(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a contiguous tensor."""
        size = tensor.element_size()
        offset = self.draw.randrange(1, ALIGNMENT // size)
        room = torch.empty(tensor.numel() + ALIGNMENT // size, dtype=tensor.dtype)
        start = -(room.data_ptr() // size) % (ALIGNMENT // size) + offset
        return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def _is_alone(parameter: nn.Parameter) -> bool:
    """Whether a weight has a storage of its own: it is no view, and was not shifted before."""
    return parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.nbytes
