"""What a model is evaluated on: images with texts, or images with classes, and what is said where some are missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..images import ImageSource


class IncompleteDataError(ValueError):
    """A data set that lacks something: nothing is scored on the rest. The message says what, and where to get it."""


@dataclass(frozen=True)
class RetrievalData:
    """
    Images and the texts that belong to them.

    Args:
        id (`str`): what the data set is called on the Hub, such as `"google/imageinwords"`, or a name of its own.
        name (`str`): what a table calls it, such as `"IIW"`.
        images (`Sequence[ImageSource]`):
            [I] paths, bytes of image files, or images; read one by one, so it may load them when asked.
        image_names (`Sequence[str]`): [I] what messages call the images, such as their file names.
        texts (`Sequence[str]`): [T] as they are encoded: normalised already, as the protocol wants them.
        text_to_image (`Sequence[int]`): [T] the index in `images` of each text's image. Every image has a text.
        split (`str`, *optional*): which part of the data set it is.
        revision (`str`, *optional*): of the data set on the Hub, if it comes from there.
        protocol (`Mapping[str, Any]`): how texts were normalised and images chosen.
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
    Images and the class of each.

    Args:
        id, name, images, image_names, split, revision, protocol: as in [`RetrievalData`].
        labels (`Sequence[int]`): [I] the index in `class_names` of each image's class.
        class_names (`Sequence[str]`): [C] as they stand in a prompt.
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
