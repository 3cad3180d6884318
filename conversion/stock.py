"""
Converts a trained LoTLIP to stock classes of transformers, which need neither this package nor remote code.

    lotlip convert stock --model lotlip-vit-b-16 --output stock
    lotlip convert stock --model lotlip-vit-b-16 --without-text-cleaning --output stock
    lotlip convert stock --model lotlip-modernbert --text-only --without-text-cleaning --output sentences

Text tokens do not attend to corner tokens, so an encoder without corner tokens gives the same features. A BERT loses
the positions of corner tokens. A model with CLIP's text and image towers becomes a `CLIPModel`, any other model a
`VisionTextDualEncoderModel`, and a single tower the stock class of its encoder. The result is for inference, because
it cannot train corner tokens.

A `VisionTextDualEncoderModel` reads `pooler_output`, so it needs poolings that the encoders' stock classes have. A
text tower with another pooling or with a projection (`--text-only` for that of a whole model) becomes a folder for
`SentenceTransformer`, with pooling, projection and normalisation as modules of sentence-transformers.

A stock tokenizer splits sentences, but does not clean texts: call `lotlip_hf.modeling.cleaning_lotlip.clean`. If
the LoTLIP tokenizer cleans texts, a stock tokenizer is saved only with `--without-text-cleaning`. A stock tokenizer
encodes a text that is only a special token, such as "[SEP]", as that token. It adds `prompt_template` to all texts
except empty ones. A template that continues after the text has no stock tokenizer.

Callers of the stock classes must pass the attention mask, pad on the right, pass `truncation=True` for texts, and drop
the transparency of images with `convert("RGB")`; otherwise transparent images get a white background.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import models
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)
from transformers import initialization as init

from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPTokenizer,
    LoTLIPVisionConfig,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
)
from lotlip_hf.diffusion.stretch import clip_text_model
from lotlip_hf.files import all_or_nothing
from lotlip_hf.loading import fit_tokenizer, load_strict, naming_damage, quiet
from lotlip_hf.modeling.backbones_lotlip import POOLINGS, CLIPTextBackbone
from lotlip_hf.modeling.calls_lotlip import free_of_calls
from lotlip_hf.modeling.projection_lotlip import ResidualMLP
from lotlip_hf.modeling.tokenization_lotlip import CLOSE, OPEN
from lotlip_hf.options import Parser
from lotlip_hf.sentence_folder import POOLINGS as POOLINGS_OF_SENTENCES
from lotlip_hf.terminal import run

from .common import (
    ConversionError,
    check_output,
    checked_length,
    load_checkpoint,
    local_folder,
    random_images,
    random_texts,
    read_json,
)

# Largest accepted difference between features before and after the export, relative to a feature's norm.
TOLERANCE = 1e-6
TOWERS = {"text": LoTLIPTextModelWithProjection, "vision": LoTLIPVisionModelWithProjection}


@dataclass(frozen=True)
class StockCheckpoint:
    """
    The folder that [`convert`] wrote.

    Args:
        folder (`Path`): The folder.
        model_class (`str`): Class name of the stock model.
        num_parameters (`int`): Number of parameters.
        dtype (`torch.dtype`): Type of the parameters.
        difference (`float`): Largest difference of the features from the LoTLIP's, relative to a feature's norm.
        processor (`str`): Classes of the saved tokenizer and image processor, or the reason why one is missing.
    """

    folder: Path
    model_class: str
    num_parameters: int
    dtype: torch.dtype
    difference: float
    processor: str


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """
    Returns the stock model with the weights of a LoTLIP model. Weights that do not change are shared. Text features,
    image features and logits are those of the LoTLIP for texts that are padded on the right and passed with their
    attention mask.

    Args:
        model (`PreTrainedModel`): A [`LoTLIPModel`], which becomes a `CLIPModel` (CLIP towers) or a
            `VisionTextDualEncoderModel`; or one of its towers, with or without projection, which becomes the stock
            class of its encoder. If this class lacks a text tower's pooling or projection, [`convert`] writes them as
            modules of sentence-transformers.

    Returns:
        `PreTrainedModel`: The stock model.

    Raises:
        `ConversionError`: If no stock class gives the same features.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel, ViTConfig, ViTModel
    >>> from lotlip_hf import from_backbones
    >>> from lotlip_hf.conversion.stock import stock_model

    >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> model = from_backbones(BertModel(BertConfig(**size)), ViTModel(ViTConfig(**size)))
    >>> type(stock_model(model)).__name__
    'VisionTextDualEncoderModel'
    ```
    """
    if isinstance(model, LoTLIPModel):
        return _stock_dual_encoder(model)
    if isinstance(model, (LoTLIPTextModel, LoTLIPTextModelWithProjection)):
        return _stock_text_encoder(model)
    return _stock_vision_encoder(model)


def _stock_dual_encoder(model: LoTLIPModel) -> PreTrainedModel:
    if _pools_otherwise(model.config.text_config):
        raise _no_stock_class(
            model.text_model,
            f"with pooling {model.config.text_config.pooling!r} in a dual encoder",
            "the text tower with --text-only",
        )
    if not model.config.vision_config.family.in_dual_encoder:
        raise _no_stock_class(model.vision_model, "in a dual encoder", "one tower with --text-only or --vision-only")
    text_config, text_state = _text_encoder(model.text_model)
    vision_config, vision_state = _vision_encoder(model.vision_model)
    if not hasattr(vision_config, "hidden_size"):
        vision_config.hidden_size = model.config.vision_config.hidden_size
    state = {
        **{f"text_model.{name}": tensor for name, tensor in text_state.items()},
        **{f"vision_model.{name}": tensor for name, tensor in vision_state.items()},
        "text_projection.weight": _projection_weight(model.text_projection, model.text_model),
        "visual_projection.weight": _projection_weight(model.visual_projection, model.vision_model),
        "logit_scale": model.logit_scale.detach(),
    }
    is_clip = (text_config.model_type, vision_config.model_type) == ("clip_text_model", "clip_vision_model")
    config_class, stock_class = VisionTextDualEncoderConfig, VisionTextDualEncoderModel
    if is_clip:
        config_class, stock_class = CLIPConfig, CLIPModel
    for config in (text_config, vision_config):
        if hasattr(config, "projection_dim"):  # CLIP's towers also store it
            config.projection_dim = model.config.projection_dim
    config = config_class(
        text_config=text_config.to_dict(),
        vision_config=vision_config.to_dict(),
        projection_dim=model.config.projection_dim,
        logit_scale_init_value=model.config.logit_scale_init_value,
    )
    return _build(stock_class, config, state, model)


def _stock_text_encoder(model: LoTLIPTextModel | LoTLIPTextModelWithProjection) -> PreTrainedModel:
    tower = model if isinstance(model, LoTLIPTextModel) else model.text_model
    has_projection = _linear(getattr(model, "text_projection", None), tower) is not None
    if isinstance(tower.backbone, CLIPTextModel):
        return clip_text_model(model, with_projection=has_projection)
    return _build(type(tower.backbone), *_text_encoder(tower), model, **_options(model))


def _options(model: PreTrainedModel) -> dict[str, bool]:
    """Arguments of the stock class of a text tower, which can lack the pooler."""
    config = model.config
    return config.family.pooling_layer(config.pooling) if isinstance(config, LoTLIPTextConfig) else {}


def _has_modules(model: PreTrainedModel) -> bool:
    """Whether a text tower becomes an encoder with modules of sentence-transformers."""
    if not isinstance(model, LoTLIPTextModel | LoTLIPTextModelWithProjection):
        return False
    has_projection = isinstance(getattr(model, "text_projection", None), nn.Linear)
    is_clip = isinstance(model.config.family, CLIPTextBackbone)
    return _pools_otherwise(model.config) or (has_projection and not is_clip)


def _pools_otherwise(config: LoTLIPTextConfig) -> bool:
    """Whether the `pooler_output` of the stock class is not the pooled state."""
    return config.pooling not in config.family.stock_poolings


def _stock_vision_encoder(model: LoTLIPVisionModel | LoTLIPVisionModelWithProjection) -> PreTrainedModel:
    tower = model if isinstance(model, LoTLIPVisionModel) else model.vision_model
    projection = getattr(model, "visual_projection", None)
    config, state = _vision_encoder(tower)
    if not isinstance(projection, nn.Linear):
        return _build(type(tower.backbone), config, state, model)
    if config.model_type != "clip_vision_model":
        raise _no_stock_class(tower, "with a projection", "the whole LoTLIPModel or the tower without the projection")
    config.projection_dim = projection.out_features
    state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    state["visual_projection.weight"] = projection.weight.detach()
    return _build(CLIPVisionModelWithProjection, config, state, model)


def _text_encoder(tower: LoTLIPTextModel) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of the stock text encoder, without the positions of corner tokens."""
    config, state = copy.deepcopy(tower.config.backbone_config), dict(tower.backbone.state_dict())
    family, corners = tower.config.family, tower.config.num_corner_tokens
    if tower.config.token_prepending is not None:
        raise _no_stock_class(tower, "with token_prepending", "a model without it")
    if tower.config.attention == "bidirectional" and not getattr(config, "use_bidirectional_attention", False):
        # Without padding, `sdpa` of stock decoders is causal, also with `config.is_causal=False`.
        raise _no_stock_class(tower, "with attention='bidirectional'", "a model with attention='causal'")
    table = state.get(family.position_table)
    if table is not None and corners and family.words_skip_corners:
        words = family.position_offset(config) + 1
        state[family.position_table] = torch.cat([table[:words], table[words + corners :]])
        config.max_position_embeddings -= corners
    return config, state


def _vision_encoder(tower: LoTLIPVisionModel) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a stock image encoder with the tower's `pooler_output`."""
    config, state = copy.deepcopy(tower.config.backbone_config), dict(tower.backbone.state_dict())
    layers = tower.config.pooled_layers
    if layers > 1:
        raise _no_stock_class(tower, f"with pooled_layers={layers}", "a model with pooled_layers=1")
    if tower.config.image_token_centers is not None:
        raise _no_stock_class(tower, "with image_token_centers", "a model with image_token_centers=None")
    if tower.config.pooling not in tower.config.family.stock_poolings:
        family = tower.config.family
        instead = " or ".join(repr(one) for one in family.stock_poolings if one not in family.excluded_poolings)
        raise _no_stock_class(tower, f"with pooling {tower.config.pooling!r}", f"a model with pooling={instead}")
    if config.model_type == "vit" and tower.config.pooling == "cls":
        # The stock ViT applies a dense layer to the class token.
        config.pooler_act, config.pooler_output_size = "linear", config.hidden_size
        weight = _identity(tower)
        state.update({"pooler.dense.weight": weight, "pooler.dense.bias": torch.zeros_like(weight[0])})
    return config, state


def _no_stock_class(tower: LoTLIPTextModel | LoTLIPVisionModel, what: str, instead: str) -> ConversionError:
    onnx = "" if tower.config.family.no_onnx else ", or export to ONNX with `lotlip convert onnx`"
    return ConversionError(
        f"There is no stock class for a {type(tower.backbone).__name__} {what}. Export {instead}{onnx}."
    )


def _identity(tower: LoTLIPTextModel | LoTLIPVisionModel) -> torch.Tensor:
    return torch.eye(tower.config.hidden_size, dtype=tower.dtype, device=tower.device)


def _linear(projection: nn.Module | None, tower: LoTLIPTextModel | LoTLIPVisionModel) -> nn.Linear | None:
    """The projection of a tower, if there is one."""
    if isinstance(projection, ResidualMLP):
        raise _no_stock_class(tower, "with projection='residual_mlp'", "a model with projection='linear'")
    return projection if isinstance(projection, nn.Linear) else None


def _projection_weight(projection: nn.Module, tower: LoTLIPTextModel | LoTLIPVisionModel) -> torch.Tensor:
    linear = _linear(projection, tower)
    return _identity(tower) if linear is None else linear.weight.detach()


def _build(
    stock_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    **options: bool,
) -> PreTrainedModel:
    for one in (config, *(getattr(config, name) for name in config.sub_configs)):
        one.architectures, one.dtype = None, model.dtype
        vars(one).pop("auto_map", None)  # names remote code
    with init.no_init_weights():
        stock = stock_class(config, **options)
    stock.load_state_dict(dict(state), assign=True)
    return stock.to(model.device).train(model.training)


def stock_tokenizer(tokenizer: LoTLIPTokenizer) -> PreTrainedTokenizerFast:
    """
    Returns the stock tokenizer that gives the same ids as a LoTLIP tokenizer without cleaning. Its normaliser, which
    is saved in `tokenizer.json`, splits sentences. Names of special tokens in a text stay text. The ids differ in two
    cases: for a text that is only the name of a special token, and, with tokenizers other than BERT's, for a text with
    the characters U+2E3B U+2E3A, between which the normaliser inserts a space.

    Args:
        tokenizer (`LoTLIPTokenizer`): A tokenizer with `clean_text=False`.

    Returns:
        `PreTrainedTokenizerFast`: A tokenizer that pads on the right, which stock models need for their positions.

    Raises:
        `ConversionError`: If the tokenizer cleans texts, which a stock tokenizer cannot do.
    """
    if tokenizer.clean_text:
        raise ConversionError("A stock tokenizer cannot clean texts. Load the tokenizer with clean_text=False.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.bare_tokenizer(),
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side="right",
        truncation_side=tokenizer.truncation_side,
        **tokenizer.special_tokens_map,
    )


def convert(
    model: str | Path, output: str | Path, without_text_cleaning: bool = False, tower: str | None = None
) -> StockCheckpoint:
    """
    Converts a LoTLIP checkpoint to stock classes, for `AutoModel`, `AutoTokenizer` and `AutoProcessor`. The saved
    model is loaded and compared with the LoTLIP on random texts and images. The folder is created only if all checks
    pass.

    Args:
        model (`str` or `Path`): Folder or Hub id of a [`LoTLIPModel`], or of a tower with or without projection.
        output (`str` or `Path`): Folder to create. It must not exist or must be empty.
        without_text_cleaning (`bool`, *optional*, defaults to `False`): Whether to save a stock tokenizer that does
            not clean texts. By default no tokenizer is saved if the checkpoint's tokenizer cleans texts.
        tower (`str`, *optional*): Tower of a whole model to export, with its projection: `"text"` or `"vision"`.

    Returns:
        [`StockCheckpoint`]: Summary of the export.

    Raises:
        `ConversionError`: If the checkpoint is incomplete, or if no stock class gives the same features.
    """
    target = check_output(output)
    model = local_folder(model)
    lotlip = load_checkpoint(model)
    if tower is not None:
        if not isinstance(lotlip, LoTLIPModel):
            raise ConversionError(f"--{tower}-only: {model} is a {type(lotlip).__name__}. Leave the option out.")
        lotlip = load_strict(TOWERS[tower], model)
    stock = stock_model(lotlip)
    processor, processor_summary = _stock_processors(model, lotlip, stock, without_text_cleaning)

    with all_or_nothing(target) as folder:
        with quiet():
            stock.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        _name_tokenizer_class(folder)
        if _has_modules(lotlip):
            limit = lotlip.config.max_position_embeddings
            _write_modules(folder, lotlip, getattr(processor, "model_max_length", limit))
        checkpoint = StockCheckpoint(
            folder=Path(output),
            model_class=type(stock).__name__,
            num_parameters=stock.num_parameters(),
            dtype=stock.dtype,
            difference=_check_features(folder, lotlip, type(stock)),
            processor=processor_summary,
        )
    return checkpoint


def _write_modules(folder: Path, lotlip: LoTLIPTextModel | LoTLIPTextModelWithProjection, max_length: int) -> None:
    """Adds the files with which `SentenceTransformer(folder)` pools, projects and normalises."""
    config: LoTLIPTextConfig = lotlip.config
    settings: dict[str, Any] = {"sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False}}
    own = "cls" if config.pooling == "pooler" else config.pooling  # "pooler" adds a dense layer
    pooling = {switch: name == own for switch, name in POOLINGS_OF_SENTENCES.values()}
    settings["1_Pooling/config.json"] = {"word_embedding_dimension": config.hidden_size, **pooling}
    layers = []
    if config.pooling == "pooler":
        tower = lotlip if isinstance(lotlip, LoTLIPTextModel) else lotlip.text_model
        layers.append((tower.backbone.pooler.dense, "torch.nn.modules.activation.Tanh"))
    if isinstance(getattr(lotlip, "text_projection", None), nn.Linear):
        layers.append((lotlip.text_projection, "torch.nn.modules.linear.Identity"))
    names = ["Transformer", "Pooling", *["Dense"] * len(layers), "Normalize"]
    paths = [f"{index}_{name}" if index else "" for index, name in enumerate(names)]
    settings["modules.json"] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    for path, (layer, activation) in zip(paths[2:-1], layers, strict=True):
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
        settings[f"{path}/config.json"] = {**sizes, "activation_function": activation}
    for name, content in settings.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path, (layer, _) in zip(paths[2:-1], layers, strict=True):
        state = {f"linear.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
        save_file(state, folder / path / "model.safetensors")


def _stock_processors(
    folder: Path, lotlip: PreTrainedModel, stock: PreTrainedModel, without_text_cleaning: bool
) -> tuple[Any, str]:
    """Tokenizer and image processor to save with the model, and a line that describes them."""
    tokenizer, image_processor, missing = None, None, []
    with naming_damage(str(folder)):
        if isinstance(lotlip, (LoTLIPModel, LoTLIPTextModel, LoTLIPTextModelWithProjection)):
            tokenizer, reason = _stock_tokenizer_of(folder, lotlip, without_text_cleaning)
            missing += [] if tokenizer is not None else [f"no tokenizer: {reason}"]
        if isinstance(lotlip, (LoTLIPModel, LoTLIPVisionModel, LoTLIPVisionModelWithProjection)):
            image_processor = _image_processor_of(folder)
            missing += [] if image_processor is not None else [f"no image processor: {folder} has none"]
    for part in (tokenizer, image_processor):
        for settings in (getattr(part, "init_kwargs", {}), vars(part) if part is not None else {}):
            for name in ("auto_map", "processor_class", "_processor_class"):
                settings.pop(name, None)  # remote code, and the LoTLIP's processor
    processor = image_processor if tokenizer is None else tokenizer
    if tokenizer is not None and image_processor is not None:
        processor_class = CLIPProcessor if isinstance(stock, CLIPModel) else VisionTextDualEncoderProcessor
        processor = processor_class(image_processor, tokenizer)
    written = [] if processor is None else [type(processor).__name__]
    return processor, "; ".join([*written, *missing])


def _image_processor_of(folder: Path) -> Any:
    if (folder / "processor_config.json").is_file():
        return getattr(AutoProcessor.from_pretrained(folder, trust_remote_code=False), "image_processor", None)
    if (folder / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    return None


def _stock_tokenizer_of(
    folder: Path, lotlip: PreTrainedModel, without_text_cleaning: bool
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """The stock tokenizer of a checkpoint, or the reason why there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None, f"{folder} has none"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    fit_tokenizer(lotlip, tokenizer)
    if not isinstance(tokenizer, LoTLIPTokenizer):
        if not type(tokenizer).__module__.startswith("transformers."):
            return None, f"{type(tokenizer).__name__} is not a class of transformers"
        tokenizer.padding_side = "right"  # stock models count positions from the left
        return tokenizer, ""
    if tokenizer.clean_text and not without_text_cleaning:
        return None, (
            "a stock tokenizer cannot clean texts as LoTLIP's does (ftfy, HTML entities, white space). Pass "
            "--without-text-cleaning to save a tokenizer that does not clean"
        )
    tokenizer.clean_text = False
    stock = stock_tokenizer(tokenizer)
    differing = _differing_text(tokenizer, stock)
    free_of_calls(stock)
    return (
        (stock, "") if differing is None else (None, f"a stock tokenizer would give other ids for {differing[:40]!r}")
    )


def _differing_text(tokenizer: LoTLIPTokenizer, stock: PreTrainedTokenizerFast) -> str | None:
    """A text with different ids, from samples that exercise sentence splitting and normalisers, or `None`."""
    special = list(tokenizer.special_tokens_map.values())
    parts = [
        "A cat sleeps",
        "the Dog's 3.5 bones",
        "Äußerst (schön)",
        "e\u0301",
        "猫が。",
        "",
        " ",
        "\t",
        "[x]",
        "<b>",
    ]
    texts = [f"{one}{between}{other}" for one in parts for between in (". ", ".", " . ", "... ") for other in parts]
    texts += [text for name in special for text in (f"a {name}. {name} b", f"{name}{name}", f". {name}.", f"{name} ")]
    texts += [f"{OPEN}0{CLOSE} a", ". ".join(parts * 100), *parts]
    if isinstance(tokenizer.backend_tokenizer.model, (models.BPE, models.Unigram)):
        texts = [text for text in texts if OPEN not in text]  # see `stock_tokenizer`
    if tokenizer.prompt_template != "{}":
        texts = [text for text in texts if text.strip(". ")]  # in a stock tokenizer, others get no template
    for text in texts:
        for truncation in (True, False):
            ids = [one(text, truncation=truncation, verbose=False)["input_ids"] for one in (tokenizer, stock)]
            if ids[0] != ids[1]:
                return text
    return None


def _name_tokenizer_class(folder: Path) -> None:
    """Sets the class name that every version of transformers accepts for a plain tokenizer.json."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["tokenizer_class"] == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_features(folder: Path, lotlip: PreTrainedModel, stock_class: type[PreTrainedModel]) -> float:
    """Largest difference of features after saving and loading, as in [`StockCheckpoint`]."""
    stock: Any = load_strict(stock_class, folder, **_options(lotlip))
    if stock.dtype != lotlip.dtype:
        raise ConversionError(f"The stock model has another dtype after saving and loading: {stock.dtype}.")
    # Rounding in half precision depends on the order of operations, so compare in single precision.
    dtype = torch.float64 if lotlip.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        expected = _features(lotlip.to(dtype).eval())
        given = _features(stock.to(dtype).eval(), lotlip.config, folder)
    differences = {}
    for name, one in expected.items():
        if name == "logits_per_image":  # divide by the factor, so that cosine similarities are compared
            differences[name] = ((given[name] - one).abs().max() / lotlip.logit_scale.exp()).item()
            continue
        differences[name] = ((given[name] - one) / one.norm(dim=-1, keepdim=True)).abs().max().item()
        normalised = nn.functional.normalize(given[name], dim=-1) - nn.functional.normalize(one, dim=-1)
        differences[f"{name}, normalised"] = normalised.abs().max().item()
    worst = max(differences, key=lambda name: (differences[name] != differences[name], differences[name]))
    if not differences[worst] <= TOLERANCE:
        raise ConversionError(
            f"The stock {stock_class.__name__} differs in {worst} by {differences[worst]:.1e} of the norm, more than "
            f"{TOLERANCE:.0e}. Nothing was written. Check that all weights are finite."
        )
    return differences[worst]


def _features(
    model: PreTrainedModel, config: PreTrainedConfig | None = None, folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """Outputs [N, width] of a LoTLIP model, or of its stock counterpart in `folder`, for random texts and images."""
    config = config or model.config
    features = {}
    text_config = getattr(config, "text_config", config if isinstance(config, LoTLIPTextConfig) else None)
    vision_config = getattr(config, "vision_config", config if isinstance(config, LoTLIPVisionConfig) else None)
    is_dual = isinstance(config, LoTLIPConfig)
    text_batches: list[dict[str, torch.Tensor]] = []
    if text_config is not None:
        limit = checked_length(text_config)
        padded, whole = random_texts(text_config, [(4, limit), (1, min(7, limit))])
        text_batches = [dict(zip(("input_ids", "attention_mask"), padded, strict=True)), {"input_ids": whole[0]}]
    images = {} if vision_config is None else random_images(vision_config, 2, model.dtype)
    for name, batch in zip(("texts", "texts without padding"), text_batches, strict=False):
        if is_dual:
            features[name] = model.get_text_features(**batch).pooler_output
        else:
            outputs = model(**batch)
            seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            if folder is not None and (folder / "modules.json").is_file():
                features[name] = _pool_by_modules(outputs.last_hidden_state, seen, config, folder)
            else:
                features[name] = _pooled(outputs, "text_embeds")
            features[f"hidden states of {name}"] = outputs.last_hidden_state[seen]
    if is_dual:
        features["images"] = model.get_image_features(**images).pooler_output
        short = {name: tensor[:2, :7] for name, tensor in text_batches[0].items()}
        features["logits_per_image"] = model(**short, **images).logits_per_image
    elif images:
        outputs = model(**images)
        features["images"] = _pooled(outputs, "image_embeds")
        features["hidden states of images"] = outputs.last_hidden_state.flatten(1)
    return features


def _pool_by_modules(states: torch.Tensor, seen: torch.Tensor, config: Any, folder: Path) -> torch.Tensor:
    """States [N, L, hidden_size] and a mask [N, L] -> features [N, width], as the modules in `folder` compute them."""
    pooled = POOLINGS[config.pooling](states, seen, config.family.pooled_index(config.backbone_config, seen, None))
    for dense in sorted(folder.glob("*_Dense")):
        layer = {name: tensor.to(pooled) for name, tensor in load_file(dense / "model.safetensors").items()}
        pooled = nn.functional.linear(pooled, layer["linear.weight"], layer.get("linear.bias"))
        if read_json(dense / "config.json")["activation_function"].endswith("Tanh"):
            pooled = pooled.tanh()
    return pooled


def _pooled(outputs: Any, name: str) -> torch.Tensor:
    return outputs[name] if name in outputs else outputs.pooler_output


DESCRIPTION = """\
Convert a LoTLIP to classes that transformers includes, which load without this package.

  lotlip convert stock --model checkpoint --output stock
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in the module's docstring. Returns the exit status: 0, or 2 after a printed error."""
    return run("lotlip convert stock", lambda: _main(argv))


def parser(prog: str = "lotlip convert stock") -> Parser:
    """Returns the parser of the command."""
    flags = Parser(prog=prog, description=DESCRIPTION)
    group = flags.add_argument_group("Conversion")
    group.add_argument(
        "--model", required=True, metavar="FOLDER", help="Folder of a LoTLIP or of one of its towers (required)"
    )
    group.add_argument("--output", required=True, metavar="FOLDER", help="Folder to write (required)")
    group.add_argument(
        "--without-text-cleaning",
        action="store_true",
        help="Leave out the cleaning of texts that a stock tokenizer cannot express; clean texts yourself",
    )
    only = group.add_mutually_exclusive_group()
    for tower, name in (("text", "text"), ("vision", "image")):
        only.add_argument(
            f"--{tower}-only",
            dest="tower",
            action="store_const",
            const=tower,
            help=f"Convert only the {name} tower, with its projection",
        )
    return flags


def _main(argv: Sequence[str] | None) -> None:
    arguments = parser().parse_args(argv)
    written = convert(arguments.model, arguments.output, arguments.without_text_cleaning, arguments.tower)
    dtype = str(written.dtype).removeprefix("torch.")
    print(
        f"Wrote {written.folder}\n"
        f"  {written.model_class}, {written.num_parameters:,} parameters in {dtype}, features differ by "
        f"at most {written.difference:.1e}\n"
        f"  {written.processor}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
