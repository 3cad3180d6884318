"""Finds image files in a folder and reads images of any kind as RGB."""

import contextlib
import hashlib
import io
import json
import math
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Union

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, UnidentifiedImageError

from .files import FileError, is_inside, open_regular, read_regular

if TYPE_CHECKING:
    import torch

# All accepted image types; a mapping is the output of `datasets.Image(decode=False)`
ImageSource = Union[str, os.PathLike, bytes, Image.Image, np.ndarray, "torch.Tensor", Mapping]
# Colour behind transparent pixels, in a form that PIL accepts; `None` drops the alpha channel
Background = str | Sequence[int] | None
WHITE = "white"

# Formats that PIL lists but does not decode itself: EPS and WMF start other programs, the rest are stubs or video.
EXCLUDED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}

# Maximum file size. Several decoders read the whole file before they check its size in pixels.
MAX_FILE_BYTES = 1 << 30
# Environment variable of the pixel limit, inherited by child processes
MAX_PIXELS_VARIABLE = "LOTLIP_MAX_IMAGE_PIXELS"
# Twice PIL's `MAX_IMAGE_PIXELS`, as in PIL's own check
DEFAULT_MAX_PIXELS = 2 * (1024**3 // 4 // 3)
# Larger files are read one at a time, because metadata of large files may also fill the memory.
LARGE_FILE_BYTES = 1 << 26
# Formats with a header that may state a wrong size of the image
NESTED_FORMATS = ("BLP", "ICNS", "ICO")
TILE_WIDTH, TILE_LENGTH = 322, 323  # numbers of TIFF tags
# Width and height in pixels of the tiles in which memory-hungry conversions process an image
TILE = 1024
# Module of the resizing that most image processors of transformers share
RESIZING_MODULE = "transformers.image_processing_backends"
# Ratio of the sides above which an image is thin. At this ratio, resizing the shortest edge to 224 gives 224 x 14,336.
MAX_ASPECT_RATIO = 64
# Images with more pixels are resized before the image processor, which would make several copies of the full image.
LARGE = 1 << 24
# Image towers have fewer pixels per side. Larger settings are mistakes, or meant to fill the memory.
MAX_IMAGE_SIDE = 4096
CONVNEXT_SQUASHED = 384  # pixels, from which ConvNeXt's image processor does not crop

# Image processors of transformers that resize, crop, rescale and normalise, by whether they crop by default
CROPPING_PROCESSORS = ("CLIPImageProcessor", "BitImageProcessor")
WHOLE_PROCESSORS = ("ViTImageProcessor", "SiglipImageProcessor")
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
PLAIN_SETTINGS = (*SWITCHES[:1], *SWITCHES[2:], "size", "resample", "rescale_factor", "image_mean", "image_std")
# Entries of a saved image processor that do not change the pixels of an RGB image
NO_SETTINGS = ("auto_map", "data_format", "default_to_square", "do_convert_rgb", "processor_class")

EMPTY = "the file is empty"
NO_MEMORY = "too large for this machine's memory"
HEIF_HINT = "HEIC and HEIF need pillow-heif (pip install 'lotlip-hf[heif]')"
AVIF_HINT = "AVIF needs a newer Pillow (pip install --upgrade pillow)"
# Bytes 4 to 12 of HEIF and AVIF files, which may have any extension
BRANDS = {
    **{b"ftyp" + brand: HEIF_HINT for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")},
    **dict.fromkeys((b"ftypavif", b"ftypavis"), AVIF_HINT),
}
# Advice for image files that PIL cannot read, by extension; used only if PIL and its plugins do not decode them
HINTS = {
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), HEIF_HINT),
    **dict.fromkeys((".avif", ".avifs"), AVIF_HINT),
    **dict.fromkeys((".svg", ".svgz"), "SVG is a vector format; convert the file to PNG, for example"),
}
RAW_EXTENSIONS = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf "
    ".srw .x3f".split()
)
RAW_HINT = "camera raw is not supported; convert the file to JPEG or TIFF, for example"

