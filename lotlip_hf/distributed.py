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


def gather(tensor: torch.Tensor, sizes: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    The tensors of all ranks, one behind the other, with gradients: each rank gets the sum of all ranks' gradients of
    its own part. The ranks add them up while the backward pass goes on with what was computed after `tensor` (a text
    tower that ran after the images'), until it needs them. A hook of `tensor` gives them to it; as any hook's, they
    are not in what one call of `torch.autograd.grad` answers for both `tensor` and what it was computed from.

    Args:
        tensor: [n, ...]; n may differ between the ranks and may be 0, the other dimensions may not differ.
        sizes: n of each rank ([`all_sizes`]), if known; otherwise the ranks exchange it.
        dtype: Type of the answer, which the gradients are added up in; by default that of `tensor`.

    Returns:
        [sum of n, ...], the same on every rank. When alone, `tensor` itself, or as `dtype`.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.distributed import gather

    >>> gather(torch.arange(3))
    tensor([0, 1, 2])
    ```
    """
    dtype = tensor.dtype if dtype is None else dtype
    if not is_distributed():
        return tensor.to(dtype)
    sizes = all_sizes(tensor) if sizes is None else sizes
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return _all_gather(tensor.to(dtype), sizes)
    pending: list[tuple[torch.Tensor, dist.Work]] = []
    start = sum(sizes[: rank()])

    def add_gradient(grad: torch.Tensor) -> torch.Tensor:
        for total, work in pending:
            work.wait()
            grad = grad + total.narrow(0, start, len(grad)).to(grad.dtype)
        pending.clear()
        return grad

    # called when all gradients of `tensor` are there and its own backward pass is the next
    tensor.register_hook(add_gradient)
    return _Gather.apply(tensor, sizes, dtype, pending)  # pyright: ignore[reportReturnType]


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


class OtherProcessError(RuntimeError):
    """Another process of the run has met an error; its own message says which."""


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Whether `flag` is true on any rank."""
    return bool(max_over_ranks(torch.tensor(int(flag), device=device)).item())


def raise_on_all_ranks(error: Exception | None, device: torch.device | None = None) -> None:
    """Raises `error`, and where another rank has one [`OtherProcessError`]; every rank calls it."""
    if any_rank(error is not None, device):
        raise error or OtherProcessError("Another process has stopped; its own message says why.")


def average_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """`parameter` itself, its gradient averaged over the ranks: for one that no `DistributedDataParallel` holds."""
    return _AverageGradient.apply(parameter) if is_distributed() else parameter  # pyright: ignore[reportReturnType]


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor)
    return tensor


def _all_gather(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    # all_gather wants the same shape of every rank
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """The gradient goes to `pending`, [(its sum over the ranks, being computed; the work to wait for)]."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        sizes: Sequence[int],
        dtype: torch.dtype,
        pending: list[tuple[torch.Tensor, dist.Work]],
    ) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.pending = tensor.shape, tensor.dtype, pending
        return _all_gather(tensor.to(dtype), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # gloo has no reduce_scatter for uneven parts
        total = grad.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(total, async_op=True)
        assert work is not None
        ctx.pending.append((total, work))
        return grad.new_zeros((), dtype=ctx.dtype).expand(ctx.shape), None, None, None


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
