"""Tiny random image encoders of all families and the image processors that go with them, shared by the tests."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    PreTrainedConfig,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.utils.import_utils import is_timm_available, is_torchvision_available

import tiny_clip
from lotlip_hf import LoTLIPVisionConfig

SIDE, PATCH_SIDE = 32, 8
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
TOKENS = {**SIZE, "image_size": SIDE, "patch_size": PATCH_SIDE}
DINO = {name: value for name, value in TOKENS.items() if name != "intermediate_size"}
MAP = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "image_size": SIDE}
NAFLEX_PATCHES = 20


def square(processor_class: Any, **options: Any) -> Callable[[], Any]:
    return lambda: processor_class(size={"height": SIDE, "width": SIDE}, **options)


def shortest(processor_class: Any, **options: Any) -> Callable[[], Any]:
    crop = {"height": SIDE, "width": SIDE}
    return lambda: processor_class(size={"shortest_edge": SIDE}, crop_size=crop, **options)


@dataclass
class Family:
    """A family of image encoders: a tiny backbone, what it can do, and its image processor."""

    model_type: str
    settings: dict[str, Any]
    poolings: tuple[str, ...]  # the first is the default
    image_processor: Callable[[], Any]
    prefix: int = 0  # class token and registers
    sizes: str = "all"  # "all", "interpolated" or "fixed"
    keeps_patches: bool = True
    final_norm: str = ""  # module of the stock model, if it fits the states of earlier layers

    @property
    def variants(self) -> list[dict[str, Any]]:
        """All poolings, and those that fit the two layers together."""
        ones: list[dict[str, Any]] = [{"pooling": pooling} for pooling in self.poolings]
        twos = [{**one, "pooled_layers": 2} for one in ones if self.final_norm and one["pooling"] != "pooler"]
        return ones + twos

    @property
    def name(self) -> str:
        return self.settings.get("architecture", self.model_type)

    def backbone_config(self) -> PreTrainedConfig:
        if self.model_type == "timm_wrapper":
            import_timm()
        return AutoConfig.for_model(self.model_type, **self.settings)

    def config(self, **options: Any) -> LoTLIPVisionConfig:
        return LoTLIPVisionConfig(backbone_config=self.backbone_config(), **options)

    def inputs(self, batch_size: int = 3, size: tuple[int, int] = (SIDE, SIDE)) -> dict[str, torch.Tensor]:
        """Random images. Those of NaFlex have different shapes and padding."""
        if self.model_type != "siglip2_vision_model":
            return {"pixel_values": torch.randn(batch_size, 3, *size)}
        shapes = torch.tensor([[4, 4], [2, 6], [3, 5]])[torch.arange(batch_size) % 3]
        mask = torch.arange(NAFLEX_PATCHES) < shapes.prod(1, keepdim=True)
        return {
            "pixel_values": torch.randn(batch_size, NAFLEX_PATCHES, 3 * PATCH_SIDE**2),
            "pixel_attention_mask": mask.int(),
            "spatial_shapes": shapes,
        }

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """The patches [B, P, hidden_size] in the states of the stock model."""
        return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states[:, self.prefix :]


TIMM_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": SIDE, "patch_size": PATCH_SIDE}
TIMM_MAP = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}

FAMILIES = [
    Family(
        "vit",
        TOKENS,
        ("cls", "pooler", "mean", "cls+mean"),
        square(ViTImageProcessorPil),
        1,
        "interpolated",
        final_norm="layernorm",
    ),
    Family(
        "dinov2",
        DINO,
        ("cls", "pooler", "mean", "cls+mean"),
        shortest(BitImageProcessorPil),
        1,
        final_norm="layernorm",
    ),
    Family(
        "dinov2_with_registers",
        {**DINO, "num_register_tokens": 3},
        ("cls", "pooler", "mean", "cls+mean"),
        shortest(BitImageProcessorPil),
        4,
        final_norm="layernorm",
    ),
    Family(
        "dinov3_vit",
        {**TOKENS, "num_register_tokens": 2, "pos_embed_rescale": None},
        ("cls", "pooler", "mean", "cls+mean"),
        square(ViTImageProcessorPil),
        3,
        final_norm="norm",
    ),
    Family("clip_vision_model", TOKENS, ("pooler", "mean"), shortest(CLIPImageProcessorPil), 1, "interpolated"),
    Family("siglip_vision_model", TOKENS, ("pooler", "mean"), square(SiglipImageProcessorPil), 0, "interpolated"),
    Family(
        "siglip2_vision_model",
        {**SIZE, "patch_size": PATCH_SIDE, "num_patches": 16},
        ("pooler", "mean"),
        lambda: Siglip2ImageProcessorPil(patch_size=PATCH_SIDE, max_num_patches=NAFLEX_PATCHES),
    ),
    Family("convnext", MAP, ("pooler",), square(ViTImageProcessorPil), keeps_patches=False),
    Family("convnextv2", MAP, ("pooler",), shortest(ConvNextImageProcessorPil), keeps_patches=False),
    Family("dinov3_convnext", MAP, ("pooler", "mean"), square(ViTImageProcessorPil), 1, keeps_patches=False),
    *(
        Family(
            "timm_wrapper",
            {"architecture": architecture, "model_args": TIMM_VIT},
            ("pooler", "cls", "mean", "cls+mean"),
            square(ViTImageProcessorPil),
            1,
            "fixed",
            keeps_patches=False,
        )
        for architecture in ("vit_tiny_patch16_224", "vit_pe_core_tiny_patch16_384")
    ),
    Family(
        "timm_wrapper",
        {"architecture": "convnext_atto", "model_args": TIMM_MAP},
        ("pooler",),
        square(ViTImageProcessorPil),
        keeps_patches=False,
    ),
]


def spread(model: nn.Module, seed: int = 0) -> Any:
    """Weights large enough that attention and positions matter to the outputs; norms stay norms."""
    tiny_clip.random_weights(model, seed)
    return model.eval()


class _InterpolationMode(Enum):
    NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC = "nearest", "nearest-exact", "bilinear", "bicubic"
    BOX, HAMMING, LANCZOS = "box", "hamming", "lanczos"


class _StandIn(ModuleType):
    """A module of torchvision: timm subclasses and names parts of it when it is imported."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def import_timm() -> None:
    """
    Imports timm, and transformers' wrapper of it. Where no torchvision fits torch, timm gets a stand-in of the parts
    that it imports; models do not use them. Skips the test where timm is not installed.
    """
    with contextlib.suppress(ImportError, RuntimeError):
        importlib.import_module("timm")
        if is_timm_available():
            return
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".utils")
    stand_ins: dict[str, Any] = {f"torchvision{name}": _StandIn(f"torchvision{name}") for name in names}
    for name, module in stand_ins.items():
        module.__spec__ = ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, module)
    stand_ins["torchvision.transforms.functional"].InterpolationMode = _InterpolationMode
    sys.modules.update(stand_ins)
    wrapper = "transformers.models.timm_wrapper"
    try:
        for function in (is_torchvision_available, is_timm_available):
            getattr(function, "cache_clear", bool)()
        assert is_timm_available()  # transformers remembers it
        timm = importlib.import_module("timm")
        vars(importlib.import_module(f"{wrapper}.modeling_timm_wrapper"))["timm"] = timm
        names = ("ImageNetInfo", "infer_imagenet_subset")
        own = vars(importlib.import_module(f"{wrapper}.configuration_timm_wrapper"))
        own.update({name: getattr(timm.data, name) for name in names})
    finally:
        for name in stand_ins:
            del sys.modules[name]
        getattr(is_torchvision_available, "cache_clear", bool)()
