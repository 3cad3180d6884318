"""A LoTLIP text encoder in a diffusers pipeline: longer prompts, and everything else as the pipeline has it."""

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
from ..modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPTextModelWithProjection
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from .stretch import clip_text_model, stretch_text_model
from .text_encoder import LoTLIPTextEncoder, pipeline_target_layer
from .tokenizers import prompt_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

# What a slot that can be swapped holds, before and after.
TextEncoder = CLIPTextModel | CLIPTextModelWithProjection | LoTLIPTextEncoder

# What loads the text side of a checkpoint, by the class that the checkpoint is of.
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
    Puts another text encoder and its tokenizer into a pipeline whose text encoder is CLIP's: Stable Diffusion 1.x,
    2.x, XL and 3, Flux, and what has the same components (image to image, inpainting, ControlNet, ...).

    A LoTLIP over CLIP's text tower goes in as a stock CLIP text encoder: its corner tokens change nothing there. The
    pipeline's other CLIP encoders are made to agree on the length; one with too few positions gets more
    ([`~lotlip_hf.diffusion.stretch.stretch_positions`], knowledge preserved) and keeps them: to go back, load the
    pipeline again. T5 encoders stay as they are. Device, dtype and attention implementation of the replaced encoder
    are taken over. From then on the words that are cut off a prompt are logged as a warning.

    Swap first; then load LoRA weights and textual inversions, turn on offloading, compile. `pipe.save_pretrained`
    saves the swapped pipeline; `DiffusionPipeline.from_pretrained` loads it wherever `lotlip_hf` has been imported.

    Args:
        pipe: A pipeline with a CLIP text encoder. It is changed in place, once everything has been checked; models
            that it shares with other pipelines are not.
        model_or_path: A LoTLIP model (whole, or its text tower), [`LoTLIPTextEncoder`], `CLIPModel`, `CLIPTextModel`
            or `CLIPTextModelWithProjection`, or folder or Hub id of one of these. A model is copied.
        slot: Name of the component to replace, such as `"text_encoder_2"`.
        max_length: Longest prompt in tokens, the first and last included. By default all positions of the model.
        tokenizer: The model's tokenizer, or folder or Hub id of one. By default for a folder its own, padding as the
            slot's does if their vocabularies allow, or what lies beside it in a pipeline; for a model the slot's.

    Returns:
        `pipe`.

    Raises:
        ValueError: if the slot holds no CLIP text encoder (T5, empty, unknown); if the model's type, widths,
            projection, positions or tokenizer do not fit, or no tokenizer is found; if the pipeline is offloaded, or
            holds LoRA weights for its text encoders or textual inversions that the new one does not know.
        OSError: if the checkpoint is not found.

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.swap import swap_text_encoder

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")  # doctest: +SKIP
    >>> swap_text_encoder(pipe, "lotlip-clip-248")  # doctest: +SKIP
    >>> pipe("A prompt of up to 248 tokens ...").images[0].save("picture.png")  # doctest: +SKIP
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
            f"`{slot}` will give LoTLIP's own hidden states, which are not in the space of the encoder that the "
            "pipeline was trained with: its pictures will not show what the prompts say. Train an adapter into that "
            "space with examples/align_text_encoder.py and swap in what it saves, or take a LoTLIP over CLIP's tower."
        )
    pipe.register_modules(**components)
    if hasattr(pipe, "tokenizer_max_length"):  # what Stable Diffusion 3 and Flux read off the first tokenizer once
        pipe.tokenizer_max_length = pipe.tokenizer.model_max_length
    return pipe


class CLIPTextEncoder(CLIPTextModel):
    """
    `CLIPTextModel` for Stable Diffusion 1.x and 2.x, whose `clip_skip` asks for `text_encoder.text_model`, a level
    that transformers took out. Weights, their names and all outputs are those of `CLIPTextModel`, which loads it, too.
    """

    @property
    def text_model(self) -> "CLIPTextEncoder":
        """The model itself."""
        # Diffusers takes the names of LoRA weights for those of the old, deeper model where it finds this attribute,
        # and else puts both, old and new, right.
        if sys._getframe(1).f_code.co_name == "_load_lora_into_text_encoder":
            raise AttributeError("text_model")
        return self

    @classmethod
    def from_clip(cls, model: CLIPTextModel) -> "CLIPTextEncoder":
        """
        A copy of a stock text encoder.

        Args:
            model: The stock text encoder.
        """
        # made anew: the class of a model is registered when it is made, and without it gives out no hidden states
        config = copy.deepcopy(model.config)
        config.vocab_size = model.get_input_embeddings().num_embeddings  # which unloading an inversion leaves behind
        with init.no_init_weights():  # the random numbers that come next are the pipeline's
            encoder = cls._from_config(config, attn_implementation=config._attn_implementation, dtype=model.dtype)
        encoder.load_state_dict(model.state_dict())
        for parameter, own in zip(model.parameters(), encoder.parameters(), strict=True):
            own.requires_grad_(parameter.requires_grad)
        return encoder


