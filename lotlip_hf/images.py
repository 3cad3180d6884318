"""Image files: finding them in a folder, and reading any of them as RGB or saying why it cannot be read."""

import contextlib
import io
import math
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from .files import FileError, lies_in, open_regular, read_regular

# What an image may be; a mapping is what `datasets.Image(decode=False)` gives
ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor | Mapping
# The colour under transparency, as PIL takes it; `None` drops the alpha channel
Background = str | Sequence[int] | None
WHITE = "white"

# Formats that PIL lists but does not decode itself: EPS and WMF call outside programs, the others are stubs or video.
EXCLUDED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

# The largest file that is read, in bytes. Several decoders read a file whole before they look at its size in pixels.
MAX_FILE_BYTES = 1 << 30
# The environment variable that sets the pixel limit in this process and those that it starts
MAX_PIXELS_VARIABLE = "LOTLIP_MAX_IMAGE_PIXELS"
# Twice the size from which on PIL warns
DEFAULT_MAX_PIXELS = 2 * (1024**3 // 4 // 3)
# Larger files are read one at a time: metadata in them may fill the memory too.
LARGE_FILE_BYTES = 1 << 26
# Formats that may hold an image of another size than they say
NESTED_FORMATS = ("BLP", "ICNS", "ICO")
TILE_WIDTH, TILE_LENGTH = 322, 323  # TIFF's tags
# Side in pixels of the tiles in which conversions work that need more memory than their result
TILE = 1024
# Where transformers' image processors have the resizing that most of them share
RESIZING_MODULE = "transformers.image_processing_backends"
# Longest side over shortest, beyond which an image is thin. Resized to a shortest edge of 224 one of this ratio has
# 224 x 14,336 pixels.
MAX_ASPECT_RATIO = 64
# Images of more pixels are resized here, where their image processor would copy them whole several times
LARGE = 1 << 24

EMPTY = "the file is empty"
NO_MEMORY = "too large for this machine's memory"
HEIF_HINT = "HEIC and HEIF are read once pillow-heif is installed (pip install pillow-heif)"
AVIF_HINT = "AVIF needs a newer Pillow (pip install --upgrade pillow)"
# How such files begin, after their first four bytes; a name may say something else
BRANDS = {
    **{b"ftyp" + brand: HEIF_HINT for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")},
    **dict.fromkeys((b"ftypavif", b"ftypavis"), AVIF_HINT),
}
# Files that are pictures to people, and why they may not be read. What PIL or a plugin does read counts as readable.
HINTS = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), HEIF_HINT),
    **dict.fromkeys((".avif", ".avifs"), AVIF_HINT),
    **dict.fromkeys((".svg", ".svgz"), "SVG is drawing instructions, not pixels; convert it, to PNG for example"),
}
RAW_EXTENSIONS = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf "
    ".srw .x3f".split()
)
RAW_HINT = "camera raw is not developed here; convert it, to JPEG or TIFF for example"

# A JPEG file is decoded at no less than so many times the size that it is resized to. From 3 on, Pillow says of its
# `reducing_gap`, the result is indistinguishable in most cases.
DRAFT_MARGIN = 3

# PIL fills its registry of formats on first use, which two threads must not do at once.
_registry_lock = threading.Lock()


