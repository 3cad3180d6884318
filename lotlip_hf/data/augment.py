"""Random changes of training images: a crop, a mirror image, shades of grey and other colours."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from .. import options
from ..images import Background, ImageSource, load_image, load_pixels, load_sized_pixels

CROP_RATIOS = 3 / 4, 4 / 3  # smallest and largest width / height of a crop
CROP_TRIES = 10
HUE_SHARE = 1 / 4  # of the strength of the other colours, as in SimCLR and open_clip
HUES = 256
Edges = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Augment:
    """
    Random changes of an image, in the order of the fields. They follow the transforms of torchvision, with PIL alone.

    Args:
        crop (`float`, *optional*, defaults to 0.0): Smallest share of the image's area that a crop keeps, as in
            torchvision's `RandomResizedCrop`: the share is drawn from `crop` to 1, the ratio of the sides from 3/4 to
            4/3, and the crop is resized to the model's image. 0 does not crop.
        flip (`float`, *optional*, defaults to 0.0): Probability of the mirror image.
        jitter (`float`, *optional*, defaults to 0.0): Strength of `ColorJitter`: brightness, contrast and saturation
            are multiplied by numbers from 1 - `jitter` to 1 + `jitter`, and the hue is turned by up to `jitter` / 4 of
            a circle, in random order.
        grey (`float`, *optional*, defaults to 0.0): Probability of shades of grey.

    Raises:
        `ValueError`: If a number is not in [0, 1].

    Example:

    ```python
    >>> from random import Random
    >>> from PIL import Image
    >>> from lotlip_hf.data.augment import Augment

    >>> Augment(crop=0.5, flip=0.5)(Image.new("RGB", (64, 48)), Random(0), size=(32, 32)).size
    (32, 32)
    ```
    """

    crop: float = 0.0
    flip: float = 0.0
    jitter: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= (number := getattr(self, field.name)) <= 1:
                raise ValueError(f"`augment` {field.name} must be a number from 0 to 1, got {number}.")

    @property
    def moves(self) -> bool:
        """Whether parts of an image are at another position after the changes."""
        return bool(self.crop or self.flip)

    def __call__(
        self,
        image: Image.Image,
        rng: Random,
        size: tuple[int, int] | None = None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> Image.Image:
        """
        Changes an image.

        Args:
            image (`PIL.Image.Image`): RGB image.
            rng (`Random`): Random generator. The same state gives the same changes.
            size (`tuple[int, int]`, *optional*): Width and height of a crop after resizing. Defaults to those of
                `image`.
            resample (`Image.Resampling`, *optional*, defaults to bicubic): Filter of the resizing.

        Returns:
            `PIL.Image.Image`: RGB image.
        """
        return self.view(image, rng, size, resample)[0]

    def view(
        self,
        image: Image.Image,
        rng: Random,
        size: tuple[int, int] | None = None,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> tuple[Image.Image, Edges]:
        """
        Changes an image as a call does. Returns it, and the left, top, right and bottom edge of the crop in pixels of
        `image`. For a mirror image, left and right are exchanged.
        """
        left, top, right, bottom = 0, 0, *image.size
        if self.crop:
            left, top, right, bottom = draw_crop(image.size, self.crop, rng)
            image = image.crop((left, top, right, bottom)).resize(size or image.size, resample)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left, right = right, left
        if self.jitter:
            image = _jittered(image, self.jitter, rng)
        if rng.random() < self.grey:
            image = image.convert("L").convert("RGB")
        return image, (left, top, right, bottom)


def parse_augment(entries: Sequence[str]) -> Augment | None:
    """
    Reads the option `augment`.

    Args:
        entries (`Sequence[str]`): Entries `name:number`, such as `crop:0.5`, with the fields of [`Augment`].

    Returns:
        [`Augment`] or `None`: The changes. `None` if there are no entries.

    Raises:
        `ValueError`: If a name is unknown or given twice, or a number is wrong.
    """
    known, numbers = [field.name for field in fields(Augment)], {}
    for name, _, number in (entry.partition(":") for entry in entries):
        if name not in known or name in numbers:
            problem = "is given twice" if name in numbers else f"is not one of {', '.join(known)}"
            raise ValueError(f"`augment`: {name!r} {problem}. Write, for example, crop:0.5 flip:0.5.")
        numbers[name] = options.convert(f"augment: {name}", number, float)
    return Augment(**numbers) if numbers else None


def draw_crop(size: tuple[int, int], smallest: float, rng: Random) -> Edges:
    """
    Draws the box of a crop as torchvision's `RandomResizedCrop` does.

    Args:
        size (`tuple[int, int]`): Width and height of the image.
        smallest (`float`): Smallest share of the area.
        rng (`Random`): Random generator.

    Returns:
        `tuple[int, int, int, int]`: Left, top, right and bottom edge in pixels. If ten boxes in a row do not fit into
            the image, the largest box with an allowed ratio, in its centre.
    """
    width, height = size
    low, high = CROP_RATIOS
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(smallest, 1)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = rng.randint(0, width - across), rng.randint(0, height - down)
            return left, top, left + across, top + down
    across, down = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def crop_size(image_processor: Any) -> tuple[int, int]:
    """
    Finds the size of the images of a model.

    Args:
        image_processor (`BaseImageProcessor`): Image processor of the model.

    Returns:
        `tuple[int, int]`: Width and height in pixels.

    Raises:
        `ValueError`: If the size depends on the image, so that a crop cannot be resized to it.
    """
    images = [Image.new("RGB", size) for size in ((96, 64), (64, 128))]
    shapes = {load_pixels(image, image_processor=image_processor)["pixel_values"].shape[1:] for image in images}
    if len(shapes) > 1 or len(shape := shapes.pop()) != 3:  # [3, H, W]; patches have two dimensions
        raise ValueError("`augment` crop needs an image processor whose images have one size. Leave crop out.")
    return shape[2], shape[1]


def load_augmented(
    source: ImageSource,
    name: str,
    *,
    augment: Augment,
    rng: Random,
    size: tuple[int, int] | None,
    image_processor: Any,
    background: Background,
) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """
    Reads an image, changes it and processes it for a model. A crop takes the place of the processor's own resizing and
    centre crop.

    Args:
        source (`ImageSource`): Image.
        name (`str`): Name of the image, for errors.
        augment (`Augment`): The changes.
        rng (`Random`): Random generator.
        size (`tuple[int, int]`, *optional*): Size of a crop after resizing ([`crop_size`]).
        image_processor (`BaseImageProcessor`): Image processor of the model.
        background (`str` or `Sequence[int]`): Colour behind transparent pixels.

    Returns:
        `tuple`: Output of the image processor, and width and height of the image.

    Raises:
        `ImageError`: If the image cannot be read.
    """
    image = load_image(source, name, background=background)
    if not augment.crop:
        return load_sized_pixels(augment(image, rng), name, image_processor=image_processor)
    cropped = augment(image, rng, size, image_processor.resample)
    return dict(_unsized(image_processor)(images=[cropped], return_tensors="pt")), image.size


def load_views(
    source: ImageSource,
    name: str,
    *,
    augment: Augment,
    rngs: Sequence[Random],
    size: tuple[int, int] | None,
    image_processor: Any,
    background: Background,
    around: bool = False,
) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """
    Reads an image and makes views of it.

    Args:
        rngs (`Sequence[Random]`): A random generator for each view.
        around (`bool`, *optional*, defaults to `False`): Whether to add the smallest part of the image that holds all
            views, without other changes.

    The other arguments are those of [`load_augmented`].

    Returns:
        `tuple`: `pixel_values` [1, V, 3, H, W] of the views, and width and height of the image. With `around`, also
        `around` [1, 3, H, W] and `view_boxes` [1, V, 4], the edges of the views as shares of that part
        ([`Augment.view`]).

    Raises:
        `ImageError`: If the image cannot be read.
    """
    image = load_image(source, name, background=background)
    resample = image_processor.resample
    views, boxes = zip(*(augment.view(image, rng, size, resample) for rng in rngs), strict=True)
    pictures, added = [*views], dict[str, torch.Tensor]()
    if around:
        edges = np.array(boxes, dtype=np.float64).reshape(-1, 2, 2)  # [V, 2 corners, x and y]
        low, high = edges.min((0, 1)), edges.max((0, 1))
        pictures.append(image.crop((*map(int, low), *map(int, high))).resize(size or image.size, resample))
        added["view_boxes"] = torch.from_numpy((edges - low) / (high - low)).flatten(1)[None].float()
    pixels = torch.as_tensor(_unsized(image_processor)(images=pictures, return_tensors="pt")["pixel_values"])
    if around:
        added["around"] = pixels[-1:]
    return {"pixel_values": pixels[None, : len(views)], **added}, image.size


def _unsized(image_processor: Any) -> Any:
    """Returns an image processor that neither resizes nor crops."""
    unsized = copy.copy(image_processor)
    unsized.do_resize = unsized.do_center_crop = False
    return unsized


def _jittered(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    """Changes brightness, contrast, saturation and hue, in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = [rng.uniform(1 - strength, 1 + strength) for _ in kinds]
    changes: list[Callable[[Image.Image], Image.Image]] = [
        lambda image, kind=kind, factor=factor: kind(image).enhance(factor)
        for kind, factor in zip(kinds, factors, strict=True)
    ]
    turn = round(rng.uniform(-HUE_SHARE * strength, HUE_SHARE * strength) * (HUES - 1))
    changes.append(lambda image: _turned(image, turn))
    rng.shuffle(changes)
    for change in changes:
        image = change(image)
    return image


def _turned(image: Image.Image, turn: int) -> Image.Image:
    """Turns the hue by a number of its 256 steps."""
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(turn % HUES)
    return Image.fromarray(pixels, "HSV").convert("RGB")
