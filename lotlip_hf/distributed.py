"""Rank, world size and collectives with gradients. In a single process they return their input."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def is_distributed() -> bool:
    """Whether there are several processes."""
    return world_size() > 1


def rank() -> int:
    """Rank of this process, 0 for a single process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sizes(tensor: torch.Tensor) -> list[int]:
    """Length of `tensor` on each rank, in the order of the ranks."""
    if not is_distributed():
        return [len(tensor)]
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    return torch.cat(sizes).tolist()


def gather(tensor: torch.Tensor, sizes: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    Concatenates the tensors of all ranks. Gradients are summed over the ranks, and each rank gets its part of the sum.

    The ranks compute the sum while the backward pass continues elsewhere in the graph, for example in the text tower.
    A hook on `tensor` waits for the sum and adds it to the gradient. Do not pass both `tensor` and its inputs to one
    call of `torch.autograd.grad`: as with all hooks, the gradient of `tensor` then lacks the sum.

    Args:
        tensor (`torch.Tensor`): Tensor [n, ...]. n may differ between ranks and may be 0, other dimensions must agree.
        sizes (`Sequence[int]`, *optional*): n of each rank, from [`all_sizes`]. By default the ranks exchange n.
        dtype (`torch.dtype`, *optional*): Type of the result and of the summed gradients. Defaults to `tensor.dtype`.

    Returns:
        `torch.Tensor`: Tensor [sum of n, ...], the same on every rank.

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

    # Autograd calls the hook when `tensor` has all gradients, before it continues to the inputs of `tensor`.
    tensor.register_hook(add_gradient)
    return _Gather.apply(tensor, sizes, dtype, pending)  # pyright: ignore[reportReturnType]


def gather_lists(values: list[Any]) -> list[Any]:
    """Concatenates the lists of all ranks. The values must be picklable. The result is the same on every rank."""
    if not is_distributed():
        return values
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over the ranks in the forward pass, and the gradients in the backward pass."""
    return _Sum.apply(tensor) if is_distributed() else tensor  # pyright: ignore[reportReturnType]


def max_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Maximum of each element over the ranks, without gradients."""
    tensor = tensor.detach()
    if is_distributed():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


class OtherProcessError(RuntimeError):
    """Raised if another process of the run raised an error. The other process prints the error."""


def any_rank(flag: bool, device: torch.device | None = None) -> bool:
    """Whether `flag` is true on any rank."""
    return bool(max_over_ranks(torch.tensor(int(flag), device=device)).item())


def raise_on_all_ranks(error: Exception | None, device: torch.device | None = None) -> None:
    """Raises `error`, or [`OtherProcessError`] if only other ranks have an error. All ranks must call this."""
    if any_rank(error is not None, device):
        raise error or OtherProcessError("Another process failed. See its error message.")


def average_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Returns `parameter` and averages its gradient over the ranks, for use without `DistributedDataParallel`."""
    return _AverageGradient.apply(parameter) if is_distributed() else parameter  # pyright: ignore[reportReturnType]


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor)
    return tensor


def _all_gather(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    # all_gather needs the same shape on every rank
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """Appends to `pending` the sum of the gradients over the ranks, still being computed, and its handle."""

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
        # gloo has no reduce_scatter for parts of different sizes
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
