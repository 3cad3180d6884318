"""Replacement of the CLIP text encoder in a diffusers pipeline, for longer prompts."""

import copy
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init

from ..loading import load_strict, load_tokenizer, naming_damage
from ..modeling.backbones_lotlip import CLIPTextBackbone
from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPTextModelWithProjection
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .stretch import clip_text_model, stretch_text_model
from .text_encoder import LoTLIPTextEncoder, pipeline_target_layer
from .tokenizers import prompt_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

# The classes that a slot may contain, before and after the swap.
TextEncoder = CLIPTextModel | CLIPTextModelWithProjection | LoTLIPTextEncoder

# Architecture of a checkpoint -> class that loads its text tower.
TEXT_CLASSES: dict[str, type[PreTrainedModel]] = {
    "LoTLIPModel": LoTLIPTextModelWithProjection,
    "LoTLIPTextModel": LoTLIPTextModel,
    "LoTLIPTextModelWithProjection": LoTLIPTextModelWithProjection,
    "LoTLIPTextEncoder": LoTLIPTextEncoder,
    "CLIPModel": CLIPTextModelWithProjection,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextEncoder": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


def swap_text_encoder(
    pipe: "DiffusionPipeline",
    model_or_path: PreTrainedModel | str | os.PathLike,
    slot: str = "text_encoder",
    max_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
) -> "DiffusionPipeline":
    """
    Replaces a CLIP text encoder and its tokenizer in a pipeline: Stable Diffusion 1.x, 2.x, XL and 3, Flux, and
    pipelines with the same components (image to image, inpainting, ControlNet, ...).

    A LoTLIP model with CLIP's text tower is inserted as a stock CLIP text encoder, because its corner tokens change no
    output there. Other CLIP text encoders of the pipeline are set to the same prompt length. An encoder with too few
    positions gets more with [`~lotlip_hf.diffusion.stretch.stretch_positions`]; reload the pipeline to undo this. T5
    encoders are not changed. The new encoder gets the device, dtype and attention implementation of the old encoder.
    The new tokenizers log the words that they truncate as a warning.

    Call this function before you load LoRA weights or textual inversions, turn on offloading, or compile the pipeline.
    Save the result with `pipe.save_pretrained`, and import `lotlip_hf` before `DiffusionPipeline.from_pretrained`.

    Args:
        pipe (`DiffusionPipeline`): Pipeline with a CLIP text encoder, which is changed in place after all checks have
            passed. Models that the pipeline shares with other pipelines are not changed.
        model_or_path (`PreTrainedModel` or `str` or `os.PathLike`): A LoTLIP model or its text tower, a
            [`LoTLIPTextEncoder`], `CLIPModel`, `CLIPTextModel` or `CLIPTextModelWithProjection`, or the folder or Hub
            id of such a model. A model object is copied.
        slot (`str`, *optional*, defaults to `"text_encoder"`): Component to replace, such as `"text_encoder_2"`.
        max_length (`int`, *optional*): Maximum length of a prompt in tokens, special tokens included. Defaults to all
            positions of the model.
        tokenizer (`PreTrainedTokenizerBase` or `str` or `os.PathLike`, *optional*): Tokenizer of the model, or its
            folder or Hub id. For a model object, defaults to the tokenizer of the slot. For a path, defaults to the
            tokenizer saved with the model, with the padding token of the slot's tokenizer if both have it.

    Returns:
        `DiffusionPipeline`: The changed `pipe`.

    Raises:
        `ValueError`: If the slot does not contain a CLIP text encoder; if the type, widths, projection, positions or
            tokenizer of the model do not fit the pipeline; if the pipeline is offloaded, has LoRA weights in its text
            encoders, or has textual inversions that the new tokenizer does not know.
        `OSError`: If the checkpoint is not found.

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.swap import swap_text_encoder

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> pipe = swap_text_encoder(pipe, "lotlip-clip")
    >>> pipe.tokenizer.model_max_length
    248
    ```
    """
    others = _text_encoders(pipe, slot)
    replaced = others.pop(slot)
    is_model = isinstance(model_or_path, PreTrainedModel)
    model = model_or_path if is_model else _load_model(model_or_path)
    have_projections = (_projection_dim(encoder) is not None for encoder in (replaced, *others.values()))
    encoder = _encoder(model, replaced, slot, pipeline_target_layer(have_projections))

    tokenizer_name = _tokenizer_name(slot)
    if tokenizer is None and is_model:
        tokenizer = getattr(pipe, tokenizer_name)
    elif tokenizer is None:
        tokenizer = _load_tokenizer(model_or_path, padding_of=getattr(pipe, tokenizer_name))
    elif not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = _load_tokenizer(tokenizer)
    _check_tokenizer(tokenizer, encoder)
    _check_inversions(getattr(pipe, tokenizer_name), tokenizer, slot)
    length, others_length = _lengths(pipe, encoder, max_length, bool(others))

    if type(encoder) is CLIPTextModel and sum(name.startswith("text_encoder") for name in pipe.components) == 1:
        encoder = CLIPTextEncoder.from_clip(encoder)
    elif is_model:
        encoder = copy.deepcopy(encoder)
    if isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
        encoder.set_attn_implementation(replaced.config._attn_implementation)
    components: dict[str, Any] = {
        slot: encoder.to(device=replaced.device, dtype=replaced.dtype).eval(),
        tokenizer_name: prompt_tokenizer(
            tokenizer, length, isinstance(encoder, LoTLIPTextEncoder) and encoder.config.output_length is not None
        ),
    }
    for name, other in others.items():
        components[name] = _with_length(other, others_length, name)
        components[_tokenizer_name(name)] = prompt_tokenizer(getattr(pipe, _tokenizer_name(name)), others_length)

    if isinstance(encoder, LoTLIPTextEncoder) and encoder.config.adapter is None:
        logger.warning(
            f"`{slot}` has no adapter, so the pipeline cannot interpret its hidden states and the pictures will not "
            "match the prompts. Train an adapter with examples/align_text_encoder.py, or use a LoTLIP model with "
            "CLIP's text tower."
        )
    pipe.register_modules(**components)
    if hasattr(pipe, "tokenizer_max_length"):  # Stable Diffusion 3 and Flux store the first tokenizer's length
        pipe.tokenizer_max_length = pipe.tokenizer.model_max_length
    return pipe


class CLIPTextEncoder(CLIPTextModel):
    """
    `CLIPTextModel` with the attribute `text_model`, which transformers removed but the `clip_skip` of Stable Diffusion
    1.x and 2.x needs. Weights and outputs are those of `CLIPTextModel`, which loads the same checkpoints.
    """

    @property
    def text_model(self) -> "CLIPTextEncoder":
        """The model itself."""
        # If this attribute exists, diffusers expects the old names of LoRA weights; otherwise it accepts old and new.
        if sys._getframe(1).f_code.co_name == "_load_lora_into_text_encoder":
            raise AttributeError("text_model")
        return self

    @classmethod
    def from_clip(cls, model: CLIPTextModel) -> "CLIPTextEncoder":
        """
        Copies a stock text encoder.

        Args:
            model (`CLIPTextModel`): The stock text encoder.

        Returns:
            `CLIPTextEncoder`: The copy.
        """
        # Call `__init__`, which registers the class: otherwise the copy would return no hidden states.
        config = copy.deepcopy(model.config)
        config.vocab_size = model.get_input_embeddings().num_embeddings  # wrong after an inversion is unloaded
        with init.no_init_weights():  # leaves the pipeline's random state unchanged
            encoder = cls._from_config(config, attn_implementation=config._attn_implementation, dtype=model.dtype)
        encoder.load_state_dict(model.state_dict())
        for parameter, own in zip(model.parameters(), encoder.parameters(), strict=True):
            own.requires_grad_(parameter.requires_grad)
        return encoder


# Saved pipelines name the package and class of each component. diffusers looks the class up in `lotlip_hf`.
CLIPTextEncoder.__module__ = "lotlip_hf"


def _text_encoders(pipe: "DiffusionPipeline", slot: str) -> dict[str, TextEncoder]:
    """Returns the swappable text encoders of a pipeline, or raises an error if a swap is impossible."""
    components = pipe.components
    encoders = {
        name: component
        for name, component in components.items()
        if name.startswith("text_encoder") and isinstance(component, TextEncoder)
    }
    if slot not in encoders:
        raise ValueError(
            f"`slot` {slot!r} of {type(pipe).__name__} contains a {type(components.get(slot)).__name__}, not a CLIP "
            f"text encoder. Slots that can be swapped: {', '.join(map(repr, encoders)) or 'none'}."
        )
    for name, encoder in encoders.items():
        if getattr(encoder, "peft_config", None):
            raise ValueError(
                f"`{name}` has LoRA weights. Call pipe.unload_lora_weights(), swap, then load the weights again."
            )
        hooks = ("_hf_hook", "_diffusers_hook")  # set by accelerate and diffusers
        if pipe.hf_device_map is not None or any(hasattr(m, hook) for m in encoder.modules() for hook in hooks):
            raise ValueError(f"`{name}` is offloaded or has a device map. Swap first, then turn offloading on.")
    return encoders


def _tokenizer_name(slot: str) -> str:
    return slot.replace("text_encoder", "tokenizer")


def _projection_dim(model: PreTrainedModel) -> int | None:
    return getattr(getattr(model, "text_projection", None), "out_features", None)


def _load_model(path: str | os.PathLike) -> PreTrainedModel:
    with naming_damage(os.fspath(path)):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    architecture = (config.architectures or [type(config).__name__.replace("Config", "Model")])[0]
    if architecture not in TEXT_CLASSES:
        raise ValueError(f"{path} contains a {architecture}. Pass one of {', '.join(TEXT_CLASSES)}.")
    if isinstance(config, CLIPConfig):
        config.text_config.projection_dim = config.projection_dim  # `CLIPModel` ignores `text_config.projection_dim`
    config = getattr(config, "text_config", config) if architecture != "LoTLIPTextEncoder" else config
    # the weights of an image tower are ignored
    return load_strict(TEXT_CLASSES[architecture], path, allow_unexpected=True, config=config)


def _load_tokenizer(
    path: str | os.PathLike, padding_of: PreTrainedTokenizerBase | None = None
) -> PreTrainedTokenizerBase:
    folder = Path(path)
    if not (folder / "tokenizer_config.json").is_file() and folder.name.startswith("text_encoder"):
        beside = folder.with_name(_tokenizer_name(folder.name))  # the tokenizer's folder in a saved pipeline
        path = beside if beside.is_dir() else path
    tokenizer = load_tokenizer(path, "pass `tokenizer`")
    # The pipeline attends to padding and was trained with this padding token.
    if isinstance(tokenizer, CLIPTokenizer) and isinstance(padding_of, CLIPTokenizer):
        if tokenizer.convert_tokens_to_ids(padding_of.pad_token) == padding_of.pad_token_id:
            tokenizer.pad_token = padding_of.pad_token
    return tokenizer


def _encoder(model: Any, replaced: TextEncoder, slot: str, target_layer: int) -> TextEncoder:
    """Converts `model` to the text encoder for the slot, which shares the weights of `model`."""
    name = type(model).__name__
    is_lotlip = isinstance(model, LoTLIPModel | LoTLIPTextModel | LoTLIPTextModelWithProjection)
    if isinstance(model, CLIPModel):
        config = copy.deepcopy(model.config.text_config)
        config.projection_dim = model.config.projection_dim  # `CLIPModel` ignores `text_config.projection_dim`
        with torch.device("meta"):
            text_side = CLIPTextModelWithProjection(config)
        text_side.text_model, text_side.text_projection = model.text_model, model.text_projection
        model = text_side
    if not (is_lotlip or isinstance(model, TextEncoder)) or getattr(model, "peft_config", None):
        raise ValueError(
            f"`model_or_path` is a {name} or has LoRA weights. Pass one of {', '.join(TEXT_CLASSES)}, without LoRA."
        )
    config = model.config.text_config if isinstance(model, LoTLIPModel) else model.config
    width, projection_dim, own_projection_dim = replaced.config.hidden_size, *map(_projection_dim, (replaced, model))
    is_adapted = isinstance(model, LoTLIPTextEncoder)
    problem = None
    if config.hidden_size != width:
        problem = f"width {config.hidden_size}, but the pipeline needs width {width}"
    elif (projection_dim is not None or is_adapted) and own_projection_dim != projection_dim:
        problem = f"projection width {own_projection_dim}, but the pipeline needs {projection_dim}"
    elif is_adapted and config.target_layer != target_layer:
        problem = f"`target_layer` {config.target_layer}, but the pipeline uses layer {target_layer}"
    if problem is not None:
        raise ValueError(
            f"{name} has {problem} from `{slot}`. Pass another model, or train an adapter for this slot with "
            "examples/align_text_encoder.py."
        )
    if is_adapted:
        return model
    if is_lotlip and isinstance(config.family, CLIPTextBackbone):
        return clip_text_model(model, with_projection=projection_dim is not None)
    if is_lotlip:
        return LoTLIPTextEncoder.from_text_model(model, projection_dim=projection_dim, target_layer=target_layer)
    return model.text_model if isinstance(model, CLIPTextModelWithProjection) and projection_dim is None else model


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, encoder: TextEncoder) -> None:
    config = encoder.config.get_text_config() if isinstance(encoder, LoTLIPTextEncoder) else encoder.config
    problem = None
    if not isinstance(tokenizer, CLIPTokenizer | LoTLIPTokenizer):
        problem = f"it is a {type(tokenizer).__name__}, neither a CLIPTokenizer nor a LoTLIPTokenizer"
    elif len(tokenizer) > config.vocab_size:
        problem = f"it has {len(tokenizer)} tokens, but the model has {config.vocab_size}"
    elif isinstance(encoder, LoTLIPTextEncoder) and not isinstance(config.family, CLIPTextBackbone):
        if tokenizer.pad_token_id != config.pad_token_id:
            problem = f"its padding id is {tokenizer.pad_token_id}, but the model's is {config.pad_token_id}"
    elif config.eos_token_id not in (tokenizer.eos_token_id, 2):  # old CLIP configurations have the wrong id 2
        problem = f"its end-of-text id is {tokenizer.eos_token_id}, but the model's is {config.eos_token_id}"
    if problem is not None:
        raise ValueError(f"The tokenizer does not fit the model: {problem}. Pass the model's own as `tokenizer`.")


