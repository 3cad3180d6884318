"""All families of image encoders, tiny and random, against their own stock models."""

import copy
import itertools
import json
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertTokenizer,
    ConvNextImageProcessorPil,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
)

import tiny
from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPProcessor,
    LoTLIPVisionConfig,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
    cli,
    from_backbones,
    load_encoder,
)
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.loading import check_config, check_image_sizes, load_image_processor, load_model
from lotlip_hf.modeling import backbones_lotlip
from lotlip_hf.modeling.backbones_lotlip import POOLINGS
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.scenes.small import small_model
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import batch_loss, make_objective
from lotlip_hf.training.optim import freeze, freeze_unused
from seams import train_alone_and_together
from tiny_vision import FAMILIES, NAFLEX_PATCHES, PATCH_SIDE, Family, import_timm, spread

EXACT = {"rtol": 1e-6, "atol": 1e-6}
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
NAFLEX = next(family for family in FAMILIES if family.model_type == "siglip2_vision_model")

# Only one family of each kind is in the quick tests.
QUICK = ("vit", "dinov3_vit", "siglip2_vision_model", "dinov3_convnext", "vit_tiny_patch16_224")
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=() if family.name in QUICK else pytest.mark.slow)
        for family in FAMILIES
    ],
)


@pytest.fixture(autouse=True)
def timm(request: pytest.FixtureRequest) -> None:
    family = getattr(request.node, "callspec", None) and request.node.callspec.params.get("family")
    if family and family.model_type == "timm_wrapper":
        import_timm()


def tower(family: Family, **options: Any) -> LoTLIPVisionModel:
    return spread(LoTLIPVisionModel(family.config(**options)))


def stock(model: LoTLIPVisionModel) -> Any:
    """The stock model with the weights of a tower."""
    backbone = AutoModel.from_config(copy.deepcopy(model.backbone.config))
    keys = backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(name.startswith("pooler.") for name in keys.missing_keys)
    return backbone.eval()


def small_dual_encoder(family: Family, **options: Any) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """The small text tower for Scenes and an image tower of the family, with the family's image processor."""
    small, processor = small_model(hidden_size=32, num_hidden_layers=1)
    config = LoTLIPConfig(
        text_config=small.config.text_config,
        vision_config=family.config(**options, projection_dim=32),
        projection_dim=32,
    )
    return LoTLIPModel(config), LoTLIPProcessor(family.image_processor(), processor.tokenizer)


@cache
def scenes() -> list[Any]:
    return [*scenes_dataset(3)]


@every_family
def test_features_are_those_of_the_stock_model(family: Family) -> None:
    inputs = family.inputs()
    lengths = inputs["spatial_shapes"].prod(1).tolist() if family is NAFLEX else [None] * 3
    assert family.config().pooling == family.poolings[0]
    for options in family.variants:
        model, pooling, layers = tower(family, **options), options["pooling"], options.get("pooled_layers", 1)
        stock_model = stock(model)
        with torch.no_grad():
            answer, expected = model(**inputs), stock_model(**inputs, output_hidden_states=True)
            dense = model(**inputs, pooled_only=True, output_patch_embeds=True)
            pooled_only = model(**inputs, pooled_only=True)
            hidden = model(**inputs, output_hidden_states=True).hidden_states
            states = [expected.last_hidden_state]
            for earlier in expected.hidden_states[-layers:-1] if layers > 1 else ():
                states.insert(len(states) - 1, getattr(stock_model, family.final_norm)(earlier))
        torch.testing.assert_close(answer.last_hidden_state, expected.last_hidden_state, **EXACT)
        torch.testing.assert_close(pooled_only.pooler_output, answer.pooler_output, **TOLERANCE)
        assert answer.pooler_output.shape == (3, model.config.pooled_size)
        assert answer.hidden_states is None
        torch.testing.assert_close(hidden, expected.hidden_states, **EXACT)
        assert len(hidden) > 1
        if family is not NAFLEX and family.name != "convnext_atto":
            assert model.config.num_patches == family.tokens(expected.last_hidden_state).shape[1]
        naive, patches = [], []
        for one, name in itertools.product(states, pooling.split("+")):
            patches.append(naive_patches(family, model.backbone, one, name))
            if name == "cls":
                naive.append(one[:, 0])
            elif name == "mean":
                rows = zip(family.tokens(one), lengths, strict=True)
                naive.append(torch.stack([row[:length].mean(0) for row, length in rows]))
            elif model.config.backbone_config.model_type == "vit":
                naive.append(model.backbone.pooler(one))
            else:
                naive.append(expected.pooler_output)
        torch.testing.assert_close(answer.pooler_output, torch.cat(naive, dim=1), **EXACT)
        torch.testing.assert_close(dense.patch_embeds, torch.cat(patches, dim=2), **EXACT)
        assert answer.patch_embeds is None


