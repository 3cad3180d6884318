"""Image files: every mode and every kind of damage gives the right pixels or one error that names the file."""

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.image_utils import load_image as transformers_load_image

from lotlip_hf.images import (
    ImageError,
    find_images,
    image_extensions,
    kept_box,
    load_image,
    official_image_processor,
)


def random_pixels(height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def pixels(source: object) -> np.ndarray:
    image = load_image(source)  # pyright: ignore[reportArgumentType]
    assert image.mode == "RGB"
    return np.asarray(image)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft and sharp edges, as in a photograph, at every place and up to the borders."""
    soft = Image.fromarray(random_pixels(9, 12)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(soft)
    for place, colour in enumerate(random_pixels(40, 3).reshape(-1, 3).tolist()[:40]):
        x, y = width * (place % 8) // 8, height * (place // 8) // 5
        draw.rectangle((x, y, x + width // 14, y + height // 9), fill=tuple(colour))
    draw.rectangle((0, 0, width - 1, height - 1), outline="white", width=max(1, min(width, height) // 40))
    return soft.convert(mode)


def encoded(image: Image.Image, format: str = "TIFF", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **settings)
    return buffer.getvalue()


def jpeg(image: Image.Image, **settings: object) -> bytes:
    return encoded(image, "JPEG", quality=90, **settings)


def check_reduced(source: bytes, image_processor: Any) -> None:
    """A JPEG read for an image processor has the size that it needs, and nearly the pixels of the whole one."""
    whole, reduced = load_image(source), load_image(source, image_processor=image_processor)
    assert reduced.mode == "RGB"
    assert type(reduced) is Image.Image
    expected, result, as_it_is = (
        image_processor(images=[image], return_tensors="pt", do_resize=resize)["pixel_values"]
        for image, resize in ((whole, True), (reduced, True), (reduced, False))
    )
    assert torch.equal(result, as_it_is)
    steps = (result - expected).abs() * 255 / 2  # mean and deviation 0.5: from -1 to 1
    # These edges are sharper than those of photographs; beside its place, without the box, the mean would be 3 to 5.
    assert steps.mean() < 2.2
    assert steps.max() < 16


LOTLIP = official_image_processor(32)
SIGLIP = SiglipImageProcessorPil(size={"height": 32, "width": 32})
VIT = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_ordinary_modes_are_what_pil_converts(mode: str, tmp_path: Path) -> None:
    original = Image.fromarray(random_pixels()).convert(mode)
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    original.save(path)
    with Image.open(path) as reopened:
        expected = np.asarray(reopened.convert("RGB"))
    np.testing.assert_array_equal(pixels(path), expected)
    np.testing.assert_array_equal(pixels(str(path)), np.asarray(transformers_load_image(str(path))))


def test_golden_images_keep_their_pixels(golden: Path) -> None:
    expected = load_file(golden / "images" / "expected_pixels.safetensors")
    for path in sorted((golden / "images").glob("*.png")):
        assert f"lotlip.{path.name}" in expected
        with Image.open(path) as image:
            np.testing.assert_array_equal(
                np.asarray(load_image(path, background=None)), np.asarray(image.convert("RGB"))
            )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("mode", "transparency"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_without_a_background_a_colour_declared_transparent_stays_a_colour(
    tmp_path: Path, mode: str, transparency: int | tuple[int, ...]
) -> None:
    colour = transparency if isinstance(transparency, tuple) else (transparency,) * 3
    Image.new(mode, (40, 40), transparency).save(tmp_path / "image.png", transparency=transparency)
    image = load_image(tmp_path / "image.png", background=None)
    pixel_values = official_image_processor(32)(images=image, return_tensors="pt")["pixel_values"]
    expected = (torch.tensor(colour) / 255 - 0.5) / 0.5
    torch.testing.assert_close(pixel_values.amax((0, 2, 3)), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path: Path) -> None:
    original = Image.fromarray(random_pixels()).quantize(16)
    colours = np.asarray(original.convert("RGB")).astype(float)
    alpha = np.arange(0, 160, 10)[np.asarray(original)][..., None]
    original.save(tmp_path / "image.png", transparency=bytes(range(0, 160, 10)))
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "image.png", background=None)), colours)
    expected = (colours * alpha + 255 * (255 - alpha)) / 255
    np.testing.assert_allclose(pixels(tmp_path / "image.png"), expected, atol=0.51)
    original.save(tmp_path / "image.gif", transparency=3)
    shown = pixels(tmp_path / "image.gif")
    assert (shown[np.asarray(original) == 3] == 255).all()
    assert (shown[np.asarray(original) == 4] == colours[np.asarray(original) == 4]).all()


def png(depth: int, colour: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file of two pixels, as PIL does not write them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    declared = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + declared + data + chunk(b"IEND", b"")


HALF = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
HALF.putpixel((1, 0), (100, 100, 100, 255))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("source", "opaque"),
    [
        (HALF, 100),
        (HALF.convert("LA"), 100),
        (HALF.convert("LA").convert("La"), 100),
        (HALF.convert("PA"), 100),
        (HALF.convert("RGBa"), 100),
        (np.asarray(HALF), 100),
        (png(1, 0, b"\x40", b"\0\0"), 255),
        (png(1, 0, b"\x80", b"\0\1"), 0),
        (png(2, 0, b"\xd0", b"\0\3"), 85),
        (png(4, 0, b"\xf1", b"\0\x0f"), 17),
        (png(8, 0, b"\x07\x64", b"\0\x07"), 100),
        (png(16, 0, struct.pack(">2H", 300, 25700), struct.pack(">H", 300)), 100),
        (png(8, 2, bytes([1, 2, 3, 100, 100, 100]), struct.pack(">3H", 1, 2, 3)), 100),
        (png(16, 2, struct.pack(">6H", 256, 512, 1, *[25700] * 3), struct.pack(">3H", 256, 512, 1)), 100),
        (png(16, 4, struct.pack(">4H", 0, 0, 25700, 65535)), 100),
        (png(16, 6, struct.pack(">8H", 0, 0, 0, 0, *[25700] * 3, 65535)), 100),
    ],
    ids="RGBA LA La PA RGBa array 1 1-white 2 4 8 16 RGB RGB-16 LA-16 RGBA-16".split(),
)
def test_transparency_shows_the_background(source: Any, opaque: int) -> None:
    for background, shown in (("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ([9, 8, 7], (9, 8, 7))):
        image = load_image(source, background=background)
        assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (shown, (opaque,) * 3)
        assert "transparency" not in image.info
    assert load_image(source).getpixel((0, 0)) == (255, 255, 255)
    dropped = load_image(source, background=None)
    assert dropped.getpixel((0, 0)) != (255, 255, 255) or opaque == 0 or isinstance(source, bytes)
    assert dropped.getpixel((1, 0)) == (opaque,) * 3


@pytest.mark.parametrize("extension", ["webp", "tiff", "ico", "tga", "gif"])
def test_files_with_transparency(extension: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (16, 0, 32, 32))
    image.save(tmp_path / f"image.{extension}", **({"lossless": True} if extension == "webp" else {}))
    shown = load_image(tmp_path / f"image.{extension}")
    assert (shown.getpixel((3, 3)), shown.getpixel((28, 28))) == ((255, 255, 255), (200, 0, 0))


def test_large_transparent_pictures_are_like_small_ones() -> None:
    """Tile by tile."""
    array = np.random.default_rng(0).integers(0, 256, (1030, 1500, 4), dtype=np.uint8)
    colours, alpha = array[..., :3].astype(float), array[..., 3:].astype(float)
    np.testing.assert_allclose(pixels(array), (colours * alpha + 255 * (255 - alpha)) / 255, atol=0.51)
    grey = np.random.default_rng(0).integers(0, 65536, (1100, 1030), dtype=np.uint16)
    np.testing.assert_array_equal(pixels(Image.fromarray(grey))[..., 1], np.rint(grey / 257))


@pytest.mark.parametrize("background", ["wite", (1, 2), (1, 2, 300), 7, ["a", "b", "c"], True])
def test_a_background_that_is_no_colour(background: Any) -> None:
    with pytest.raises(ValueError, match="`background`"):
        load_image(HALF, background=background)


@pytest.mark.parametrize("name", ["image.png", "image.tiff", "image.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(name: str, tmp_path: Path) -> None:
    eight_bits = np.arange(256, dtype=np.uint16).reshape(16, 16)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + (eight_bits * 257).astype(">u2").tobytes())
    else:
        Image.fromarray(eight_bits * 257).save(tmp_path / name)
    np.testing.assert_array_equal(pixels(tmp_path / name), np.repeat(eight_bits[..., None], 3, axis=2))
    np.testing.assert_array_equal(pixels(encoded(Image.new("I;16B", (4, 4), 0x8080))), 128)  # big-endian


def test_floating_point_pixels_go_from_black_to_white(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "image.tiff")
    assert pixels(tmp_path / "image.tiff")[..., 0].ravel().tolist() == list(range(256))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_exif_orientation_is_applied_as_transformers_does(orientation: int, extension: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{extension}"
    Image.fromarray(random_pixels()).save(path, exif=exif)
    result = pixels(path)
    assert result.shape == ((24, 32, 3) if orientation <= 4 else (32, 24, 3))
    np.testing.assert_array_equal(result, np.asarray(transformers_load_image(str(path))))


def test_exif_orientation_of_sixteen_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = (np.arange(6, dtype=np.uint16) * 257).reshape(2, 3)
    Image.fromarray(values).save(tmp_path / "image.png", exif=exif)
    assert pixels(tmp_path / "image.png")[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tiff"])
def test_animations_give_their_first_frame(extension: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if extension == "webp" else {}
    frames[0].save(tmp_path / f"image.{extension}", save_all=True, append_images=frames[1:], **lossless)
    with Image.open(tmp_path / f"image.{extension}") as image:
        assert getattr(image, "n_frames", 1) == 3
    assert (pixels(tmp_path / f"image.{extension}") == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (30000, 1), (3, 3), (1, 3)])
def test_any_shape_is_read(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "image.png")
    result = pixels(tmp_path / "image.png")
    assert result.shape == (size[1], size[0], 3)
    assert (result == (1, 2, 3)).all()


def text_chunk() -> PngInfo:
    chunk = PngInfo()
    chunk.add_text("comment", "x" * (2 * 1024 * 1024), zip=True)
    return chunk


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: encoded(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32))), "floating-point"),
        (lambda: encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32))), "32-bit"),
        # small as a file, 0.6 GB as RGB
        (lambda: encoded(Image.new("1", (14000, 14000)), "PNG"), "--max-image-pixels"),
        (lambda: encoded(Image.new("RGB", (4, 4)), "PNG", pnginfo=text_chunk()), "damaged"),
        (lambda: b"no picture at all", "format"),
        (lambda: np.zeros((4, 4, 3), dtype=np.float32), "float32"),
        (lambda: np.zeros((5, 4, 7), dtype=np.uint8), "shape"),
        (lambda: np.zeros((0, 4, 3), dtype=np.uint8), ""),
        (lambda: 3, "int"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], word: str) -> None:
    with pytest.raises((ImageError, TypeError), match=word) as error:
        load_image(make(), "images[2]")
    assert str(error.value).startswith("images[2]")


def test_pil_only_warns_of_large_images_and_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        assert (pixels(tmp_path / "large.png") == (255, 0, 0)).all()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of damaged tags
@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "bmp", "tiff"])
def test_truncated_files_are_named(extension: str, tmp_path: Path) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    path = tmp_path / f"image.{extension}"
    Image.fromarray(random_pixels(64, 64)).save(path)
    data = path.read_bytes()
    for kept in (10, 60, len(data) // 2):
        path.write_bytes(data[:kept])
        with pytest.raises(ImageError, match=f"image.{extension}") as error:
            load_image(path)
        assert not error.value.transient


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's, of damaged tags
def test_corrupt_files_are_read_or_named(tmp_path: Path) -> None:
    """Random damage: a decoder may read past it, raise any exception, but only `ImageError` comes out, the same one
    where a JPEG file is decoded at a fraction of its size."""
    generator = np.random.default_rng(0)
    refused = 0
    for extension in ("jpg", "png", "gif", "webp", "bmp", "tiff"):
        path = tmp_path / f"image.{extension}"
        picture(400, 300).save(path)
        original = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(15):
            data = original.copy()
            places = generator.integers(0, min(len(data), 400), 12)
            data[places] = generator.integers(0, 256, 12)
            path.write_bytes(data.tobytes())
            messages = []
            for image_processor in (None, LOTLIP):
                try:
                    assert load_image(path, image_processor=image_processor).mode == "RGB"
                except ImageError as error:
                    messages.append((str(error), error.transient))
            assert len(set(messages)) < 2
            assert all(message.startswith(f"{path}: ") for message, _ in messages)
            assert len(messages) in (0, 2)
            refused += bool(messages)
    assert refused > 10


def test_what_is_no_image_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, word, transient in (
        ("text.jpg", "format", False),
        ("empty.jpg", "empty", False),
        ("folder.jpg", "folder", False),
        ("script.jpg", "format", False),  # and Ghostscript is not called
        ("pipe.jpg", "regular", False),
        ("missing.jpg", "opened", True),
    ):
        with pytest.raises(ImageError, match=f"{name}.*{word}") as error:
            load_image(tmp_path / name)
        assert error.value.transient is transient


def test_unreadable_now_is_not_unreadable_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")

    def no_memory(*arguments: object, **keywords: object) -> None:
        raise MemoryError

    def no_permission(*arguments: object, **keywords: object) -> None:
        raise PermissionError(13, "Permission denied")

    for failing, reason in ((no_memory, "memory"), (no_permission, "Permission denied")):
        monkeypatch.setattr(Image, "open", failing)
        with pytest.raises(ImageError, match=reason) as error:
            load_image(tmp_path / "image.png")
        assert error.value.transient


def test_arrays_and_tensors() -> None:
    array = random_pixels()
    for source in (
        array,
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
    ):
        np.testing.assert_array_equal(pixels(source), array)
    np.testing.assert_array_equal(pixels(array.astype(np.uint16) * 257), array)
    grey = array[..., 0]
    for source in (grey, grey[..., None], grey[None]):
        np.testing.assert_array_equal(pixels(source), np.repeat(grey[..., None], 3, axis=2))
    opaque = np.full_like(grey, 255)
    np.testing.assert_array_equal(pixels(np.dstack([array, opaque])), array)


def test_a_callers_image_is_left_unchanged() -> None:
    image = Image.fromarray(random_pixels()).convert("RGBA")
    image.getexif()[0x0112] = 6
    before = np.asarray(image).copy()
    assert load_image(image).size == (24, 32)
    assert image.mode == "RGBA"
    assert image.getexif()[0x0112] == 6
    np.testing.assert_array_equal(np.asarray(image), before)
    copy = load_image(same := Image.new("RGB", (4, 4)))
    copy.putpixel((0, 0), (9, 9, 9))
    assert same.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("image_processor", [LOTLIP, SIGLIP, VIT], ids=["lotlip", "siglip", "vit"])
@pytest.mark.parametrize("size", [(400, 300), (257, 301), (1023, 517), (193, 999), (192, 192)])
def test_large_jpegs_are_decoded_no_larger_than_needed(size: tuple[int, int], image_processor: Any) -> None:
    check_reduced(jpeg(picture(*size)), image_processor)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_processor", [LOTLIP, SIGLIP], ids=["lotlip", "siglip"])
def test_large_jpegs_are_turned_upright(orientation: int, image_processor: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    check_reduced(jpeg(picture(515, 389), exif=exif), image_processor)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("L", {}),
        ("CMYK", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2, "optimize": True}),
    ],
)
def test_large_jpegs_of_every_kind(mode: str, settings: dict[str, object]) -> None:
    check_reduced(jpeg(picture(401, 303, mode), **settings), LOTLIP)


def test_pictures_of_several_jpegs_are_reduced_too() -> None:
    two = encoded(picture(401, 303), "MPO", save_all=True, append_images=[picture(401, 303).rotate(180)])
    check_reduced(two, LOTLIP)


@pytest.mark.parametrize("size", [(191, 500), (500, 191), (90, 64), (32, 32), (7, 9)])
def test_jpegs_no_larger_than_needed_keep_their_pixels(size: tuple[int, int]) -> None:
    data = jpeg(picture(*size))
    np.testing.assert_array_equal(np.asarray(load_image(data, image_processor=LOTLIP)), pixels(data))


@pytest.mark.parametrize("extension", ["png", "gif", "webp", "bmp", "tiff"])
def test_other_formats_keep_their_pixels(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{extension}"
    picture(400, 300).save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path, image_processor=LOTLIP)), pixels(path))


class OtherResizing(CLIPImageProcessorPil):
    def resize(self, *arguments: object, **keywords: object) -> np.ndarray:
        raise NotImplementedError


@pytest.mark.parametrize(
    "image_processor",
    [
        None,
        OtherResizing(size={"shortest_edge": 32}),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, do_resize=False),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, resample=Image.Resampling.NEAREST),
        CLIPImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}),
        SiglipImageProcessorPil(size={"height": 32, "width": 48}),
    ],
)
def test_a_processor_that_resizes_in_its_own_way_gets_the_whole_jpeg(image_processor: Any) -> None:
    data = jpeg(picture(400, 300))
    np.testing.assert_array_equal(np.asarray(load_image(data, image_processor=image_processor)), pixels(data))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(20_000, 200), (131, 2), (2, 131), (1, 3001), (999, 7), (70, 1)])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize(("edge", "side"), [(32, 32), (33, 32), (24, 32), (32, 15)])
def test_of_thin_images_the_middle_is_the_same(
    size: tuple[int, int], resample: Image.Resampling, edge: int, side: int
) -> None:
    """What the crop leaves, and little more, whichever of crop and shortest edge is larger."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": side, "width": side}, resample=resample
    )
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    cut = load_image(whole, image_processor=image_processor)
    assert max(cut.size) <= max(edge, side) + 3
    expected, given = (image_processor(images=[one], return_tensors="pt")["pixel_values"] for one in (whole, cut))
    # a step of 255 where rounding to 8 bits is at stake
    torch.testing.assert_close(given, expected, rtol=0, atol=1.01 / 255 / min(image_processor.image_std))
    assert (given != expected).float().mean() < 0.01


