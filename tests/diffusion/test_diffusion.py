"""Text encoders swapped in diffusion pipelines: what a pipeline can do, it can do after the swap."""

import copy
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

import tiny
import tiny_clip
import tiny_diffusion
from lotlip_hf import LoTLIPModel, LoTLIPTextModel, LoTLIPTextModelWithProjection, LoTLIPTokenizer, from_backbones
from lotlip_hf.diffusion.stretch import stretch_positions, stretch_text_model
from lotlip_hf.diffusion.swap import CLIPTextEncoder, swap_text_encoder
from lotlip_hf.diffusion.text_encoder import LoTLIPTextEncoder
from lotlip_hf.diffusion.tokenizers import CLIPPromptTokenizer, LoTLIPPromptTokenizer
from scripts import load_script
from tiny_diffusion import picture, pipeline, same

# Every kind of pipeline, and every slot of it that holds a CLIP text encoder.
SLOTS = [
    ("sd", "text_encoder"),
    ("sd2", "text_encoder"),
    ("sdxl", "text_encoder"),
    ("sdxl", "text_encoder_2"),
    ("sd3", "text_encoder"),
    ("sd3", "text_encoder_2"),
    ("flux", "text_encoder"),
]
KINDS = list(tiny_diffusion.BUILDERS)
LONG = 120
PROMPT = "a photo of a cat and a red house"
NEGATIVE = "the dog"


@pytest.fixture(autouse=True)
def _quiet_diffusers() -> Any:
    """Only errors: a LoRA for the text encoder alone, cut prompts, ... are all worth a warning to diffusers."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    yield
    diffusers_logging.set_verbosity(level)


def words(number: int, last: str = "") -> str:
    """A prompt of so many words, of a token each."""
    return " ".join([tiny_clip.WORDS[place % 7] for place in range(number)] + [last] * bool(last))


def swapped(kind: str, slot: str = "text_encoder", length: int = 77, **kwargs: Any) -> DiffusionPipeline:
    """A pipeline after the swap of one encoder for a LoTLIP with its weights, stretched to `length` positions."""
    pipe = pipeline(kind)
    model = tiny_diffusion.lotlip(getattr(pipe, slot))
    if length > 77:
        stretch_text_model(model, length)
    return swap_text_encoder(pipe, model, slot, **kwargs)


def clip_encoders(pipe: DiffusionPipeline) -> list[str]:
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    return [name for name in names if not isinstance(getattr(pipe, name), T5EncoderModel)]


def encode(pipe: DiffusionPipeline, prompt: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
    """`encode_prompt` alone, as each pipeline takes it."""
    settings = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    if not hasattr(pipe, "unet"):
        settings.update(prompt_2=None, max_sequence_length=16)
        if hasattr(pipe, "tokenizer_3"):
            settings.update(prompt_3=None)
    else:
        settings.update(do_classifier_free_guidance=True)
    with torch.no_grad():
        return pipe.encode_prompt(prompt, **{**settings, **kwargs})


def bert(width: int = tiny_diffusion.WIDTH, **kwargs: Any) -> LoTLIPTextModel:
    config = tiny.text_config(projection_dim=None, hidden_size=width, vocab_size=60, **kwargs)
    return LoTLIPTextModel(config).eval()


def bert_tokenizer(max_length: int = 38) -> LoTLIPTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tiny_clip.WORDS]
    return LoTLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, model_max_length=max_length)


# What stays the same


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slot"), SLOTS)
def test_clip_weights_and_77_tokens_give_the_same_picture(kind: str, slot: str) -> None:
    stock, pipe = pipeline(kind), swapped(kind, slot)
    guided = {} if kind == "flux" else {"negative_prompt": words(30)}
    for prompt in ("", PROMPT, words(75)):
        assert same(picture(stock, prompt, **guided), picture(pipe, prompt, **guided))
    assert not same(picture(pipe, PROMPT), picture(pipe, NEGATIVE))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slot"), SLOTS)
def test_every_slot_gets_the_stock_class_of_its_kind(kind: str, slot: str) -> None:
    stock, pipe = pipeline(kind), swapped(kind, slot)
    encoder = getattr(pipe, slot)
    if kind in ("sd", "sd2"):
        assert type(encoder) is CLIPTextEncoder
        assert pipe.config["text_encoder"] == ("lotlip_hf", "CLIPTextEncoder")
    else:
        assert type(encoder) is type(getattr(stock, slot))
    assert getattr(pipe, slot.replace("text_encoder", "tokenizer")).model_max_length == 77
    assert pipe.components.keys() == stock.components.keys()
    for name in stock.components:
        if isinstance(getattr(stock, name), torch.nn.Module):
            expected, answer = getattr(stock, name).state_dict(), getattr(pipe, name).state_dict()
            assert expected.keys() == answer.keys()
            assert all(torch.equal(expected[key], answer[key]) for key in expected)


def test_device_dtype_and_mode_are_those_of_the_replaced_encoder() -> None:
    pipe = pipeline("sdxl").to(torch.bfloat16)
    model = tiny_diffusion.lotlip(pipe.text_encoder_2).float().train()
    swap_text_encoder(pipe, model, "text_encoder_2")
    assert pipe.text_encoder_2.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert not pipe.text_encoder_2.training
    assert model.dtype == torch.float32
    assert model.training
    assert picture(pipe).isfinite().all()


def test_the_model_given_is_copied() -> None:
    pipe = pipeline("sd")
    model = tiny_diffusion.lotlip(pipe.text_encoder)
    swap_text_encoder(pipe, model)
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in model.parameters())


# Where a model comes from


@pytest.fixture(scope="module")
def whole_lotlip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoTLIPModel]:
    """A whole LoTLIP over CLIP's towers, whose tokenizer pads with [EOT]."""
    clip = tiny_clip.clip_model(seed=5)
    model = from_backbones(clip.text_model, clip.vision_model, projection_dim=tiny_clip.PROJECTION_DIM)
    tiny_clip.random_weights(model, seed=6)
    folder = tmp_path_factory.mktemp("whole") / "lotlip"
    return tiny_diffusion.save(folder, model, tiny_clip.clip_tokenizer()), model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "slot"), [("sd", "text_encoder"), ("sdxl", "text_encoder_2"), ("flux", "text_encoder")]
)
def test_a_folder_is_the_model_in_it(whole_lotlip: tuple[Path, LoTLIPModel], kind: str, slot: str) -> None:
    folder, model = whole_lotlip
    from_folder, from_model = pipeline(kind), pipeline(kind)
    swap_text_encoder(from_folder, folder, slot)
    swap_text_encoder(from_model, model, slot)
    prompt = "a dog! of the house"
    assert same(picture(from_folder, prompt), picture(from_model, prompt))
    assert not same(picture(from_folder, prompt), picture(pipeline(kind), prompt))
    ids = from_folder.tokenizer(prompt).input_ids
    pooled = model.get_text_features(torch.tensor([ids])).pooler_output
    encoder = getattr(from_folder, slot)
    if isinstance(encoder, CLIPTextModelWithProjection):
        assert same(encoder(torch.tensor([ids])).text_embeds, pooled)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text model", "with projection", "whole CLIP", "pipeline's own", "lotlip tower"])
