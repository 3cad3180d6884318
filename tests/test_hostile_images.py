"""Pictures, folders and processors that strangers made: nothing else is read, memory is bounded, each is named."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile
from transformers import CLIPImageProcessorPil

from lotlip_hf import images
from lotlip_hf.cli import main as lotlip
from lotlip_hf.evaluation.embeddings import image_digests
from lotlip_hf.evaluation.tasks import IncompleteDataError
from lotlip_hf.images import ImageError, find_images, load_image, read_image_bytes, set_max_image_pixels
from lotlip_hf.loading import check_image_sizes, load_model
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data


@pytest.fixture(autouse=True)
def _own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test sets, the next one has PIL's limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv("LOTLIP_MAX_IMAGE_PIXELS", "")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with one picture, and links that lead out of it and stay in it."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    for path in (folder / "a.png", tmp_path / "private" / "secret.png"):
        Image.new("RGB", (40, 30), "red").save(path)
    (folder / "file.png").symlink_to(tmp_path / "private" / "secret.png")
    (folder / "relative.png").symlink_to(Path("..", "private", "secret.png"))
    (folder / "linked").symlink_to(tmp_path / "private")
    (folder / "sub" / "up").symlink_to(tmp_path)
    (folder / "sub" / "inner.png").symlink_to(folder / "a.png")
    (folder / "sub" / "chain.png").symlink_to(folder / "file.png")
    return folder


# What was not given is not read


def test_links_lead_nowhere_else(photos: Path, tmp_path: Path) -> None:
    found, unreadable = find_images(photos)
    assert list(found) == ["a.png", "sub/inner.png"]
    assert unreadable.keys() == {"file.png", "relative.png", "linked", "sub/up", "sub/chain.png"}
    assert all("--image-root" in reason for reason in unreadable.values())
    # a folder is what a link to it leads to
    (tmp_path / "other").symlink_to(photos)
    assert find_images(tmp_path / "other") == (found, unreadable)
    found, unreadable = find_images(photos, root=tmp_path)
    assert {"file.png", "relative.png", "sub/chain.png"} < found.keys()
    assert unreadable == {}
    assert find_images(photos, root="/")[1] == {}
    # another root allows no less than the folder itself
    assert list(find_images(photos, root=tmp_path / "private")[0]) == [
        *("a.png", "file.png", "linked/secret.png", "relative.png", "sub/chain.png", "sub/inner.png")
    ]
    with pytest.raises(NotADirectoryError, match="missing"):
        find_images(photos, root=tmp_path / "missing")


@pytest.mark.parametrize("command", ["search", "embed"])
def test_commands_take_a_root(
    command: str, photos: Path, tmp_path: Path, official_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.parquet")
    rest = (
        ["--index", str(tmp_path / "index"), "a cat"] if command == "search" else ["--output", output, "--overwrite"]
    )
    arguments = [command, "--model", str(official_checkpoint), "--device", "cpu", "--images", str(photos)]
    assert lotlip([*arguments, *rest]) == 0
    out, err = capsys.readouterr()
    assert "secret.png" not in out
    assert err.count("--image-root") == 5
    assert lotlip([*arguments, "--image-root", str(tmp_path), *rest]) == 0
    out, err = capsys.readouterr()
    assert "skipped" not in err


def test_what_is_no_file_is_no_picture(tmp_path: Path) -> None:
    """And is not waited for: a pipe without a writer, a device without an end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for read in (load_image, read_image_bytes):
        for name in ("pipe.png", "zero.png", "folder.png"):
            with pytest.raises(ImageError, match=name):
                read(tmp_path / name)
    assert find_images(tmp_path, root="/")[1].keys() == {"pipe.png", "zero.png"}
    with pytest.raises(IncompleteDataError, match="pipe.png"):
        image_digests([tmp_path / "pipe.png"], progress=False)


def test_a_picture_changed_for_something_else_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is asked of the file that was opened."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(path)
    open_regular = images.open_regular

    def swap(name: str) -> Any:
        file = open_regular(name)
        os.unlink(path)
        os.mkfifo(path)
        return file

    monkeypatch.setattr(images, "open_regular", swap)
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


# Memory


def sparse(path: Path, size: int) -> None:
    Image.new("RGB", (8, 8)).save(path, format="WEBP")
    os.truncate(path, size)