# Saved pipelines name a component's package and class; diffusers looks both up in `lotlip_hf` itself.
CLIPTextEncoder.__module__ = "lotlip_hf"


def _text_encoders(pipe: "DiffusionPipeline", slot: str) -> dict[str, TextEncoder]:
    """The pipeline's text encoders that can be swapped, checked, `slot` among them."""
    components = pipe.components
    encoders = {
        name: component
        for name, component in components.items()
        if name.startswith("text_encoder") and isinstance(component, TextEncoder)
    }
    if slot not in encoders:
        raise ValueError(
            f"`slot` {slot!r} of {type(pipe).__name__} holds {type(components.get(slot)).__name__}, which is no CLIP "
            f"text encoder. Slots that can be swapped here: {', '.join(map(repr, encoders)) or 'none'}."
        )
    for name, encoder in encoders.items():
        if getattr(encoder, "peft_config", None):
            raise ValueError(
                f"`{name}` holds LoRA weights: call pipe.unload_lora_weights(), swap, then load them again."
            )
        # of accelerate, and of diffusers' own
        hooks = ("_hf_hook", "_diffusers_hook")
        if pipe.hf_device_map is not None or any(hasattr(m, hook) for m in encoder.modules() for hook in hooks):
            raise ValueError(f"`{name}` is offloaded or placed by a device map: swap first, then turn that on.")
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
        raise ValueError(f"{path} holds a {architecture}: expected one of {', '.join(TEXT_CLASSES)}.")
    if isinstance(config, CLIPConfig):
        config.text_config.projection_dim = config.projection_dim  # the one that counts in a whole CLIP
    config = getattr(config, "text_config", config) if architecture != "LoTLIPTextEncoder" else config
    # what is left over is the image tower of a whole model
    return load_strict(TEXT_CLASSES[architecture], path, allow_unexpected=True, config=config)


def _load_tokenizer(
    path: str | os.PathLike, padding_of: PreTrainedTokenizerBase | None = None
) -> PreTrainedTokenizerBase:
    folder = Path(path)
    if not (folder / "tokenizer_config.json").is_file() and folder.name.startswith("text_encoder"):
        beside = folder.with_name(_tokenizer_name(folder.name))  # as pipelines have it
        path = beside if beside.is_dir() else path
    tokenizer = load_tokenizer(path, "give `tokenizer`")
    # the pipeline was trained on texts padded as the slot's tokenizer does it, and looks at the padding
    if isinstance(tokenizer, CLIPTokenizer) and isinstance(padding_of, CLIPTokenizer):
        if tokenizer.convert_tokens_to_ids(padding_of.pad_token) == padding_of.pad_token_id:
            tokenizer.pad_token = padding_of.pad_token
    return tokenizer