class _PixelBudget:
    """Lets threads decode images of no more pixels together than the largest image may have; the others wait."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # the threads that hold pixels stay behind

    def _reset(self) -> None:
        self._change = threading.Condition()
        self._held = 0

    @contextlib.contextmanager
    def hold(self, pixels: int | None = None) -> Iterator[None]:
        """Waits until there is room for so many pixels; `None` is for an image that says its size too late."""
        limit = max_image_pixels() or DEFAULT_MAX_PIXELS
        pixels = limit if pixels is None else pixels
        with self._change:
            self._change.wait_for(lambda: not self._held or self._held + pixels <= limit)
            self._held += pixels
        try:
            yield
        finally:
            with self._change:
                self._held -= pixels
                self._change.notify_all()


_budget = _PixelBudget()


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


class StoredImage(NamedTuple):
    """An image out of its dictionary, if it is in one; `path` names it if it has a name."""

    source: Any
    path: str | None


def image_source(value: Any) -> StoredImage:
    """
    Takes an image out of the dictionary that `datasets.Image(decode=False)` gives, with `bytes`, which go first, and
    `path`. Other values stay as they are; `None` is for what is missing.
    """
    if not isinstance(value, Mapping):
        return StoredImage(value, os.fspath(value) if isinstance(value, str | os.PathLike) else None)
    path, content = value.get("path"), value.get("bytes")
    path = path if isinstance(path, str) else None
    return StoredImage(content if isinstance(content, bytes) else path, path)


@cache
def readable_formats() -> tuple[str, ...]:
    """Names of the formats that PIL decodes, those of installed plugins included."""
    with _registry_lock:
        Image.init()
        with contextlib.suppress(ImportError):  # an extra
            import pillow_heif  # pyright: ignore[reportMissingImports]

            pillow_heif.register_heif_opener()
    return tuple(name for name in Image.OPEN if name not in EXCLUDED_FORMATS)


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of the files taken for images, in lower case and with their dot."""
    formats = set(readable_formats())
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def unreadable_hint(name: str | os.PathLike) -> str | None:
    """Why a file that people take for a picture is not read, by its name; `None` for files that PIL decodes."""
    extension = os.path.splitext(name)[1].lower()
    if extension in RAW_EXTENSIONS:
        return RAW_HINT
    return None if extension in image_extensions() else HINTS.get(extension)


def find_images(
    folder: str | os.PathLike, root: str | os.PathLike | None = None
) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """
    Finds the image files below a folder, by their extensions.

    Hidden files and folders are left out. Links are followed where they stay below `root`; a folder reached twice is
    read once, so loops of links end.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        root (`str` or `os.PathLike`, *optional*, defaults to `folder`):
            The folder that links must not lead out of. `/` allows all.

    Returns:
        `tuple`: the images, a dictionary from the path relative to `folder` (with `/`) to its `os.stat_result`, sorted
        by name; and what could not be looked at, a dictionary from relative path to the reason: links that lead out of
        `root`, and formats that are not read, too.

    Raises:
        NotADirectoryError: if `folder` or `root` is not a folder.
    """
    folder = Path(folder)
    root = folder if root is None else Path(root)
    for one in (folder, root):
        if not one.is_dir():
            raise NotADirectoryError(f"{one}: {'not a folder' if one.exists() else 'no such folder'}.")
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
            hint = unreadable_hint(name)
            is_image_name = hint is not None or os.path.splitext(name)[1].lower() in image_extensions()
            try:
                status = os.lstat(folder / path)
                is_link = stat.S_ISLNK(status.st_mode)
                status = os.stat(folder / path) if is_link else status
            except OSError as error:
                if is_image_name:
                    unreadable[path] = f"cannot be opened ({error.strerror})"
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            if not is_folder and not is_image_name:
                continue
            if is_link and not lies_in({folder, root}, folder / path):
                unreadable[path] = "a link that leads out of the folder; --image-root DIR names one that holds both"
                continue
            if is_folder:
                pending.append(path)
            elif not stat.S_ISREG(status.st_mode):
                unreadable[path] = "not a regular file"
            elif hint is not None:
                unreadable[path] = hint
            else:
                images[path] = status
    return dict(sorted(images.items())), dict(sorted(unreadable.items()))


def read_image_bytes(path: str | os.PathLike, limit: int = MAX_FILE_BYTES) -> bytes:
    """
    Reads an image file whole, without decoding it.

    Args:
        path (`str` or `os.PathLike`): the file.
        limit (`int`, *optional*, defaults to 1 GiB): the most bytes that are read.

    Returns:
        `bytes`: its contents.

    Raises:
        ImageError: if it cannot be opened, is larger, empty, or no regular file.
    """
    name = os.fspath(path)
    with _image_errors(name):
        content = read_regular(name, limit)
    if not content:
        raise ImageError(name, EMPTY)
    return content


