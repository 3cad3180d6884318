"""What a term of the objective sees: named tensors of this process and of all of them."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch

from ...distributed import all_sizes, gather, rank


class Views(Mapping[str, torch.Tensor]):
    """
    This process's tensors of a batch by name, samples first. Floating point tensors are at least float32.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): the tensors; their length may differ between the processes.
        logit_scale (`torch.Tensor`): scalar factor on the cosine similarities, not its logarithm.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], logit_scale: torch.Tensor) -> None:
        self.logit_scale = logit_scale
        self._tensors, self._all = tensors, dict[str, torch.Tensor]()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].to(_exact(self._tensors[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def all(self, name: str) -> torch.Tensor:
        """The tensors of all processes, gathered once, with gradients. Every process has to ask for the same names."""
        if name not in self._all:
            self._all[name] = gather(self._tensors[name], self.sizes, _exact(self._tensors[name]))
        return self._all[name]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of samples of each process."""
        return all_sizes(next(iter(self._tensors.values())))

    @property
    def own(self) -> slice:
        """Where the samples of this process are among those of all."""
        start = sum(self.sizes[: rank()])
        return slice(start, start + self.sizes[rank()])


def _exact(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