def _encoder(model: Any, replaced: TextEncoder, slot: str, target_layer: int) -> TextEncoder:
    """What goes into the slot; weights are shared with `model`."""
    name = type(model).__name__
    is_lotlip = isinstance(model, LoTLIPModel | LoTLIPTextModel | LoTLIPTextModelWithProjection)
    if isinstance(model, CLIPModel):
        config = copy.deepcopy(model.config.text_config)
        config.projection_dim = model.config.projection_dim  # the one that counts
        with torch.device("meta"):
            text_side = CLIPTextModelWithProjection(config)
        text_side.text_model, text_side.text_projection = model.text_model, model.text_projection
        model = text_side
    if not (is_lotlip or isinstance(model, TextEncoder)) or getattr(model, "peft_config", None):
        raise ValueError(
            f"`model_or_path` is a {name}, or holds LoRA weights; expected one of {', '.join(TEXT_CLASSES)}."
        )
    config = model.config.text_config if isinstance(model, LoTLIPModel) else model.config
    width, projection_dim, own_projection_dim = replaced.config.hidden_size, *map(_projection_dim, (replaced, model))
    is_adapted = isinstance(model, LoTLIPTextEncoder)
    problem = None
    if config.hidden_size != width:
        problem = f"gives states of width {config.hidden_size}, and the pipeline reads {width}"
    elif (projection_dim is not None or is_adapted) and own_projection_dim != projection_dim:
        problem = f"has a projection to width {own_projection_dim}, and the pipeline reads {projection_dim}"
    elif is_adapted and config.target_layer != target_layer:
        problem = (
            f"stands for layer {config.target_layer} of a text encoder, and the pipeline reads layer {target_layer}"
        )
    if problem is not None:
        raise ValueError(
            f"{name} {problem} from `{slot}`: take a model that fits, or train an adapter for this slot "
            "with examples/align_text_encoder.py."
        )
    if is_adapted:
        return model
    if is_lotlip and config.pooling == "eos":
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
        problem = f"it has {len(tokenizer)} tokens and the model {config.vocab_size}"
    elif isinstance(encoder, LoTLIPTextEncoder) and config.pooling != "eos":
        if tokenizer.pad_token_id != config.pad_token_id:
            problem = f"it pads with id {tokenizer.pad_token_id} and the model with {config.pad_token_id}"
    elif config.eos_token_id not in (tokenizer.eos_token_id, 2):  # 2 stood in CLIP's configurations for the highest id
        problem = f"its end-of-text id is {tokenizer.eos_token_id} and the model's {config.eos_token_id}"
    if problem is not None:
        raise ValueError(f"The tokenizer does not fit the model: {problem}. Give the model's as `tokenizer`.")


def _check_inversions(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, slot: str) -> None:
    added = {token.content for token in old.added_tokens_decoder.values() if not token.special}
    lost = sorted(added - new.get_vocab().keys())
    if lost:
        raise ValueError(
            f"`{slot}` has learnt tokens that the new one does not know: {', '.join(lost)}. Call "
            "pipe.unload_textual_inversion(), swap, then load them again."
        )


def _lengths(
    pipe: "DiffusionPipeline", encoder: TextEncoder, max_length: int | None, has_others: bool
) -> tuple[int, int]:
    """Longest prompt in tokens of the new encoder, and of the pipeline's other CLIP encoders."""
    positions = encoder.config.max_position_embeddings
    output_length = encoder.config.output_length if isinstance(encoder, LoTLIPTextEncoder) else None
    if output_length is not None and has_others and hasattr(pipe, "tokenizer_max_length"):
        # one length for all texts, so that what a resampler gives out is as long as the others' states
        if max_length not in (None, output_length) or positions < output_length:
            raise ValueError(
                f"{type(pipe).__name__} has one length for all its tokenizers, and the model's resampler gives out "
                f"{output_length} tokens: `max_length` must be {output_length}, which the model's {positions} "
                "positions must hold."
            )
        return output_length, output_length
    length = positions if max_length is None else max_length
    if not 3 <= length <= positions:
        more = "a text tower other than CLIP's cannot get more"
        if isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
            more = (
                f"convert the CLIP with `lotlip convert clip --max-positions {length}`, or give a "
                f"loaded model more with lotlip_hf.diffusion.stretch.stretch_text_model(model, {length})"
            )
        raise ValueError(f"`max_length` is {length}; the model has positions for 3 to {positions} tokens: {more}.")
    return length, output_length or length


def _with_length(encoder: TextEncoder, length: int, name: str) -> TextEncoder:
    """The encoder itself where it can give out `length` states, or one with more positions and the same weights."""
    positions = encoder.config.max_position_embeddings
    if isinstance(encoder, LoTLIPTextEncoder):
        longest = encoder.config.output_length or positions
        if length > longest or encoder.config.output_length not in (None, length):
            raise ValueError(
                f"The pipeline joins the states of its text encoders, and `{name}` gives out {longest} tokens, not "
                f"{length}: pass max_length={longest}."
            )
        return encoder
    if positions >= length:
        return encoder
    longer = copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})
    stretch_text_model(longer, length)
    return longer
