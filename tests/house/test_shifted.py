"""`--shift-weights`, the option of these tests: weights at other addresses, and nothing else changed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import tiny
from lotlip_hf import LoTLIPModel
from shifted import ShiftWeights


@pytest.fixture
def _shift() -> Any:
    hook = register_module_forward_pre_hook(ShiftWeights())
    yield
    hook.remove()


def places(model: nn.Module) -> list[int]:
    """Where each weight begins, in bytes after a multiple of 64."""
    return [parameter.data_ptr() % 64 for parameter in model.parameters()]


@pytest.mark.usefixtures("_shift")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_moved_once_and_kept(dtype: torch.dtype) -> None:
    model = LoTLIPModel(tiny.config()).to(dtype).eval()
    other, before = copy.deepcopy(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = {"input_ids": tiny.input_ids(3, 7), "pixel_values": tiny.pixel_values(3).to(dtype)}
    with torch.inference_mode():
        outputs = [one(**inputs, output_corner_embeds=True) for one in (model, other)]
    assert 0 not in places(model)
    assert sum(one != two for one, two in zip(places(model), places(other), strict=True)) > len(before) / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = places(model)
    model(**inputs, return_loss=True).loss.backward()  # they can be trained
    assert places(model) == moved
    torch.testing.assert_close(outputs[0].text_embeds, outputs[1].text_embeds, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("_shift")
def test_weights_stay_tied_and_optimisers_keep_them() -> None:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
    second(first(torch.ones(2, 8))).sum().backward()
    before = first.weight.detach().clone()
    optimizer.step()
    assert second.weight is first.weight
    assert not torch.equal(first.weight, before)


@pytest.mark.same_bits
def test_a_test_may_keep_its_bits() -> None:
    layer = nn.Linear(8, 8)
    before = layer.weight.data_ptr()
    layer(torch.ones(2, 8))
    assert layer.weight.data_ptr() == before


def test_the_option_moves_weights(request: pytest.FixtureRequest) -> None:
    layer = nn.Linear(8, 8)
    before = layer.weight.data_ptr()
    layer(torch.ones(2, 8))
    assert (layer.weight.data_ptr() != before) == request.config.getoption("--shift-weights")