@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    ],
    ids=["no crop", "its own resizing"],
)
def test_thin_images_for_a_processor_that_would_resize_them_whole_are_refused(image_processor: Any) -> None:
    with pytest.raises(ImageError, match="thin"):
        load_image(Image.new("RGB", (1, 65)), "images[3]", image_processor=image_processor)
    assert load_image(Image.new("RGB", (1, 64)), image_processor=image_processor).size == (1, 64)


def shown_box(size: tuple[int, int], image_processor: Any) -> list[float]:
    """The edges of what an image processor shows, read from its pixels of ramps along both sides of an image."""
    (width, height), noise = size, np.random.default_rng(0)  # noise, since rounding would bend the ramps
    ramps = np.zeros((height, width, 3), dtype=np.uint8)
    ramps[..., 0] = 255 * (np.arange(width) + 0.5) / width + noise.random((height, width))
    ramps[..., 1] = 255 * (np.arange(height)[:, None] + 0.5) / height + noise.random((height, width))
    low, high, ramp = (
        image_processor(images=[Image.fromarray(one)], return_tensors="np")["pixel_values"][0]
        for one in (np.zeros_like(ramps), np.full_like(ramps, 255), ramps)
    )
    shown = np.abs(high[0] - low[0]) > 0.1  # not the padding around an image that is smaller than the crop
    edges = []
    for channel in (0, 1):
        numbers = np.flatnonzero(shown.any(channel))
        part = ((ramp - low)[channel] / np.where(shown, high - low, 1)[channel])[np.ix_(shown.any(1), shown.any(0))]
        slope, start = np.polyfit(numbers + 0.5, part.mean(channel), 1)
        edges.append((start, start + slope * shown.shape[1 - channel]))
    return [edges[axis][end] for end in (0, 1) for axis in (0, 1)]


