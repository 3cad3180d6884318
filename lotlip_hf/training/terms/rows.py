"""Sums over whole rows of similarities, in the memory of a few rows."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from ...distributed import all_sizes, gather, rank
from . import pairs


def sum_of_rows(
    function: Callable[..., torch.Tensor],
    rows: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
    first: int,
    keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Sums a function of the rows of similarities. The backward pass computes the similarities again, block by block.

    Args:
        function (`Callable`): Function of blocks of similarities [r, N], one for each pair of `rows` and `columns`,
            and of a mask [r, N] of the columns that belong to each row. It returns the sum of its rows.
        rows (`Sequence[torch.Tensor]`): Tensors [b, dim] of this process.
        columns (`Sequence[torch.Tensor]`): Tensors [N, dim] of all processes.
        first (`int`): Number of the column that belongs to the first row.
        keys (`torch.Tensor`, *optional*): Keys [N] of the columns. The columns with the key of a row's own column
            belong to the row, too.
    """
    keys = torch.arange(len(columns[0]), device=columns[0].device) if keys is None else keys
    size = max(1, pairs.TILE_SIZE**2 // len(columns[0]))

    def of_block(start: int, *block: torch.Tensor) -> torch.Tensor:
        similarities = [one @ other.t() for one, other in zip(block, columns, strict=True)]
        own = keys[start : start + len(block[0])]
        return function(*similarities, own.unsqueeze(1) == keys)

    blocks = zip(*(each.split(size) for each in rows), strict=True)
    sums = [
        checkpoint(of_block, first + size * number, *block, use_reentrant=False, preserve_rng_state=False)
        for number, block in enumerate(blocks)
    ]
    return torch.stack(sums).sum()


def sum_of_matches(
    rows: torch.Tensor, columns: torch.Tensor, keys: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """
    Sums the cross entropy of rows against the columns of all processes, of which the i-th of this process belongs to
    its i-th row. Other columns with the key of that column are left out.

    Args:
        rows (`torch.Tensor`): Embeddings [n, dim]. n may differ between processes and may be 0.
        columns (`torch.Tensor`): Embeddings [n, dim].
        keys (`torch.Tensor`): Keys [n] of the columns.
        logit_scale (`torch.Tensor`): Factor of the similarities.
    """
    sizes = all_sizes(rows)
    every, every_key = gather(columns, sizes), gather(keys, sizes)
    if not len(every):
        return rows.sum()

    def of_rows(cosines: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        equal = every_key[own.int().argmax(1)].unsqueeze(1) == every_key
        logits = (logit_scale * cosines).masked_fill(equal & ~own, -torch.inf)
        return logits.logsumexp(1).sum() - logits[own].sum()

    return sum_of_rows(of_rows, [rows], [every], sum(sizes[: rank()]))
