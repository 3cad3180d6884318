"""Relevance of tokens: against finite differences in the attention of one layer, and with each family's attentions."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lotlip_hf import LoTLIPTextConfig, LoTLIPTextModel
from lotlip_hf.attribution import eager, relevance
from lotlip_hf.scenes.small import small_model
from tiny_families import FAMILIES, marked, spread, texts

TEXTS = ["A large red star is in the center. A blue circle is above the star.", "a tiny green cross"]


@pytest.mark.parametrize("layer", [0, 1])
def test_it_is_attention_times_finite_differences(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = small_model(hidden_size=16, num_hidden_layers=2)
    model, image = model.double(), F.normalize(torch.randn(16, dtype=torch.double), dim=0)
    inputs = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    attention = model.text_model.backbone.encoder.layer[layer].attention.self
    step = 1e-5

    def similarity(*change: int, by: float = 0.0) -> tuple[torch.Tensor, Any]:
        def forward(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            _, weights = own(states, *args, **kwargs)
            values = attention.value(states).unflatten(-1, (4, 4)).transpose(1, 2)  # [N, heads, L, 4]
            weights = weights.clone()
            weights[change] += by
            return (weights @ values).transpose(1, 2).flatten(2), weights

        own = attention.forward
        with monkeypatch.context() as patch:
            if change:
                patch.setattr(attention, "forward", forward)
            output = model.get_text_features(**inputs, output_corner_embeds=False, output_attentions=True)
        return F.normalize(output.pooler_output, dim=-1) @ image, output.attentions

    with eager(model):
        value, attentions = similarity()
        found = relevance(value, attentions[layer : layer + 1])
        assert found.shape == (2, attentions[0].shape[-1], attentions[0].shape[-1])
        torch.testing.assert_close(relevance(value, attentions), sum(relevance(value, [one]) for one in attentions))
        with torch.no_grad():
            for text, row, column in [(0, 0, 3), (0, 0, 9), (0, 4, 2), (1, 0, 1), (1, 2, 3)]:
                expected = 0.0
                for head in range(4):
                    index = (text, head, row, column)
                    upper, lower = (similarity(*index, by=by)[0][text] for by in (step, -step))
                    expected += attentions[layer][index] * (upper - lower) / (2 * step) / 4
                torch.testing.assert_close(found[text, row, column], expected, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_attentions_of_a_family_have_gradients(name: str) -> None:
    config = LoTLIPTextConfig(backbone_config=FAMILIES[name].stock_config(), num_corner_tokens=2)
    model = spread(LoTLIPTextModel(config)).eval()
    ids, mask = texts(7, 4)
    with torch.no_grad():
        before = model(ids, mask).pooler_output
    with eager(model):
        output = model(ids, mask, output_attentions=True)
        found = relevance(output.pooler_output.sum(-1), output.attentions)
    assert found.shape == (2, 7, 7)
    assert found.abs().max() > 0
    assert not found[1].masked_select(~mask[1].bool()).any()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, mask).pooler_output, before)
