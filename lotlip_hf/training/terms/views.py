"""What a term of the objective sees: named tensors of this process and of all of them."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch

from ...distributed import all_sizes, gather, rank


class Views(Mapping[str, torch.Tensor]):
    """
    The tensors of a batch by name, samples first: those of this process as items, those of all processes by
    [`~Views.all`]. Floating point tensors are at least float32.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): this process's tensors; their length may differ between the processes.
        logit_scale (`torch.Tensor`): scalar factor on the cosine similarities, not its logarithm.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], logit_scale: torch.Tensor) -> None:
        self.logit_scale = logit_scale
        self._tensors = dict(tensors)
        self._all: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].to(_exact(self._tensors[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def all(self, name: str) -> torch.Tensor:
        """
        The tensors of all processes, one behind the other. Gradients go back to the processes that they come from.
        Every process has to call it, with the same names in the same order. A second call gathers nothing.
        """
        if name not in self._all:
            own = self._tensors[name]
            self._all[name] = gather(own, self.sizes, _exact(own))
        return self._all[name]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of samples of each process."""
        return all_sizes(next(iter(self._tensors.values())))

    @property
    def own(self) -> slice:
        """Where the samples of this process are among those of [`~Views.all`]."""
        start = sum(self.sizes[: rank()])
        return slice(start, start + self.sizes[rank()])


def _exact(tensor: torch.Tensor) -> torch.dtype:
    """The type that a term computes in, also under autocast."""
    is_float = tensor.is_floating_point()
    return torch.promote_types(tensor.dtype, torch.float32) if is_float else tensor.dtype