def max_image_pixels() -> int | None:
    """The most pixels that an image may have, see [`set_max_image_pixels`]; `None` without a limit."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def set_max_image_pixels(pixels: int) -> None:
    """
    Sets the pixel limit: larger images are refused, and no more pixels are decoded at a time.

    It holds for all of PIL, in this process and in those that it starts from here on (the environment variable
    `LOTLIP_MAX_IMAGE_PIXELS` hands it on, and sets it as well). By default it is twice `PIL.Image.MAX_IMAGE_PIXELS`,
    178,956,970 pixels; each may take up to 12 bytes.

    Args:
        pixels (`int`): the limit.

    Raises:
        ValueError: if it is less than 1.
    """
    if pixels < 1:
        raise ValueError(f"`pixels` must be at least 1, got {pixels}.")
    os.environ[MAX_PIXELS_VARIABLE] = str(pixels)
    # PIL would warn from half of the limit on.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = -(-pixels // 2)


if _given := os.environ.get(MAX_PIXELS_VARIABLE):
    set_max_image_pixels(int(_given))


def checked_background(background: Background) -> tuple[int, int, int] | None:
    """A background's red, green and blue, from 0 to 255; a `ValueError` if it is no colour."""
    if background is None:
        return None
    with contextlib.suppress(ValueError, TypeError):
        red, green, blue = ImageColor.getrgb(background)[:3] if isinstance(background, str) else background
        if all(isinstance(one, int) and 0 <= one <= 255 for one in (red, green, blue)):
            return red, green, blue
    raise ValueError(
        f"`background` must be a colour such as 'white', '#ffffff' or (255, 255, 255), or None, got {background!r}."
    )


def background_of(processor: Any) -> Background:
    """The colour that a processor lays under transparent pixels; white, if it has no such setting."""
    return getattr(processor, "background", WHITE)


def load_image(
    source: ImageSource, name: str | None = None, *, image_processor: Any = None, background: Background = WHITE
) -> Image.Image:
    """
    Reads an image as 8-bit RGB, upright.

    The EXIF orientation is applied, as `transformers.image_utils.load_image` does; an animation gives its first frame;
    transparent pixels show the background. 16-bit pixels are scaled to 8 bits, where PIL would clip them, and
    floating-point ones are taken to go from 0 (black) to 1 (white).

    Images of more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels are refused, see [`set_max_image_pixels`], and so are
    files of more than 1 GiB. Threads that read large images wait for each other: together they decode no more pixels
    than the largest image may have.

    With `image_processor` a large JPEG file is read for it in a fraction of the time. It is decoded at 1/2, 1/4 or 1/8
    of its size, which leaves libjpeg fewer pixels to compute, yet at least three times as large as the processor
    resizes it to, and is resized to that; the processor's own resizing then changes nothing. On photographs of 3 to 26
    megapixels `pixel_values` differ from those of the whole file by 0.15/255 to 0.25/255 on average, by 8/255 at most.
    Of an image with one side more than 64 times the other only what the centre crop leaves is resized. All other
    images, and those for a processor that resizes in its own way, are what they are without it.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or `Mapping`):
            Path of a file, the bytes of one, a PIL image (left unchanged), an array of 8- or 16-bit unsigned integers,
            of shape [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, or a dictionary of `bytes` and `path`, as
            `datasets.Image(decode=False)` gives it.
        name (`str`, *optional*): what errors call the image, before its path.
        image_processor (`BaseImageProcessor`, *optional*): what the image is for, if only for that.
        background (`str` or `Sequence[int]`, *optional*, defaults to `"white"`):
            The colour laid under transparency, as PIL takes it: a name, `"#rrggbb"`, or three numbers. `None` drops
            the transparency instead, as `Image.convert("RGB")` and the official code do.

    Returns:
        `PIL.Image.Image`: a new image of mode RGB.

    Raises:
        ImageError: if it cannot be read. The message names the file and says why.
        ValueError: if `background` is no colour.
        TypeError: if `source` is something else.

    Example:

    ```python
    >>> import numpy as np
    >>> from lotlip_hf.images import load_image

    >>> load_image(np.full((4, 6), 65535, dtype=np.uint16)).getpixel((0, 0))
    (255, 255, 255)
    ```
    """
    with _loaded(source, name, image_processor, background) as image:
        return image


