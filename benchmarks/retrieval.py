"""Measures the time and memory of exact retrieval, compared with the bare matrix product.

    python benchmarks/retrieval.py                                # 20,000 images, 20,000 texts, 768 dimensions
    python benchmarks/retrieval.py --images 5000 --texts 25000    # five texts per image

Three calls take turns: the product of all images and texts in blocks, `recalls`, and `retrieval_metrics` with its
bootstrap interval. The peak memory of `retrieval_metrics`, beyond the embeddings, is measured in a separate process.
The result is appended to `benchmarks/results/retrieval.jsonl`.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lotlip_hf.evaluation.retrieval import BLOCK_SIZE, recalls, retrieval_metrics
from measure import RESULTS as FOLDER
from measure import in_turns, keep, machine, peak_memory

RESULTS = FOLDER / "retrieval.jsonl"
# Noise of the text embeddings; large enough that recall is below 1.
NOISE = 5.0


def make_embeddings(images: int, texts: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Creates images [I, dim], texts [T, dim] near their images, and the image index of each text [T]."""
    generator = torch.Generator().manual_seed(0)
    text_to_image = torch.arange(texts) % images
    image_embeds = torch.randn(images, dim, generator=generator)
    text_embeds = torch.randn(texts, dim, generator=generator).mul_(NOISE)
    for rows, own in zip(text_embeds.split(1024), text_to_image.split(1024), strict=True):
        rows += image_embeds[own]
    for embeds in (image_embeds, text_embeds):
        for rows in embeds.split(1024):
            F.normalize(rows, out=rows)
    return image_embeds, text_embeds, text_to_image


def product(image_embeds: torch.Tensor, text_embeds: torch.Tensor, block_size: int) -> None:
    """Computes and discards all similarities, block by block in the same memory."""
    memory = torch.empty(min(block_size, len(image_embeds)) * min(block_size, len(text_embeds)))
    for images in image_embeds.split(block_size):
        for texts in text_embeds.split(block_size):
            block = memory[: len(images) * len(texts)].view(len(images), len(texts))
            torch.mm(images, texts.t(), out=block)


def make_retrieval(images: int, texts: int, dim: int, block_size: int) -> Callable[[], Any]:
    """Creates the call for the measurement of memory."""
    return partial(retrieval_metrics, *make_embeddings(images, texts, dim), block_size=block_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, saves and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="number of images")
    parser.add_argument("--texts", type=int, default=20_000, help="number of texts")
    parser.add_argument("--dim", type=int, default=768, help="dimensions of the embeddings")
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE, help="rows and columns of a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed turns")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to which the result is appended")
    arguments = parser.parse_args(argv)
    sizes = {name: getattr(arguments, name) for name in ("images", "texts", "dim", "block_size")}
    torch.set_num_threads(arguments.threads)
    held = peak_memory(make_retrieval, *sizes.values())

    load = os.getloadavg()[0]  # load of other processes, which slows down the calls
    images, texts, owners = make_embeddings(arguments.images, arguments.texts, arguments.dim)
    block_size = arguments.block_size
    calls: dict[str, Callable[[], Any]] = {
        "product": lambda: product(images, texts, block_size),
        "recalls": lambda: recalls(images, texts, owners, block_size=block_size),
        "retrieval_metrics": lambda: retrieval_metrics(images, texts, owners, block_size=block_size),
    }
    medians = in_turns(calls, arguments.repeats)
    result = {
        **sizes,
        "repeats": arguments.repeats,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "times_the_product": {
            name: round(value / medians["product"], 3) for name, value in medians.items() if name != "product"
        },
        "embeddings_mib": round((images.nbytes + texts.nbytes) / 2**20, 1),
        "peak_beyond_embeddings_mib": round(held, 1),
        "load": round(load, 2),
        **machine(),
    }
    keep(result, arguments.results)
    print(
        f"product {medians['product']:.2f} s, recalls {medians['recalls']:.2f} s, retrieval_metrics "
        f"{medians['retrieval_metrics']:.2f} s; {held:.0f} MiB in addition to {result['embeddings_mib']:.0f} MiB of "
        "embeddings"
    )
    print(f"Appended to {arguments.results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
