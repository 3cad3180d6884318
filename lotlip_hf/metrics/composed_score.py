"""Composed score: the cosine of a text with an image whose parts are weighted by the words for them."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..encoder import Encoder, load_encoder
from ..images import ImageSource

Box = Sequence[float]


def composed_score(
    image: ImageSource,
    text: str,
    parts: Iterable[tuple[str, Sequence[Box]]],
    encoder: Encoder | str | os.PathLike,
) -> float:
    """
    Computes the score of ComCLIP (https://arxiv.org/abs/2211.13854): the cosine of a text with the sum of an image and
    its parts. A part is the image, black outside of its boxes. Its weight is the similarity of the part and the words
    for it.

    Args:
        image (`ImageSource`): The image as a path, PIL image or array.
        text (`str`): The text.
        parts (`Iterable[tuple[str, Sequence[Box]]]`): Words and their boxes [x0, y0, x1, y1], in [0, 1] from the top
            left corner. In ComCLIP, subject and object have one box each, and their relation has both. Without parts,
            the score is the cosine.
        encoder (`Encoder` or `str` or `os.PathLike`): A dual encoder ([`~lotlip_hf.encoder.Encoder`]) or its folder or
            Hub id.

    Returns:
        `float`: The score, from -1 to 1.

    Raises:
        `ValueError`: If a box is malformed, empty or outside of the image.
        `ImageError`: If the image cannot be read; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.metrics import composed_score

    >>> cat, sofa = [0, 0, 0.5, 1], [0, 0.5, 1, 1]
    >>> parts = [("cat", [cat]), ("sofa", [sofa]), ("lies on", [cat, sofa])]
    >>> -1 <= composed_score("photos/cat.png", "A cat lies on a sofa.", parts, "checkpoint") <= 1
    True
    ```
    """
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    engine, parts = encoder.engine, list(parts)
    whole = engine.open(image, str(image) if isinstance(image, str | os.PathLike) else "image")
    pixels = [engine.pixels(one) for one in (whole, *(only_boxes(whole, boxes) for _, boxes in parts))]
    inputs = {name: np.concatenate([one[name] for one in pixels]) for name in pixels[0]}
    features = torch.from_numpy(engine.features("image", inputs))
    encoded, _ = engine.tokenize([text, *(words for words, _ in parts)], encoder.max_text_length)
    text_features = torch.from_numpy(engine.features("text", engine.pad(encoded)))
    composed = composed_features(features[0], features[1:], text_features[1:])
    return F.cosine_similarity(composed, text_features[0], dim=0).item()


def composed_features(image: Tensor, parts: Tensor, words: Tensor) -> Tensor:
    """
    Adds the parts of an image to it, each with the share of its similarity to its words.

    Args:
        image (`torch.Tensor`): Features [P] of the image, before they are normalised.
        parts (`torch.Tensor`): Features [K, P] of its parts.
        words (`torch.Tensor`): Features [K, P] of the words for the parts.

    Returns:
        `torch.Tensor`: Features [P].
    """
    similarities = (parts * words).sum(-1)
    return image + (similarities / similarities.sum()) @ parts if len(parts) else image


def only_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """
    Blackens an image outside of boxes.

    Args:
        image (`PIL.Image.Image`): An image.
        boxes (`Sequence[Box]`): Boxes [x0, y0, x1, y1], in [0, 1] from the top left corner.

    Returns:
        `PIL.Image.Image`: The image, black outside of the boxes.
    """
    part = Image.new(image.mode, image.size)
    for box in boxes:
        if np.shape(box) != (4,):
            raise ValueError(f"`parts`: {box} is not a box [x0, y0, x1, y1]. Pass a list of boxes for each part.")
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"`parts`: the box {[x0, y0, x1, y1]} is empty or outside of [0, 1].")
        width, height = image.size
        corners = (int(x0 * width), int(y0 * height), -int(-x1 * width // 1), -int(-y1 * height // 1))
        part.paste(image.crop(corners), corners[:2])
    return part
