"""
Converts the official LoTLIP checkpoints (of an open_clip fork, github.com/wuw2019/LoTLIP) to transformers, and back.

    lotlip convert official --checkpoint model.pt --open-clip-config open_clip_config.json \
        --tokenizer bert-base-uncased --output lotlip-vit-b-16
    lotlip convert official --checkpoint weiwu-ww/LoTLIP-ViT-B-16-100M --output lotlip-vit-b-16
    lotlip convert official --reverse --checkpoint lotlip-vit-b-16 --output model.pt
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoTokenizer, BertConfig, PreTrainedConfig, ViTConfig

from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPProcessor,
    LoTLIPTextConfig,
    LoTLIPTokenizer,
    LoTLIPVisionConfig,
)
from lotlip_hf.files import all_or_nothing, one_line, replacing
from lotlip_hf.images import official_image_processor
from lotlip_hf.loading import load_tokenizer, naming_damage, quiet
from lotlip_hf.options import Parser
from lotlip_hf.terminal import run

from .common import (
    ConversionError,
    building,
    check_output,
    load_checkpoint,
    option,
    read_json,
    rename_tensors,
    same_bits,
    section,
    size_of,
    whole,
)


def _released(patch_size: int) -> dict[str, Any]:
    return {
        "embed_dim": 768,
        "vision_cfg": {
            "timm_model_name": f"vit_base_patch{patch_size}_224.augreg_in21k",
            "timm_pool": "token",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 128,
            "hf_model_name": "bert-base-uncased",
            "hf_tokenizer_name": "bert-base-uncased",
            "hf_proj_type": "linear",
            "hf_pooler_type": "cls_pooler",
            "num_corner_token": 2,
        },
    }


# Hub id of a released checkpoint -> its open_clip configuration.
RELEASED = {
    "weiwu-ww/LoTLIP-ViT-B-16-100M": _released(16),
    "weiwu-ww/LoTLIP-ViT-B-32-100M": _released(32),
}

PREFIX = "module."
# Prefixes that wrappers add to all names: DistributedDataParallel, torch.compile, FSDP and Lightning modules.
WRAPPERS = (PREFIX, "_orig_mod.", "_fsdp_wrapped_module.", "model.")
# Settings of timm's vision transformers that the official configuration does not contain.
TIMM_VIT = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}
# A buffer of BERT with 0, 1, 2, ..., which transformers saved before 4.31.
POSITION_IDS = "text.transformer.embeddings.position_ids"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# timm's name -> transformers' names. timm stacks several tensors in one tensor, in this order.
VISION_EMBEDDINGS = {
    "cls_token": ["embeddings.cls_token"],
    "pos_embed": ["embeddings.position_embeddings"],
    "patch_embed.proj.weight": ["embeddings.patch_embeddings.projection.weight"],
    "patch_embed.proj.bias": ["embeddings.patch_embeddings.projection.bias"],
}
VISION_BLOCK = {
    "norm1": ["layernorm_before"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attn.proj": ["attention.o_proj"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}


def official_layout(model: LoTLIPModel) -> dict[str, list[str]]:
    """
    Maps the official name of every tensor, in the official order, to the names of this model's tensors. Several names
    are stacked along the first dimension: query, key and value, or words and corner tokens.
    """
    layout = {"logit_scale": ["logit_scale"]}
    vision = {}
    vision.update(VISION_EMBEDDINGS)
    for layer in range(model.config.vision_config.num_hidden_layers):
        for official, ours in VISION_BLOCK.items():
            for kind in ("weight", "bias"):
                vision[f"blocks.{layer}.{official}.{kind}"] = [f"layers.{layer}.{name}.{kind}" for name in ours]
    for kind in ("weight", "bias"):
        vision[f"norm.{kind}"] = [f"layernorm.{kind}"]
    for official, ours in vision.items():
        layout[f"visual.trunk.{official}"] = [f"vision_model.backbone.{name}" for name in ours]
    if model.config.vision_config.projection_dim is not None:
        layout["visual.head.proj.weight"] = ["visual_projection.weight"]
    for name in model.text_model.backbone.state_dict():
        layout[f"text.transformer.{name}"] = [f"text_model.backbone.{name}"]
    if model.config.text_config.num_corner_tokens:
        layout["text.transformer.embeddings.word_embeddings.weight"].append("text_model.corner_embeds")
    layout["text.proj.weight"] = ["text_projection.weight"]
    return layout


def read_official_state_dict(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads the tensors of an official checkpoint, a pickle of a state dict or of `{"state_dict": ...}`. With
    `weights_only=True`, no code in the pickle can run. Removes the prefixes of `WRAPPERS`, and the buffer of position
    ids that old versions of transformers saved and the official code ignores.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ConversionError(
            f"{checkpoint} is damaged or not a PyTorch pickle of tensors. Pass an official model.pt."
        ) from error
    state_dict = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in state_dict.items()
    ):
        raise ConversionError(f"{checkpoint} is not a state dict of dense tensors. Pass an official model.pt.")
    tensors = without_wrappers({name: tensor.detach() for name, tensor in state_dict.items()})
    position_ids = tensors.get(POSITION_IDS)
    if position_ids is not None and same_bits(position_ids.flatten(), torch.arange(position_ids.numel())):
        del tensors[POSITION_IDS]
    return tensors


def without_wrappers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the prefixes of `WRAPPERS` that all names have, in any number and order."""
    names = list(tensors)
    while prefix := next((one for one in WRAPPERS if names and all(name.startswith(one) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def config_from_official(
    open_clip_config: Mapping[str, Any],
    bert_config: PreTrainedConfig,
    state_dict: Mapping[str, torch.Tensor],
    source: str = "open_clip_config",
) -> LoTLIPConfig:
    """
    Creates the configuration of an official model. Sizes that the open_clip configuration lacks (width, depth, patch
    and image size) come from the shapes of the tensors. Settings that this package cannot reproduce exactly raise an
    error.
    """

    def size(name: str, dim: int, num_dims: int) -> int:
        return size_of(state_dict, name, dim, num_dims, "The checkpoint")

    vision, text = section(open_clip_config, "vision_cfg", source), section(open_clip_config, "text_cfg", source)
    embed_dim = whole(open_clip_config, "embed_dim", None, source)
    num_corner_tokens = whole(text, "num_corner_token", 0, source, least=0)
    # The text needs [CLS], a word and [SEP] besides the corner tokens.
    whole(text, "context_length", 77, source, least=num_corner_tokens + 3)
    option(vision, "timm_pool", "avg", ["token"], source)
    projection = option(vision, "timm_proj", "linear", ["linear", "none"], source)
    option(text, "hf_pooler_type", "mean_pooler", ["cls_pooler"], source)
    option(text, "hf_proj_type", "mlp", ["linear"], source)
    option(text, "tokenizer_kwargs", None, [None, {}], source)

    width = size("visual.trunk.cls_token", 2, 3)
    patch_size = size("visual.trunk.patch_embed.proj.weight", 2, 4)
    grid = math.isqrt(size("visual.trunk.pos_embed", 1, 3) - 1)
    timm_name = str(vision.get("timm_model_name"))
    if "heads" not in vision and not timm_name.startswith(("vit_tiny", "vit_small", "vit_base", "vit_large")):
        raise ConversionError(
            f"{source}: the number of attention heads of {timm_name!r} is unknown. Set vision_cfg.heads."
        )
    return LoTLIPConfig(
        text_config=LoTLIPTextConfig(
            backbone_config=bert_config,
            num_corner_tokens=num_corner_tokens,
            pooling="pooler",
            projection_dim=embed_dim,
        ),
        vision_config=LoTLIPVisionConfig(
            backbone_config=ViTConfig(
                hidden_size=width,
                num_hidden_layers=len({name.split(".")[3] for name in state_dict if ".trunk.blocks." in name}),
                num_attention_heads=whole(vision, "heads", max(1, width // 64), source),
                intermediate_size=size("visual.trunk.blocks.0.mlp.fc1.weight", 0, 2),
                image_size=whole(vision, "image_size", grid * patch_size, source),
                patch_size=patch_size,
                num_channels=size("visual.trunk.patch_embed.proj.weight", 1, 4),
                **TIMM_VIT,
            ),
            pooling="cls",
            projection_dim=embed_dim if projection == "linear" else None,
        ),
        projection_dim=embed_dim,
    )


def from_official(state_dict: Mapping[str, torch.Tensor], model: LoTLIPModel) -> dict[str, torch.Tensor]:
    """Renames the official tensors, which must have the same precision, to this model's names."""
    dtypes = Counter(tensor.dtype for tensor in state_dict.values())
    # transformers loads all tensors of a checkpoint in one precision.
    common = max((dtype for dtype in dtypes if dtype in DTYPES), key=dtypes.__getitem__, default=torch.float32)
    problems = [
        f"of another precision: {name} is {tensor.dtype}, expected {common}"
        for name, tensor in state_dict.items()
        if tensor.dtype != common
    ]
    converted = rename_tensors(
        state_dict, official_layout(model), model.state_dict(), "The checkpoint", problems=problems
    )
    return {name: tensor.clone() for name, tensor in converted.items()}


def to_official(model: LoTLIPModel) -> dict[str, torch.Tensor]:
    """Renames the model's tensors to the official names, in the official order. Exact inverse of `from_official`."""
    own = model.state_dict()
    return {
        official: own[names[0]].clone() if len(names) == 1 else torch.cat([own[name] for name in names])
        for official, names in official_layout(model).items()
    }


def _read_open_clip_config(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if "model_cfg" not in content:
        return content
    # open_clip publishes this form. For timm models, open_clip uses only this setting of the preprocessing.
    option(content.get("preprocess_cfg") or {}, "interpolation", None, [None, "bicubic"], str(path))
    return section(content, "model_cfg", str(path))


def _load_bert_config(open_clip_config: Path | None, text_cfg: Mapping[str, Any]) -> BertConfig:
    beside = None if open_clip_config is None else open_clip_config.parent / "bert_config.json"
    if beside is None or not beside.is_file():
        if text_cfg.get("hf_model_name") != "bert-base-uncased":
            raise ConversionError(
                f"{open_clip_config}: the text tower {text_cfg.get('hf_model_name')!r} is not bert-base-uncased. Save "
                "its configuration as bert_config.json in the same folder."
            )
        return BertConfig()
    settings = read_json(beside)
    settings.pop("transformers_version", None)
    only = {"model_type": "bert", "is_decoder": False, "position_embedding_type": "absolute"}
    for key, value in only.items():
        option(settings, key, value, [value], str(beside))
    with building(beside):
        return BertConfig(**settings)


def _load_tokenizer(source: str | Path, config: LoTLIPTextConfig, context_length: int) -> LoTLIPTokenizer:
    folder = Path(source)
    is_bare = (folder / "vocab.txt").is_file() and not (folder / "tokenizer_config.json").is_file()
    backbone_tokenizer = load_tokenizer(
        source, "pass another --tokenizer", tokenizer_class=LoTLIPTokenizer if is_bare else AutoTokenizer
    )
    tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(
        backbone_tokenizer, model_max_length=context_length - config.num_corner_tokens
    )
    # In the official code, the ids of corner tokens follow the tokenizer's last id.
    fits = len(tokenizer) == config.vocab_size or (len(tokenizer) < config.vocab_size and not config.num_corner_tokens)
    if not fits or tokenizer.pad_token_id != config.pad_token_id:
        raise ConversionError(
            f"--tokenizer {source} has {len(tokenizer)} tokens and padding id {tokenizer.pad_token_id}, but the text "
            f"tower has {config.vocab_size} and {config.pad_token_id}, without corner tokens. Pass another tokenizer."
        )
    return tokenizer


def convert(
    checkpoint: str | Path,
    open_clip_config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    output: str | Path = "lotlip",
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """
    Converts an official checkpoint into a folder for `AutoModel`, `AutoTokenizer` and `AutoProcessor`. The saved
    folder is loaded and compared with the checkpoint, bit by bit. The folder is created only if all checks pass.

    Args:
        checkpoint (`str` or `Path`): A `model.pt`, or the Hub id of a released model (see `RELEASED`), which needs no
            configuration.
        open_clip_config (`str` or `Path`, *optional*): Official configuration of the model. A `bert_config.json` in
            the same folder replaces the configuration of BERT-base.
        tokenizer (`str` or `Path`, *optional*): Folder or Hub id of a tokenizer. A folder with only a `vocab.txt` is
            enough. Defaults to the configuration's `hf_tokenizer_name`.
        output (`str` or `Path`, *optional*, defaults to `"lotlip"`): Folder to create. It must not exist or must be
            empty.
        report (`Callable`, *optional*): Function that is called with each line of the summary.

    Returns:
        `Path`: The folder.

    Raises:
        `ConversionError`: If the checkpoint cannot be converted exactly.
    """
    target = check_output(output)
    released = RELEASED.get(str(checkpoint))
    if open_clip_config is not None:
        config_path, source = Path(open_clip_config), str(open_clip_config)
        official_config = _read_open_clip_config(config_path)
    elif released is not None:
        config_path, official_config, source = None, released, str(checkpoint)
    else:
        raise ConversionError(
            f"{checkpoint}: pass its configuration with --open-clip-config. Only {', '.join(RELEASED)} need none."
        )
    text_cfg = section(official_config, "text_cfg", source)
    bert_config = _load_bert_config(config_path, text_cfg)
    tokenizer = tokenizer or text_cfg.get("hf_tokenizer_name")
    if not tokenizer:
        raise ConversionError(f"{source} has no hf_tokenizer_name. Pass --tokenizer.")
    with naming_damage(str(checkpoint)):
        weights = checkpoint if released is None else hf_hub_download(str(checkpoint), "model.pt")
    state_dict = read_official_state_dict(weights)
    with building(source):
        config = config_from_official(official_config, bert_config, state_dict, source)
        with torch.device("meta"):
            model = LoTLIPModel(config)
    text_tokenizer = _load_tokenizer(tokenizer, config.text_config, text_cfg.get("context_length", 77))
    model.load_state_dict(from_official(state_dict, model), assign=True)
    image_processor = official_image_processor(config.vision_config.image_size)
    processor = LoTLIPProcessor(image_processor=image_processor, tokenizer=text_tokenizer)

    with all_or_nothing(target) as folder:
        with quiet():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _check_saved(folder, state_dict)
    dtype, size = str(model.dtype).removeprefix("torch."), config.vision_config.image_size
    report(f"{model.num_parameters():,} parameters in {dtype}, equal to the checkpoint's bit by bit")
    report(
        f"{config.text_config.num_corner_tokens} corner tokens, texts of up to {text_tokenizer.model_max_length} "
        f"tokens, images of {size} x {size} pixels"
    )
    return Path(output)


def _check_saved(folder: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    saved = to_official(load_checkpoint(folder))
    differing = [name for name, tensor in state_dict.items() if not same_bits(saved[name], tensor)]
    if differing:
        raise ConversionError(f"These tensors differ from the checkpoint's after saving and loading: {differing}")


def reverse(checkpoint: str | Path, output: str | Path) -> Path:
    """
    Writes a LoTLIP checkpoint in the official layout, `{"state_dict": {"module....": tensor}}`, with the same bits.

    Args:
        checkpoint (`str` or `Path`): Folder of a [`LoTLIPModel`] with BERT and ViT backbones.
        output (`str` or `Path`): The `model.pt` to write. It must not exist.

    Returns:
        `Path`: The file.

    Raises:
        `ConversionError`: If the official code has no such model.
    """
    target = check_output(output)
    model = load_checkpoint(checkpoint)
    if not isinstance(model, LoTLIPModel):
        raise ConversionError(f"{checkpoint} is a {type(model).__name__}. Pass a whole LoTLIPModel.")
    text, vision = model.config.text_config, model.config.vision_config
    vit = vision.backbone_config
    wanted = {"text tower": "bert", "text pooling": "pooler", "image tower": "vit", "image pooling": "cls"}
    wanted |= {"pooled_layers": 1, "image_token_centers": None, **TIMM_VIT}
    own = (text.backbone_config.model_type, text.pooling, vit.model_type, vision.pooling)
    own += (vision.pooled_layers, vision.image_token_centers)
    own += tuple(getattr(vit, name, None) for name in TIMM_VIT)
    for (name, value), given in zip(wanted.items(), own, strict=True):
        if given != value:
            raise ConversionError(f"{checkpoint}: {name} is {given!r}. The official code supports only {value!r}.")
    mapped = {name for names in official_layout(model).values() for name in names}
    unmapped = sorted(mapped ^ model.state_dict().keys())
    if unmapped:
        raise ConversionError(f"{checkpoint}: the official layout does not have {', '.join(unmapped)}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as file:
        try:
            torch.save({"state_dict": {PREFIX + name: tensor for name, tensor in to_official(model).items()}}, file)
        except RuntimeError as error:  # also if only the end of the file cannot be written
            raise OSError(f"{target} cannot be written ({one_line(error.__context__ or error)}).") from error
    return Path(output)


DESCRIPTION = """\
Convert an official LoTLIP checkpoint to a checkpoint folder, or with --reverse back to an official file.

  lotlip convert official --checkpoint weiwu-ww/LoTLIP-ViT-B-16-100M --output checkpoint
  lotlip convert official --reverse --checkpoint checkpoint --output model.pt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in the module's docstring. Returns the exit status: 0, or 2 after a printed error."""
    return run("lotlip convert official", lambda: _main(argv))


def parser(prog: str = "lotlip convert official") -> Parser:
    """Returns the parser of the command."""
    flags = Parser(prog=prog, description=DESCRIPTION)
    group = flags.add_argument_group("Conversion")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="NAME",
        help="File model.pt or Hub id of a released model; with --reverse, a checkpoint folder (required)",
    )
    group.add_argument(
        "--output", required=True, metavar="PATH", help="Folder to write; with --reverse, the file (required)"
    )
    group.add_argument("--reverse", action="store_true", help="Convert a checkpoint folder to an official file")
    group = flags.add_argument_group("Files of a model.pt")
    group.add_argument(
        "--open-clip-config",
        metavar="FILE",
        help="Official model configuration; a bert_config.json in the same folder is also read",
    )
    group.add_argument(
        "--tokenizer", metavar="NAME", help="Folder or Hub id (default: hf_tokenizer_name of the configuration)"
    )
    return flags


def _main(argv: Sequence[str] | None) -> None:
    arguments = parser().parse_args(argv)
    if arguments.reverse and (arguments.open_clip_config or arguments.tokenizer):
        raise ValueError("--reverse works with --checkpoint and --output only. Leave the other options out.")
    if arguments.reverse:
        written = reverse(arguments.checkpoint, arguments.output)
        print(f"Wrote {written}")
    else:
        lines: list[str] = []
        written = convert(
            arguments.checkpoint, arguments.open_clip_config, arguments.tokenizer, arguments.output, lines.append
        )
        print("\n  ".join([f"Wrote {written}", *lines]))


if __name__ == "__main__":
    raise SystemExit(main())
