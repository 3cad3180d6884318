"""Shows what a model sees: the score of each sentence, the value of each word, heat maps and attention."""

import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .attribution import eager
from .data.sentences import split_sentences
from .dense import heat_maps
from .encoder import Encoder, load_encoder
from .engines.torch import evaluating
from .images import ImageSource, image_source, kept_box, load_image
from .metrics.word_alignment import word_alignment
from .modeling.calls_lotlip import for_one_call
from .modeling.modeling_lotlip import LoTLIPModel
from .modeling.sentences_lotlip import find_sentences
from .words import Word, original_offsets, split_words, to_words

SIDE = 640  # longest side of `Explanation.picture` in pixels


@dataclass(frozen=True)
class ExplainedSentence:
    """
    The sentence `text[start:end]` of an explained text.

    Args:
        start, end (`int`): Where the sentence is in the text, with its mark and with white space before it.
        score (`float`): Cosine of the image and the sentence alone.
        lost (`float`, *optional*): Score of the whole text minus the score of the text without the sentence. `None`
            for the only sentence of a text.
        heat (`torch.Tensor`): Heat map [h, w] in [0, 1] on the grid of patches.
    """

    start: int
    end: int
    score: float
    lost: float | None
    heat: Tensor


@dataclass(frozen=True)
class ExplainedWord:
    """
    The word `text[start:end]` of an explained text.

    Args:
        start, end (`int`): Where the word is in the text.
        value (`float`): What the picture says of the word: above 0 if it supports the word, below 0 if it contradicts.
            0 for a word that is cut.
        is_cut (`bool`): Whether the word, or its end, is beyond the maximum length of the model.
        heat (`torch.Tensor`): Heat map [h, w] in [0, 1] on the grid of patches.
    """

    start: int
    end: int
    value: float
    is_cut: bool
    heat: Tensor


@dataclass(frozen=True)
class Attention:
    """
    What a token attends to in the last layer of the text tower, as the mean over heads.

    Args:
        token (`str`): The pooled token, such as `"[CLS]"`, or `"corner 1"`.
        values (`list[float]`): Attention to each word.
        rest (`float`): Attention to other tokens: special tokens, punctuation, and the corner token itself.
    """

    token: str
    values: list[float]
    rest: float


@dataclass(frozen=True)
class Explanation:
    """
    What a model sees in an image by a text. [`explain`] makes it.

    Args:
        model (`str`): Folder name or Hub id of the model.
        image (`str`): Name of the image.
        picture (`PIL.Image.Image`): The image, upright, at most 640 pixels wide and high.
        seen (`tuple[float, float, float, float]`): Left, top, right and bottom of the part of the image that the model
            sees, and that heat maps cover, as fractions of width and height.
        text (`str`): The text.
        score (`float`): Cosine of the image and the text.
        sentences (`list[ExplainedSentence]`): Sentences of the text that contain a word.
        words (`list[ExplainedWord]`): Words and numbers of the text.
        attentions (`list[Attention]`): Attention of the pooled token and of each corner token.
        max_length (`int`): Maximum length of a text in tokens.
    """

    model: str
    image: str
    picture: Image.Image
    seen: tuple[float, float, float, float]
    text: str
    score: float
    sentences: list[ExplainedSentence]
    words: list[ExplainedWord]
    attentions: list[Attention]
    max_length: int

    @property
    def num_cut(self) -> int:
        """Number of words beyond the maximum length of the model."""
        return sum(word.is_cut for word in self.words)


