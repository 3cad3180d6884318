"""
Reads CLIP checkpoints in the layout of open_clip, OpenAI or Long-CLIP as stock `CLIPModel`s, which `conversion.clip`
converts to LoTLIP.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
from transformers.initialization import no_init_weights

from lotlip_hf.diffusion.stretch import KEPT_POSITIONS
from lotlip_hf.files import one_line

from .common import ConversionError, building, option, read_json, rename_tensors, section, size_of, whole
from .official import DTYPES, read_official_state_dict, without_wrappers
from .torchscript import is_torchscript, read_torchscript

Activation = Literal["gelu", "quick_gelu"]

# Wrong id in configurations from before transformers 4.31. With this id, [EOT] is the highest id in a text.
LEGACY_EOS_TOKEN_ID = 2

# Tensors in archives and some checkpoints that are not weights: sizes, and the buffer of the causal mask.
IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask")
# Prefix of the text tower in open_clip's `CustomTextCLIP`.
TEXT_PREFIX = "text."
# Long-CLIP has a second table for the positions that it trains.
LONG_CLIP_POSITIONS = "positional_embedding_res"

# Prefixes of tensors in checkpoints of transformers, for a whole CLIP and for text encoders.
TRANSFORMERS_NAMES = ("text_model.", "vision_model.", "embeddings.", "encoder.layers.")

# open_clip's settings of a tower: those that are read, those that must have one of the listed values, and those that
# do not change outputs.
VISION_SETTINGS = "layers width head_width mlp_ratio patch_size image_size norm_kwargs".split()
TEXT_SETTINGS = "layers width heads mlp_ratio context_length vocab_size norm_kwargs eos_id hf_tokenizer_name".split()
BLOCK_VALUES: dict[str, list[Any]] = {
    "ls_init_value": [None],
    "act_kwargs": [None, {}],
    "block_type": [None, "default"],
    **dict.fromkeys("qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc".split(), [False]),
}
VISION_VALUES = {
    **BLOCK_VALUES,
    **dict.fromkeys(("attentional_pool", "no_ln_pre"), [False]),
    "pool_type": ["tok"],
    "timm_model_name": [None],
}
TEXT_VALUES = {
    **BLOCK_VALUES,
    **dict.fromkeys(("embed_cls", "no_causal_mask", "proj_bias"), [False]),
    "pool_type": ["argmax", "eos"],
    "proj_type": ["linear"],
    **dict.fromkeys(("tokenizer_mode", "hf_model_name"), [None]),
    "tokenizer_kwargs": [None, {}],
}
MODEL_VALUES: dict[str, list[Any]] = {
    **dict.fromkeys(("init_logit_bias", "multimodal_cfg"), [None]),
    "nonscalar_logit_scale": [False],
}
# Settings of dropout in training, of additional outputs and of how a saved table was created, and settings that have
# an effect only with values excluded above.
VISION_UNUSED = (
    "patch_dropout output_tokens pos_embed_type final_ln_after_pool attn_pooler_queries attn_pooler_heads "
    "timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path"
).split()
TEXT_UNUSED = "pad_id output_tokens final_ln_after_pool hf_model_pretrained hf_proj_type hf_pooler_type".split()
MODEL_UNUSED = ("init_logit_scale", "custom_text", "output_dict", "cast_dtype")

# open_clip's name -> transformers' names. open_clip stacks several tensors in one tensor, in this order.
TEXT_TENSORS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
VISION_TENSORS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
BLOCK = {
    "ln_1.{}": ["layer_norm1.{}"],
    "attn.in_proj_{}": ["self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"],
    "attn.out_proj.{}": ["self_attn.out_proj.{}"],
    "ln_2.{}": ["layer_norm2.{}"],
    "mlp.c_fc.{}": ["mlp.fc1.{}"],
    "mlp.c_proj.{}": ["mlp.fc2.{}"],
}
# open_clip multiplies states by these matrices from the right. Linear layers store the transposed matrix.
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def open_clip_layout(config: CLIPConfig) -> dict[str, list[str]]:
    """
    Maps the open_clip name of every tensor to the names of a `CLIPModel`'s tensors. Several names (query, key and
    value) are stacked along the first dimension. Tensors in `TRANSPOSED` are also transposed.
    """
    layout = {"logit_scale": ["logit_scale"], **{theirs: [own] for theirs, own in TRANSPOSED.items()}}
    towers = (
        ("", "text_model.", TEXT_TENSORS, config.text_config),
        ("visual.", "vision_model.", VISION_TENSORS, config.vision_config),
    )
    for their_prefix, own_prefix, tensors, tower_config in towers:
        names = {theirs: [own] for theirs, own in tensors.items()}
        for layer in range(tower_config.num_hidden_layers):
            for theirs, own in BLOCK.items():
                for kind in ("weight", "bias"):
                    parts = [f"encoder.layers.{layer}.{name.format(kind)}" for name in own]
                    names[f"transformer.resblocks.{layer}.{theirs.format(kind)}"] = parts
        layout.update({their_prefix + theirs: [own_prefix + name for name in own] for theirs, own in names.items()})
    return layout


def read_open_clip(
    weights: str | Path, config: str | Path | None = None, activation: Activation | None = None
) -> tuple[CLIPModel, CLIPImageProcessorPil, str | None]:
    """
    Reads a checkpoint of open_clip, OpenAI or Long-CLIP.

    Args:
        weights (`str` or `Path`): A `.safetensors` file; a pickle of a state dict or of `{"state_dict": ...}`, from
            which only tensors are read; or a TorchScript archive, as published by OpenAI, whose code does not run.
        config (`str` or `Path`, *optional*): open_clip's configuration: an `open_clip_config.json`, or only the
            model's part of it. By default all sizes come from the tensors, with heads of width 64 as in OpenAI's code.
        activation (`str`, *optional*): `"gelu"` or `"quick_gelu"`, for a file without a configuration. Archives and
            files of Long-CLIP always use `"quick_gelu"`.

    Returns:
        `tuple[CLIPModel, CLIPImageProcessorPil, str | None]`: The model in the precision of the file (the higher one
        of two), its image processor, and the configuration's `hf_tokenizer_name`, if it has one.

    Raises:
        `ConversionError`: If a file is missing or damaged, if a `CLIPModel` does not support a setting, or if a tensor
            is unknown, missing or misshapen.
    """
    path = Path(weights)
    state_dict, is_archive = _read_tensors(path)
    if any(name.startswith(TRANSFORMERS_NAMES) for name in state_dict):
        raise ConversionError(
            f"{path} has tensor names of transformers. Pass its folder, with config.json, instead of the file."
        )
    # If the short name exists too, keep the prefix: the tensor is then reported as unknown.
    short = {name: name.removeprefix(TEXT_PREFIX) for name in state_dict}
    state_dict = {name if short[name] in state_dict else short[name]: one for name, one in state_dict.items()}
    for name in IGNORED:
        state_dict.pop(name, None)
    is_long_clip = LONG_CLIP_POSITIONS in state_dict
    if is_long_clip:
        _join_long_clip_positions(state_dict)
    known = "quick_gelu" if is_archive or is_long_clip else None
    if config is None:
        model_cfg, preprocess_cfg, source = _settings_from_tensors(state_dict, known or activation, path), {}, path
    else:
        if activation is not None:
            raise ConversionError(f"--activation {activation}: {config} already sets it. Leave --activation out.")
        content = read_json(Path(config))
        model_cfg, preprocess_cfg = content, {}
        if "model_cfg" in content:
            model_cfg = section(content, "model_cfg", str(config))
            preprocess_cfg = content.get("preprocess_cfg") or {}
        source = config
        if known and not model_cfg.get("quick_gelu", False):
            raise ConversionError(
                f"{config} does not set quick_gelu, but the code for files like {path} always uses it. Set quick_gelu "
                "to true, or leave --open-clip-config out."
            )
    with building(source), no_init_weights():
        clip_config = config_from_open_clip(model_cfg, str(source))
        model = CLIPModel(clip_config)
    model.load_state_dict(from_open_clip(state_dict, model, path), assign=True)
    image_size = clip_config.vision_config.image_size
    image_processor = image_processor_from_open_clip(preprocess_cfg, image_size, str(source))
    return model.eval(), image_processor, model_cfg["text_cfg"].get("hf_tokenizer_name")


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Reads the tensors of a file, and whether it is a TorchScript archive."""
    if is_torchscript(path):
        return read_torchscript(path), True
    if path.suffix != ".safetensors":
        return read_official_state_dict(path), False
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ConversionError(f"{path} is not a safetensors file ({one_line(error)}).") from error
    return without_wrappers(tensors), False