@torch.no_grad()
def naive_patches(family: Family, backbone: Any, states: torch.Tensor, pooling: str) -> torch.Tensor:
    """Each patch as an image of one patch, without the head of SigLIP."""
    patches = family.tokens(states)
    if pooling != "pooler" or family.model_type.startswith(("dino", "siglip")):
        return patches
    if family.model_type == "vit":
        return torch.tanh(backbone.pooler.dense(patches))
    if family.model_type == "clip_vision_model":
        return backbone.post_layernorm(patches)
    if family.model_type == "timm_wrapper":
        norm = backbone.timm_model.head.norm if states.dim() == 4 else backbone.timm_model.fc_norm
        return norm(states).flatten(2).transpose(1, 2) if states.dim() == 4 else norm(patches)
    return backbone.layernorm(patches)


@every_family
def test_poolings_without_sense_are_refused(family: Family) -> None:
    for pooling in {*POOLINGS, "cls+mean", "mean+cls"} - {*family.poolings}:
        with pytest.raises(Exception, match="pooling"):
            family.config(pooling=pooling)
    for pooling in family.poolings:
        fits = {"pooling": pooling, "pooled_layers": 2} in family.variants
        for number in (0, -1, 3, 10**30, 1.5, "1", *([] if fits else [2])):
            with pytest.raises(Exception, match="pooled_layers"):
                family.config(pooling=pooling, pooled_layers=number)


@every_family
def test_images_do_not_see_each_other(family: Family) -> None:
    model, inputs = tower(family), family.inputs()
    with torch.no_grad():
        together = model(**inputs).pooler_output
        for index in range(3):
            alone = model(**{name: values[index : index + 1] for name, values in inputs.items()}).pooler_output
            torch.testing.assert_close(alone, together[index : index + 1], **TOLERANCE)


@every_family
def test_other_image_sizes(family: Family) -> None:
    """As the stock model takes them, or refused."""
    if family is NAFLEX:
        return
    model, inputs = tower(family), family.inputs(size=(48, 64))
    interpolate = {"interpolate_pos_encoding": True}
    if family.sizes != "all":
        with pytest.raises(ValueError, match="pixel_values"):
            model(**inputs)
    with torch.no_grad():
        if family.sizes == "interpolated":
            answer, expected = model(**inputs, **interpolate), stock(model)(**inputs, **interpolate)
        elif family.sizes == "fixed":
            model_args = {**family.settings["model_args"], "dynamic_img_size": True}
            model = tower(replace(family, settings={**family.settings, "model_args": model_args}))
            answer, expected = model(**inputs), stock(model)(**inputs)
        else:
            answer, expected = model(**inputs), stock(model)(**inputs)
    torch.testing.assert_close(answer.last_hidden_state, expected.last_hidden_state, **EXACT)
    assert torch.isfinite(answer.pooler_output).all()