# A JPEG file is decoded at no less than this multiple of its final size. According to Pillow's documentation of
# `reducing_gap`, the result for 3 is in most cases indistinguishable from the exact one.
DRAFT_MARGIN = 3

# PIL fills its registry of formats on first use, which is not safe in two threads at once.
_registry_lock = threading.Lock()


class _PixelBudget:
    """Limits the pixels that all threads decode at the same time to `max_image_pixels`; other threads wait."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # the threads of the parent do not exist in the child

    def _reset(self) -> None:
        self._change = threading.Condition()
        self._held = 0

    @contextlib.contextmanager
    def hold(self, pixels: int | None = None) -> Iterator[None]:
        """Waits until `pixels` are free. `None`, for an image of unknown size, reserves the whole limit."""
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
    Raised for an image that cannot be read.

    Args:
        name (`str`): Path of the file, or index of the image in the argument (`images[3]`).
        reason (`str`): Reason, without a full stop.
        transient (`bool`, *optional*, defaults to `False`): Whether a later attempt may succeed, for example after a
            lack of memory or of permission. `False` for damaged contents.
    """

    def __init__(self, name: str, reason: str, transient: bool = False) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.transient = transient

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str, bool]]:
        return type(self), (self.name, self.reason, self.transient)  # workers of a DataLoader pickle their errors


class StoredImage(NamedTuple):
    """The image that [`image_source`] unpacks, and its path or `None`."""

    source: Any
    path: str | None


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of PyTorch, which is not imported for this."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_image_source(value: Any) -> bool:
    """Returns whether a value has a type of `ImageSource`."""
    return isinstance(value, str | os.PathLike | bytes | Image.Image | np.ndarray | Mapping) or _is_tensor(value)


def image_source(value: Any) -> StoredImage:
    """
    Unpacks the dictionary of `bytes` and `path` that `datasets.Image(decode=False)` returns. `bytes` take precedence.
    Values that are not dictionaries stay unchanged.
    """
    if not isinstance(value, Mapping):
        return StoredImage(value, os.fspath(value) if isinstance(value, str | os.PathLike) else None)
    path, content = value.get("path"), value.get("bytes")
    path = path if isinstance(path, str) else None
    return StoredImage(content if isinstance(content, bytes) else path, path)


@cache
def readable_formats() -> tuple[str, ...]:
    """Returns the names of the formats that PIL and its installed plugins decode."""
    with _registry_lock:
        Image.init()
        with contextlib.suppress(ImportError):  # optional dependency
            import pillow_heif  # pyright: ignore[reportMissingImports]

            pillow_heif.register_heif_opener()
    return tuple(name for name in Image.OPEN if name not in EXCLUDED_FORMATS)


@cache
def image_extensions() -> frozenset[str]:
    """Returns the extensions of readable image files, in lower case and with a dot."""
    formats = set(readable_formats())
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def unreadable_hint(name: str | os.PathLike) -> str | None:
    """Returns advice for an image file that PIL cannot read, by its extension; `None` for all other files."""
    extension = os.path.splitext(name)[1].lower()
    if extension in RAW_EXTENSIONS:
        return RAW_HINT
    return None if extension in image_extensions() else HINTS.get(extension)


def find_images(
    folder: str | os.PathLike, root: str | os.PathLike | None = None
) -> tuple[dict[str, os.stat_result], dict[str, str]]:
    """
    Finds the image files in a folder and its subfolders by their extensions.

    Hidden files and folders are skipped. Each folder is read only once, even if links form a loop.

    Args:
        folder (`str` or `os.PathLike`): Folder.
        root (`str` or `os.PathLike`, *optional*, defaults to `folder`): Links to files outside of this folder are not
            followed. `/` allows all links.

    Returns:
        `tuple`: Two dictionaries with sorted keys, which are paths relative to `folder` (with `/`). The first contains
        the `os.stat_result` of each image, the second the reason for each image or folder that cannot be read.

    Raises:
        `NotADirectoryError`: If `folder` or `root` is not a folder.
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
            if is_link and not is_inside({folder, root}, folder / path):
                unreadable[path] = "a link out of the folder; pass a folder that contains both with --image-root DIR"
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
    Reads an image file without decoding it.

    Args:
        path (`str` or `os.PathLike`): Image file.
        limit (`int`, *optional*, defaults to 1 GiB): Maximum size in bytes.

    Returns:
        `bytes`: Contents of the file.

    Raises:
        `ImageError`: If the file cannot be opened, is empty, larger than `limit`, or not a regular file.
    """
    name = os.fspath(path)
    with _image_errors(name):
        content = read_regular(name, limit)
    if not content:
        raise ImageError(name, EMPTY)
    return content