def explain(encoder: Encoder | str | os.PathLike, image: ImageSource, text: str) -> Explanation:
    """
    Explains the score of an image and a text by the text's sentences and words, with heat maps over the image.

    Args:
        encoder (`Encoder` or `str` or `os.PathLike`): A LoTLIP ([`~lotlip_hf.encoder.Encoder`]), or its folder or Hub
            id.
        image (`ImageSource`): Image; see [`~lotlip_hf.images.load_image`].
        text (`str`): Text of one or more sentences.

    Returns:
        [`Explanation`]: The explanation, which [`~lotlip_hf.explain_page.write_page`] draws.

    Raises:
        `ValueError`: If the model is not a LoTLIP, or if the text has no word or is not valid Unicode.
        `ImageError`: If the image cannot be read.

    Example:

    ```python
    >>> from lotlip_hf.explain import explain
    >>> from lotlip_hf.explain_page import write_page

    >>> found = explain("checkpoint", "photos/cat.png", "A ginger cat looks into the camera. Its fur is striped.")
    >>> [round(sentence.score, 2) for sentence in found.sentences]  # doctest: +SKIP
    >>> write_page([found], "page.html")
    ```
    """
    encoder = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    check_model(encoder)
    words = split_words(text)
    if not words:
        raise ValueError("`text` has no word. Pass a description of the image.")
    spans = [(one.start, one.end) for one in find_sentences(text)]
    sentences = split_sentences(text)
    # Without its only sentence, a text is empty.
    without = [text[:start] + text[end:] for start, end in spans] if len(spans) > 1 else []
    embeds, was_cut = _embed(encoder, [text, *sentences, *without])
    scores = (embeds @ encoder.encode_images([image], progress=False)[0]).tolist()
    alone, rest = scores[1 : 1 + len(sentences)], scores[1 + len(sentences) :] or [None]
    is_cut = _are_cut(encoder, text, words) if was_cut[0] else [False] * len(words)
    values = {(one.start, one.end): one.value for one in word_alignment([image], [text], encoder)[0]}
    distinct = list(dict.fromkeys([*sentences, *(word.text for word in words)]))
    heat = dict(zip(distinct, heat_maps(encoder, image, distinct), strict=True))
    source, path = image_source(image)
    picture = load_image(source, background=encoder.engine.background)
    seen = kept_box(picture.size, encoder.engine.image_processor)
    picture.thumbnail((SIDE, SIDE))
    return Explanation(
        model=Path(encoder.name).name if os.path.isdir(encoder.name) else encoder.name,
        image=Path(path).name if path else (Path(source).name if isinstance(source, str | os.PathLike) else "image"),
        picture=picture,
        seen=seen,
        text=text,
        score=scores[0],
        sentences=[
            ExplainedSentence(*span, score, None if other is None else scores[0] - other, heat[sentence])
            for span, score, other, sentence in zip(spans, alone, rest, sentences, strict=True)
        ],
        words=[
            ExplainedWord(
                word.start, word.end, 0.0 if cut else values.get((word.start, word.end), 0.0), cut, heat[word.text]
            )
            for word, cut in zip(words, is_cut, strict=True)
        ],
        attentions=_attentions(encoder, text, words),
        max_length=encoder.max_text_length,
    )


def check_model(encoder: Encoder) -> None:
    """
    Checks that a model can be explained.

    Args:
        encoder (`Encoder`): Encoder.

    Raises:
        `ValueError`: If the model is not a LoTLIP in PyTorch.
    """
    if not isinstance(getattr(encoder.engine, "model", None), LoTLIPModel):
        raise ValueError(
            f"{encoder.name} is not a LoTLIP checkpoint, so it cannot be explained. Convert a CLIP with `lotlip "
            "convert clip`."
        )


def _embed(encoder: Encoder, texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
    """Embeddings [N, D] of texts, and whether each text was cut, without a warning."""
    found = {index: (embedding, cut) for index, embedding, cut in encoder.iterate_texts(texts)}
    embeddings, was_cut = zip(*(found[index] for index in range(len(texts))), strict=True)
    return torch.stack(embeddings), list(was_cut)


def _are_cut(encoder: Encoder, text: str, words: Sequence[Word]) -> list[bool]:
    """Whether each word is beyond the maximum length."""
    engine: Any = encoder.engine

    def fits(part: str) -> bool:
        return not engine.tokenize([part], encoder.max_text_length)[1][0]

    numbers = range(len(words))
    if engine.tokenizer.truncation_side == "left":
        first = bisect_left(numbers, True, key=lambda index: fits(text[words[index].start :]))
        return [index < first for index in numbers]
    first = bisect_left(numbers, True, key=lambda index: not fits(text[: words[index].end]))
    return [index >= first for index in numbers]


def _attentions(encoder: Encoder, text: str, words: Sequence[Word]) -> list[Attention]:
    engine: Any = encoder.engine
    tokenizer, model = engine.tokenizer, engine.model
    config = model.config.text_config
    options = {"truncation": True, "max_length": encoder.max_text_length, "verbose": False}
    encoding = for_one_call(tokenizer)([text], **options, return_offsets_mapping=True)
    offsets = original_offsets(tokenizer, text, encoding.pop("offset_mapping")[0])
    inputs = {name: value.to(encoder.device) for name, value in engine.pad(dict(encoding)).items()}
    with evaluating(model), eager(model), torch.inference_mode():
        output = model.get_text_features(
            **inputs, output_attentions=True, output_corner_embeds=bool(config.num_corner_tokens)
        )
    attention = output.attentions[-1][0].float().mean(0)  # [L, L]
    ids = inputs["input_ids"]
    if "mean" in config.pooling:
        rows = {"mean of all tokens": attention.mean(0)}
    else:
        is_text = inputs.get("attention_mask", torch.ones_like(ids))
        pooled = int(config.family.pooled_index(config.backbone_config, is_text, ids))
        rows = {tokenizer.convert_ids_to_tokens(int(ids[0, pooled])): attention[pooled]}
    if output.corner_attentions:
        corners = output.corner_attentions[-1][0].float().mean(0)  # [m, L]
        rows |= {f"corner {number}": row for number, row in enumerate(corners, 1)}
    found = []
    for token, row in rows.items():
        values = to_words(row.cpu(), offsets, words)
        found.append(Attention(token, values.tolist(), max(0.0, 1 - float(values.sum()))))
    return found