def load_pixels(
    source: ImageSource, name: str | None = None, *, image_processor: Any, background: Background = WHITE
) -> dict[str, torch.Tensor]:
    """
    Reads an image, as [`load_image`], and makes of it what a model takes.

    Args:
        source, name, background: as in [`load_image`].
        image_processor (`BaseImageProcessor`): the model's.

    Returns:
        `dict[str, torch.Tensor]`: what the processor makes of the one image, `pixel_values` [1, 3, H, W] for most.

    Raises:
        ImageError: if the image cannot be read, or its pixels do not fit in memory.
        ValueError, TypeError: as [`load_image`].
    """
    with _loaded(source, name, image_processor, background) as image:
        return dict(image_processor(images=[image], return_tensors="pt"))


def official_image_processor(image_size: int = 224) -> Any:
    """
    The preprocessing of the released LoTLIP models: bicubic to `image_size`, centre crop, mean and deviation 0.5.

    Args:
        image_size (`int`, *optional*, defaults to 224): the shortest edge and the side of the crop, in pixels.

    Returns:
        `CLIPImageProcessorPil`: gives `pixel_values` [B, 3, image_size, image_size]. Saved, it is a plain
        `CLIPImageProcessor`, which loads with whichever backend is installed.
    """
    from transformers import CLIPImageProcessorPil  # here: transformers takes seconds to import

    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def processed_size(image_processor: Any) -> tuple[int, int]:
    """Height and width of the `pixel_values` that a processor makes of a picture of 96 x 64 pixels."""
    height, width = load_pixels(Image.new("RGB", (96, 64)), image_processor=image_processor)["pixel_values"].shape[-2:]
    return height, width


@contextlib.contextmanager
def _loaded(
    source: ImageSource, name: str | None, image_processor: Any, background: Background
) -> Iterator[Image.Image]:
    """The image, while its pixels count among those that are decoded."""
    source, path = image_source(source)
    name = ": ".join(filter(None, (name, path))) or "image"
    if not isinstance(source, ImageSource):
        raise TypeError(
            f"{name} must be a path, the bytes of a file, a PIL image or an array, got {type(source).__name__}."
        )
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(
            name,
            "the image is an address on the web. Download the images first, for example with img2dataset, and read "
            "its shards or its folder",
        )
    colour = checked_background(background)
    with contextlib.ExitStack() as held:
        with _image_errors(name):
            image = _prepared(_read(source, name, image_processor, colour, held), name, image_processor)
        try:
            yield image
        except MemoryError as error:
            raise ImageError(name, NO_MEMORY, transient=True) from error


