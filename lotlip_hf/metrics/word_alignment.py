"""Word alignment: which words of a text an image supports, and which it contradicts."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..attribution import eager, relevance
from ..encoder import Encoder, load_encoder, warn_of_cut_texts
from ..engines.torch import TorchEngine, evaluating
from ..images import ImageSource
from ..modeling.backbones_lotlip import POOLINGS
from ..modeling.calls_lotlip import for_one_call
from ..modeling.modeling_lotlip import LoTLIPModel
from ..terminal import progress_bar
from ..words import original_offsets, split_words, to_words
from .clip_score import as_pairs

Rows = Literal["all", "pooled"]


class WordScore(NamedTuple):
    """
    A word of a text, `text[start:end]`, and its part of the cosine with the image. A negative value says that the
    word lowers the cosine.
    """

    text: str
    start: int
    end: int
    value: float


def word_alignment(
    images: Iterable[ImageSource],
    texts: Iterable[str],
    encoder: Encoder | str | os.PathLike,
    *,
    rows: Rows = "all",
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[list[WordScore]]:
    """
    Attributes the cosine of each pair to the words of the text, after CLIP4DM (https://arxiv.org/abs/2412.18404): the
    attention of the text tower times the gradient of the cosine with respect to it, averaged over the heads without
    cutting negative values and added up over the layers and the tokens of a word. See [`token_relevance`].

    The values of a text can be compared with each other, but not with those of another model. Words beyond the
    maximum length of the model are left out.

    Args:
        images (`Iterable`): N images as paths, PIL images or arrays.
        texts (`Iterable[str]`): N texts; text i is compared with image i.
        encoder (`Encoder` or `str` or `os.PathLike`): A dual encoder of transformers
            ([`~lotlip_hf.encoder.Encoder`]) or its folder or Hub id.
        rows (`str`, *optional*, defaults to `"all"`): Tokens whose attention counts. `"pooled"`, as in the paper: that
            of the pooled token; only for LoTLIP. `"all"`: that of all tokens, so that a word also counts for what it
            adds to other words.
        layers (`Sequence[int]`, *optional*): Indices of the layers to add up. Defaults to all layers.
        batch_size (`int`, *optional*, defaults to 8): Number of texts in a batch.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        `list[list[WordScore]]`: The words of each text, in order, with their values.

    Raises:
        `ValueError`: If the numbers of images and texts differ or are 0, or if the encoder does not run in
            transformers.
        `ImageError`: If an image cannot be read; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.metrics import word_alignment

    >>> (words,) = word_alignment(["photos/cat.png"], ["A cat sleeps on a red sofa."], "checkpoint")
    >>> [word.text for word in words]
    ['A', 'cat', 'sleeps', 'on', 'a', 'red', 'sofa']
    >>> worst = min(words, key=lambda word: word.value)
    ```
    """
    images, texts = as_pairs(images, texts)
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    engine = encoder.engine
    if not isinstance(engine, TorchEngine):
        raise ValueError(f"`encoder` {encoder.name} has no attention to differentiate. Pass a model of transformers.")
    image_embeds = encoder.encode_images(images, batch_size=batch_size, progress=progress)
    found, cut = [], 0
    with progress_bar(total=len(texts), desc="Aligning words", unit="text", shown=progress) as bar:
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            inputs, spans, num_cut = tokenize(engine, some)
            cut += num_cut
            image = image_embeds[start : start + len(some)].to(encoder.device)
            values = token_relevance(engine.model, inputs, image, rows=rows, layers=layers).float().cpu()
            for text, own, row in zip(some, spans, values, strict=True):
                last = max(end for _, end in own)
                words = [word for word in split_words(text) if word.start < last]
                sums = to_words(row, own, words).tolist()
                found.append([WordScore(*word, value) for word, value in zip(words, sums, strict=True)])
            bar.update(len(some))
    warn_of_cut_texts(cut, len(texts), encoder.max_text_length)
    return found


def tokenize(engine: TorchEngine, texts: Sequence[str]) -> tuple[dict[str, Tensor], list[list[tuple[int, int]]], int]:
    """Returns the model's inputs for N texts, the spans in the texts of their L tokens, and how many texts are cut."""
    tokenizer = engine.tokenizer
    options = {"truncation": True, "max_length": engine.max_text_length, "verbose": False}
    encoded = for_one_call(tokenizer)(texts, return_offsets_mapping=True, **options)
    num_cut = sum(bool(one.overflowing) for one in encoded.encodings or ())
    offsets = encoded.pop("offset_mapping")
    inputs = engine.on_device(engine.pad(dict(encoded)))
    spans = []
    for text, own in zip(texts, offsets, strict=True):
        own, padding = original_offsets(tokenizer, text, own), [(0, 0)] * (inputs["input_ids"].shape[1] - len(own))
        spans.append(padding + own if tokenizer.padding_side == "left" else own + padding)
    return inputs, spans, num_cut


def token_relevance(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    image_embeds: Tensor,
    *,
    rows: Rows = "all",
    layers: Sequence[int] | None = None,
) -> Tensor:
    """
    Attributes the cosines of texts and images to the tokens of the texts, see [`word_alignment`].

    Args:
        model (`PreTrainedModel`): LoTLIP, or a model with CLIP's `get_text_features`.
        inputs (`dict[str, torch.Tensor]`): `input_ids` [N, L] and what else the tokenizer returned.
        image_embeds (`torch.Tensor`): Normalised embeddings [N, D] of the images; text i is compared with image i.
        rows (`str`, *optional*, defaults to `"all"`): As in [`word_alignment`].
        layers (`Sequence[int]`, *optional*): As in [`word_alignment`].

    Returns:
        `torch.Tensor`: Values [N, L].
    """
    with eager(model), evaluating(model), _with_graph(model), torch.enable_grad():
        output = model.get_text_features(**inputs, output_attentions=True)
        cosines = (F.normalize(output.pooler_output.float(), dim=-1) * image_embeds).sum(-1)
        attentions = output.attentions if layers is None else [output.attentions[layer] for layer in layers]
        found = relevance(cosines, attentions).detach()
    if rows == "all":
        return found.sum(1)
    if rows != "pooled" or not isinstance(model, LoTLIPModel):
        raise ValueError(f"`rows` must be 'all', or 'pooled' for LoTLIP, got {rows!r}.")
    return (pooled_weights(model, inputs).to(found).unsqueeze(1) @ found).squeeze(1)


def pooled_weights(model: LoTLIPModel, inputs: dict[str, Tensor]) -> Tensor:
    """Returns what each token contributes to the pooled state, [N, L]: pooling is linear in the states of tokens."""
    config, ids = model.config.text_config, inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    index = config.family.pooled_index(config.backbone_config, mask, ids)
    one_hot = torch.eye(ids.shape[1], device=ids.device).expand(*ids.shape, -1)
    return POOLINGS[config.pooling](one_hot, mask, index)


@contextmanager
def _with_graph(model: PreTrainedModel) -> Iterator[None]:
    """Lets frozen models have gradients with respect to states."""

    def require(module: Any, args: Any, embeds: Tensor) -> Tensor:
        return embeds.requires_grad_()

    hook = getattr(model, "text_model", model).get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        hook.remove()
