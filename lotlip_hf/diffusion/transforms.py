"""Transforms of the states that a pipeline's text encoders compute for a prompt, without training."""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
)
from transformers.utils import ModelOutput

from ..files import FileError, read_tensors, write_tensors
from .text_encoder import LoTLIPResampler, pipeline_target_layer
from .tokenizers import text_end

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Vectors of a few text encoders are a few KB.
MAX_DIRECTION_BYTES = 1 << 20


@dataclass
class PromptTokens:
    """
    The tokens of a prompt in a text encoder.

    Args:
        slot (`str`): Name of the text encoder in the pipeline, such as `"text_encoder_2"`.
        ids (`list[int]`): Token ids [L], with special tokens and padding.
        text (`str`): The prompt as the tokenizer reads it, such as in lower case. `split_words(prompt.text)` of
            `lotlip_hf.words` finds its words.
        offsets (`list[tuple[int, int]]`): Start and end [L] of each token in `text`. The span of a special token is
            empty. In CLIP, the span of a token is that of its word.
        end (`int`): Index of the token that ends the text. Padding follows it.
        encode (`Callable`): Function of another prompt that returns its states [L, hidden_size] before transforms, in
            the same layer, and its [`PromptTokens`].
        split (`Callable`): Function of a text that returns its token ids without special tokens.
    """

    slot: str
    ids: list[int]
    text: str
    offsets: list[tuple[int, int]]
    end: int
    encode: Callable[[str], tuple[torch.Tensor, "PromptTokens"]]
    split: Callable[[str], list[int]]

    def find(self, phrase: str) -> list[list[int]]:
        """
        Finds a phrase.

        Args:
            phrase (`str`): One or more whole words. The tokenizer decides whether case matters.

        Returns:
            `list[list[int]]`: The indices of the tokens of each occurrence, which is empty without any.
        """
        wanted = self.split(phrase)
        starts = [one for one in range(self.end) if wanted and self.ids[one : one + len(wanted)] == wanted]
        spans = [(start, start + len(wanted)) for start in starts]
        return [list(range(*span)) for span in spans if all(map(self._is_between_words, span))]

    def _is_between_words(self, index: int) -> bool:
        """Whether a token begins a word or a sign, or ends the text."""
        if index >= self.end:
            return index == self.end
        before, (start, _) = self.offsets[index - 1][1], self.offsets[index]
        return before < start or not (
            self.text[start - 1 : start].isalnum() and self.text[start : start + 1].isalnum()
        )


Transform = Callable[[torch.Tensor, PromptTokens], torch.Tensor]


@contextlib.contextmanager
def transformed(
    pipe: "DiffusionPipeline",
    transform: Transform,
    slot: str | Sequence[str] | None = None,
    *,
    pooled: bool = False,
    negative: bool = False,
) -> "Iterator[DiffusionPipeline]":
    """
    Context in which a transform changes the prompt states of a pipeline: Stable Diffusion 1.x, 2.x, XL and 3, Flux,
    and pipelines with the same components. Contexts may be nested; the outer transform is the first. Nothing of it is
    saved with the pipeline, and it ends after errors too.

    Args:
        pipe (`DiffusionPipeline`): The pipeline, with stock text encoders or those of
            [`~lotlip_hf.diffusion.swap.swap_text_encoder`].
        transform (`Callable`): Function of the states [L, hidden_size] of a prompt and its [`PromptTokens`] that
            returns new states [L, hidden_size], such as [`suppress`].
        slot (`str` or `Sequence[str]`, *optional*): Text encoders to transform. Defaults to all whose states the
            pipeline reads: all, but for Flux's CLIP, of which it reads the pooled state alone.
        pooled (`bool`, *optional*, defaults to `False`): Whether to compute the pooled state of CLIP from the
            transformed states of its last layer.
        negative (`bool`, *optional*, defaults to `False`): Whether to transform negative prompts too. Texts that are
            encoded outside of the pipeline, as compel does, are never taken for negative.

    Returns:
        `DiffusionPipeline`: The pipeline.

    Raises:
        `ValueError`: If the pipeline has no such text encoder, or its states are not those of tokens. The pipeline
            raises it if the transform does not fit a prompt.

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.transforms import suppress, transformed

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> with transformed(pipe, suppress("red", strength=0.5)):
    ...     picture = pipe("a red cat").images[0]
    ```
    """
    slots = _slots(pipe, slot, pooled)
    with contextlib.ExitStack() as stack:
        is_negative = (lambda name: False) if negative else stack.enter_context(_watching(pipe))
        for name in slots:
            hook = partial(_hook, pipe, name, transform, pooled, is_negative)
            stack.callback(getattr(pipe, name).register_forward_hook(hook, with_kwargs=True).remove)
        yield pipe