def max_image_pixels() -> int | None:
    """Returns the maximum number of pixels of an image, or `None`; see [`set_max_image_pixels`]."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def set_max_image_pixels(pixels: int) -> None:
    """
    Sets the maximum number of pixels of an image, which is also the maximum that all threads decode at the same time.

    The limit applies to all of PIL in this process, and to processes that it starts later. The environment variable
    `LOTLIP_MAX_IMAGE_PIXELS` sets it, too. The default is twice `PIL.Image.MAX_IMAGE_PIXELS`, which is 178,956,970. A
    decoded pixel needs up to 12 bytes.

    Args:
        pixels (`int`): Maximum number of pixels.

    Raises:
        `ValueError`: If `pixels` is less than 1.
    """
    if pixels < 1:
        raise ValueError(f"`pixels` must be at least 1, got {pixels}.")
    os.environ[MAX_PIXELS_VARIABLE] = str(pixels)
    # PIL warns above half of the limit.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = -(-pixels // 2)


if _given := os.environ.get(MAX_PIXELS_VARIABLE):
    set_max_image_pixels(int(_given))


def checked_background(background: Background) -> tuple[int, int, int] | None:
    """Returns the red, green and blue (0 to 255) of a background; raises a `ValueError` if it is not a colour."""
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
    """Returns the `background` of a processor: its colour behind transparent pixels, white by default."""
    return getattr(processor, "background", WHITE)


def load_image(
    source: ImageSource, name: str | None = None, *, image_processor: Any = None, background: Background = WHITE
) -> Image.Image:
    """
    Reads an image as 8-bit RGB, upright.

    The EXIF orientation is applied, as in `transformers.image_utils.load_image`. An animation is read as its first
    frame. 16-bit pixels are scaled to 8 bits (PIL clips them instead). Floating-point pixels must be from 0
    (black) to 1 (white).

    Files of more than 1 GiB and images above the limit of [`set_max_image_pixels`] are refused. Threads wait for each
    other, so that together they never decode more pixels than this limit.

    With `image_processor`, large JPEG files are read several times faster: they are decoded at 1/2, 1/4 or 1/8 of
    their size, but at least at three times the size that the processor resizes to, and are then resized to that size.
    On photographs of 3 to 26 megapixels, the mean difference in `pixel_values` is 0.15/255 to 0.25/255, the maximum
    8/255. If one side is more than 64 times the other, only the part inside the centre crop is resized. Other images
    do not depend on `image_processor`. No image depends on a processor that resizes by its own code.

    Args:
        source (`ImageSource`): Path of a file, contents of a file (`bytes`), PIL image, array or tensor of 8- or
            16-bit unsigned integers (shape [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels), or the output of
            `datasets.Image(decode=False)`.
        name (`str`, *optional*): Name of the image, which errors put before the path.
        image_processor (`BaseImageProcessor`, *optional*): Image processor that will process the image. Do not pass it
            if the image has another use.
        background (`str` or `Sequence[int]`, *optional*, defaults to `"white"`): Colour behind transparent pixels: a
            name, `"#rrggbb"`, or three numbers. `None` drops the alpha channel, as `Image.convert("RGB")` and the
            official code do.

    Returns:
        `PIL.Image.Image`: A new RGB image.

    Raises:
        `ImageError`: If the image cannot be read.
        `ValueError`: If `background` is not a colour.
        `TypeError`: If `source` has another type.

    Example:

    ```python
    >>> import numpy as np
    >>> from lotlip_hf.images import load_image

    >>> load_image(np.full((4, 6), 65535, dtype=np.uint16)).getpixel((0, 0))
    (255, 255, 255)
    ```
    """
    with _loaded(source, name, image_processor, background) as (image, _):
        return image


def load_pixels(
    source: ImageSource, name: str | None = None, *, image_processor: Any, background: Background = WHITE
) -> "dict[str, torch.Tensor]":
    """
    Reads an image and processes it for a model.

    Args:
        source (`ImageSource`): Image; see [`load_image`].
        name (`str`, *optional*): Name of the image, which errors put before the path.
        image_processor (`BaseImageProcessor`): Image processor of the model. The output of a
            [`PlainImageProcessor`] has NumPy arrays instead of tensors.
        background (`str` or `Sequence[int]`, *optional*, defaults to `"white"`): Colour behind transparent pixels; see
            [`load_image`].

    Returns:
        `dict[str, torch.Tensor]`: Output of the image processor, usually `pixel_values` [1, 3, H, W], and for SigLIP 2
            NaFlex `pixel_values`, `pixel_attention_mask` and `spatial_shapes`.

    Raises:
        `ImageError`: If the image cannot be read or its pixels do not fit in memory.
        `ValueError`: If `background` is not a colour.
        `TypeError`: If `source` has another type.
    """
    return load_sized_pixels(source, name, image_processor=image_processor, background=background)[0]


def load_sized_pixels(
    source: ImageSource, name: str | None = None, *, image_processor: Any, background: Background = WHITE
) -> "tuple[dict[str, torch.Tensor], tuple[int, int]]":
    """Returns what [`load_pixels`] does, and the width and height of the image, of which large ones are reduced."""
    with _loaded(source, name, image_processor, background) as (image, size):
        return dict(image_processor(images=[image], return_tensors="pt")), size


def load_mask(path: str | os.PathLike) -> "torch.Tensor":
    """
    Reads a mask of classes.

    Args:
        path (`str` or `os.PathLike`): PNG file of 8 bits, whose pixels are gray values or indices of a palette.

    Returns:
        `torch.Tensor`: The gray values or indices, uint8 [H, W].

    Raises:
        `ImageError`: If the file cannot be read or has another format.
    """
    import torch

    name = os.fspath(path)
    with _image_errors(name), Image.open(io.BytesIO(read_image_bytes(path)), formats=["PNG"]) as image:
        if image.mode not in ("L", "P"):
            raise ImageError(name, f"a mask must have one channel of 8 bits, this has mode {image.mode}")
        if image.tile[0][3] in ("L;2", "L;4"):  # Pillow would scale the values
            raise ImageError(name, "a mask must have one channel of 8 bits, this has gray values of fewer bits")
        return torch.from_numpy(np.array(image))


def image_digest(source: ImageSource, name: str | None = None) -> str:
    """
    Computes the digest of an image's content: of the bytes of a file, or of the pixels of an image object.

    Args:
        source (`ImageSource`): Image; see [`load_image`].
        name (`str`, *optional*): Name of the image, which errors put before the path.

    Returns:
        `str`: 32 hexadecimal digits.

    Raises:
        `ImageError`: If the image cannot be read.
        `TypeError`: If `source` has another type.
    """
    source, _ = image_source(source)
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, str | os.PathLike):
        try:
            digest.update(read_image_bytes(source))
        except ImageError as error:
            raise ImageError(": ".join(filter(None, (name, error.name))), error.reason, error.transient) from error
    elif isinstance(source, bytes):
        digest.update(source)
    else:
        for background in (WHITE, None):  # processors use white or drop transparency
            upright = load_image(source, name, background=background)
            digest.update(f"{upright.size}".encode() + upright.tobytes())
    return digest.hexdigest()


def official_image_processor(image_size: int = 224) -> Any:
    """
    Creates the image processor of the released LoTLIP models: bicubic resizing, centre crop, mean and deviation 0.5.

    Args:
        image_size (`int`, *optional*, defaults to 224): Length of the shortest edge and side of the crop, in pixels.

    Returns:
        `CLIPImageProcessorPil`: Image processor with the output `pixel_values` [B, 3, image_size, image_size], which
        `save_pretrained` saves as a plain `CLIPImageProcessor` that loads with any installed backend.
    """
    from transformers import CLIPImageProcessorPil  # a late import: it takes seconds

    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


class PlainImageProcessor:
    """
    An image processor without transformers: resizes, crops, rescales and normalises images as the processors of ViT,
    CLIP, SigLIP and BiT (DINOv2) do with PIL, with equal pixels.

    Args:
        settings (`Mapping[str, Any]`): Settings of a saved image processor.

    Raises:
        `ValueError`: If the settings are those of another image processor, or have unknown or missing values.
    """

    backend = "pil"
    do_convert_rgb = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        given = {name: value for name, value in settings.items() if value is not None and name not in NO_SETTINGS}
        kind = str(given.pop("image_processor_type", None)).removesuffix("Fast")
        unknown = given.keys() - {*PLAIN_SETTINGS, "do_center_crop", "crop_size"}
        missing = [name for name in PLAIN_SETTINGS if name not in given]
        if kind in CROPPING_PROCESSORS:  # these crop by default
            missing += [name for name in ("do_center_crop", "crop_size") if name not in given]
        if kind not in (*CROPPING_PROCESSORS, *WHOLE_PROCESSORS) or unknown or missing:
            raise ValueError(f"{kind}: not a plain image processor ({', '.join([*missing, *sorted(unknown)])}).")
        switches = [given.get(name, False) for name in SWITCHES]
        if not all(isinstance(one, bool) for one in switches) or type(given["resample"]) is not int:
            raise ValueError(f"{kind}: `resample` must be a number, and {', '.join(SWITCHES)} true or false.")
        self.do_resize, self.do_center_crop, self.do_rescale, self.do_normalize = switches
        self.size: dict[str, int] = dict(given["size"])
        self.crop_size: dict[str, int] | None = dict(given["crop_size"]) if "crop_size" in given else None
        self.resample = Image.Resampling(given["resample"])
        crop = self.crop_size.keys() if self.do_center_crop and self.crop_size else {"height", "width"}
        if self.size.keys() not in ({"shortest_edge"}, {"height", "width"}) or crop != {"height", "width"}:
            raise ValueError(f"{kind}: `size` {self.size} or `crop_size` {self.crop_size} has other sides.")
        if not self.do_rescale and not self.do_normalize:
            raise ValueError(f"{kind}: `do_rescale` and `do_normalize` are both off.")
        check_image_sizes(self, kind)
        self.settings = {"image_processor_type": kind, **given}
        # Value of each of the 256 levels in each channel, [256, 3]
        levels = np.arange(256, dtype=np.float64)
        table = np.repeat(levels * given["rescale_factor"] if self.do_rescale else levels, 3).reshape(256, 3)
        self._table = table.astype(np.float32)
        if self.do_normalize:
            mean, std = (np.asarray(given[name], np.float32) for name in ("image_mean", "image_std"))
            if {mean.shape, std.shape} - {(), (3,)}:
                raise ValueError(f"{kind}: `image_mean` or `image_std` is not for three channels.")
            with np.errstate(all="ignore"):
                self._table = (self._table - mean) / std
        if not np.isfinite(self._table).all():
            raise ValueError(f"{kind}: `image_mean`, `image_std` or `rescale_factor` gives no finite pixels.")

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "np") -> dict[str, np.ndarray]:
        """Processes B RGB images of one size. Returns `pixel_values` [B, 3, height, width], always as NumPy arrays."""
        return {"pixel_values": np.stack([self._pixels(image) for image in images])}

    def _pixels(self, image: Image.Image) -> np.ndarray:
        if self.do_resize:
            size = resized_size(image.size, self) or (self.size["width"], self.size["height"])
            image = image.resize(size, self.resample)
        if self.do_center_crop and self.crop_size:
            width, height = self.crop_size["width"], self.crop_size["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black outside of the image
        levels = np.asarray(image)
        return np.stack([self._table[:, channel][levels[..., channel]] for channel in range(3)])


def plain_image_processor(image_processor: Any) -> Any:
    """
    Returns a [`PlainImageProcessor`] with the pixels of an image processor, which is faster, or the processor itself.

    Args:
        image_processor (`BaseImageProcessor`): Image processor.

    Returns:
        `PlainImageProcessor` or `BaseImageProcessor`: The processor itself if it is not of the PIL backend, or
        does more than resize, crop, rescale and normalise.
    """
    is_known = type(image_processor).__module__.startswith("transformers.")
    if not is_known or getattr(image_processor, "backend", "") != "pil":
        return image_processor
    try:
        return PlainImageProcessor(json.loads(image_processor.to_json_string()))
    except ValueError:
        return image_processor


def check_image_sizes(image_processor: Any, name: str) -> None:
    """
    Raises a `ValueError` if a side of `size` or `crop_size` is not an integer from 1 to 4096, or if the patches of
    SigLIP 2 NaFlex or the `crop_pct` of ConvNeXt make images that are larger.
    """
    for setting in ("size", "crop_size"):
        for side, value in dict(getattr(image_processor, setting, None) or {}).items():
            if value is not None and not (type(value) is int and 1 <= value <= MAX_IMAGE_SIDE):
                raise ValueError(
                    f"{name}: `{setting}` in processor_config.json or preprocessor_config.json has {side}={value!r}. "
                    f"Use a number of pixels from 1 to {MAX_IMAGE_SIDE}."
                )
    number = getattr(image_processor, "max_num_patches", None)
    if number is not None:
        side = image_processor.patch_size
        if not all(type(one) is int and one >= 1 for one in (number, side)) or number * side**2 > MAX_IMAGE_SIDE**2:
            raise ValueError(
                f"{name}: `max_num_patches` of the image processor is {number!r} and `patch_size` is {side!r}. Use "
                f"positive numbers for images of at most {MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} pixels."
            )
    share = getattr(image_processor, "crop_pct", None)
    if share is not None:
        side = dict(image_processor.size or {}).get("shortest_edge") or 1
        if not (isinstance(share, float | int) and side / MAX_IMAGE_SIDE <= share <= 1):
            raise ValueError(f"{name}: `crop_pct` of the image processor is {share!r}. Use a share such as 0.875.")


def processed_size(image_processor: Any) -> tuple[int, int]:
    """Returns the height and width of the `pixel_values` of an image of 96 x 64 pixels."""
    height, width = load_pixels(Image.new("RGB", (96, 64)), image_processor=image_processor)["pixel_values"].shape[-2:]
    return height, width


@contextlib.contextmanager
def _loaded(
    source: ImageSource, name: str | None, image_processor: Any, background: Background
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Provides the image and its size, and reserves its pixels in the budget of all threads until the context ends."""
    source, path = image_source(source)
    name = ": ".join(filter(None, (name, path))) or "image"
    if not is_image_source(source):
        raise TypeError(
            f"{name} must be a path, the contents of a file, a PIL image or an array, got {type(source).__name__}."
        )
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ImageError(
            name,
            "the image is a web address. Download the images first, for example with img2dataset, and pass the shards "
            "or the folder",
        )
    colour = checked_background(background)
    with contextlib.ExitStack() as held:
        with _image_errors(name):
            whole = _read(source, name, image_processor, colour, held)
            size = whole.size
            image = _prepared(whole, name, image_processor)
            del whole
        try:
            yield image, size
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
    """Returns the reason for a read error, and whether it is transient."""
    if isinstance(error, Image.DecompressionBombError):
        advice = "raise the limit with --max-image-pixels N or lotlip_hf.images.set_max_image_pixels(N)"
        return f"too large ({str(error).rstrip('.')}); if you trust the file, {advice}", True
    if isinstance(error, MemoryError):
        return NO_MEMORY, True
    if isinstance(error, FileError):
        return error.reason, False
    if isinstance(error, IsADirectoryError):
        return "a folder, not an image", False
    if isinstance(error, OSError) and error.errno is not None:  # PIL's errors about the contents have no errno
        return f"cannot be opened ({error.strerror})", True
    # Decoders raise many types on damaged files: SyntaxError, struct.error, zlib.error, ...
    return f"damaged or truncated ({type(error).__name__}: {error})", False


def _open_file(path: str) -> BinaryIO:
    """Opens a file and checks its size through the same descriptor, so that it cannot change in between."""
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
    """Reads the image as RGB, and reserves its pixels until `held` is closed."""
    if isinstance(source, Image.Image):
        held.enter_context(_budget.hold(source.width * source.height))
        return _to_rgb(source, name, background)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        image = _from_array(np.asarray(source), name)
        held.enter_context(_budget.hold(image.width * image.height))
        return _to_rgb(image, name, background)
    hint = unreadable_hint(name)
    if hint == RAW_HINT:  # PIL would read only the small preview inside
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
            reason = f"not an image, or in a format that PIL cannot read{f'; {hint}' if hint else ''}"
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
    """Returns the number of pixels of an opened file, or `None` if it is not known before decoding."""
    if image.format in NESTED_FORMATS:
        return None
    width, height = image.size
    if image.format == "TIFF":  # tiles are decoded completely, even if they are larger than the image
        tags: Any = getattr(image, "tag_v2", {})
        tile = int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_LENGTH, 0))
        if tile[0] * tile[1] > (max_image_pixels() or math.inf):
            raise Image.DecompressionBombError(f"tiles of {tile[0]}x{tile[1]} pixels")
        width, height = max(width, tile[0]), max(height, tile[1])
    return width * height