def _check_inversions(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, slot: str) -> None:
    added = {token.content for token in old.added_tokens_decoder.values() if not token.special}
    lost = sorted(added - new.get_vocab().keys())
    if lost:
        raise ValueError(
            f"The new tokenizer of `{slot}` does not know the textual inversions {', '.join(lost)}. Call "
            "pipe.unload_textual_inversion(), swap, then load them again."
        )


def _lengths(
    pipe: "DiffusionPipeline", encoder: TextEncoder, max_length: int | None, has_others: bool
) -> tuple[int, int]:
    """Returns the maximum prompt length in tokens of the new encoder and of the other CLIP encoders."""
    positions = encoder.config.max_position_embeddings
    output_length = encoder.config.output_length if isinstance(encoder, LoTLIPTextEncoder) else None
    if output_length is not None and has_others and hasattr(pipe, "tokenizer_max_length"):
        # The pipeline uses one length for all encoders, so the other states must be as long as the resampler's.
        if max_length not in (None, output_length) or positions < output_length:
            raise ValueError(
                f"{type(pipe).__name__} has one length for all tokenizers and the resampler returns {output_length} "
                f"tokens, so `max_length` must be {output_length}. The model has {positions} positions."
            )
        return output_length, output_length
    length = positions if max_length is None else max_length
    if not 3 <= length <= positions:
        advice = f"Pass `max_length` from 3 to {positions}."
        if isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection) and length > positions:
            advice = (
                f"Convert the CLIP with `lotlip convert clip --max-positions {length}`, or call "
                f"lotlip_hf.diffusion.stretch.stretch_text_model(model, {length}) before."
            )
        raise ValueError(f"`max_length` is {length}, but the model has {positions} positions. {advice}")
    return length, output_length or length


def _with_length(encoder: TextEncoder, length: int, name: str) -> TextEncoder:
    """Returns the encoder if it can return `length` states, else a copy with more positions."""
    positions = encoder.config.max_position_embeddings
    if isinstance(encoder, LoTLIPTextEncoder):
        longest = encoder.config.output_length or positions
        if length > longest or encoder.config.output_length not in (None, length):
            raise ValueError(
                f"The pipeline concatenates the states of its text encoders, but `{name}` returns {longest} tokens "
                f"instead of {length}. Pass max_length={longest}."
            )
        return encoder
    if positions >= length:
        return encoder
    longer = copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})
    stretch_text_model(longer, length)
    return longer
