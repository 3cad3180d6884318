"""The input of a term: named tensors of this process and of all processes."""

from collections.abc import Mapping

import torch

from ...distributed import all_sizes, gather, rank

PATCHES = ("pixel_attention_mask", "kept_patches")  # tensors that some batches have


class Views(dict[str, torch.Tensor]):
    """
    The tensors of a batch on this process, by name. Floating point tensors are converted to at least float32.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): The tensors. The size of the first dimension, the batch dimension, may
            differ between processes.
        logit_scale (`torch.Tensor`): Scalar factor of the cosine similarities, not its logarithm.

    Attributes:
        own (`slice`): The samples of this process within the samples of all processes.
        num_samples (`int`): Number of samples of all processes.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], logit_scale: torch.Tensor) -> None:
        super().__init__({name: tensor.to(_exact(tensor)) for name, tensor in tensors.items()})
        self.logit_scale = logit_scale
        self._tensors, self._all = tensors, dict[str, torch.Tensor]()
        self._sizes = all_sizes(next(iter(tensors.values())))
        self.num_samples = sum(self._sizes)
        start = sum(self._sizes[: rank()])
        self.own = slice(start, start + self._sizes[rank()])

    def __missing__(self, name: str) -> torch.Tensor:
        raise KeyError(f"{name}: not in the batch. Add it to `needs` of the term, and to the batch or the model.")

    def all(self, name: str) -> torch.Tensor:
        """Gathers a tensor from all processes, with gradients. Every process must call it for the same names."""
        if name not in self._all:
            dtype = self[name].dtype
            self._all[name] = gather(self._tensors[name], self._sizes, dtype)
        return self._all[name]


def mask_of_patches(views: Views) -> torch.Tensor | None:
    """Returns which of the embedded patches [b, P] are not padding, for SigLIP 2 NaFlex, or `None` without samples."""
    mask, kept = (views.get(name) for name in PATCHES)
    return None if mask is None or not len(mask) else (mask if kept is None else mask.gather(1, kept)).bool()


def _exact(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