def _in_8_bits(transparency: Any, raw_mode: str) -> Any:
    """Scales the transparent colour of a PNG file to 8 bits, because PIL scales only the pixels."""
    if raw_mode in ("L;2", "L;4"):
        return transparency * {"L;2": 85, "L;4": 17}[raw_mode]
    return tuple(value >> 8 for value in transparency) if raw_mode == "RGB;16B" else transparency


def resized_size(size: tuple[int, int], image_processor: Any) -> tuple[int, int] | None:
    """
    Predicts the size of an image after an image processor resizes it.

    Args:
        size (`tuple[int, int]`): Width and height of the image.
        image_processor (`BaseImageProcessor`): Image processor.

    Returns:
        `tuple[int, int]` or `None`: Width and height. `None` if the processor does not resize, resizes by its own
        code, or resizes to a height and a width that differ.
    """
    if 0 in size:
        return None
    methods = (getattr(type(image_processor), name, None) for name in ("resize", "_preprocess"))
    is_shared = all(getattr(method, "__module__", None) == RESIZING_MODULE for method in methods)
    if not (is_shared or isinstance(image_processor, PlainImageProcessor)):
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


def kept_box(size: tuple[int, int], image_processor: Any) -> tuple[float, float, float, float]:
    """
    Finds the part of an image that an image processor keeps, which depends on its crop.

    Args:
        size (`tuple[int, int]`): Width and height of the image in pixels.
        image_processor (`BaseImageProcessor`): Image processor.

    Returns:
        `tuple[float, float, float, float]`: Left, top, right and bottom edge as shares of the width and height. They
            are below 0 and above 1 if the processor pads images that are smaller than the crop.
    """
    wanted = dict(getattr(image_processor, "size", None) or {}) if getattr(image_processor, "do_resize", False) else {}
    shortest, crop = wanted.get("shortest_edge"), dict(getattr(image_processor, "crop_size", None) or {})
    if shortest and getattr(image_processor, "crop_pct", None) and shortest < CONVNEXT_SQUASHED:
        crop = {"width": shortest, "height": shortest}
        shortest = int(shortest / image_processor.crop_pct)
    elif not crop or not getattr(image_processor, "do_center_crop", False):
        return 0.0, 0.0, 1.0, 1.0
    if shortest:
        width, height = (shortest * side / min(size) for side in size)
    else:
        width, height = wanted.get("width") or size[0], wanted.get("height") or size[1]
    across, down = crop["width"] / width / 2, crop["height"] / height / 2
    return 0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down