def test_every_kind_of_checkpoint_loads(tmp_path: Path, kind: str) -> None:
    tokenizer = tiny_clip.clip_tokenizer()
    if kind == "pipeline's own":
        pipe = swapped("sd")
        pipe.save_pretrained(tmp_path / "saved")
        stock, folder, tokenizer = pipe.text_encoder, tmp_path / "saved" / "text_encoder", pipe.tokenizer
    else:
        clip = tiny_clip.clip_model(seed=8)
        clip.config.text_config.projection_dim = 512  # as in fine-tunes that were saved with it
        model = {
            "text model": clip.text_model,
            "with projection": tiny_clip.clip_text_model(with_projection=True, seed=8),
            "whole CLIP": clip,
            "lotlip tower": tiny_diffusion.lotlip(clip.text_model),
        }[kind]
        folder = tiny_diffusion.save(tmp_path / "model", model, tokenizer)
        stock = model.text_model if kind == "with projection" else clip.text_model
    pipe = swap_text_encoder(pipeline("sd"), folder, tokenizer=tokenizer)
    ids = torch.tensor(tokenizer([PROMPT]).input_ids)
    assert same(pipe.text_encoder(ids)[0], stock(ids)[0])
    if kind == "whole CLIP":
        pipe = swap_text_encoder(pipeline("sdxl"), folder, "text_encoder_2")
        expected = clip.get_text_features(ids).pooler_output
        assert same(pipe.text_encoder_2(ids).text_embeds, expected)


