"""LoRA reaches the towers that it is meant for, whatever their layers are called."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertModel

import tiny
import tiny_families
import tiny_vision
from lotlip_hf import (
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextEncoder,
    LoTLIPTextModel,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
    lora_targets,
)
from scripts import load_script

TOWERS = ("text_model", "vision_model")


def wrapped(model: nn.Module, targets: list[str]) -> set[str]:
    """The layers that LoRA is put on."""
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=targets)).get_base_model()
    return {name for name, module in lora.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("text_backbone", tiny.TEXT_BACKBONES)
@pytest.mark.parametrize("vision_backbone", tiny.VISION_BACKBONES)
def test_every_layer_of_both_towers_is_reached(text_backbone: str, vision_backbone: str) -> None:
    model = LoTLIPModel(tiny.config(text_backbone, vision_backbone))
    found = wrapped(model, lora_targets(model))
    for tower in TOWERS:
        names = [name for name in found if name.startswith(f"{tower}.")]
        assert len(names) == 4 * 2  # queries, keys, values and outputs of two layers
        assert {name.split(".layer")[1].split(".")[1] for name in names} == {"0", "1"}
    assert len(found) == 16


@pytest.mark.parametrize("name", tiny_families.marked(n for n in tiny_families.FAMILIES if "," not in n))
def test_text_encoders_of_all_families(name: str) -> None:
    model = LoTLIPTextModel(LoTLIPTextConfig(backbone_config=tiny_families.FAMILIES[name].stock_config()))
    targets = lora_targets(model)
    assert len(targets) >= 4
    assert all("attn" in target or "attention" in target.lower() for target in targets)


@pytest.mark.parametrize("family", tiny_vision.FAMILIES, ids=lambda family: family.name)
def test_image_encoders_of_all_families(family: tiny_vision.Family) -> None:
    model = LoTLIPVisionModel(family.config())
    if family.name == "convnext_atto":  # its layers are convolutions
        with pytest.raises(ValueError, match="target_modules"):
            lora_targets(model)
        return
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model)))
    lora(**family.inputs()).pooler_output.sum().backward()
    grads = [parameter.grad for parameter in lora.parameters() if parameter.requires_grad]
    assert len(grads) >= 4
    assert all(isinstance(grad, torch.Tensor) for grad in grads)


@pytest.mark.parametrize("locked", TOWERS)
def test_a_locked_tower_is_left_alone_if_asked(locked: str) -> None:
    model = LoTLIPModel(tiny.config("clip", "clip"))  # the names of both towers' layers end alike
    model.get_submodule(locked).requires_grad_(False)
    assert {name.split(".")[0] for name in wrapped(model, lora_targets(model, skip_frozen=True))} == {*TOWERS} - {
        locked
    }
    assert {name.split(".")[0] for name in lora_targets(model)} == {*TOWERS}


def test_towers_by_themselves_and_what_holds_them() -> None:
    assert len(lora_targets(LoTLIPTextModel(tiny.text_config()))) == 8
    assert len(lora_targets(LoTLIPVisionModelWithProjection(tiny.vision_config()))) == 8
    assert all(name.startswith("0.") for name in lora_targets(nn.Sequential(LoTLIPModel(tiny.config()))))
    encoder = LoTLIPTextEncoder.from_text_model(LoTLIPTextModel(tiny.text_config()), adapter="resampler")
    targets = lora_targets(encoder)
    assert wrapped(encoder, targets) == set(targets)
    with pytest.raises(ValueError, match="BertModel"):
        lora_targets(BertModel(tiny.text_config().backbone_config))


@pytest.mark.parametrize(
    ("names", "vision", "lacking"),
    [
        (["q_proj", "v_proj"], False, "text_model"),
        (["q_proj", "v_proj"], True, "text_model"),
        (["query", "value"], True, "vision_model"),
        (["query", "value"], False, None),
        (["query", "value", "q_proj"], True, None),
    ],
)
def test_the_example_says_which_tower_names_do_not_reach(names: list[str], vision: bool, lacking: str | None) -> None:
    add_lora = load_script("examples/finetune_lora.py").add_lora
    model = LoTLIPModel(tiny.config("bert", "vit"))
    if lacking is not None:
        with pytest.raises(ValueError, match=f"--target-modules .*{lacking}"):
            add_lora(model, 2, vision, names)
        return
    lora = add_lora(model, 2, vision, names)
    found = {name.split(".lora_A")[0] for name, _ in lora.named_parameters() if ".lora_A." in name}
    assert len(found) == 2 * len(names)


def test_lora_of_the_targets_trains() -> None:
    model = LoTLIPModel(tiny.config("roberta", "siglip"))
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model)))
    lora(tiny.input_ids(3, 7), tiny.pixel_values(3), return_loss=True).loss.backward()
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    assert all(isinstance(parameter.grad, torch.Tensor) for parameter in trained)