def is_thin(size: tuple[int, int], image_processor: Any) -> bool:
    """
    Tells whether an image is so thin that resizing its shortest edge makes it too large.

    Args:
        size (`tuple[int, int]`): Width and height of the image.
        image_processor (`BaseImageProcessor`): Image processor.

    Returns:
        `bool`: Whether one side is more than 64 times the other and the processor limits only the shortest edge.
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
    Cuts out and resizes the middle of a thin image, the only part that the centre crop of the processor keeps.

    The `pixel_values` of the result are those of the whole image, except that less than 1 % of them differ by 1/255.

    Args:
        image (`PIL.Image.Image`): Image for which [`is_thin`] is true.
        image_processor (`BaseImageProcessor`): Image processor.

    Returns:
        `PIL.Image.Image` or `None`: Small image, which the processor does not resize again. `None` if the processor
        does not crop, or resizes by its own code.
    """
    resized = resized_size(image.size, image_processor)
    crop = getattr(image_processor, "crop_size", None)
    if resized is None or crop is None or not getattr(image_processor, "do_center_crop", False):
        return None
    if image.mode not in ("RGB", "L") and not image_processor.do_convert_rgb:
        return None
    axis = 0 if image.width > image.height else 1
    length, kept = resized[axis], max(min(resized), crop["width" if axis == 0 else "height"])
    # A multiple of 4 keeps the centre, even if the crop rounds half a pixel to even.
    kept = min(length, kept + (length - kept) % 4)
    scale = image.size[axis] / length
    start, end = scale * (length - kept) / 2, scale * (length + kept) / 2
    # Crop before resizing, with a margin for the filter, because `resize` rounds its `box` to single precision.
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
    Sets an opened JPEG file to be decoded at a fraction of its size; returns the final size and the box to resize.
    Returns `None` for other images.
    """
    if image_processor is None or is_thin(image.size, image_processor):
        return None
    size = resized_size(image.size, image_processor)
    if size is None or image_processor.resample == Image.Resampling.NEAREST:
        return None
    if min(image.width // size[0], image.height // size[1]) < 2 * DRAFT_MARGIN:
        return None
    draft = image.draft(None, (DRAFT_MARGIN * size[0], DRAFT_MARGIN * size[1]))
    # `draft[1]` is the box of the image. The last row and column of the decoded pixels may be partly outside of it.
    return None if draft is None else (size, draft[1])


def _prepared(image: Image.Image, name: str, image_processor: Any) -> Image.Image:
    """Resizes thin and very large images, which need too much memory in the processor; returns others unchanged."""
    if image_processor is None:
        return image
    if is_thin(image.size, image_processor):
        middle = resized_middle(image, image_processor)
        if middle is None:
            raise ImageError(name, f"too thin ({image.width}x{image.height} pixels) for this image processor")
        return middle
    size = resized_size(image.size, image_processor)
    # The result is exact: the PIL backend resizes in the same way.
    if size is None or image.width * image.height <= LARGE or getattr(image_processor, "backend", "") != "pil":
        return image
    return image.resize(size, image_processor.resample)


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int] | None) -> Image.Image:
    """Converts to a new RGB image. Conversions that need much memory work tile by tile."""
    if 0 in image.size:
        raise ImageError(name, f"the image has no pixels (size {image.width}x{image.height})")
    given, file_format = image, image.format
    image.load()  # first, because the orientation of a PNG file may follow the pixels
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "La":
        image = image.convert("LA")  # PIL has only this conversion for the mode
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
            raise ImageError(
                name, f"floating-point pixels must be from 0 (black) to 1 (white), these are from {found}"
            )
        return _by_tiles(image, _from_unit_range, background)
    if image.has_transparency_data and background is not None:
        return _by_tiles(image, _with_mask, background)
    if image.mode == "P" and "transparency" in image.info:
        # Gives the same pixels as a direct conversion, without PIL's warning.
        image = image.convert("RGBA")
    rgb = image if image.mode == "RGB" and image is not given else image.convert("RGB")
    # `convert` keeps the transparent colour, which newer versions of transformers would make white.
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
    """Converts to RGB by a function that returns the colours of a tile and the mask of its opaque pixels."""
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
    """Divides by 257 and rounds to the nearest integer: 65535 = 255 * 257."""
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