def test_padding_stays_the_slots(whole_lotlip: tuple[Path, LoTLIPModel]) -> None:
    pipe = swap_text_encoder(pipeline("sd2"), whole_lotlip[0])
    assert pipe.tokenizer.pad_token == "!"
    stock = tiny_clip.clip_tokenizer(pad_token="!")
    assert pipe.tokenizer("a cat", padding="max_length").input_ids == stock("a cat", padding="max_length").input_ids
    given = swap_text_encoder(pipeline("sd2"), whole_lotlip[0], tokenizer=whole_lotlip[0])
    assert given.tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_token_ids_are_the_stock_tokenizers(tmp_path: Path, pad_token: str) -> None:
    stock = tiny_clip.clip_tokenizer(pad_token=pad_token)
    stock.add_tokens("<toy>")
    model = tiny_clip.clip_text_model(vocab_size=len(stock))
    pipe = pipeline("sd")
    swap_text_encoder(pipe, model, tokenizer=stock)
    assert type(pipe.tokenizer) is CLIPPromptTokenizer
    pipe.tokenizer.save_pretrained(tmp_path)
    texts = [*tiny_clip.texts(), "A <toy>, a<toy>!", "<|endoftext|> a", "wow!! e\u0301 É  \n a\tb"]
    arguments = {"padding": "max_length", "truncation": True, "return_tensors": "pt", "verbose": False}
    expected = stock(texts, max_length=77, **arguments)
    for tokenizer in (
        pipe.tokenizer,
        CLIPPromptTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        answer = tokenizer(texts, **arguments)
        assert torch.equal(answer.input_ids, expected.input_ids)
        assert torch.equal(answer.attention_mask, expected.attention_mask)
    assert pipe.tokenizer.decode(expected.input_ids[-3]) == stock.decode(expected.input_ids[-3])


def test_a_live_clip() -> None:
    clip = tiny_clip.clip_model()
    own, projected = (pipeline(kind) for kind in ("sd", "sdxl"))
    swap_text_encoder(own, clip)
    ids = own.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    assert same(own.text_encoder(ids)[0], clip.text_model(ids).last_hidden_state)
    swap_text_encoder(projected, clip, "text_encoder_2")
    features = clip.get_text_features(ids).pooler_output
    assert same(projected.text_encoder_2(ids).text_embeds, features)


def test_a_swap_draws_no_random_numbers() -> None:
    pipe, model = pipeline("sd"), tiny_clip.clip_text_model(seed=5)
    state = torch.get_rng_state()
    swap_text_encoder(pipe, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_frozen_stays_so() -> None:
    pipe = pipeline("sd")
    model = tiny_diffusion.lotlip(pipe.text_encoder)
    model.backbone.encoder.requires_grad_(False)
    swap_text_encoder(pipe, model)
    assert not any(parameter.requires_grad for parameter in pipe.text_encoder.encoder.parameters())
    assert all(parameter.requires_grad for parameter in pipe.text_encoder.embeddings.parameters())


# Length


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slot"), SLOTS)
def test_long_prompts_reach_the_picture(kind: str, slot: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = swapped(kind, slot, LONG)
    assert [len(positions(pipe, name)) for name in clip_encoders(pipe)] == [LONG] * len(clip_encoders(pipe))
    first, second = words(LONG - 3, "cat"), words(LONG - 3, "dog")
    with caplog.at_level(logging.WARNING):
        assert not same(picture(pipe, first), picture(pipe, second))
        both = picture(pipe, [first, second])
        assert len(both) == 2
        assert not same(both[0], both[1])
        if kind != "flux":
            pictures = [picture(pipe, PROMPT, negative_prompt=text) for text in (first, second, NEGATIVE)]
            assert not same(pictures[0], pictures[1])
            assert not same(pictures[1], pictures[2])
            both = picture(pipe, [PROMPT, first], negative_prompt=[second, ""])
            assert len(both) == 2
    assert not caplog.records


def positions(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    encoder = getattr(pipe, name)
    tower = encoder.text_model if isinstance(encoder, CLIPTextModelWithProjection) else encoder
    assert encoder.config.max_position_embeddings == len(tower.embeddings.position_embedding.weight)
    assert (
        getattr(pipe, name.replace("text_encoder", "tokenizer")).model_max_length
        == encoder.config.max_position_embeddings
    )
    return tower.embeddings.position_embedding.weight


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slot"), [case for case in SLOTS if case[0] in ("sdxl", "sd3")])
def test_the_other_encoder_is_stretched_and_nothing_that_is_shared(kind: str, slot: str) -> None:
    other = "text_encoder" if slot == "text_encoder_2" else "text_encoder_2"
    stock = pipeline(kind)
    before = picture(stock)
    pipe = type(stock)(**stock.components)
    model = tiny_diffusion.lotlip(getattr(pipe, slot))
    stretch_text_model(model, LONG)
    swap_text_encoder(pipe, model, slot)
    old, new = positions(stock, other), positions(pipe, other)
    assert torch.equal(new, stretch_positions(old.detach(), LONG))
    assert torch.equal(new[:20], old[:20])
    shared = dict(getattr(stock, other).named_parameters())
    for name, parameter in getattr(pipe, other).named_parameters():
        assert (parameter is shared[name]) == ("position" not in name)
    assert same(picture(stock), before)
    if kind == "sd3":
        assert pipe.tokenizer_max_length == LONG


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_length_than_the_positions(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = swapped(kind, max_length=20)
    assert {
        getattr(pipe, name.replace("text_encoder", "tokenizer")).model_max_length for name in clip_encoders(pipe)
    } == {20}
    if kind in ("sd", "sd2", "sdxl"):
        assert encode(pipe, PROMPT)[0].shape[1] == 20
    with caplog.at_level(logging.WARNING):
        picture(pipe, words(18))
        assert not caplog.records
        picture(pipe, words(18, "car"))
    assert all("cut off at 20 tokens. Lost words: 'car'" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == len(clip_encoders(pipe))


def test_swapping_again(whole_lotlip: tuple[Path, LoTLIPModel]) -> None:
    pipe = swapped("sdxl", "text_encoder", LONG)
    swap_text_encoder(pipe, whole_lotlip[0], "text_encoder_2")
    assert pipe.tokenizer.model_max_length == pipe.tokenizer_2.model_max_length == 77
    assert picture(pipe, words(100)).isfinite().all()
    stock = pipeline("sd")
    pipe = swapped("sd", length=LONG)
    swap_text_encoder(pipe, stock.text_encoder)
    assert type(pipe.text_encoder) is CLIPTextEncoder
    assert same(picture(pipe), picture(stock))


# What a pipeline can do


@pytest.mark.slow
@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_clip_skip_of_stable_diffusion(kind: str, clip_skip: int) -> None:
    pipe = swapped(kind, length=LONG)
    prompt = words(90)
    ids = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden_states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    expected = pipe.text_encoder.final_layer_norm(hidden_states[-1 - clip_skip])
    assert same(encode(pipe, prompt, clip_skip=clip_skip)[0], expected)
    assert not same(picture(pipe, prompt, clip_skip=clip_skip), picture(pipe, prompt))


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_clip_skip_of_the_others(kind: str) -> None:
    stock, pipe = pipeline(kind), swapped(kind)
    assert same(picture(stock, clip_skip=1), picture(pipe, clip_skip=1))
    assert not same(picture(pipe, clip_skip=1), picture(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_encode_prompt_alone_and_prompt_embeds(kind: str) -> None:
    pipe = swapped(kind, length=LONG)
    prompt = words(100)
    if kind == "flux":
        names = ("prompt_embeds", "pooled_prompt_embeds")
    else:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    guided = {} if kind == "flux" else {"negative_prompt": words(90)}
    embeds = dict(zip(names, encode(pipe, prompt, **guided), strict=False))
    length = {"sd3": LONG + 16, "flux": 16}.get(kind, LONG)
    assert embeds["prompt_embeds"].shape[:2] == (1, length)
    assert same(picture(pipe, None, **embeds), picture(pipe, prompt, **guided))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_several_images_of_a_prompt(kind: str) -> None:
    pipe = swapped(kind, length=LONG)
    guided = {} if kind == "flux" else {"negative_prompt": [words(90), ""]}
    pictures = picture(pipe, [words(100), "a dog"], num_images_per_prompt=2, **guided)
    assert len(pictures) == 4
    assert not same(pictures[0], pictures[1])
    one, two = (encode(pipe, [words(100), "a dog"], num_images_per_prompt=number, **guided) for number in (1, 2))
    for single, double in zip(one[:2], two[:2], strict=True):
        assert same(double, single.repeat_interleave(2, 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading(kind: str, offload: str) -> None:
    pipe = swapped(kind, length=LONG)
    clip_skip = {} if kind == "flux" else {"clip_skip": 1}
    expected = picture(pipe, words(100), **clip_skip)
    device = torch.device("cpu")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    assert same(picture(pipe, words(100), **clip_skip), expected)
    with pytest.raises(ValueError, match="offloaded"):
        swap_text_encoder(pipe, tiny_clip.clip_text_model())
    if offload == "model" and kind == "sd":
        pipe.remove_all_hooks()
        swap_text_encoder(pipe, tiny_clip.clip_text_model())
        assert pipe.tokenizer.model_max_length == 77


def lora_weights(encoder: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names that PEFT saves for a stock text encoder."""
    copy = type(encoder)(encoder.config)
    copy.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "fc1"]))
    generator = torch.Generator().manual_seed(seed)
    weights = get_peft_model_state_dict(copy, adapter_name="default")
    return {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}


# `CLIPTextModel` has lost the prefix "text_model." of its weights' names, `CLIPTextModelWithProjection` keeps it.
OLD_NAMES = [(*case, "text_model.") for case in SLOTS]
NEW_NAMES = [("sd", "text_encoder", ""), ("sdxl", "text_encoder", ""), ("flux", "text_encoder", "")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slot", "prefix"), OLD_NAMES + NEW_NAMES)
def test_lora_on_the_text_encoder(tmp_path: Path, kind: str, slot: str, prefix: str) -> None:
    stock, pipe = pipeline(kind), swapped(kind, slot)
    weights = lora_weights(getattr(stock, slot))
    layers = {prefix + name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    type(pipe).save_lora_weights(tmp_path, **{f"{slot}_lora_layers": layers})
    before = picture(stock)
    pictures = []
    for one in (stock, pipe):
        one.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="toy")
        full = picture(one)
        one.set_adapters(["toy"], [0.5])
        half = picture(one)
        one.unload_lora_weights()
        pictures.append((full, half, picture(one)))
    for expected, answer in zip(*pictures, strict=True):
        assert same(expected, answer)
    full, half, unloaded = pictures[1]
    assert not same(full, before)
    assert not same(half, full)
    assert same(unloaded, before)


def test_lora_and_clip_skip_together(tmp_path: Path) -> None:
    pipe = swapped("sd", length=LONG)
    before = picture(pipe, clip_skip=1)
    layers = {f"text_model.{name}": weights for name, weights in lora_weights(pipe.text_encoder).items()}
    for _ in range(2):  # before a forward pass and after it, in either order
        pipe.load_lora_weights({f"text_encoder.{name}": weights for name, weights in layers.items()})
        with_lora = picture(pipe, clip_skip=1)
        assert not same(with_lora, before)
        pipe.fuse_lora(components=["text_encoder"])
        assert same(picture(pipe, clip_skip=1), with_lora)
        pipe.unfuse_lora(components=["text_encoder"])
        pipe.unload_lora_weights()
        assert same(picture(pipe, clip_skip=1), before)


def inversion(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two vectors for the token <toy>."""
    return {"<toy>": torch.randn(2, tiny_diffusion.WIDTH, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slot"), [case for case in SLOTS if case[0] != "sd3"])
def test_textual_inversion(kind: str, slot: str, caplog: pytest.LogCaptureFixture) -> None:
    stock, pipe = pipeline(kind), swapped(kind, slot)
    before = picture(stock)
    tokenizer_name = slot.replace("text_encoder", "tokenizer")
    pictures = []
    for one in (stock, pipe):
        parts = {"text_encoder": getattr(one, slot), "tokenizer": getattr(one, tokenizer_name)}
        one.load_textual_inversion(inversion(), **parts)
        with_toy, without = picture(one, "a photo of <toy>"), picture(one)
        one.unload_textual_inversion(**parts)
        pictures.append((with_toy, without, picture(one)))
    for expected, answer in zip(*pictures, strict=True):
        assert same(expected, answer)
    assert not same(pictures[1][0], before)
    assert same(pictures[1][1], before)
    assert same(pictures[1][2], before)
    with caplog.at_level(logging.WARNING):
        getattr(pipe, tokenizer_name)(words(75, "red car"), truncation=True)
    assert "Lost words: 'red car'" in caplog.text


def test_a_pipeline_loaded_from_another_one() -> None:
    stock, pipe = pipeline("sd"), swapped("sd", length=LONG)
    start = Image.new("RGB", (tiny_diffusion.SIZE,) * 2, "red")
    to_picture = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    first, second = (image_to_image(to_picture, start, words(110, word)) for word in ("cat", "dog"))
    assert first.isfinite().all()
    assert not same(first, second)
    own = StableDiffusionImg2ImgPipeline.from_pipe(stock)
    expected = image_to_image(own, start, PROMPT)
    swap_text_encoder(own, tiny_diffusion.lotlip(stock.text_encoder))
    assert same(image_to_image(own, start, PROMPT), expected)


def image_to_image(pipe: DiffusionPipeline, image: Image.Image, prompt: str, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    answer = pipe(
        prompt, image=image, strength=1.0, num_inference_steps=2, generator=generator, output_type="np", **kwargs
    )
    return torch.from_numpy(answer.images)


def test_controlnet() -> None:
    image = Image.new("RGB", (tiny_diffusion.SIZE,) * 2, "red")
    stock = pipeline("sd")
    controlnet = ControlNetModel.from_unet(stock.unet, conditioning_embedding_out_channels=(4, 4))
    pipe = StableDiffusionControlNetPipeline(**stock.components, controlnet=controlnet, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    model = tiny_diffusion.lotlip(stock.text_encoder)
    stretch_text_model(model, LONG)
    swap_text_encoder(pipe, model)
    first, second = (picture(pipe, words(110, word), image=image) for word in ("cat", "dog"))
    assert not same(first, second)


def test_a_pipeline_without_its_first_text_encoder() -> None:
    refiner = pipeline("sdxl")
    parts = {**refiner.components, "text_encoder": None, "tokenizer": None}
    parts["unet"] = tiny_diffusion.unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + tiny_clip.PROJECTION_DIM,
    )
    pipe = StableDiffusionXLImg2ImgPipeline(
        **{name: part for name, part in parts.items() if part is not None or "text" in name or "tokenizer" in name},
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    model = tiny_diffusion.lotlip(pipe.text_encoder_2)
    stretch_text_model(model, LONG)
    swap_text_encoder(pipe, model, "text_encoder_2")
    image = Image.new("RGB", (tiny_diffusion.SIZE,) * 2, "red")
    first, second = (image_to_image(pipe, image, words(110, word)) for word in ("cat", "dog"))
    assert not same(first, second)


# What is cut off


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_off_is_said_once(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """By each tokenizer; diffusers, which has a logger of its own, finds nothing more to say."""
    pipe = swapped(kind)
    calls = [([words(75, "Red HOUSE, photo"), "a cat"], {}, ["Red HOUSE, photo"])]
    if kind != "flux":
        negative = ["", words(75, "red house"), words(75, "car")]
        calls.append(([PROMPT] * 3, {"negative_prompt": negative}, ["red house", "car"]))
    theirs = logging.getLogger("diffusers")
    theirs.addHandler(caplog.handler)
    try:
        for prompt, guided, lost in calls:
            caplog.clear()
            with caplog.at_level(logging.WARNING), caplog.at_level(logging.WARNING, "diffusers"):
                picture(pipe, prompt, **guided)
            told = [record.getMessage() for record in caplog.records]
            told = [message for message in told if "max_sequence_length" not in message]  # T5's own
            assert len(told) == len(clip_encoders(pipe))
            for message in told:
                assert message.startswith(f"{len(lost)} of {len(prompt)} prompts cut off at 77 tokens")
                assert all(repr(one) in message for one in lost)
    finally:
        theirs.removeHandler(caplog.handler)
    # who asks for the whole prompt gets it
    assert len(pipe.tokenizer(words(75, "Red HOUSE, photo"), padding="longest", truncation=False)["input_ids"]) > 77


def test_what_is_cut_off_is_said_every_time_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = swapped("sd").tokenizer
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tokenizer(words(75, "cat"), truncation=True)
        assert len(caplog.records) == 3
        tokenizer(words(75, "cat"))  # longer than the limit, but whole
        tokenizer(words(75), truncation=True, padding="max_length")
        tokenizer(words(75, "cat"), truncation=True, verbose=False)
        tokenizer(words(75, "cat"), truncation=True, return_overflowing_tokens=True)
        assert len(caplog.records) == 3
        tokenizer(words(400, "cat"), truncation=True, max_length=10)
    assert caplog.records[3].getMessage().endswith(f"'{words(400, 'cat').split(' ', 8)[8]}'")


# A LoTLIP over BERT


def test_a_bert_lotlip_without_an_adapter_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    pipe = pipeline("sd")
    with caplog.at_level(logging.WARNING):
        swap_text_encoder(pipe, model, tokenizer=bert_tokenizer())
    assert len(caplog.records) == 1
    assert "examples/align_text_encoder.py" in caplog.text
    assert isinstance(pipe.text_encoder, LoTLIPTextEncoder)
    assert pipe.config["text_encoder"] == ("lotlip_hf", "LoTLIPTextEncoder")
    assert type(pipe.tokenizer) is LoTLIPPromptTokenizer
    assert pipe.tokenizer.split_sentences
    assert pipe.tokenizer.model_max_length == model.config.max_position_embeddings == 38
    inputs = pipe.tokenizer("a cat. the dog", padding="max_length", return_tensors="pt")
    states = model(inputs.input_ids).last_hidden_state
    assert same(encode(pipe, "a cat. the dog")[0], states)
    for extra in ({}, {"clip_skip": 1}, {"negative_prompt": words(30)}):
        assert not same(picture(pipe, words(30, "cat"), **extra), picture(pipe, words(30, "dog"), **extra))
    caplog.clear()
    picture(pipe, words(36, "red house"), negative_prompt=words(36, "car"))
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 1 prompts cut off at 38 tokens. Lost words: 'red house'",
        "1 of 1 prompts cut off at 38 tokens. Lost words: 'car'",
    ]


ADAPTED = [
    ("sd", "text_encoder", "linear"),
    ("sd", "text_encoder", "resampler"),
    ("sdxl", "text_encoder", "resampler"),
    ("sdxl", "text_encoder_2", "mlp"),
    ("sd3", "text_encoder", "resampler"),
    ("sd3", "text_encoder_2", "linear"),
    ("flux", "text_encoder", "mlp"),
]


def adapted(kind: str, slot: str, adapter: str, num_queries: int = 24) -> DiffusionPipeline:
    """A pipeline with a BERT LoTLIP of another width behind an adapter (untrained)."""
    pipe = pipeline(kind)
    replaced = getattr(pipe, slot)
    model = LoTLIPTextEncoder.from_text_model(
        bert(width=20),
        adapter=adapter,
        hidden_size=replaced.config.hidden_size,
        projection_dim=replaced.text_projection.out_features if hasattr(replaced, "text_projection") else None,
        target_layer=-2 if kind in ("sdxl", "sd3") else -1,
        num_queries=num_queries,
    )
    tiny_clip.random_weights(model, seed=9)
    return swap_text_encoder(pipe, model.eval(), slot, tokenizer=bert_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "slot", "adapter"), ADAPTED)
def test_a_bert_lotlip_behind_an_adapter(kind: str, slot: str, adapter: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe = adapted(kind, slot, adapter)
        assert not caplog.records
    assert not same(picture(pipe, "a cat"), picture(pipe, "a dog"))
    if kind != "flux":
        both = picture(pipe, ["a cat", words(60)], negative_prompt=[words(60), ""], num_images_per_prompt=2)
        assert len(both) == 4
        assert both.isfinite().all()
    if kind in ("sd", "sdxl"):
        length = 24 if adapter == "resampler" else 38
        assert encode(pipe, "a cat")[0].shape[1] == length
        # a resampler reads as much as the model takes, whatever it gives out
        assert getattr(pipe, slot.replace("text_encoder", "tokenizer")).model_max_length == 38


@pytest.mark.slow
@pytest.mark.parametrize("num_queries", [12, 60])
def test_a_resampler_reads_all_of_negative_prompts(num_queries: int) -> None:
    # diffusers cuts them to as many tokens as the prompt has states
    pipe = adapted("sd", "text_encoder", "resampler", num_queries=num_queries)
    states = [encode(pipe, PROMPT, negative_prompt=words(30, word))[1] for word in ("cat", "dog")]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].shape == (1, num_queries, tiny_diffusion.WIDTH)
    assert not same(states[0], states[1])


def test_lengths_that_adapters_cannot_agree_on() -> None:
    with pytest.raises(ValueError, match="`max_length` must be 50"):
        adapted("sd3", "text_encoder", "resampler", num_queries=50)
    pipe = adapted("sdxl", "text_encoder", "resampler")
    model = tiny_diffusion.lotlip(pipe.text_encoder_2)
    with pytest.raises(ValueError, match="max_length=24"):
        swap_text_encoder(pipe, model, "text_encoder_2")
    swap_text_encoder(pipe, model, "text_encoder_2", max_length=24)
    assert picture(pipe, words(60)).isfinite().all()


# Saved and loaded again

LOAD = """
import json, sys
import diffusers, lotlip_hf
import numpy, torch
torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
answers = {}
for name, arguments in json.loads(sys.argv[1]).items():
    pipe = diffusers.DiffusionPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    classes = [type(part).__name__ for key, part in sorted(pipe.components.items()) if key.startswith("text_encoder")]
    answers[name] = [float(abs(picture - numpy.load(name + ".npy")).max()), classes]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_saved_pipelines_load_in_a_process_that_imports_diffusers_and_lotlip_hf_alone(tmp_path: Path) -> None:
    with_inversion = swapped("sd", length=LONG)
    with_inversion.load_textual_inversion(inversion())
    pipes = {
        **{kind: swapped(kind, length=LONG) for kind in KINDS},
        "inversion": with_inversion,
        "bert": swap_text_encoder(pipeline("sd"), bert(), tokenizer=bert_tokenizer()),
        "adapted": adapted("sd3", "text_encoder_2", "resampler", num_queries=38),
    }
    calls = {}
    for name, pipe in pipes.items():
        arguments = {"prompt": words(100, "<toy>"), "num_inference_steps": 2, "guidance_scale": 3.0}
        arguments.update(height=tiny_diffusion.SIZE, width=tiny_diffusion.SIZE)
        if hasattr(pipe, "unet"):
            arguments.update(negative_prompt=words(130), clip_skip=1)
        else:
            arguments.update(max_sequence_length=16)
        pipe.save_pretrained(tmp_path / name)
        image = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
        np.save(tmp_path / f"{name}.npy", image)
        calls[str(tmp_path / name)] = arguments
    command = [sys.executable, "-W", "ignore", "-c", LOAD, json.dumps(calls)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert answer.returncode == 0, answer.stderr
    answers = json.loads(answer.stdout)
    for name, pipe in pipes.items():
        difference, classes = answers[str(tmp_path / name)]
        assert difference < tiny_diffusion.TOLERANCE, name
        assert classes == [
            type(getattr(pipe, key)).__name__ for key in sorted(pipe.components) if "text_encoder" in key
        ]
    # cut prompts are reported there, too
    assert answer.stderr.count("prompts cut off at 120 tokens. Lost words: 'red a cat dog") >= len(KINDS)
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    assert index["text_encoder"] == ["lotlip_hf", "CLIPTextEncoder"]
    assert index["tokenizer"] == ["lotlip_hf", "CLIPPromptTokenizer"]


def test_copies_and_half_precision(tmp_path: Path) -> None:
    pipe = swapped("sd", length=LONG)
    expected = encode(pipe, words(100))[0]
    for copied in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert same(encode(copied, words(100))[0], expected)
    pipe.to(torch.float16).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert loaded.text_encoder.dtype == torch.float16
    assert same(encode(loaded, words(100))[0], encode(pipe, words(100))[0], tolerance=1e-2)


def test_the_text_encoder_of_a_saved_pipeline_is_a_stock_checkpoint(tmp_path: Path) -> None:
    pipe = swapped("sd", length=LONG)
    pipe.save_pretrained(tmp_path)
    stock_class: Any = CLIPTextModel
    stock, info = stock_class.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(tokenizer) is CLIPTokenizer
    ids = tokenizer([words(110)], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, LONG)
    assert same(stock(ids)[0], pipe.text_encoder(ids)[0])
    # and goes into another pipeline, with the tokenizer that lies beside it
    again = swap_text_encoder(pipeline("sd"), tmp_path / "text_encoder")
    assert again.tokenizer.model_max_length == LONG
    assert same(encode(again, words(110))[0], encode(pipe, words(110))[0])


# The example


def example() -> ModuleType:
    return load_script("examples/swap_text_encoder.py")


def test_the_example_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--num-steps",
        "2",
        "--output",
        str(tmp_path / "new" / "picture.png"),
        "--save",
        str(tmp_path / "pipe"),
    ]
    assert example().main(arguments) == tmp_path / "new" / "picture.png"
    before, after = np.split(np.asarray(Image.open(tmp_path / "new" / "picture.png")), 2, axis=1)
    assert before.shape == after.shape == (64, 64, 3)
    assert abs(before.astype(int) - after).max() > 1
    assert {"270", "`text_encoder`", "248."} <= set(capsys.readouterr().out.split())
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 248


def test_the_example_with_a_pipeline_and_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline("sdxl")
    pipe.save_pretrained(tmp_path / "pipe")
    tiny_diffusion.save(tmp_path / "model", tiny_diffusion.lotlip(pipe.text_encoder_2), pipe.tokenizer_2)
    arguments = ["--pipeline", str(tmp_path / "pipe"), "--model", str(tmp_path / "model"), "--slot", "text_encoder_2"]
    arguments += ["--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--num-steps", "2"]
    picture_path = tmp_path / "picture.png"
    example().main([*arguments, "--output", str(picture_path)])
    before, after = np.split(np.asarray(Image.open(picture_path)), 2, axis=1)
    assert abs(before.astype(int) - after).max() <= 1  # the same weights
    assert {"`text_encoder_2`", "77."} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slot", "vae"], "AutoencoderKL"),
        (["--model", "nowhere/at all"], "nowhere/at all"),
        (["--pipeline", "damaged"], "model_index.json"),
        (["--output", "picture"], "picture"),
        (["--save", "."], "exists already"),
        (["--num-steps", "0"], "num_steps"),
    ],
)
def test_the_example_checks_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model_index.json").write_text("[]")
    module = example()
    monkeypatch.setattr(module, "draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(SystemExit, match=message) as error:
        module.main(arguments)
    assert str(error.value).startswith("error: ")


# What is refused


def stretched_tokenizer() -> CLIPTokenizer:
    tokenizer = tiny_clip.clip_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    return tokenizer


def adapter_for(pipe: DiffusionPipeline, **kwargs: Any) -> LoTLIPTextEncoder:
    return LoTLIPTextEncoder.from_text_model(bert(), **{"adapter": "linear", "hidden_size": 32, **kwargs})


REFUSED: dict[str, tuple[str, Callable[[DiffusionPipeline], dict[str, Any]], str]] = {
    "T5 of Flux": ("flux", lambda pipe: {"slot": "text_encoder_2"}, "T5EncoderModel"),
    "no such slot": ("sd", lambda pipe: {"slot": "text_encoder_2"}, "text_encoder_2"),
    "width": ("sd", lambda pipe: {"model_or_path": tiny_clip.clip_text_model(hidden_size=48)}, "48"),
    "no projection": (
        "sdxl",
        lambda pipe: {"model_or_path": tiny_diffusion.lotlip(pipe.text_encoder), "slot": "text_encoder_2"},
        "projection",
    ),
    "width of the projection": (
        "sd3",
        lambda pipe: {"model_or_path": tiny_clip.clip_text_model(with_projection=True, projection_dim=40)},
        "40",
    ),
    "projection too many": (
        "sd",
        lambda pipe: {"model_or_path": adapter_for(pipe, projection_dim=24), "tokenizer": bert_tokenizer()},
        "projection",
    ),
    "adapter for another layer": (
        "sdxl",
        lambda pipe: {"model_or_path": adapter_for(pipe), "tokenizer": bert_tokenizer()},
        "layer -2",
    ),
    "length": ("sd", lambda pipe: {"max_length": 248}, "max_length.*--max-positions 248"),
    "no length": ("sd", lambda pipe: {"max_length": 2}, "max_length"),
    "too many tokens": ("sd", lambda pipe: {"tokenizer": stretched_tokenizer()}, "tokenizer"),
    "BERT's tokenizer": ("sd", lambda pipe: {"tokenizer": bert_tokenizer()}, "tokenizer"),
    "not a model": (
        "sd",
        lambda pipe: {
            "model_or_path": ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        },
        "ViTModel",
    ),
    "LoRA in the model": ("sd", lambda pipe: {"model_or_path": with_lora(tiny_clip.clip_text_model())}, "LoRA"),
    "LoRA in the pipeline": (
        "sd",
        lambda pipe: {"model_or_path": tiny_clip.clip_text_model(), "slot": lora_slot(pipe)},
        "unload_lora_weights",
    ),
}


def lora_slot(pipe: DiffusionPipeline) -> str:
    """The slot of a pipeline, which gets LoRA weights."""
    weights = lora_weights(tiny_clip.clip_text_model())
    pipe.load_lora_weights({f"text_encoder.{name}": tensor for name, tensor in weights.items()})
    return "text_encoder"


def with_lora(model: CLIPTextModel) -> CLIPTextModel:
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_changed(case: str) -> None:
    kind, arguments, message = REFUSED[case]
    pipe = pipeline(kind)
    parts, config = dict(pipe.components), dict(pipe.config)
    given = arguments(pipe)
    if "model_or_path" not in given:
        given["model_or_path"] = tiny_diffusion.lotlip(pipe.text_encoder)
    with pytest.raises(ValueError, match=message):
        swap_text_encoder(pipe, **given)
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert dict(pipe.config) == config


def test_pipelines_that_are_refused() -> None:
    model = tiny_clip.clip_text_model()
    empty = StableDiffusionXLPipeline(**{**pipeline("sdxl").components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="'text_encoder_2'"):  # the slot that there is
        swap_text_encoder(empty, model)
    pipe = pipeline("sd")
    pipe.load_textual_inversion(inversion())
    with pytest.raises(ValueError, match="<toy>"):
        swap_text_encoder(pipe, model, tokenizer=tiny_clip.clip_tokenizer())
    pipe.unload_textual_inversion()
    assert type(pipe.text_encoder) is CLIPTextModel
    swap_text_encoder(pipe, pipe.text_encoder)  # whose configuration counts the token that went


@pytest.mark.parametrize("case", ["nowhere", "no tokenizer", "ViTModel", "final_layer_norm"])
def test_checkpoints_that_are_refused(case: str, tmp_path: Path) -> None:
    model, folder = tiny_clip.clip_text_model(), tmp_path / case
    if case == "no tokenizer":
        model.save_pretrained(folder)
    elif case == "ViTModel":
        ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(folder)
    elif case != "nowhere":
        tiny_diffusion.save(folder, model, tiny_clip.clip_tokenizer())
    if case == "final_layer_norm":
        weights = {name: tensor for name, tensor in model.state_dict().items() if case not in name}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError if case == "nowhere" else ValueError, match=case):
        swap_text_encoder(pipeline("sd"), folder)


def test_lotlip_with_projection_goes_where_none_is_asked_for() -> None:
    encoder = tiny_clip.clip_text_model(with_projection=True, seed=4)
    model = tiny_diffusion.lotlip(encoder)
    assert isinstance(model, LoTLIPTextModelWithProjection)
    first, second = (swap_text_encoder(pipeline("flux"), one) for one in (model, encoder))
    assert type(first.text_encoder) is type(second.text_encoder) is CLIPTextModel
    assert same(picture(first), picture(second))
