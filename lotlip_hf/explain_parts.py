"""
The simplest forms of what `lotlip_hf.attribution`, `words`, `metrics.word_alignment` and `dense` provide, for
[`~lotlip_hf.explain.explain`].
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .encoder import Encoder
from .images import ImageSource
from .modeling.calls_lotlip import for_one_call
from .modeling.modeling_lotlip import LoTLIPModel
from .modeling.tokenization_lotlip import LoTLIPTokenizer

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Word(NamedTuple):
    """The word `text[start:end]`."""

    text: str
    start: int
    end: int


class WordScore(NamedTuple):
    """The word `text[start:end]` and its value."""

    text: str
    start: int
    end: int
    value: float


def split_words(text: str) -> list[Word]:
    """Finds the words and numbers of a text."""
    return [Word(found[0], *found.span()) for found in WORD.finditer(text)]


def to_words(values: Tensor, offsets: Sequence[tuple[int, int]], words: Sequence[Word]) -> Tensor:
    """Adds up the values [L] of tokens at `offsets` to values [W] of words."""
    found = values.new_zeros(len(words))
    for value, (start, end) in zip(values, offsets, strict=True):
        for index, word in enumerate(words):
            if start < end and start < word.end and word.start < end:
                found[index] += value
                break
    return found


def original_offsets(tokenizer: Any, text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Translates offsets in the text that a LoTLIP tokenizer prepares to offsets in the text that was passed."""
    if not isinstance(tokenizer, LoTLIPTokenizer):
        return list(offsets)
    before, _, after = tokenizer.prompt_template.partition("{}")
    separator = tokenizer.sep_token or ""
    prepared = before + separator.join(tokenizer.sentences(text)) + after
    prepared = prepared.replace(separator, " " * len(separator)) if separator else prepared
    matcher = SequenceMatcher(None, prepared, text, autojunk=False)
    place = {a + i: b + i for a, b, size in matcher.get_matching_blocks() for i in range(size)}
    known = [[place[i] for i in range(*one) if i in place and not prepared[i].isspace()] for one in offsets]
    return [(one[0], one[-1] + 1) if one else (0, 0) for one in known]


@contextmanager
def eager(model: LoTLIPModel) -> Iterator[None]:
    """Sets eager attention in the text tower, and evaluation mode."""
    attention, in_training = model.text_model.backbone.config._attn_implementation, model.training
    model.text_model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.text_model.set_attn_implementation(attention)
        model.train(in_training)


def relevance(similarity: Tensor, attentions: Sequence[Tensor]) -> Tensor:
    """Attention times the gradient of the similarity, averaged over heads and summed over layers: [N, L, L]."""
    gradients = torch.autograd.grad(similarity.sum(), list(attentions))
    products = [(one * gradient).mean(1) for one, gradient in zip(attentions, gradients, strict=True)]
    return torch.stack(products).sum(0)


def word_alignment(images: Sequence[ImageSource], texts: Sequence[str], encoder: Encoder) -> list[list[WordScore]]:
    """Values of the words of each text for its image."""
    return [_word_alignment(image, text, encoder) for image, text in zip(images, texts, strict=True)]


def _word_alignment(image: ImageSource, text: str, encoder: Encoder) -> list[WordScore]:
    engine: Any = encoder.engine
    config = engine.model.config.text_config
    call = for_one_call(engine.tokenizer)
    options = {"truncation": True, "max_length": encoder.max_text_length, "verbose": False}
    encoding = call([text], **options, return_offsets_mapping=True)
    offsets = original_offsets(engine.tokenizer, text, encoding.pop("offset_mapping")[0])
    inputs = {name: value.to(encoder.device) for name, value in engine.pad(dict(encoding)).items()}
    target = encoder.encode_images([image], progress=False)[0].to(encoder.device)
    with eager(engine.model), torch.enable_grad():
        output = engine.model.get_text_features(**inputs, output_attentions=True)
        similarity = torch.nn.functional.normalize(output.pooler_output[0].float(), dim=-1) @ target
        rows = relevance(similarity, output.attentions)[0]
    is_mean = "mean" in config.pooling
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    pooled = config.family.pooled_index(config.backbone_config, mask, inputs["input_ids"])
    row = rows.mean(0) if is_mean else rows[int(pooled)]
    words = split_words(text)
    values = to_words(row.detach().float().cpu(), offsets, words).tolist()
    return [WordScore(*word, value) for word, value in zip(words, values, strict=True)]


def heat_maps(encoder: Encoder, image: ImageSource, texts: Sequence[str], *, method: str = "auto") -> Tensor:
    """Maps [S, h, w] in [0, 1] of the cosines of texts and patches."""
    engine: Any = encoder.engine
    pixels = {name: value.to(encoder.device) for name, value in engine.pixels(image).items()}
    pixels["pixel_values"] = pixels["pixel_values"].to(engine.model.vision_model.dtype)
    with torch.inference_mode():
        patches = engine.model.get_image_features(**pixels, output_patch_embeds=True).patch_embeds[0]
    rows = {index: row for index, row, _ in encoder.iterate_texts(texts)}
    embeds = torch.stack([rows[index] for index in range(len(texts))])
    cosines = embeds @ torch.nn.functional.normalize(patches.float().cpu(), dim=-1).T
    if "spatial_shapes" in pixels:
        height, width = pixels["spatial_shapes"][0].tolist()
        cosines = cosines[:, : height * width]
    else:
        tall, wide = pixels["pixel_values"].shape[-2:]
        height = round((cosines.shape[1] * tall / wide) ** 0.5)
        width = cosines.shape[1] // height
    low, high = cosines.amin(1, keepdim=True), cosines.amax(1, keepdim=True)
    return ((cosines - low) / (high - low).clamp(min=1e-6)).unflatten(1, (height, width))
