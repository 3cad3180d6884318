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
    found = torch.zeros(len(words))
    for value, (start, end) in zip(values.tolist(), offsets, strict=True):
        for index, word in enumerate(words):
            if start < end and start < word.end and word.start < end:
                found[index] += value
                break
    return found


def tokenize(encoder: Encoder, text: str) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Returns the inputs [1, L] of a text, and the offsets of its tokens in the text; (0, 0) of special tokens."""
    tokenizer: Any = encoder.engine.tokenizer  # pyright: ignore
    options = {"truncation": True, "max_length": encoder.max_text_length, "verbose": False}
    call = for_one_call(tokenizer)
    encoding = call([text], **options, return_offsets_mapping=True, return_special_tokens_mask=True)
    offsets = encoding.pop("offset_mapping")[0]
    special = encoding.pop("special_tokens_mask")[0]
    ids = encoding["input_ids"][0]
    special = [one or token in tokenizer.all_special_ids for one, token in zip(special, ids, strict=True)]
    encoded = text
    if isinstance(tokenizer, LoTLIPTokenizer):  # its offsets are those in the cleaned text
        before, _, after = tokenizer.prompt_template.partition("{}")
        encoded = before + (tokenizer.sep_token or "").join(tokenizer.sentences(text)) + after
    if encoded != text:
        matcher = SequenceMatcher(None, encoded, text, autojunk=False)
        place = {a + i: b + i for a, b, size in matcher.get_matching_blocks() for i in range(size)}
        known = [[place[i] for i in range(*one) if i in place] for one in offsets]
        offsets = [(one[0], one[-1] + 1) if one else (0, 0) for one in known]
    offsets = [(0, 0) if skipped else tuple(one) for one, skipped in zip(offsets, special, strict=True)]
    return {name: value.to(encoder.device) for name, value in encoder.engine.pad(dict(encoding)).items()}, offsets


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


def pooled_row(encoder: Encoder, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    """The row [L] of the pooled token in [L, L], or the mean of all rows with mean pooling."""
    config = encoder.engine.model.config.text_config  # pyright: ignore
    if "mean" in config.pooling:
        return rows.mean(0)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return rows[int(config.family.pooled_index(config.backbone_config, mask, inputs["input_ids"]))]


def word_alignment(images: Sequence[ImageSource], texts: Sequence[str], encoder: Encoder) -> list[list[WordScore]]:
    """Values of the words of each text for its image."""
    return [_word_alignment(image, text, encoder) for image, text in zip(images, texts, strict=True)]


def _word_alignment(image: ImageSource, text: str, encoder: Encoder) -> list[WordScore]:
    model: LoTLIPModel = encoder.engine.model  # pyright: ignore
    inputs, offsets = tokenize(encoder, text)
    target = encoder.encode_images([image], progress=False)[0].to(encoder.device)
    with eager(model), torch.enable_grad():
        output = model.get_text_features(**inputs, output_attentions=True)
        similarity = torch.nn.functional.normalize(output.pooler_output[0].float(), dim=-1) @ target
        row = pooled_row(encoder, inputs, relevance(similarity, output.attentions)[0])
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