KEEPING: dict[str, Any] = {
    "the released models": official_image_processor(224),
    "a margin": BitImageProcessorPil(size={"shortest_edge": 128}, crop_size={"height": 112, "width": 112}),
    "a frame": CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 128, "width": 128}),
    "squashed, with a margin": CLIPImageProcessorPil(
        size={"height": 96, "width": 72}, crop_size={"height": 64, "width": 64}
    ),
    "squashed": SiglipImageProcessorPil(size={"height": 64, "width": 64}),
    "ConvNeXt": ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    "a large ConvNeXt": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "not resized": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 128, "width": 128}),
    "no crop": CLIPImageProcessorPil(size={"shortest_edge": 96}, do_center_crop=False),
}


@pytest.mark.parametrize("size", [(640, 480), (300, 100), (96, 192), (64, 64)])
@pytest.mark.parametrize("image_processor", KEEPING.values(), ids=KEEPING)
def test_what_an_image_processor_keeps(size: tuple[int, int], image_processor: Any) -> None:
    """Of an image that is smaller than the crop, all is kept, and edges lie outside."""
    assert kept_box(size, image_processor) == pytest.approx(shown_box(size, image_processor), abs=0.01)


def test_kept_parts_by_hand() -> None:
    assert kept_box((640, 480), KEEPING["the released models"]) == (0.125, 0, 0.875, 1)
    assert kept_box((64, 32), KEEPING["not resized"]) == (-0.5, -1.5, 1.5, 2.5)
    assert kept_box((300, 100), Siglip2ImageProcessorPil(patch_size=16)) == (0, 0, 1, 1)