def naive_kept(model: LoTLIPVisionModel, family: Family, inputs: dict[str, torch.Tensor], kept: torch.Tensor) -> Any:
    """Each image alone through a tower whose tokens, rotary positions and mask are gathered by hooks."""
    pooled = []
    for index, chosen in enumerate(kept):
        gathered, one = copy.deepcopy(model), {name: values[index : index + 1] for name, values in inputs.items()}

        def gather(module: Any, arguments: Any, output: Any, chosen: torch.Tensor = chosen) -> Any:
            if isinstance(output, tuple):  # cos and sin
                return tuple(part[chosen] for part in output)
            return torch.cat([output[:, : family.prefix], output[:, family.prefix :][:, chosen]], dim=1)

        gathered.backbone.embeddings.register_forward_hook(gather)
        if hasattr(gathered.backbone, "rope_embeddings"):
            gathered.backbone.rope_embeddings.register_forward_hook(gather)
        if "pixel_attention_mask" in one:
            # the hook cannot change the mask: as many patches and no padding
            one["pixel_attention_mask"] = torch.ones(1, len(chosen), dtype=torch.int32)
            outputs = gathered.backbone(**one)
            states = outputs.last_hidden_state
            pooled.append(outputs.pooler_output if model.config.pooling == "pooler" else states.mean(1))
        else:
            pooled.append(gathered(**one).pooler_output)
    return torch.cat(pooled)


@every_family
def test_kept_patches(family: Family) -> None:
    inputs = family.inputs()
    kept = torch.stack([torch.randperm(12)[:5] for _ in range(3)])
    if not family.keeps_patches:
        with pytest.raises(ValueError, match="kept_patches"):
            tower(family)(**inputs, kept_patches=kept)
        return
    for options in family.variants:
        model = tower(family, **options)
        with torch.no_grad():
            number = model.config.num_patches if family is not NAFLEX else NAFLEX_PATCHES
            everything = torch.arange(number).expand(3, -1)
            whole, answer = model(**inputs), model(**inputs, kept_patches=everything)
            assert torch.equal(answer.pooler_output, whole.pooler_output)
            assert torch.equal(answer.last_hidden_state, whole.last_hidden_state)
            answer = model(**inputs, kept_patches=kept).pooler_output
            torch.testing.assert_close(answer, naive_kept(model, family, inputs, kept), **TOLERANCE)
        with pytest.raises(ValueError, match="kept_patches"):
            model(**inputs, kept_patches=kept + number)


def test_rotary_positions_of_kept_patches_in_other_sizes_and_in_training() -> None:
    family = next(family for family in FAMILIES if family.model_type == "dinov3_vit")
    model, inputs = tower(family, pooling="mean", pooled_layers=2).train(), family.inputs(size=(48, 64))
    kept = torch.tensor([[47, 3], [0, 20], [9, 8]])
    answer = model(**inputs, kept_patches=kept, output_hidden_states=True)
    torch.testing.assert_close(answer.pooler_output, naive_kept(model, family, inputs, kept), **TOLERANCE)
    assert answer.hidden_states[0].shape == (3, family.prefix + 2, 32)
    answer.pooler_output.square().sum().backward()
    assert model.backbone.embeddings.patch_embeddings.weight.grad.abs().max() > 0


