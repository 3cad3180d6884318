"""Several processes as one: rank, world size, and collectives that gradients pass through. Alone, the identity."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return world_size() > 1


def rank() -> int:
    """Number of this process, from 0; 0 when alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 when alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sizes(tensor: torch.Tensor) -> list[int]:
    """The length of `tensor` on each rank, in the order of the ranks."""
    if not is_distributed():
        return [len(tensor)]
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    return torch.cat(sizes).tolist()


def gather(tensor: torch.Tensor, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """
    The tensors of all ranks, one behind the other, with gradients: each rank gets the sum of all ranks' gradients of
    its own part.

    Args:
        tensor: [n, ...]; n may differ between the ranks and may be 0, the other dimensions may not differ.
        sizes: n of each rank ([`all_sizes`]), if known; otherwise the ranks exchange it.

    Returns:
        [sum of n, ...], the same on every rank. When alone, `tensor` itself.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.distributed import gather

    >>> gather(torch.arange(3))
    tensor([0, 1, 2])
    ```
    """
    if not is_distributed():
        return tensor
    return _Gather.apply(tensor, all_sizes(tensor) if sizes is None else sizes)  # pyright: ignore[reportReturnType]


def gather_lists(values: list[Any]) -> list[Any]:
    """The lists of all ranks, one behind the other, of anything that can be pickled; the same on every rank."""
    if not is_distributed():
        return values
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over the ranks, with gradients: each rank gets the sum of all ranks' gradients of it."""
    return _Sum.apply(tensor) if is_distributed() else tensor  # pyright: ignore[reportReturnType]


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The largest value of each element over the ranks, without gradients."""
    tensor = tensor.detach()
    if is_distributed():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def average_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """`parameter` itself, its gradient averaged over the ranks: for one that no `DistributedDataParallel` holds."""
    return _AverageGradient.apply(parameter) if is_distributed() else parameter  # pyright: ignore[reportReturnType]


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor)
    return tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        ctx.start, ctx.length = sum(sizes[: rank()]), len(tensor)
        # all_gather wants the same shape of every rank
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # gloo has no reduce_scatter for uneven parts
        return _summed(grad).narrow(0, ctx.start, ctx.length), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _summed(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _summed(grad)


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _summed(grad) / world_size()
