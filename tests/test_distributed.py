"""Collectives over real processes (gloo), and alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lotlip_hf.distributed import (
    all_sizes,
    average_gradient,
    gather,
    gather_lists,
    is_distributed,
    max_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from processes import run_processes

SIZES = [3, 0, 1, 2]  # of each rank's tensor
WIDTH = 2


def rows(num_processes: int) -> torch.Tensor:
    """All ranks' rows."""
    return torch.arange(sum(SIZES[:num_processes]) * WIDTH, dtype=torch.float).reshape(-1, WIDTH) + 1


def collectives() -> dict[str, Any]:
    """This rank's answers."""
    assert is_distributed()
    whole = rows(world_size())
    own = whole.split(SIZES[: world_size()])[rank()].clone().requires_grad_()
    answers: dict[str, Any] = {"rank": rank(), "world_size": world_size(), "sizes": all_sizes(own)}

    gathered = gather(own)
    # every rank weighs the rows in its own way
    (gathered**2 * (rank() + 1)).sum().backward()
    answers["gathered"], answers["gather_gradient"] = gathered.detach(), own.grad
    # in the middle of a graph, used in two ways, its gradient asked for
    leaf = own.detach().requires_grad_()
    inner = leaf * 2
    total = (gather(inner, dtype=torch.double) ** 2 * (rank() + 1)).sum() + (inner * rank()).sum()
    for name, tensor in (("inner_gradient", inner), ("leaf_gradient", leaf)):
        (answers[name],) = torch.autograd.grad(total, tensor, retain_graph=True)
    answers["with_known_sizes"] = gather(own.detach(), answers["sizes"])
    answers["strided"] = gather(whole.t()[:, : rank() + 1].t())
    answers["integers"] = gather(torch.full((2, 1), rank()))
    answers["nothing"] = gather(own[:0].detach())
    answers["lists"] = gather_lists([f"{rank()} of {world_size()}"] * rank())

    value = torch.tensor([1.0, 2.0]).mul_(rank() + 1).requires_grad_()
    total = sum_over_ranks(value)
    (total * (rank() + 1)).sum().backward()
    answers["sum"], answers["sum_gradient"] = total.detach(), value.grad
    answers["max"] = max_over_ranks(torch.tensor([rank(), -rank()]))

    parameter = torch.tensor(5.0, requires_grad=True)
    (average_gradient(parameter) * rank()).backward()
    answers["average_gradient"] = parameter.grad
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_collectives(num_processes: int, tmp_path: Path) -> None:
    whole, sizes = rows(num_processes), SIZES[:num_processes]
    all_ranks = range(num_processes)
    sum_of_weights = sum(all_ranks) + num_processes
    for index, answers in enumerate(run_processes(collectives, num_processes, tmp_path)):
        own = whole.split(sizes)[index]
        assert (answers["rank"], answers["world_size"], answers["sizes"]) == (index, num_processes, sizes)
        assert torch.equal(answers["gathered"], whole)
        assert torch.equal(answers["with_known_sizes"], whole)
        # the sum of all ranks' gradients: 2 x (1 + 2 + ...)
        assert torch.equal(answers["gather_gradient"], 2 * own * sum_of_weights)
        inner_gradient = 4 * own * sum_of_weights + index
        assert torch.equal(answers["inner_gradient"], inner_gradient)
        assert torch.equal(answers["leaf_gradient"], 2 * inner_gradient)
        assert torch.equal(answers["strided"], torch.cat([whole[: i + 1] for i in all_ranks]))
        assert torch.equal(answers["integers"], torch.arange(num_processes).repeat_interleave(2)[:, None])
        assert answers["nothing"].shape == (0, WIDTH)
        assert answers["lists"] == [f"{i} of {num_processes}" for i in all_ranks for _ in range(i)]
        assert torch.equal(answers["sum"], torch.tensor([1.0, 2.0]) * sum_of_weights)
        assert torch.equal(answers["sum_gradient"], torch.full((2,), float(sum_of_weights)))
        assert answers["max"].tolist() == [num_processes - 1, 0]
        torch.testing.assert_close(answers["average_gradient"], torch.tensor(sum(all_ranks) / num_processes))


def test_alone_they_are_the_identity() -> None:
    tensor = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world_size(), is_distributed()) == (0, 1, False)
    assert all_sizes(tensor) == [3]
    assert gather(tensor, dtype=torch.double).dtype == torch.double
    assert gather_lists(["alone"]) == ["alone"]
    for function in (gather, sum_over_ranks, average_gradient):
        assert function(tensor) is tensor
    assert torch.equal(max_over_ranks(tensor), tensor)
    assert not max_over_ranks(tensor).requires_grad