@every_family
def test_it_is_saved_and_loaded(family: Family, tmp_path: Path) -> None:
    model, processor = small_dual_encoder(family, **family.variants[-1])
    spread(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ids, inputs = tiny.input_ids(3, 8), family.inputs()
    copied = pickle.loads(pickle.dumps(model))  # transformers' hooks for hidden states cannot be pickled
    # as is said for the text tower; ConvNeXt has no attention
    loaded, info = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected = model(ids, **inputs)
        torch.testing.assert_close(loaded(ids, **inputs).logits_per_image, expected.logits_per_image, **EXACT)
        features = LoTLIPVisionModelWithProjection.from_pretrained(tmp_path)(**inputs).image_embeds
        torch.testing.assert_close(nn.functional.normalize(features, dim=-1), expected.image_embeds, **EXACT)
        torch.testing.assert_close(copied(ids, **inputs).logits_per_image, expected.logits_per_image, **EXACT)

    pictures = [Image.new("RGB", size, colour) for size, colour in (((64, 40), "red"), ((40, 90), "blue"))]
    encoder = load_encoder(tmp_path, device="cpu")
    assert encoder.encode_images(pictures, progress=False).shape == (2, 32)
    both = AutoProcessor.from_pretrained(tmp_path)(text=[["a", "b"], ["c", "d"]], images=pictures, return_tensors="pt")
    assert both["input_ids"].shape[:2] == (2, 2)
    with torch.no_grad():
        embeds = loaded(**both).image_embeds
    torch.testing.assert_close(encoder.encode_images(pictures, progress=False), embeds, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "dinov3_vit", "siglip2_vision_model", "convnext", "vit_tiny_patch16_224"])
def test_a_run_of_two_steps(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, with the family's image processor, gradient caching, dropped patches and an evaluation."""
    (family,) = (family for family in FAMILIES if family.name == name)
    model, processor = small_dual_encoder(family)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    run = ["train", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "run"), "--data", "scenes"]
    run += "--num-scenes 8 --batch-size 4 --grad-cache-chunk 2 --max-steps 2 --num-workers 0 --trackers none".split()
    run += "--eval-data scenes --eval-samples 4".split()
    if not family.keeps_patches:
        assert cli.main([*run, "--patch-dropout", "0.5"]) == 2
        assert "patch_dropout" in capsys.readouterr().err
    assert cli.main([*run, *(["--patch-dropout", "0.5"] if family.keeps_patches else [])]) == 0
    trained = LoTLIPModel.from_pretrained(list_checkpoints(tmp_path / "run")[-1])
    before, after = model.vision_model.state_dict(), trained.vision_model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(
            family,
            options,
            id="-".join([family.name, *map(str, options.values())]),
            marks=() if family.name in QUICK else pytest.mark.slow,
        )
        for family in FAMILIES
        for options in (family.variants[:1] + family.variants[-1:] if family.final_norm else [{}])
    ],
)
def test_two_training_steps_on_scenes(family: Family, options: dict[str, Any]) -> None:
    """With gradient checkpointing, which gives the same gradients."""
    model, processor = small_dual_encoder(family, **options)
    spread(model).train()
    batch = LoTLIPCollator(processor)(scenes())
    objective = make_objective(TrainingConfig(data="scenes"), model.config)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
            layers = model.config.vision_config.family.layers(model.vision_model.backbone)
            switched = [*layers, getattr(model.vision_model.backbone, "timm_model", None)]
            assert any(getattr(layer, "gradient_checkpointing", False) for layer in switched)
        model.zero_grad()
        torch.manual_seed(0)
        batch_loss(model, batch, objective)["loss"].backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        gradients.append({name: gradient.clone() for name, gradient in found.items() if "vision" in name})
    assert len(gradients[0]) > 4
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: tensor.clone() for name, tensor in model.vision_model.state_dict().items()}
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        loss = batch_loss(model, batch, objective)["loss"]
        loss.backward()
        assert torch.isfinite(loss)
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.vision_model.state_dict().items())


@every_family
def test_bfloat16(family: Family) -> None:
    for options in family.variants:
        model = tower(family, **options).to(torch.bfloat16)
        with torch.no_grad():
            answer = model(**family.inputs()).pooler_output
        assert answer.dtype == torch.bfloat16
        assert torch.isfinite(answer).all()


