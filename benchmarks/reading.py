"""Measures how many images one process reads from a shard per second: decode, resize and normalise.

    python benchmarks/reading.py                     # images of 640 x 480 and of 12 megapixels
    python benchmarks/reading.py --only 640x480 --num-images 200

A worker of a `DataLoader` does this work on one thread. The images are JPEG files in a WebDataset shard, made from the
two photographs of scikit-learn. The ways of reading take turns: this package, also with `--augment`; Pillow and NumPy
alone, written down plainly; and webdataset with torchvision's transforms, if both import. The result is appended to
`benchmarks/results/reading.jsonl`.
"""

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from lotlip_hf.data.augment import Augment, crop_size, load_augmented
from lotlip_hf.data.readers import read_rows
from lotlip_hf.images import load_pixels, official_image_processor, plain_image_processor
from measure import RESULTS as FOLDER
from measure import in_turns, keep, machine

RESULTS = FOLDER / "reading.jsonl"
SIDE = 224
SIZES = {"640x480": (640, 480), "4000x3000": (4000, 3000)}
SHARE = 0.5  # smallest share of the area of a crop
NORMALISED = {"mean": [0.5] * 3, "std": [0.5] * 3}


def make_shard(file: Path, size: tuple[int, int], count: int) -> None:
    """Writes a shard of JPEG images, each a resized part of a photograph."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    choose = np.random.default_rng(0)
    with tarfile.open(file, "w") as tar:
        for number in range(count):
            left, top = choose.integers(0, 100, 2)
            part = (
                photographs[number % 2].crop((left, top, left + 440, top + 320)).resize(size, Image.Resampling.BICUBIC)
            )
            content = io.BytesIO()
            part.save(content, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{number:05}.jpg")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)


def ours(file: Path) -> Iterator[torch.Tensor]:
    """Reads with this package, as training does."""
    image_processor = plain_image_processor(official_image_processor(SIDE))
    for row in read_rows(file):
        assert isinstance(row, dict)
        yield torch.as_tensor(load_pixels(row["image"], image_processor=image_processor)["pixel_values"])[0]


def ours_augmented(file: Path) -> Iterator[torch.Tensor]:
    """Reads with this package and `--augment crop:0.5 flip:0.5`."""
    image_processor = plain_image_processor(official_image_processor(SIDE))
    arguments: dict[str, Any] = {"image_processor": image_processor, "background": "white"}
    arguments |= {"augment": Augment(crop=SHARE, flip=0.5), "size": crop_size(image_processor)}
    for number, row in enumerate(read_rows(file)):
        assert isinstance(row, dict)
        yield torch.as_tensor(load_augmented(row["image"], "", rng=Random(number), **arguments)[0]["pixel_values"])[0]


def pillow(file: Path) -> Iterator[torch.Tensor]:
    """Reads with Pillow and NumPy."""
    with tarfile.open(file) as tar:
        for member in tar:
            image = Image.open(tar.extractfile(member)).convert("RGB")  # pyright: ignore[reportArgumentType]
            short = min(image.size)
            image = image.resize(
                (int(SIDE * image.width / short), int(SIDE * image.height / short)), Image.Resampling.BICUBIC
            )
            left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
            pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
            yield torch.from_numpy(((pixels - NORMALISED["mean"]) / NORMALISED["std"]).astype(np.float32)).movedim(
                -1, 0
            )


def webdataset(file: Path, augment: bool = False) -> Iterator[torch.Tensor]:
    """Reads with webdataset and torchvision's transforms, as their documentation does."""
    import webdataset as wds
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    changes = [transforms.Resize(SIDE, bicubic), transforms.CenterCrop(SIDE)]
    if augment:
        crop = transforms.RandomResizedCrop(SIDE, (SHARE, 1.0), interpolation=bicubic)
        changes = [crop, transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*changes, transforms.ToTensor(), transforms.Normalize(**NORMALISED)])
    dataset = wds.WebDataset(str(file), shardshuffle=False).decode("pilrgb").to_tuple("jpg").map_tuple(transform)
    return (pixels for (pixels,) in dataset)


WAYS: dict[str, Callable[[Path], Iterator[torch.Tensor]]] = {
    "lotlip-hf": ours,
    "lotlip-hf, crop and flip": ours_augmented,
    "Pillow and NumPy": pillow,
    "webdataset + torchvision": webdataset,
    "webdataset + torchvision, crop and flip": partial(webdataset, augment=True),
}


def measure(size: str, num_images: int, repeats: int) -> dict[str, Any]:
    """
    Measures all ways that import.

    Args:
        size (`str`): Size of the images; see `SIZES`.
        num_images (`int`): Number of images.
        repeats (`int`): Number of timed turns.

    Returns:
        `dict[str, Any]`: Images per second by way of reading, the largest and mean difference of our pixels from those
            of Pillow in steps of 255, and notes on what did not import.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "shard.tar")
        make_shard(file, SIZES[size], num_images)
        calls, notes, pixels = {}, [], {}
        for name, way in WAYS.items():
            try:
                pixels[name] = torch.stack(list(way(file)))
            except Exception as error:  # a torchvision that does not match torch raises many types of errors
                notes.append(f"{name} was not measured: {type(error).__name__}: {error}")
                continue
            assert pixels[name].shape == (num_images, 3, SIDE, SIDE)
            calls[name] = partial(_read, way, file)
        seconds = in_turns(calls, repeats, size)
    difference = (pixels["lotlip-hf"] - pixels["Pillow and NumPy"]).abs() * 255 / 2  # pixels range from -1 to 1
    return {
        **{"size": size, "num_images": num_images, "repeats": repeats},
        "images_per_second": {name: num_images / each for name, each in seconds.items()},
        "difference": {"mean": difference.mean().item(), "max": difference.max().item()},
        "notes": notes,
        **machine("webdataset", "torchvision", "pillow"),
    }


def _read(way: Callable[[Path], Iterator[torch.Tensor]], file: Path) -> None:
    for _ in way(file):
        pass


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, saves and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), help="sizes of the images")
    parser.add_argument("--num-images", type=int, help="number of images; default: 200, and 16 of 12 megapixels")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed turns")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to which results are appended")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in a worker of a `DataLoader`
    for size in arguments.only:
        number = arguments.num_images or (16 if size == "4000x3000" else 200)
        result = measure(size, number, arguments.repeats)
        keep(result, arguments.results)
        for name, rate in result["images_per_second"].items():
            print(f"{size}, {name}: {rate:.1f} images/s")
        print(
            f"Our pixels differ from Pillow's by {result['difference']['mean']:.3f} of 255, at most by "
            f"{result['difference']['max']:.1f}."
        )
        print(*result["notes"], sep="\n", end="\n" if result["notes"] else "")
    print(f"Appended to {arguments.results}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