def _join_long_clip_positions(state_dict: dict[str, torch.Tensor]) -> None:
    """Joins two tables as Long-CLIP's code does: the first 20 rows of CLIP's table, then the trained table's rows."""
    kept = state_dict.get("positional_embedding")
    if kept is not None and kept.shape == state_dict[LONG_CLIP_POSITIONS].shape:  # else an unknown tensor
        trained = state_dict.pop(LONG_CLIP_POSITIONS)
        state_dict["positional_embedding"] = torch.cat([kept[:KEPT_POSITIONS], trained[KEPT_POSITIONS:]])


def _settings_from_tensors(
    state_dict: Mapping[str, torch.Tensor], activation: Activation | None, path: Path
) -> dict[str, Any]:
    """Settings of OpenAI's code for a file without a configuration."""
    if activation not in get_args(Activation):
        raise ConversionError(
            f"{path} does not contain the activation. Pass --open-clip-config, or --activation gelu (most models of "
            "open_clip) or quick_gelu (OpenAI's)."
        )

    def size(name: str, dim: int, num_dims: int) -> int:
        return size_of(state_dict, name, dim, num_dims, str(path))

    def tower(prefix: str, width: int) -> dict[str, Any]:
        if width % 64:
            raise ConversionError(
                f"{path}: the width {width} of the {'image' if prefix else 'text'} tower is not a multiple of 64, the "
                "width of OpenAI's heads. Pass --open-clip-config with the number of heads."
            )
        blocks = prefix + "transformer.resblocks."
        layers = {name[len(blocks) :].split(".")[0] for name in state_dict if name.startswith(blocks)}
        mlp_ratio = size(f"{blocks}0.mlp.c_fc.weight", 0, 2) / width
        return {"layers": len(layers), "width": width, "mlp_ratio": mlp_ratio}

    vision_width, patch_size = size("visual.conv1.weight", 0, 4), size("visual.conv1.weight", 3, 4)
    grid = math.isqrt(size("visual.positional_embedding", 0, 2) - 1)
    text_width = size("token_embedding.weight", 1, 2)
    return {
        "embed_dim": size("text_projection", 1, 2),
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": {
            **tower("visual.", vision_width),
            "patch_size": patch_size,
            "image_size": grid * patch_size,
        },
        "text_cfg": {
            **tower("", text_width),
            "heads": text_width // 64,
            "context_length": size("positional_embedding", 0, 2),
            "vocab_size": size("token_embedding.weight", 0, 2),
        },
    }


