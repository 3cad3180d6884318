"""What a term of the objective sees: named tensors of this process and of all of them."""

from collections.abc import Mapping

import torch

from ...distributed import all_sizes, gather, rank


class Views(dict[str, torch.Tensor]):
    """
    This process's tensors of a batch by name, samples first. Floating point tensors are at least float32.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): the tensors; their length may differ between the processes.
        logit_scale (`torch.Tensor`): scalar factor on the cosine similarities, not its logarithm.

    Attributes:
        own (`slice`): the indices of this process's samples among those of all.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], logit_scale: torch.Tensor) -> None:
        super().__init__({name: tensor.to(_exact(tensor)) for name, tensor in tensors.items()})
        self.logit_scale = logit_scale
        self._tensors, self._all = tensors, dict[str, torch.Tensor]()
        self._sizes = all_sizes(next(iter(tensors.values())))
        start = sum(self._sizes[: rank()])
        self.own = slice(start, start + self._sizes[rank()])

    def __missing__(self, name: str) -> torch.Tensor:
        raise KeyError(f"{name}: a term names what it looks at in `needs`, and the model or the batch must have it")

    def all(self, name: str) -> torch.Tensor:
        """The tensors of all processes, gathered once, with gradients. Every process must ask for the same names."""
        if name not in self._all:
            dtype = self[name].dtype
            self._all[name] = gather(self._tensors[name], self._sizes, dtype)
        return self._all[name]


def _exact(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
