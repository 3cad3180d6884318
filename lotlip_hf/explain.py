"""Shows what a model sees: the score of each sentence, the value of each word, heat maps and attention."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .attribution import eager
from .data.sentences import split_sentences
from .dense import heat_maps
from .encoder import Encoder, load_encoder
from .engines.torch import evaluating
from .images import ImageSource, image_source, kept_box, load_image
from .metrics.word_alignment import pooled_weights, token_relevance, tokenize
from .modeling.sentences_lotlip import find_sentences
from .words import Word, split_words, to_words

SIDE = 640  # longest side of `Explanation.picture` in pixels


@dataclass(frozen=True)
class ExplainedSentence:
    """
    The sentence `text[start:end]` of an explained text.

    Args:
        text (`str`): The sentence on one line.
        start, end (`int`): Where the sentence is in the text, with its mark and with white space before it.
        score (`float`): Cosine of the image and the sentence alone.
        lost (`float`, *optional*): Score of the whole text minus the score of the text without the sentence. `None`
            for the only sentence of a text.
        heat (`torch.Tensor`): Heat map [h, w] in [0, 1] on the grid of patches.
    """

    text: str
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
            sees, and that heat maps cover; see [`~lotlip_hf.images.kept_box`].
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
    engine, model = encoder.lotlip()
    words = split_words(text)
    if not words:
        raise ValueError("`text` has no word. Pass a description of the image.")
    spans = [(one.start, one.end) for one in find_sentences(text)]
    sentences = split_sentences(text)
    # Without its only sentence, a text is empty.
    without = [text[:start] + text[end:] for start, end in spans] if len(spans) > 1 else []
    image_embed = encoder.encode_images([image], progress=False)
    scores = (_embed(encoder, [text, *sentences, *without]) @ image_embed[0]).tolist()
    alone, rest = scores[1 : 1 + len(sentences)], scores[1 + len(sentences) :] or [None]
    inputs, (tokens,), num_cut = tokenize(engine, [text])
    values = to_words(token_relevance(model, inputs, image_embed.to(encoder.device))[0].float().cpu(), tokens, words)
    read = [token for token in tokens if token[0] < token[1]] if num_cut else [(0, len(text))]
    first, last = min(read, default=(len(text), 0))[0], max((end for _, end in read), default=0)
    is_cut = [word.start < first or word.end > last for word in words]
    distinct = list(dict.fromkeys([*sentences, *(word.text for word in words)]))
    heat = dict(zip(distinct, heat_maps(encoder, image, distinct), strict=True))
    source, path = image_source(image)
    picture = load_image(source, background=engine.background)
    seen = kept_box(picture.size, engine.image_processor)
    picture.thumbnail((SIDE, SIDE))
    return Explanation(
        model=Path(encoder.name).name if os.path.isdir(encoder.name) else encoder.name,
        image=Path(path).name if path else (Path(source).name if isinstance(source, str | os.PathLike) else "image"),
        picture=picture,
        seen=seen,
        text=text,
        score=scores[0],
        sentences=[
            ExplainedSentence(
                text=" ".join(text[start:end].split()),
                start=start,
                end=end,
                score=score,
                lost=None if other is None else scores[0] - other,
                heat=heat[sentence],
            )
            for (start, end), score, other, sentence in zip(spans, alone, rest, sentences, strict=True)
        ],
        words=[
            ExplainedWord(word.start, word.end, 0.0 if cut else value, cut, heat[word.text])
            for word, value, cut in zip(words, values.tolist(), is_cut, strict=True)
        ],
        attentions=_attentions(encoder, inputs, tokens, words),
        max_length=encoder.max_text_length,
    )


def _embed(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Embeddings [N, D] of texts, without a warning of those that are cut."""
    found = {index: embedding for index, embedding, _ in encoder.iterate_texts(texts)}
    return torch.stack([found[index] for index in range(len(texts))])


def _attentions(
    encoder: Encoder, inputs: dict[str, Tensor], tokens: Sequence[tuple[int, int]], words: Sequence[Word]
) -> list[Attention]:
    """What the pooled token and corner tokens attend to, given the inputs of a text and the spans of its tokens."""
    engine, model = encoder.lotlip()
    has_corners = model.config.text_config.num_corner_tokens > 0
    with evaluating(model), eager(model), torch.inference_mode():
        output = model.get_text_features(**inputs, output_attentions=True, output_corner_embeds=has_corners)
    weights = pooled_weights(model, inputs)[0]
    name = "mean of all tokens"
    if "mean" not in model.config.text_config.pooling:
        name = engine.tokenizer.convert_ids_to_tokens(int(inputs["input_ids"][0, weights.argmax()]))
    attention = output.attentions[-1][0].float().mean(0)  # [L, L]
    rows = {name: weights.to(attention) @ attention}
    if output.corner_attentions:
        corners = output.corner_attentions[-1][0].float().mean(0)  # [m, L]
        rows |= {f"corner {number}": row for number, row in enumerate(corners, 1)}
    found = []
    for token, row in rows.items():
        values = to_words(row.cpu(), tokens, words)
        found.append(Attention(token, values.tolist(), max(0.0, 1 - float(values.sum()))))
    return found