@pytest.mark.slow
def test_large_images_are_resized_as_the_processor_does(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    picture(4801, 3501).save(path, compress_level=1)
    for image_processor in (LOTLIP, SIGLIP):
        image = load_image(path, image_processor=image_processor)
        assert max(image.size) < 50
        expected, given = (
            image_processor(images=[one], return_tensors="pt")["pixel_values"] for one in (load_image(path), image)
        )
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_the_pixel_limit_holds_for_a_reduced_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 // 2 - 1)
    with pytest.raises(ImageError, match="--max-image-pixels"):
        load_image(jpeg(picture(400, 300)), image_processor=LOTLIP)


def test_finding_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "z/deep/c.webp", "notes.txt", ".hidden.png", ".folder/d.png", "video.mpg", "x.eps"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"any")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "e.gif").touch()
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    images, unreadable = find_images(tmp_path)
    assert list(images) == ["a.png", "b.JPG", "folder.jpg/e.gif", "z/deep/c.webp"]
    assert images["a.png"].st_size == 3
    assert unreadable == {
        "broken.png": "cannot be opened (No such file or directory)",
        "pipe.png": "not a regular file",
    }


def test_finding_images_through_loops_of_links(tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "photos" / "sub" / "b.png").touch()
    (tmp_path / "elsewhere" / "c.png").touch()
    (tmp_path / "photos" / "sub" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "photos" / "a.png")
    images, unreadable = find_images(tmp_path / "photos")
    assert list(images) == ["a.png", "link.png", "sub/b.png"]
    assert unreadable.keys() == {"linked"}
    images, unreadable = find_images(tmp_path / "photos", tmp_path)
    assert list(images) == ["a.png", "link.png", "linked/c.png", "sub/b.png"]
    assert unreadable == {}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    images, unreadable = find_images(tmp_path)
    assert list(images) == ["a.png"]
    assert unreadable == {"locked": "the folder cannot be read (Permission denied)"}


def test_extensions_are_those_that_pil_decodes() -> None:
    assert {".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp"} <= image_extensions()
    assert not {".mpg", ".mpeg", ".pdf", ".eps", ".ps", ".h5", ".wmf"} & image_extensions()


def test_threads_may_start_together(tmp_path: Path) -> None:
    Image.fromarray(random_pixels()).save(tmp_path / "image.png")
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(pixels(tmp_path / "image.png"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all((result == results[0]).all() for result in results)