def suppress(words: str, strength: float = 1.0, rank: int | None = None) -> Transform:
    """
    Takes the states of words out of those of all tokens, as DECOR (https://arxiv.org/abs/2412.09169): the states are
    projected on the complement of the space of the words' states.

    Args:
        words (`str`): Undesired words. If they are not in a prompt, their states are those of a prompt of them alone.
        strength (`float`, *optional*, defaults to 1.0): Share of the projection, from 0 for none to 1.
        rank (`int`, *optional*): Number of directions to take out, those in which the words' states are largest.
            Defaults to all.

    Returns:
        `Callable`: Transform for [`transformed`].

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.transforms import suppress, transformed

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> with transformed(pipe, suppress("red")):
    ...     picture = pipe("a red cat").images[0]
    ```
    """
    _check_strength(strength)

    def transform(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
        undesired = states[sum(prompt.find(words), [])]
        if not len(undesired):
            others, other = prompt.encode(words)
            undesired = others[sum(_found(other, words), [])]
        space = torch.linalg.svd(undesired.float(), full_matrices=False)[2][:rank].to(states)  # [r, hidden_size]
        return states - strength * (states @ space.T @ space)

    return transform


def isolate(words: str, clean: str | None = None, strength: float = 1.0) -> Transform:
    """
    Gives words the states that they have in another prompt, so that nothing of the rest of the prompt leaks into them,
    as Follow the Flow (https://arxiv.org/abs/2504.01137).

    Args:
        words (`str`): Words of the prompt. Each occurrence is replaced.
        clean (`str`, *optional*): Prompt with the same words. Defaults to the words alone.
        strength (`float`, *optional*, defaults to 1.0): Share of the new states, from 0 to 1.

    Returns:
        `Callable`: Transform for [`transformed`].

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.transforms import isolate, transformed

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> with transformed(pipe, isolate("house", clean="a photo of a house")):
    ...     picture = pipe("a photo of a cat and a red house").images[0]
    ```
    """
    _check_strength(strength)

    def transform(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
        others, other = prompt.encode(clean or words)
        first = _found(other, words)[0]
        new = states.clone()
        for occurrence in _found(prompt, words):
            if [prompt.ids[index] for index in occurrence] != [other.ids[index] for index in first]:
                raise ValueError(f"{words!r} has other tokens in {clean!r}. Write it there as in the prompt.")
            new[occurrence] = torch.lerp(states[occurrence], others[first], strength)
        return new

    return transform


def keep(*words: str, strength: float = 1.0) -> Transform:
    """
    Keeps the states of some words, and gives all other tokens of the text those of padding, as Follow the Flow
    (https://arxiv.org/abs/2504.01137) does to find which tokens a picture needs. The first token keeps its state.

    Args:
        words (`str`): Words or phrases of the prompt.
        strength (`float`, *optional*, defaults to 1.0): Share of the new states, from 0 to 1.

    Returns:
        `Callable`: Transform for [`transformed`]. It raises a `ValueError` for a prompt without padding.

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.transforms import keep, transformed

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> with transformed(pipe, keep("red", "cat")):
    ...     picture = pipe("a photo of a red cat").images[0]
    ```
    """
    _check_strength(strength)

    def transform(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
        kept = {index for one in words for part in _found(prompt, one) for index in part}
        others = [index for index, (start, end) in enumerate(prompt.offsets) if start < end and index not in kept]
        if prompt.end + 1 == len(states):
            raise ValueError("`keep` needs padding behind the prompt, but it fills the encoder. Shorten the prompt.")
        new = states.clone()
        new[others] = torch.lerp(states[others], states[prompt.end + 1].expand(len(others), -1), strength)
        return new

    return transform


def merge(words: str, strength: float = 1.0) -> Transform:
    """
    Gives the tokens of a phrase their mean state, so that its words are one thing, as Follow the Flow
    (https://arxiv.org/abs/2504.01137).

    Args:
        words (`str`): Words of the prompt. Each occurrence is merged.
        strength (`float`, *optional*, defaults to 1.0): Share of the mean, from 0 to 1.

    Returns:
        `Callable`: Transform for [`transformed`].

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.transforms import merge, transformed

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> with transformed(pipe, merge("red house")):
    ...     picture = pipe("a cat and a red house").images[0]
    ```
    """
    _check_strength(strength)

    def transform(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
        new = states.clone()
        for occurrence in _found(prompt, words):
            mean = states[occurrence].mean(0, keepdim=True).expand(len(occurrence), -1)
            new[occurrence] = torch.lerp(states[occurrence], mean, strength)
        return new

    return transform


def steer(words: str, direction: "dict[str, torch.Tensor]", scale: float = 1.0) -> Transform:
    """
    Moves the states of words along a direction, as attribute control (https://arxiv.org/abs/2403.17064).

    Args:
        words (`str`): Words of the prompt, such as the subject. Each occurrence is moved.
        direction (`dict[str, torch.Tensor]`): Vector [hidden_size] for each text encoder, from [`direction`].
        scale (`float`, *optional*, defaults to 1.0): Factor of the direction. A negative one moves the other way.

    Returns:
        `Callable`: Transform for [`transformed`].

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.transforms import direction, steer, transformed

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> red = direction(pipe, [("red cat", "cat")], prefixes=["a photo of a"])
    >>> with transformed(pipe, steer("cat", red, scale=0.5)):
    ...     picture = pipe("a photo of a cat").images[0]
    ```
    """

    def transform(states: torch.Tensor, prompt: PromptTokens) -> torch.Tensor:
        if prompt.slot not in direction:
            raise ValueError(f"`direction` has no {prompt.slot}, but {', '.join(direction)}. Pass `slot` of these.")
        new, moved = states.clone(), sum(_found(prompt, words), [])
        new[moved] = states[moved] + scale * direction[prompt.slot].to(states)
        return new

    return transform


@torch.no_grad()
def direction(
    pipe: "DiffusionPipeline",
    pairs: Sequence[tuple[str, str]],
    prefixes: Sequence[str] = ("",),
    slot: str | Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Computes the direction of an attribute by differences, as attribute control (https://arxiv.org/abs/2403.17064,
    equation 2): the state of the last token of a phrase with the attribute, minus that of a phrase without it or with
    the opposite, as a mean over pairs and prefixes.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        pairs (`Sequence[tuple[str, str]]`): Phrases with and without the attribute, such as `("old man", "young
            man")`. Both end with the word that is steered.
        prefixes (`Sequence[str]`, *optional*, defaults to `("",)`): Texts in front of the phrases.
        slot (`str` or `Sequence[str]`, *optional*): See [`transformed`].

    Returns:
        `dict[str, torch.Tensor]`: Vector [hidden_size] for each text encoder, of the layer that the pipeline reads.

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.transforms import direction

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> red = direction(pipe, [("red cat", "cat"), ("red house", "house")], prefixes=["a photo of a"])
    >>> sorted(red)
    ['text_encoder']
    ```
    """
    found = {}
    for name in _slots(pipe, slot):
        differences = []
        for prefix in prefixes:
            with_it, without = (
                torch.stack([_last_state(pipe, name, f"{prefix} {pair[place]}".strip()) for pair in pairs])
                for place in (0, 1)
            )
            differences.append(with_it - without)
        found[name] = torch.cat(differences).mean(0)
    return found


def save_direction(direction: Mapping[str, torch.Tensor], file: str | os.PathLike) -> None:
    """
    Saves a direction.

    Args:
        direction (`Mapping[str, torch.Tensor]`): Vector [hidden_size] for each text encoder, from [`direction`].
        file (`str` or `os.PathLike`): File, such as `direction.safetensors`. An existing file is replaced.
    """
    write_tensors(file, direction)


def load_direction(file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Loads a direction of [`save_direction`].

    Args:
        file (`str` or `os.PathLike`): The file.

    Returns:
        `dict[str, torch.Tensor]`: Vector [hidden_size] for each text encoder, for [`steer`].

    Raises:
        `ValueError`: If the file is not a direction, or larger than 1 MiB.
        `OSError`: If there is no such file.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.diffusion.transforms import load_direction, save_direction

    >>> save_direction({"text_encoder": torch.ones(768)}, "direction.safetensors")
    >>> load_direction("direction.safetensors")["text_encoder"].shape
    torch.Size([768])
    ```
    """
    found, _ = read_tensors(file, MAX_DIRECTION_BYTES)
    if not found or any(
        not name.startswith("text_encoder") or one.dim() != 1 or not one.is_floating_point()
        for name, one in found.items()
    ):
        raise FileError(file, "no direction of `save_direction`: it needs a vector for each text encoder")
    return found


def _found(prompt: PromptTokens, words: str) -> list[list[int]]:
    """The indices of the tokens of each occurrence of words, or an error if there is none."""
    found = prompt.find(words)
    if not found:
        raise ValueError(f"{words!r} is not in the prompt {prompt.text!r}. Pass words of the prompt.")
    return found


def _check_strength(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`strength` must be from 0 to 1, got {value}.")


def _slots(pipe: "DiffusionPipeline", slot: str | Sequence[str] | None, pooled: bool = False) -> list[str]:
    """Names of text encoders, or an error for one whose states are not those of tokens."""
    encoders = {
        name: one for name, one in pipe.components.items() if name.startswith("text_encoder") and one is not None
    }
    # Flux reads the pooled state of its CLIP alone.
    unread = [
        name
        for name, one in encoders.items()
        if "transformer" in pipe.components and isinstance(one, CLIPTextModel) and not pooled
    ]
    slots = (
        [name for name in encoders if name not in unread]
        if slot is None
        else [slot]
        if isinstance(slot, str)
        else slot
    )
    for name in slots:
        encoder = encoders.get(name)
        if encoder is None or name in unread:
            problem = (
                "whose pooled state is all that is read: pass `pooled=True`" if name in unread else "no text encoder"
            )
            raise ValueError(
                f"`slot` {name!r} is {problem}. Slots of {type(pipe).__name__}: {', '.join(encoders) or 'none'}."
            )
        if isinstance(getattr(encoder, "adapter", None), LoTLIPResampler):
            raise ValueError(f"`slot` {name!r} has a resampler, whose states are not those of tokens.")
        if pooled and not isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
            raise ValueError(f"`pooled` needs a CLIP text encoder, but `slot` {name!r} is a {type(encoder).__name__}.")
    return list(slots)


@contextlib.contextmanager
def _watching(pipe: "DiffusionPipeline") -> Iterator[Callable[[str], bool]]:
    """Context that yields a function of a text encoder: whether its present call is for negative prompts."""
    original, calls = pipe.encode_prompt, dict[str, int]()
    parameters, is_inside = inspect.signature(original).parameters, False

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if "negative_prompt" in parameters:  # text encoders are called for the prompts first
            is_for_negative = given.get("prompt_embeds") is not None
        else:  # Flux has a call for each
            caller = sys._getframe(1).f_locals
            texts = given.get("prompt"), caller.get("negative_prompt"), caller.get("prompt")
            is_for_negative = texts[0] is not None and texts[0] is texts[1] and texts[0] is not texts[2]
        calls.clear()
        calls.update(dict.fromkeys(pipe.components, int(is_for_negative)))
        is_inside = True
        try:
            return original(*args, **kwargs)
        finally:
            is_inside = False

    def is_negative(name: str) -> bool:
        calls[name] = calls.get(name, 0) + 1
        return is_inside and calls[name] > 1

    outer = vars(pipe).get("encode_prompt")
    pipe.encode_prompt = encode_prompt  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield is_negative
    finally:
        if outer is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = outer  # pyright: ignore[reportAttributeAccessIssue]


def _hook(
    pipe: "DiffusionPipeline",
    name: str,
    transform: Transform,
    pooled: bool,
    is_negative: Callable[[str], bool],
    encoder: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: ModelOutput,
) -> ModelOutput:
    """Transforms all states in the output of a text encoder."""
    if is_negative(name):
        return output
    tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
    ids, *rest = args or (kwargs["input_ids"],)
    options = {key: value for key, value in kwargs.items() if key != "input_ids"}
    split = partial(tokenizer.encode, add_special_tokens=False)

    @cache  # the same for all layers
    def read(row: tuple[int, ...]) -> tuple[str, list[tuple[int, int]], int]:
        return _read(tokenizer, list(row))

    @cache
    def other_output(text: str) -> tuple[torch.Tensor, ModelOutput]:
        encoded = tokenizer(
            text, padding="max_length", max_length=ids.shape[-1], truncation=True, return_tensors="pt"
        ).to(ids.device)
        mask = rest[0] if rest else options.get("attention_mask")
        if mask is not None:
            options["attention_mask"] = torch.ones_like(encoded.input_ids) if mask.all() else encoded.attention_mask
        return encoded.input_ids, encoder.forward(encoded.input_ids, **options)  # without hooks

    def changed(states: torch.Tensor, layer: int | None) -> torch.Tensor:
        def encode(text: str) -> tuple[torch.Tensor, PromptTokens]:
            other_ids, other = other_output(text)
            found = other.last_hidden_state if layer is None else other.hidden_states[layer]
            return found[0], tokens(other_ids[0].tolist())

        def tokens(row: list[int]) -> PromptTokens:
            return PromptTokens(name, row, *read(tuple(row)), encode, split)

        return torch.stack([transform(one, tokens(row)) for one, row in zip(states, ids.tolist(), strict=True)])

    new = {"last_hidden_state": changed(output["last_hidden_state"], None)}
    if output.get("hidden_states") is not None:
        new["hidden_states"] = tuple(changed(one, layer) for layer, one in enumerate(output["hidden_states"]))
    if pooled:
        ends = torch.tensor([read(tuple(row))[2] for row in ids.tolist()], device=ids.device)
        pooled_states = new["last_hidden_state"][range(len(ids)), ends]
        is_projected = isinstance(encoder, CLIPTextModelWithProjection)
        new["text_embeds" if is_projected else "pooler_output"] = (
            encoder.text_projection(pooled_states) if is_projected else pooled_states
        )
    return type(output)(**{**output, **new})


def _read(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]], int]:
    """The text of token ids, the span of each token, and the index of the token that ends the text."""
    end = text_end(tokenizer, ids)
    special = set[Any](
        (tokenizer.bos_token_id,)  # of which "!" may be the padding
        if isinstance(tokenizer, CLIPTokenizer)
        else {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    )
    added = set(tokenizer.get_added_vocab().values())
    text, base, offsets, known = "", "", [(0, 0)] * len(ids), list[int]()
    for index, one in enumerate(ids[:end]):
        if one in special:
            continue
        if known and (one in added or known[-1] in added):  # such as a textual inversion: a word
            base, known = f"{text} ", []
        known.append(one)
        before, text = text, base + tokenizer.decode(known, clean_up_tokenization_spaces=False).strip()
        offsets[index] = (len(before) + text[len(before) :].startswith(" "), len(text))
    return text, offsets, end


def _last_state(pipe: "DiffusionPipeline", name: str, text: str) -> torch.Tensor:
    """State [hidden_size] of the last token of a text, in the layer that the pipeline reads."""
    encoder, tokenizer = getattr(pipe, name), getattr(pipe, name.replace("text_encoder", "tokenizer"))
    ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(encoder.device)
    output = encoder(ids, output_hidden_states=True)
    encoders = [one for slot, one in pipe.components.items() if slot.startswith("text_encoder") and one is not None]
    layer = pipeline_target_layer(getattr(one, "text_projection", None) is not None for one in encoders)
    is_last = layer == -1 or isinstance(encoder, T5EncoderModel)
    states = output.last_hidden_state if is_last else output.hidden_states[layer]
    return states[
        0, max(index for index, span in enumerate(_read(tokenizer, ids[0].tolist())[1]) if span[0] < span[1])
    ]