@contextlib.contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Raises all errors in this context as `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        reason, transient = _reason(error)
        raise ImageError(name, reason, transient) from error


def _reason(error: Exception) -> tuple[str, bool]:
    """What is wrong with an image by the error that reading it raised, and whether it may be readable later."""
    if isinstance(error, Image.DecompressionBombError):
        advice = "allow more with --max-image-pixels N or lotlip_hf.images.set_max_image_pixels(N)"
        return f"too large ({str(error).rstrip('.')}); if you trust the file, {advice}", True
    if isinstance(error, MemoryError):
        return NO_MEMORY, True
    if isinstance(error, FileError):
        return error.reason, False
    if isinstance(error, IsADirectoryError):
        return "a folder, not an image", False
    if isinstance(error, OSError) and error.errno is not None:  # PIL's own, on the contents, have no number
        return f"cannot be opened ({error.strerror})", True
    # decoders raise anything on damaged files: SyntaxError, struct.error, zlib.error, ...
    return f"damaged or truncated ({type(error).__name__}: {error})", False


def _open_file(path: str) -> BinaryIO:
    """The open file, whose size and contents come from one descriptor."""
    file = open_regular(path)
    size = os.fstat(file.fileno()).st_size
    if 0 < size <= MAX_FILE_BYTES:
        return file
    file.close()
    raise FileError(path, f"larger than {MAX_FILE_BYTES:,} bytes" if size else EMPTY)


def _read(
    source: ImageSource,
    name: str,
    image_processor: Any,
    background: tuple[int, int, int] | None,
    held: contextlib.ExitStack,
) -> Image.Image:
    """The image as RGB; its pixels are among those that are decoded until `held` is closed."""
    if isinstance(source, Image.Image):
        held.enter_context(_budget.hold(source.width * source.height))
        return _to_rgb(source, name, background)
    if isinstance(source, np.ndarray | torch.Tensor):
        image = _from_array(np.asarray(source), name)
        held.enter_context(_budget.hold(image.width * image.height))
        return _to_rgb(image, name, background)
    hint = unreadable_hint(name)
    if hint == RAW_HINT:  # of these PIL reads the small preview, if anything
        raise ImageError(name, hint)
    with io.BytesIO(source) if isinstance(source, bytes) else _open_file(os.fspath(source)) as file:
        is_large = file.seek(0, os.SEEK_END) > LARGE_FILE_BYTES
        file.seek(0)
        if is_large:
            held.enter_context(_budget.hold())
        try:
            opened = Image.open(file, formats=readable_formats())
        except UnidentifiedImageError as error:
            file.seek(4)
            hint = hint or BRANDS.get(file.read(8))
            reason = f"not an image in a format that PIL reads{f'; {hint}' if hint else ''}"
            raise ImageError(name, reason, transient=hint is not None) from error
        with opened as image:
            if image.format == "PNG" and "transparency" in image.info:
                image.info["transparency"] = _in_8_bits(image.info["transparency"], str(image.tile[0][3]))
            draft = _draft(image, image_processor)
            if not is_large:
                held.enter_context(_budget.hold(_pixels_to_decode(image)))
            if draft is not None:
                size, box = draft
                image = image.convert("RGB").resize(size, image_processor.resample, box=box)
            return _to_rgb(image, name, background)


def _pixels_to_decode(image: Image.Image) -> int | None:
    """The pixels of an opened file; `None` if they are not known before decoding."""
    if image.format in NESTED_FORMATS:
        return None
    width, height = image.size
    if image.format == "TIFF":  # a tile is decoded whole, though it may be larger than the image
        tags: Any = getattr(image, "tag_v2", {})
        tile = int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_LENGTH, 0))
        if tile[0] * tile[1] > (max_image_pixels() or math.inf):
            raise Image.DecompressionBombError(f"tiles of {tile[0]}x{tile[1]} pixels")
        width, height = max(width, tile[0]), max(height, tile[1])
    return width * height


def _in_8_bits(transparency: Any, raw_mode: str) -> Any:
    """The colour declared transparent as the pixels have it: PIL scales these alone, from the depth of a PNG file."""
    if raw_mode in ("L;2", "L;4"):
        return transparency * {"L;2": 85, "L;4": 17}[raw_mode]
    return tuple(value >> 8 for value in transparency) if raw_mode == "RGB;16B" else transparency


def resized_size(size: tuple[int, int], image_processor: Any) -> tuple[int, int] | None:
    """
    The size that an image has after an image processor's resizing.

    Args:
        size (`tuple[int, int]`): width and height of the image.
        image_processor (`BaseImageProcessor`): the image processor.

    Returns:
        `tuple[int, int]`: width and height; `None` if the processor does not resize, or not in the way that most of
        transformers' do, or if the size depends on which side is up.
    """
    if 0 in size:
        return None
    methods = (getattr(type(image_processor), name, None) for name in ("resize", "_preprocess"))
    if not all(getattr(method, "__module__", None) == RESIZING_MODULE for method in methods):
        return None
    if not image_processor.do_resize or not isinstance(image_processor.resample, int):
        return None
    wanted = {name: value for name, value in dict(image_processor.size or {}).items() if value is not None}
    if wanted.keys() == {"shortest_edge"}:
        short, long = wanted["shortest_edge"], int(wanted["shortest_edge"] * max(size) / min(size))
        return (short, long) if size[0] <= size[1] else (long, short)
    if wanted.keys() == {"height", "width"} and wanted["height"] == wanted["width"]:
        return wanted["width"], wanted["height"]
    return None


def is_thin(size: tuple[int, int], image_processor: Any) -> bool:
    """
    Whether an image grows out of bounds as its shortest edge is resized.

    Args:
        size (`tuple[int, int]`): width and height of the image.
        image_processor (`BaseImageProcessor`): the image processor.

    Returns:
        `bool`: whether one side is more than 64 times the other and the processor resizes by the shortest edge alone.
    """
    wanted = dict(getattr(image_processor, "size", None) or {})
    return bool(
        max(size) > MAX_ASPECT_RATIO * min(size)
        and getattr(image_processor, "do_resize", False)
        and wanted.get("shortest_edge")
        and not wanted.get("longest_edge")
    )


def resized_middle(image: Any, image_processor: Any) -> Any:
    """
    What an image processor's resizing makes of the middle of a thin image, which its centre crop leaves. The processor
    gives the same `pixel_values` for the result as for the whole image, but for one step of 255 in less than a
    hundredth of them.

    Args:
        image (`PIL.Image.Image`): an image for which [`is_thin`] is true.
        image_processor (`BaseImageProcessor`): the image processor.

    Returns:
        `PIL.Image.Image`: a smaller image, which the resizing leaves as it is; `None` if the processor does
        not crop, or resizes in its own way.
    """
    resized = resized_size(image.size, image_processor)
    crop = getattr(image_processor, "crop_size", None)
    if resized is None or crop is None or not getattr(image_processor, "do_center_crop", False):
        return None
    if image.mode not in ("RGB", "L") and not image_processor.do_convert_rgb:
        return None
    axis = 0 if image.width > image.height else 1
    length, kept = resized[axis], max(min(resized), crop["width" if axis == 0 else "height"])
    # the centre stays where it is, for those too that round half a pixel to even
    kept = min(length, kept + (length - kept) % 4)
    scale = image.size[axis] / length
    start, end = scale * (length - kept) / 2, scale * (length + kept) / 2
    # cut out first, with what a filter sees around it: `resize` reads its box in single precision
    margin = 4 * max(1.0, scale)
    first, last = max(0, int(start - margin)), min(image.size[axis], int(end + margin) + 1)
    cut, box, size = [0, 0, *image.size], [0.0, 0.0, *image.size], list(resized)
    cut[axis], cut[axis + 2] = first, last
    box[axis], box[axis + 2] = start - first, end - first
    size[axis] = kept
    image = image.crop(cut)
    if image_processor.do_convert_rgb:
        image = image.convert("RGB")
    return image.resize(tuple(size), image_processor.resample, box=tuple(box))


def _draft(
    image: Image.Image, image_processor: Any
) -> tuple[tuple[int, int], tuple[float, float, float, float]] | None:
    """
    Has a JPEG file that was opened decoded at a fraction of its size, and returns the size to resize it to and which
    part of it; `None` for others.
    """
    if image_processor is None or is_thin(image.size, image_processor):
        return None
    size = resized_size(image.size, image_processor)
    if size is None or image_processor.resample == Image.Resampling.NEAREST:
        return None
    if min(image.width // size[0], image.height // size[1]) < 2 * DRAFT_MARGIN:
        return None
    draft = image.draft(None, (DRAFT_MARGIN * size[0], DRAFT_MARGIN * size[1]))
    # The last row and column may cover less than a pixel: the box says how much of them is image.
    return None if draft is None else (size, draft[1])


def _prepared(image: Image.Image, name: str, image_processor: Any) -> Image.Image:
    """Resized, if the processor would copy it whole several times, or enlarge it beyond bounds; others as given."""
    if image_processor is None:
        return image
    if is_thin(image.size, image_processor):
        middle = resized_middle(image, image_processor)
        if middle is None:
            raise ImageError(name, f"too thin ({image.width}x{image.height} pixels) for this image processor")
        return middle
    size = resized_size(image.size, image_processor)
    # The PIL backend's own resizing gives the same.
    if size is None or image.width * image.height <= LARGE or getattr(image_processor, "backend", "") != "pil":
        return image
    return image.resize(size, image_processor.resample)


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int] | None) -> Image.Image:
    """A new image, the only full copy: conversions that need more memory go tile by tile."""
    if 0 in image.size:
        raise ImageError(name, f"has no pixels (size {image.width}x{image.height})")
    given, file_format = image, image.format
    image.load()  # of a PNG file what follows the pixels is known only then, its orientation too
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "La":
        image = image.convert("LA")  # the only way on
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return _by_tiles(image, _from_16_bits, background)
    if image.mode == "I":
        raise ImageError(name, "32-bit integer pixels have no defined white; convert the image to 8 or 16 bits")
    if image.mode == "F":
        low, high = np.array([(np.min(tile), np.max(tile)) for _, tile in _tiles(image)]).T
        low, high = low.min(), high.max()
        # Negated, so that NaN is refused too.
        if not (low >= 0 and high <= 1):
            found = f"{low:g} to {high:g}"
            raise ImageError(name, f"floating-point pixels must go from 0 (black) to 1 (white), these go from {found}")
        return _by_tiles(image, _from_unit_range, background)
    if image.has_transparency_data and background is not None:
        return _by_tiles(image, _with_mask, background)
    if image.mode == "P" and "transparency" in image.info:
        # The same pixels as directly, without PIL's warning.
        image = image.convert("RGBA")
    rgb = image if image.mode == "RGB" and image is not given else image.convert("RGB")
    # Kept by `convert`; newer versions of transformers would lay the colour that it declares transparent on white.
    rgb.info.pop("transparency", None)
    return rgb


def _tiles(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    for top in range(0, image.height, TILE):
        for left in range(0, image.width, TILE):
            box = (left, top, min(left + TILE, image.width), min(top + TILE, image.height))
            yield box, image.crop(box)


def _by_tiles(
    image: Image.Image,
    convert: Callable[[Image.Image], tuple[Image.Image, Image.Image | None]],
    background: tuple[int, int, int] | None,
) -> Image.Image:
    """RGB, by a function from a tile to its colours and its mask of opaque pixels."""
    canvas = Image.new("RGB", image.size, background or 0)
    for box, tile in _tiles(image):
        colours, mask = convert(tile)
        canvas.paste(colours, box, None if background is None else mask)
    return canvas


def _with_mask(tile: Image.Image) -> tuple[Image.Image, Image.Image]:
    tile = tile.convert("RGBA")
    return tile.convert("RGB"), tile.getchannel("A")


def _from_16_bits(tile: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values = np.asarray(tile)
    transparent = tile.info.get("transparency")
    mask = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.fromarray(_to_8_bits(values)), mask


def _from_unit_range(tile: Image.Image) -> tuple[Image.Image, None]:
    return Image.fromarray(np.rint(np.asarray(tile) * 255).astype(np.uint8)), None


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """To the nearest: 65535 = 255 * 257."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


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
    if array.dtype == np.uint16:
        array = _to_8_bits(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