@every_family
def test_all_that_is_trained_gets_a_gradient(family: Family) -> None:
    """`DistributedDataParallel` waits for it."""
    for options in family.variants:
        model, _ = small_dual_encoder(family, **options)
        freeze_unused(model, {"image_embeds"}, has_long_texts=False)
        model.get_image_features(**family.inputs()).pooler_output.square().sum().backward()
        parameters = model.vision_model.named_parameters()
        waiting = [name for name, one in parameters if one.requires_grad and one.grad is None]
        assert not waiting


@every_family
@pytest.mark.parametrize("layers", [0, 1])
def test_a_locked_tower(family: Family, layers: int, tmp_path: Path) -> None:
    """Its last layers can be trained."""
    model, _ = small_dual_encoder(family)
    config = TrainingConfig(data="scenes", lock_vision=True, unlocked_vision_layers=layers)
    if family.name == "convnext_atto" and layers:
        with pytest.raises(ValueError, match="unlocked_vision_layers"):
            freeze(model, config, {"image_embeds", "text_embeds"})
        return
    freeze(model, config, {"image_embeds", "text_embeds"})
    found = model.config.vision_config.family.layers(model.vision_model.backbone)
    assert not any(parameter.requires_grad for layer in found[:1] for parameter in layer.parameters())
    trained = [parameter.requires_grad for layer in found[-1:] for parameter in layer.parameters()]
    assert all(trained) if layers else not any(trained)


@every_family
def test_from_backbones(family: Family, tmp_path: Path) -> None:
    encoder = spread(AutoModel.from_config(family.backbone_config()))
    encoder.save_pretrained(tmp_path)
    text = AutoModel.from_config(tiny.text_config().backbone_config)
    inputs = family.inputs()
    for source in (encoder, tmp_path):
        model = from_backbones(text, source, vision_pooling="pooler").eval()
        assert model.config.projection_dim == model.config.vision_config.hidden_size
        with torch.no_grad():
            expected, answer = encoder(**inputs), model.vision_model(**inputs)
        torch.testing.assert_close(answer.last_hidden_state, expected.last_hidden_state, **EXACT)
        if expected.pooler_output is not None:
            torch.testing.assert_close(answer.pooler_output, expected.pooler_output, **EXACT)


