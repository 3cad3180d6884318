"""Image files: finding them in a folder, and reading any of them as RGB or saying why it cannot be read."""

import io
import os
import stat
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

# Formats that PIL lists but does not decode itself: EPS and WMF call outside programs, the others are stubs or video.
EXCLUDED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

# Where transformers' image processors have the resizing that most of them share
BACKENDS = "transformers.image_processing_backends"
# A JPEG file is decoded at no less than so many times the size that it is resized to. From 3 on, Pillow says of its
# `reducing_gap`, the result is indistinguishable in most cases.
DRAFT_MARGIN = 3

# PIL fills its registry of formats on first use, which two threads must not do at once.
_registry_lock = threading.Lock()


class ImageError(ValueError):
    """
    An image that cannot be read.

    Args:
        name (`str`): path of the file, or the place of the image in the argument, as `images[3]`.
        reason (`str`): what is wrong with it.
        transient (`bool`, *optional*, defaults to `False`):
            Whether the same file may be readable later: no permission or no memory, say, rather than damaged contents.
    """

    def __init__(self, name: str, reason: str, transient: bool = False) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.transient = transient

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str, bool]]:
        return type(self), (self.name, self.reason, self.transient)  # it comes back from a DataLoader's worker


@cache
def readable_formats() -> tuple[str, ...]:
    """Names of the formats that PIL decodes, those of installed plugins included."""
    with _registry_lock:
        Image.init()
    return tuple(name for name in Image.OPEN if name not in EXCLUDED_FORMATS)


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of the files taken for images, in lower case and with their dot."""
    formats = set(readable_formats())
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def find_images(folder: str | os.PathLike) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """
    Finds the image files below a folder, by their extensions.

    Hidden files and folders are left out. Links are followed; a folder reached twice is read once, so loops of links
    end.

    Args:
        folder (`str` or `os.PathLike`): the folder.

    Returns:
        `tuple`: the images, a dictionary from the path relative to `folder` (with `/`) to its `os.stat_result`, sorted
        by name; and what could not be looked at, a dictionary from relative path to the reason.

    Raises:
        NotADirectoryError: if `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}.")
    images: dict[str, os.stat_result] = {}
    unreadable: dict[str, str] = {}
    visited: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            status = os.stat(folder / parent)
            names = sorted(os.listdir(folder / parent))
        except OSError as error:
            unreadable[parent or "."] = f"the folder cannot be read ({error.strerror})"
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for name in names:
            if name.startswith("."):
                continue
            path = f"{parent}/{name}" if parent else name
            is_image_name = os.path.splitext(name)[1].lower() in image_extensions()
            try:
                status = os.stat(folder / path)
            except OSError as error:
                if is_image_name:
                    unreadable[path] = f"cannot be opened ({error.strerror})"
                continue
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            elif is_image_name and stat.S_ISREG(status.st_mode):
                images[path] = status
            elif is_image_name:
                unreadable[path] = "not a regular file"
    return dict(sorted(images.items())), dict(sorted(unreadable.items()))


def load_image(source: ImageSource, name: str | None = None, *, image_processor: Any = None) -> Image.Image:
    """
    Reads an image as 8-bit RGB, upright.

    The EXIF orientation is applied, as `transformers.image_utils.load_image` does; an animation gives its first frame;
    transparency is dropped, as `Image.convert("RGB")` does. 16-bit pixels are scaled to 8 bits, where PIL would clip
    them, and floating-point ones are taken to go from 0 (black) to 1 (white).

    PIL warns of images of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, and they are read; with more than twice as
    many it takes them for decompression bombs, and they are refused.

    With `image_processor` a large JPEG file is read for it in a fraction of the time. It is decoded at 1/2, 1/4 or 1/8
    of its size, which leaves libjpeg fewer pixels to compute, yet at least three times as large as the processor
    resizes it to, and is resized to that; the processor's own resizing then changes nothing. On photographs of 3 to 26
    megapixels `pixel_values` differ from those of the whole file by 0.15/255 to 0.25/255 on average, by 8/255 at most.
    All other images, and those for a processor that resizes in its own way, are what they are without it.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Path of a file, the bytes of one, a PIL image (left unchanged), or an array of 8- or 16-bit unsigned
            integers, of shape [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels.
        name (`str`, *optional*): what errors call the image; by default its path.
        image_processor (`BaseImageProcessor`, *optional*): what the image is for, if only for that.

    Returns:
        `PIL.Image.Image`: a new image of mode RGB.

    Raises:
        ImageError: if it cannot be read. The message names the file and says why.
        TypeError: if `source` is something else.

    Example:

    ```python
    >>> import numpy as np
    >>> from lotlip_hf.images import load_image

    >>> load_image(np.full((4, 6), 65535, dtype=np.uint16)).getpixel((0, 0))
    (255, 255, 255)
    ```
    """
    if name is None:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
    try:
        if isinstance(source, str | os.PathLike):
            return _load_file(os.fspath(source), name, image_processor)
        if isinstance(source, bytes):
            if not source:
                raise ImageError(name, "the file is empty")
            with Image.open(io.BytesIO(source), formats=readable_formats()) as image:
                return _to_rgb(_reduced(image, image_processor), name)
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        if isinstance(source, np.ndarray | torch.Tensor):
            return _to_rgb(_from_array(np.asarray(source), name), name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        advice = "if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS"
        raise ImageError(name, f"too large ({str(error).rstrip('.')}); {advice}") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, "not an image in a format that PIL reads") from error
    except MemoryError as error:
        raise ImageError(name, "too large for this machine's memory", transient=True) from error
    except OSError as error:
        # PIL's own complaints about the contents are OSErrors without a number.
        if error.errno is None:
            raise ImageError(name, f"damaged or truncated ({error})") from error
        raise ImageError(name, f"cannot be opened ({error.strerror})", transient=True) from error
    except Exception as error:  # decoders raise anything on damaged files: SyntaxError, struct.error, zlib.error, ...
        raise ImageError(name, f"damaged ({type(error).__name__}: {error})") from error
    raise TypeError(
        f"{name} must be a path, the bytes of a file, a PIL image or an array, got {type(source).__name__}."
    )


def _load_file(path: str, name: str, image_processor: Any) -> Image.Image:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(name, "a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(name, "not a regular file")
    if status.st_size == 0:
        raise ImageError(name, "the file is empty")
    with Image.open(path, formats=readable_formats()) as image:
        return _to_rgb(_reduced(image, image_processor), name)


def _reduced(image: Image.Image, image_processor: Any) -> Image.Image:
    """A JPEG file that was opened, as RGB of the size that the processor resizes it to; others as they are."""
    full_size = image.size
    size = None if image_processor is None else _resized_size(full_size, image_processor)
    if size is None or min(full_size[0] // size[0], full_size[1] // size[1]) < 2 * DRAFT_MARGIN:
        return image
    draft = image.draft(None, (DRAFT_MARGIN * size[0], DRAFT_MARGIN * size[1]))
    if draft is None:
        return image
    # The last row and column may cover less than a pixel: the box says how much of them is image.
    return image.convert("RGB").resize(size, image_processor.resample, box=draft[1])


def _resized_size(size: tuple[int, int], image_processor: Any) -> tuple[int, int] | None:
    """
    The (width, height) that an image of this size has after the resizing that most image processors of transformers
    share; `None` if the processor does not use it or does not average, or if the size depends on which side is up.
    """
    methods = (getattr(type(image_processor), name, None) for name in ("resize", "_preprocess"))
    if not all(getattr(method, "__module__", None) == BACKENDS for method in methods):
        return None
    resample = image_processor.resample
    if not image_processor.do_resize or not isinstance(resample, int) or resample == Image.Resampling.NEAREST:
        return None
    wanted = {name: value for name, value in dict(image_processor.size or {}).items() if value is not None}
    if wanted.keys() == {"shortest_edge"}:
        short, long = wanted["shortest_edge"], int(wanted["shortest_edge"] * max(size) / min(size))
        return (short, long) if size[0] <= size[1] else (long, short)
    if wanted.keys() == {"height", "width"} and wanted["height"] == wanted["width"]:
        return wanted["width"], wanted["height"]
    return None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(name, f"has no pixels (size {image.width}x{image.height})")
    file_format = image.format
    image = ImageOps.exif_transpose(image)  # a copy, even where nothing is to be turned
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return _from_unit_range(np.asarray(image, dtype=np.float32) / 65535)
    if image.mode == "I":
        raise ImageError(name, "32-bit integer pixels have no defined white; convert the image to 8 or 16 bits")
    if image.mode == "F":
        values = np.asarray(image)
        # Negated, so that NaN is refused too.
        if not (values.min() >= 0 and values.max() <= 1):
            found = f"{values.min():g} to {values.max():g}"
            raise ImageError(name, f"floating-point pixels must go from 0 (black) to 1 (white), these go from {found}")
        return _from_unit_range(values)
    if image.mode == "P" and "transparency" in image.info:
        # The same pixels as directly, without PIL's warning.
        image = image.convert("RGBA")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # Kept by `convert`; newer versions of transformers would lay the colour that it declares transparent on white.
    rgb.info.pop("transparency", None)
    return rgb


def _from_unit_range(values: np.ndarray) -> Image.Image:
    """Grey values in [0, 1], shape [H, W], as an RGB image."""
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.dtype not in (np.uint8, np.uint16) or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    ):
        raise ImageError(
            name,
            f"an array must be uint8 or uint16, of shape [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels; "
            f"got {array.dtype} of shape {list(array.shape)}",
        )
    if array.size == 0:
        raise ImageError(name, f"has no pixels (shape {list(array.shape)})")
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)  # 65535 = 255 * 257
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
