"""Data for an evaluation: images with texts, with classes, with masks of classes, or with parts of their prompts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..images import ImageSource


class IncompleteDataError(ValueError):
    """Raised for an incomplete data set, which is not scored. The message names the missing parts and their source."""


@dataclass(frozen=True)
class RetrievalData:
    """
    Images and their texts.

    Args:
        id (`str`): Hub id of the data set, such as `"google/imageinwords"`, or another identifier.
        name (`str`): Name for tables, such as `"IIW"`.
        images (`Sequence[ImageSource]`): Images, [I], as paths, bytes of image files, or image objects. Items are
            accessed one at a time, so the sequence may load them lazily.
        image_names (`Sequence[str]`): Names of the images for messages, [I], such as file names.
        texts (`Sequence[str]`): Texts, [T], already normalised.
        text_to_image (`Sequence[int]`): Index of the image of each text, [T]. Every image needs a text.
        split (`str`, *optional*): Split of the data set.
        revision (`str`, *optional*): Revision of the data set on the Hub.
        protocol (`Mapping[str, Any]`, *optional*, defaults to `{}`): Settings such as the normalisation of the texts
            and the selection of the images.
    """

    id: str
    name: str
    images: Sequence[ImageSource]
    image_names: Sequence[str]
    texts: Sequence[str]
    text_to_image: Sequence[int]
    split: str | None = None
    revision: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassificationData:
    """
    Images and their classes. Fields not listed here are those of [`RetrievalData`].

    Args:
        labels (`Sequence[int]`): Index in `class_names` of the class of each image, [I].
        class_names (`Sequence[str]`): Names of the classes for prompts, [C].
    """

    id: str
    name: str
    images: Sequence[ImageSource]
    image_names: Sequence[str]
    labels: Sequence[int]
    class_names: Sequence[str]
    split: str | None = None
    revision: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SegmentationData:
    """
    Images and masks of classes. Fields not listed here are those of [`RetrievalData`].

    Args:
        masks (`Sequence[str | os.PathLike]`): PNG file of each image, [I], with the size of the image. A pixel
            is an index in `class_names`, or 255 for a pixel that is not scored.
        class_names (`Sequence[str]`): Names of the classes for prompts, [C].
    """

    id: str
    name: str
    images: Sequence[ImageSource]
    image_names: Sequence[str]
    masks: Sequence[str | os.PathLike]
    class_names: Sequence[str]
    split: str | None = None
    revision: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)


class Part(NamedTuple):
    """A phrase of a prompt, and optionally its box x0, y0, x1, y1, in [0, 1] from the top left corner."""

    text: str
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class PromptData:
    """
    Prompts and what must be in their pictures. Fields not listed here are those of [`RetrievalData`].

    Args:
        images (`Sequence[ImageSource]`): The picture of each prompt, [I].
        prompts (`Sequence[str]`): Prompts, [I].
        parts (`Sequence[Sequence[Part]]`): Parts of each prompt, [I]: phrases that occur in the prompt.
    """

    id: str
    name: str
    images: Sequence[ImageSource]
    image_names: Sequence[str]
    prompts: Sequence[str]
    parts: Sequence[Sequence[Part]]
    split: str | None = None
    revision: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)


# What an evaluation can score.
Data = RetrievalData | ClassificationData | SegmentationData | PromptData
