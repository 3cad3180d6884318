"""Features of patches and tokens in the shared space, and what corner tokens attend to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import LENGTHS, NUM_CORNERS, text_config
from torch.nn import functional as F

from lotlip_hf import (
    LoTLIPModel,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPVisionModelWithProjection,
)
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.scenes.small import small_model
from tiny_families import FAMILIES, spread, texts

CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def small() -> tuple[LoTLIPModel, dict[str, torch.Tensor]]:
    """The small model, and two images with a short and two long texts each."""
    model, processor = small_model(hidden_size=32, num_hidden_layers=2)
    records = [*scenes_dataset(2)]
    inputs = processor(
        images=[record["image"] for record in records],
        text=[record["short_caption"] for record in records],
        return_tensors="pt",
    )
    long = processor(text=[record["long_captions"][0] for record in records for _ in range(2)], return_tensors="pt")
    inputs |= {f"long_{name}": value.unflatten(0, (2, 2)) for name, value in long.items() if name in inputs}
    return model.eval(), {name: value for name, value in inputs.items() if name != "token_type_ids"}


@pytest.mark.parametrize("pooled_only", [True, False])
def test_they_are_projected_and_normalised(pooled_only: bool, small: tuple[LoTLIPModel, dict[str, Any]]) -> None:
    model, inputs = small
    asked = {"output_patch_embeds": True, "output_token_embeds": True}
    with torch.no_grad():
        plain = model(**inputs, return_loss=True)
        output = model(**inputs, **asked, pooled_only=pooled_only, return_loss=True)
        images = model.vision_model(inputs["pixel_values"]).last_hidden_state[:, 1:]
        short = model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        long = model.text_model(inputs["long_input_ids"], inputs["long_attention_mask"]).last_hidden_state
    torch.testing.assert_close(output.patch_embeds, F.normalize(model.visual_projection(images), dim=-1), **CLOSE)
    for embeds, states, mask in ((output.token_embeds, short, ""), (output.long_token_embeds, long, "long_")):
        expected = F.normalize(model.text_projection(states), dim=-1)
        is_text = inputs[f"{mask}attention_mask"].bool()
        assert embeds.shape == expected.shape
        torch.testing.assert_close(embeds[is_text], expected[is_text], **CLOSE)
    torch.testing.assert_close(output.text_embeds[:, 0], output.token_embeds[:, 0], **CLOSE)  # [CLS]
    for name in ("loss", "text_embeds", "image_embeds", "corner_embeds"):
        torch.testing.assert_close(output[name], plain[name], **CLOSE)
    assert plain.patch_embeds is plain.token_embeds is plain.long_token_embeds is None


def test_the_towers_alone_project_them_too(small: tuple[LoTLIPModel, dict[str, Any]], tmp_path: Path) -> None:
    model, inputs = small
    model.save_pretrained(tmp_path)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        whole = model(**texts, pixel_values=inputs["pixel_values"], output_patch_embeds=True, output_token_embeds=True)
        text = LoTLIPTextModelWithProjection.from_pretrained(tmp_path)(**texts, output_token_embeds=True)
        vision = LoTLIPVisionModelWithProjection.from_pretrained(tmp_path)
        image = vision(inputs["pixel_values"], output_patch_embeds=True)
    torch.testing.assert_close(F.normalize(text.token_embeds, dim=-1), whole.token_embeds, **CLOSE)
    torch.testing.assert_close(F.normalize(image.patch_embeds, dim=-1), whole.patch_embeds, **CLOSE)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_pooled_states_have_none(modality: str, small: tuple[LoTLIPModel, dict[str, Any]]) -> None:
    model, inputs = small
    name = {"image": "patch", "text": "token"}[modality]
    states = {f"{modality}_states": torch.zeros(2, 32)}
    with pytest.raises(ValueError, match=f"output_{name}_embeds"):
        model(**inputs, **states, **{f"output_{name}_embeds": True})


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "deberta-v2"])
def test_what_corner_tokens_attend_to(name: str) -> None:
    """Beside words and corner tokens, they attend to nothing, and the weights are those of the backbone."""
    family = FAMILIES[name]
    config = text_config(family, num_corner_tokens=NUM_CORNERS)
    config.backbone_config._attn_implementation = "eager"
    model = spread(LoTLIPTextModel(config))
    ids, mask = texts(*LENGTHS)
    found: list[Any] = []
    handle = model.backbone.register_forward_hook(lambda *args: found.append(args[-1].attentions))
    with torch.no_grad():
        output = model(ids, mask, output_corner_embeds=True, output_attentions=True)
        plain = model(ids, mask, output_attentions=True)
    handle.remove()
    assert plain.corner_attentions is None
    first = NUM_CORNERS if family.corners_first else 0
    words, corners = slice(first, first + ids.shape[1]), slice(0, first) if first else slice(ids.shape[1], None)
    for layer, whole in zip(output.corner_attentions, found[0], strict=True):
        assert layer.shape == (len(LENGTHS), layer.shape[1], NUM_CORNERS, ids.shape[1])
        torch.testing.assert_close(layer, whole[:, :, corners, words], **CLOSE)
        assert layer.masked_select(~mask.bool()[:, None, None]).abs().max() < 1e-6
        assert layer.sum(-1).max() <= 1 + 1e-5