def test_files_of_many_bytes_are_not_read(tmp_path: Path) -> None:
    sparse(tmp_path / "a.webp", 5 << 30)
    for read in (load_image, read_image_bytes):
        with pytest.raises(ImageError, match="a.webp"):
            read(tmp_path / "a.webp")
    sparse(tmp_path / "b.webp", 5000)
    assert len(read_image_bytes(tmp_path / "b.webp", 5000)) == 5000
    with pytest.raises(ImageError, match="4,999"):
        read_image_bytes(tmp_path / "b.webp", 4999)
    (tmp_path / "empty.webp").touch()
    with pytest.raises(ImageError, match="empty"):
        read_image_bytes(tmp_path / "empty.webp")


def tiff_of_one_tile(side: int) -> bytes:
    """16 x 16 pixels, in a tile of more."""
    data = zlib.compress(bytes(16 * 16))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def icon(side: int) -> bytes:
    """Says 16 x 16 pixels, and holds more."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, buffer.tell(), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [tiff_of_one_tile, icon])
def test_pictures_that_hold_more_than_they_say(make: Callable[[int], bytes]) -> None:
    set_max_image_pixels(256 * 256)
    with pytest.raises(ImageError, match="--max-image-pixels"):
        load_image(make(512))
    set_max_image_pixels(512 * 512)
    if make is icon:  # the tile would need all its bytes
        assert load_image(make(512)).size == (512, 512)


def test_the_pixel_limit_is_an_option(
    tmp_path: Path, official_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (40, 30), "red").save(photos / "small.png")
    Image.new("RGB", (80, 50), "blue").save(photos / "large.png")
    arguments = ["search", "--model", str(official_checkpoint), "--device", "cpu", "--images", str(photos), "a cat"]
    for limit, skipped in (("3998", True), ("4000", False)):  # what was too large is read once it is allowed
        assert lotlip([*arguments, "--max-image-pixels", limit]) == 0
        assert ("large.png: too large" in capsys.readouterr().err) == skipped
    assert lotlip([*arguments, "--max-image-pixels", "0"]) == 2
    with pytest.raises(ValueError, match="pixels"):
        set_max_image_pixels(0)
    with pytest.raises(ValueError, match="max_image_pixels"):
        TrainingConfig(max_image_pixels=0)
    load_data(TrainingConfig(data="scenes", num_scenes=1, max_image_pixels=20))
    with pytest.raises(ImageError, match="--max-image-pixels"):
        load_image(photos / "small.png")


def test_large_pictures_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, of which no two decode more together than one picture may have."""
    lock, at_work, most = threading.Lock(), 0, 0
    load = ImageFile.ImageFile.load

    def counting(self: Any) -> Any:
        nonlocal at_work, most
        with lock:
            at_work += self.width * self.height
            most = max(most, at_work)
        result = load(self)
        threading.Event().wait(0.01)
        with lock:
            at_work -= self.width * self.height
        return result

    for number, size in enumerate([(100, 90), (60, 60), (50, 50), (100, 100)] * 3):
        Image.new("L", size).save(tmp_path / f"{number}.bmp")
    set_max_image_pixels(10_000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", counting)
    errors: list[Exception] = []

    def read(number: int) -> None:
        try:
            load_image(tmp_path / f"{number}.bmp")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert 0 < most <= 10_000


def test_a_process_that_is_forked_meanwhile_waits_for_nobody(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with images._budget.hold():
        child = os.fork()
        if not child:
            try:
                load_image(tmp_path / "a.png")
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


MEASURED = """
import os
import sys
from lotlip_hf.images import load_image
from transformers import CLIPImageProcessorPil
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
for path in sys.argv[2:]:
    if not os.fork():  # whose peak begins anew
        before = peak()
        load_image(path, image_processor=CLIPImageProcessorPil())
        print(peak() - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
load_image(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says how much memory was taken")
def test_a_started_process_keeps_the_pixel_limit_and_memory(tmp_path: Path) -> None:
    """For pictures of 20 million pixels, at 12 bytes each and what it takes to read."""
    side, folder = 4500, tmp_path / "photos"
    folder.mkdir()
    for mode, name in (("F", "a.tiff"), ("I;16", "grey.png"), ("RGBA", "clear.png")):
        compression = {"compression": "tiff_adobe_deflate"} if mode == "F" else {}
        Image.new(mode, (side, side), 0).save(folder / name, **compression)
    (folder / "a.ico").write_bytes(icon(side))
    Image.new("RGB", (36_000, 1)).save(folder / "thin.png")
    Image.new("L", (side, side + 1)).save(tmp_path / "large.png")
    set_max_image_pixels(side * side)
    paths = sorted(folder.iterdir())
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "large.png", *paths], capture_output=True, text=True
    )
    taken = {path.name: float(line) for path, line in zip(paths, run.stdout.splitlines(), strict=True)}
    assert taken.pop("thin.png") < 60
    assert len(taken) == 4
    assert all(4 < each < 20.25 * 12 * 1.1 for each in taken.values()), taken
    assert "large.png" in run.stderr
    assert "--max-image-pixels" in run.stderr


# Formats that are not read are said


@pytest.mark.parametrize(
    ("name", "word"),
    [
        *[(f"a.{extension}", "pillow-heif") for extension in ("heic", "HEIF", "hif")],
        *[("a.avif", "pillow"), ("a.svg", "convert"), ("a.SVGZ", "convert")],
        *[(f"a.{extension}", "convert") for extension in "cr2 CR3 nef arw dng orf rw2 raf pef srw".split()],
    ],
)
def test_pictures_that_are_not_read_are_listed(
    name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = images.image_extensions()
    monkeypatch.setattr(images, "image_extensions", lambda: known - images.HINTS.keys())  # as without the plugins
    Image.new("RGB", (160, 120)).save(tmp_path / name, format="TIFF")  # as camera raw begins
    assert word in find_images(tmp_path)[1][name]
    if name.lower().endswith(tuple(images.RAW_EXTENSIONS)):
        for source, called in ((tmp_path / name, None), ((tmp_path / name).read_bytes(), f"record 1: {name}")):
            with pytest.raises(ImageError, match=word):
                load_image(source, called)


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_what_phones_write_is_known_under_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(struct.pack(">I4s4sI", 24, b"ftyp", b"heix", 0) + b"mif1heic" + bytes(100))
    with pytest.raises(ImageError) as error:
        load_image(tmp_path / name)
    if "HEIF" not in Image.OPEN:
        assert "pillow-heif" in str(error.value)
        assert error.value.transient  # an index tries it again


def test_heif_is_read_with_the_plugin(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    assert ".heic" in images.image_extensions()
    art = Image.new("RGBA", (64, 40), (0, 0, 0, 0))
    art.paste((200, 10, 10, 255), (32, 0, 64, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    art.save(tmp_path / "art.heic", quality=95)
    art.convert("RGB").save(tmp_path / "turned.heif", exif=exif.tobytes())
    assert list(find_images(tmp_path)[0]) == ["art.heic", "turned.heif"]
    shown = load_image(tmp_path / "art.heic")
    assert shown.getpixel((4, 4)) == (255, 255, 255)
    assert np.abs(np.subtract(shown.getpixel((60, 4)), (200, 10, 10))).max() < 10  # pyright: ignore[reportArgumentType]
    assert load_image(tmp_path / "turned.heif").size == (40, 64)


# Processors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("crop_size", {"height": 60_000, "width": 60_000}),
        ("size", {"shortest_edge": 60_000}),
        ("size", {"shortest_edge": -3}),
        ("size", {"shortest_edge": 1e300}),
        ("crop_size", {"height": 32, "width": [32]}),
        ("crop_size", {"sides": 3}),
        ("size", [[[[]]]]),
    ],
)
@pytest.mark.parametrize("place", ["processor_config.json", "preprocessor_config.json"])
def test_sizes_that_are_none(
    setting: str,
    value: Any,
    place: str,
    tmp_path: Path,
    official_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(official_checkpoint, checkpoint)
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    settings["image_processor"][setting] = value
    if place == "preprocessor_config.json":
        (checkpoint / "processor_config.json").unlink()
        settings = settings["image_processor"]
    (checkpoint / place).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="checkpoint"):
        load_model(checkpoint, device="cpu")
    arguments = ["--model", str(checkpoint), "--device", "cpu", "--images", str(tmp_path)]
    assert lotlip(["search", *arguments, "a cat"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if value != [[[[]]]] and "sides" not in value:
        assert setting in err
        assert "processor_config.json" in err


def test_a_background_that_is_none(tmp_path: Path, official_checkpoint: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(official_checkpoint, checkpoint)
    settings = json.loads((checkpoint / "processor_config.json").read_text())
    for background in ("no colour", {"r": 1}, [1, 2, 3, 4, 5], 7):
        settings["background"] = background
        (checkpoint / "processor_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="background"):
            load_model(checkpoint, device="cpu")


def test_sizes_of_a_strangers_image_encoder() -> None:
    check_image_sizes(CLIPImageProcessorPil(), "theirs")
    with pytest.raises(ValueError, match="crop_size"):
        check_image_sizes(CLIPImageProcessorPil(crop_size={"height": 60_000, "width": 60_000}), "theirs")