@pytest.mark.parametrize("name", ["dinov3_vit", "siglip2_vision_model", "vit_pe_core_tiny_patch16_384"])
def test_a_start_from_two_folders(name: str, tmp_path: Path) -> None:
    """The processor of the image encoder's folder fits the tower, and is saved with the model."""
    family, text, image = next(one for one in FAMILIES if one.name == name), tmp_path / "text", tmp_path / "image"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star"]
    AutoModel.from_config(tiny.text_config().backbone_config).save_pretrained(text)
    (text / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(text).save_pretrained(text)
    AutoModel.from_config(family.backbone_config()).save_pretrained(image)
    if name == "dinov3_vit":
        size = {"height": 48, "width": 48}
        settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": size, "resample": 2}
        (image / "preprocessor_config.json").write_text(json.dumps(settings))
    elif name == "siglip2_vision_model":
        family.image_processor().save_pretrained(image)
    else:
        config = json.loads((image / "config.json").read_text())
        config["pretrained_cfg"] = {"input_size": [3, 32, 32], "crop_pct": 1.0, "crop_mode": "squash"}
        (image / "config.json").write_text(json.dumps(config))
    model, processor = load_or_start_model(TrainingConfig(text_model=str(text), image_model=str(image)))
    batch = LoTLIPCollator(processor)(scenes())
    expected = model.eval()(**batch).loss
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded, processor = load_model(tmp_path / "model", device="cpu")
    answer = loaded(**LoTLIPCollator(processor)(scenes())).loss
    torch.testing.assert_close(answer, expected, **EXACT)


# Image processors


def save_settings(folder: Path, name: str = "preprocessor_config.json", **settings: Any) -> Path:
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    if name != "config.json":
        (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


PICTURE = Image.effect_mandelbrot((90, 60), (-2, -1.2, 1, 1.2), 50).convert("RGB")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.mark.parametrize("name", ["DINOv3ViTImageProcessorFast", "DINOv3ViTImageProcessor"])
def test_dinov3_processor_without_torchvision(name: str, tmp_path: Path) -> None:
    """Rescaled, resized with antialiasing and normalised, in this order, as the stock class does with torchvision."""
    size = {"height": 32, "width": 32}
    processor = load_image_processor(save_settings(tmp_path, image_processor_type=name, size=size, resample=2))
    pixels = torch.from_numpy(np.asarray(PICTURE).copy()).movedim(2, 0).float() / 255
    resized = nn.functional.interpolate(pixels[None], (32, 32), mode="bilinear", antialias=True)
    answer = processor(images=[PICTURE], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(answer * STD, resized - MEAN, rtol=0, atol=1.01 / 255)
    assert processor.to_dict()["image_processor_type"] == "ViTImageProcessor"


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_transform_of_timm(mode: str, tmp_path: Path) -> None:
    settings = {"input_size": [3, 32, 32], "crop_pct": 0.8, "crop_mode": mode, "interpolation": "bilinear"}
    save_settings(tmp_path, "config.json", architecture="vit_tiny_patch16_224", pretrained_cfg=settings)
    if mode == "border":
        with pytest.raises(ValueError, match="crop_mode"):
            load_image_processor(tmp_path)
        return
    resized = PICTURE.resize((60, 40) if mode == "center" else (40, 40), Image.Resampling.BILINEAR)
    left, top = (resized.width - 32) // 2, 4
    cut = np.asarray(resized.crop((left, top, left + 32, top + 32))).copy()
    answer = load_image_processor(tmp_path)(images=[PICTURE], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(answer * STD + MEAN, torch.from_numpy(cut).movedim(2, 0) / 255, rtol=0, atol=1e-6)


def test_settings_that_would_fill_the_memory() -> None:
    check_image_sizes(Siglip2ImageProcessorPil(), "theirs")
    for number, side in ((10**9, 16), (256, 10**6), (0, 16), ("256", 16)):
        processor = Siglip2ImageProcessorPil()
        processor.max_num_patches, processor.patch_size = number, side
        with pytest.raises(ValueError, match="max_num_patches"):
            check_image_sizes(processor, "theirs")
    check_image_sizes(ConvNextImageProcessorPil(), "theirs")
    with pytest.raises(ValueError, match="crop_pct"):
        check_image_sizes(ConvNextImageProcessorPil(crop_pct=1e-6), "theirs")


@pytest.mark.parametrize("settings", [{"hidden_sizes": [8, 16, 24, 10**12]}, {"depths": [1, 1, 1, 10**6]}])
def test_configurations_that_would_fill_the_memory(settings: dict[str, Any]) -> None:
    family = next(family for family in FAMILIES if family.name == "convnext")
    with pytest.raises(ValueError, match=next(iter(settings))):
        check_config(replace(family, settings={**family.settings, **settings}).config(), "theirs")
    import_timm()
    with pytest.raises(Exception, match="model_args"):
        replace(FAMILIES[-1], settings={"architecture": "convnext_atto", "model_args": {"depths": [10**9]}}).config()


# SigLIP 2 NaFlex


def test_more_padding_changes_nothing() -> None:
    inputs = NAFLEX.inputs()
    longer = {name: nn.functional.pad(values, (0, 0, 0, 9)) for name, values in inputs.items() if values.dim() == 3}
    longer["pixel_values"][:, NAFLEX_PATCHES:] = 100.0  # what is there does not matter
    longer["pixel_attention_mask"] = nn.functional.pad(inputs["pixel_attention_mask"], (0, 9))
    longer["spatial_shapes"] = inputs["spatial_shapes"]
    for options in NAFLEX.variants:
        model = tower(NAFLEX, **options)
        with torch.no_grad():
            torch.testing.assert_close(model(**longer).pooler_output, model(**inputs).pooler_output, **TOLERANCE)


@pytest.mark.parametrize("name", ["pixel_values", "pixel_attention_mask", "spatial_shapes"])
def test_naflex_needs_all_its_inputs(name: str) -> None:
    model, inputs = tower(NAFLEX), NAFLEX.inputs()
    with pytest.raises(ValueError, match=name):
        model(**{**inputs, name: None})
    with pytest.raises(ValueError, match="spatial_shapes"):
        model(**{**inputs, name: inputs[name][:, :1]})
    if name != "pixel_values":
        with pytest.raises(ValueError, match=name):
            tower(FAMILIES[0])(torch.randn(3, 3, 32, 32), **{name: inputs[name]})


def test_dropped_patches_of_naflex_are_no_padding() -> None:
    """Each image keeps half of its own patches."""
    _, processor = small_dual_encoder(NAFLEX)
    processor.image_processor.max_num_patches = NAFLEX_PATCHES
    records = [
        {"id": str(index), "image": Image.new("RGB", size), "short_caption": "a", "long_captions": ["b. c. d."]}
        for index, size in enumerate([(64, 64), (16, 200), (300, 8)])
    ]
    batch = LoTLIPCollator(processor, patch_dropout=0.5, patch_size=PATCH_SIDE)(records)
    for mask, kept in zip(batch["pixel_attention_mask"].bool(), batch["kept_patches"], strict=True):
        assert mask[kept].sum() == round(int(mask.sum()) / 2) == kept[mask[kept]].unique().numel()


def test_naflex_from_a_whole_siglip2(tmp_path: Path) -> None:
    text = {**tiny.SIZE, "vocab_size": 99, "max_position_embeddings": 16}
    whole = spread(Siglip2Model(Siglip2Config(text_config=text, vision_config=NAFLEX.settings)))
    whole.save_pretrained(tmp_path)
    bert, inputs = AutoModel.from_config(tiny.text_config().backbone_config), NAFLEX.inputs()
    with torch.no_grad():
        expected = whole.get_image_features(**inputs).pooler_output
        for source in (whole, tmp_path):
            model = from_backbones(bert, source).eval()
            torch.testing.assert_close(model.vision_model(**inputs).pooler_output, expected, **EXACT)


def test_naflex_in_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = small_dual_encoder(NAFLEX)
    spread(model).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    pictures = [Image.new("RGB", size, colour) for size, colour in (((64, 9), "red"), ((40, 90), "blue"))]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "photos" / f"{number}.png")
    folders = ["--model", str(tmp_path / "model"), "--images", str(tmp_path / "photos")]
    assert cli.main(["search", *folders, "A red star."]) == 0
    said = capsys.readouterr().out
    inputs = processor(text=["A red star."], images=pictures, return_tensors="pt")
    with torch.no_grad():
        embeds = model(**inputs)
    best = int((embeds.text_embeds @ embeds.image_embeds.T).argmax())
    assert said.index(f"{best}.png") < said.index(f"{1 - best}.png")


@pytest.mark.slow
def test_one_process_and_two_train_naflex(tmp_path: Path) -> None:
    model, processor = small_dual_encoder(NAFLEX)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    train_alone_and_together("lotlip_hf.cli", tmp_path, "--model", str(tmp_path / "model"))


# timm


def test_a_model_of_timm_needs_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    monkeypatch.setattr(backbones_lotlip, "is_timm_available", lambda: False)
    with pytest.raises(ImportError, match="timm"):
        LoTLIPVisionConfig(backbone_config={"model_type": "timm_wrapper", "architecture": "vit_small_patch16_224"})


def test_an_address_is_no_architecture_of_timm() -> None:
    import_timm()
    with pytest.raises(Exception, match="architecture"):  # the validation's own class
        LoTLIPVisionConfig(backbone_config={"model_type": "timm_wrapper", "architecture": "hf-hub:someone/model"})