def config_from_open_clip(model_cfg: Mapping[str, Any], source: str = "open_clip_config") -> CLIPConfig:
    """
    Creates the configuration of a `CLIPModel` from open_clip's settings of a model. Missing settings have open_clip's
    defaults. The [EOT] id is `eos_id` or, for `pool_type: argmax`, `LEGACY_EOS_TOKEN_ID`. Settings that are unknown or
    not supported by a `CLIPModel` raise an error.
    """
    vision, text = section(model_cfg, "vision_cfg", source), section(model_cfg, "text_cfg", source)
    model_settings = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    for options, read, values, unused in (
        (model_cfg, model_settings, MODEL_VALUES, MODEL_UNUSED),
        (vision, VISION_SETTINGS, VISION_VALUES, VISION_UNUSED),
        (text, TEXT_SETTINGS, TEXT_VALUES, TEXT_UNUSED),
    ):
        _check_known(options, (*read, *values, *unused), source)
        for key in values.keys() & options.keys():
            option(options, key, None, values[key], source)
    embed_dim = whole(model_cfg, "embed_dim", None, source)
    quick_gelu = option(model_cfg, "quick_gelu", False, [False, True], source)
    vision_width = whole(vision, "width", 768, source)
    towers = {}
    for name, options, width, heads in (
        ("vision", vision, vision_width, max(1, vision_width // whole(vision, "head_width", 64, source))),
        ("text", text, whole(text, "width", 512, source), whole(text, "heads", 8, source)),
    ):
        norm = dict(options.get("norm_kwargs") or {})
        _check_known(norm, ("eps",), source)
        towers[name] = {
            "hidden_size": width,
            "num_hidden_layers": whole(options, "layers", 12, source),
            "num_attention_heads": heads,
            # As in open_clip, `int` rounds down. A ratio of two widths may be slightly too low.
            "intermediate_size": int(width * float(options.get("mlp_ratio", 4.0)) + 1e-6),
            "hidden_act": "quick_gelu" if quick_gelu else "gelu",
            "layer_norm_eps": norm.get("eps", 1e-5),
            "projection_dim": embed_dim,
        }
    eos_token_id = LEGACY_EOS_TOKEN_ID
    if text.get("pool_type") == "eos":
        # 2 is also open_clip's default.
        eos_token_id = whole(text, "eos_id", LEGACY_EOS_TOKEN_ID, source, least=0)
        if eos_token_id == LEGACY_EOS_TOKEN_ID:
            raise ConversionError(
                f"{source}: `eos_id` {eos_token_id} is not supported, because a CLIPModel with this id pools at the "
                "highest id of a text. MetaCLIP 2 uses this `eos_id`."
            )
    image_size, patch_size = _side(vision, "image_size", 224, source), _side(vision, "patch_size", 16, source)
    return CLIPConfig(
        text_config={
            **towers["text"],
            "vocab_size": whole(text, "vocab_size", 49408, source),
            "max_position_embeddings": whole(text, "context_length", 77, source, least=2),
            "eos_token_id": eos_token_id,
        },
        vision_config={**towers["vision"], "image_size": image_size, "patch_size": patch_size},
        projection_dim=embed_dim,
    )


def _check_known(options: Mapping[str, Any], known: Sequence[str], source: str) -> None:
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ConversionError(f"{source}: this converter does not support the settings {', '.join(unknown)}.")


def _side(options: Mapping[str, Any], key: str, default: int, source: str) -> int:
    """Returns the side of a square, which may be given as a pair."""
    value = options.get(key, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return whole({key: value}, key, default, source)


def from_open_clip(
    state_dict: Mapping[str, torch.Tensor], model: CLIPModel, source: str | Path = "The checkpoint"
) -> dict[str, torch.Tensor]:
    """
    Renames tensors in open_clip's layout to the names of a `CLIPModel`. If a file has several precisions, as OpenAI's
    have, all tensors get the precision that represents all values exactly.
    """
    problems = [
        f"of another type: {name} is {tensor.dtype}, expected floating point"
        for name, tensor in state_dict.items()
        if tensor.dtype not in DTYPES
    ]
    layout, own = open_clip_layout(model.config), model.state_dict()
    converted = rename_tensors(state_dict, layout, own, str(source), TRANSPOSED, problems)
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in converted.values()})
    return {name: tensor.to(dtype).clone(memory_format=torch.contiguous_format) for name, tensor in converted.items()}


def image_processor_from_open_clip(
    preprocess_cfg: Mapping[str, Any], image_size: int, source: str = "open_clip_config"
) -> CLIPImageProcessorPil:
    """
    Creates the stock image processor for open_clip's settings of the preprocessing, which default to OpenAI's. It is
    saved as a plain `CLIPImageProcessor`, which loads with any installed backend.
    """
    read = ("mean", "std", "interpolation", "resize_mode", "size", "mode", "fill_color")
    _check_known(preprocess_cfg, read, source)
    option(preprocess_cfg, "mode", "RGB", ["RGB"], source)
    interpolation = option(preprocess_cfg, "interpolation", "bicubic", [*RESAMPLING], source)
    resize_mode = option(preprocess_cfg, "resize_mode", "shortest", ["shortest", "squash"], source)
    settings: dict[str, Any] = {"resample": RESAMPLING[interpolation]}
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        if key in preprocess_cfg:
            given = preprocess_cfg[key]
            settings[name] = given if isinstance(given, list) else [given] * 3
    square = {"height": image_size, "width": image_size}
    squash = resize_mode == "squash"
    return CLIPImageProcessorPil(
        size=square if squash else {"shortest_edge": image_size},
        do_center_crop=not squash,
        crop_size=square,
        **settings,
    )
