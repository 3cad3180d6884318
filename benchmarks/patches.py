"""Measures what fewer patches cost and save: R@1 of a model of Scenes, and the time of an image tower.

The layers from one on compute only a share of the patches, without any training for it: the medoids of clusters
(`--image-token-centers`), or as many at random. The time is that of ViT-B/16 with random weights, at the same
depth. The result is appended to `benchmarks/results/patches.jsonl`, and the plot is drawn from its last line.

    lotlip train --model scenes --data scenes --num-scenes 20000 --max-steps 2000 --batch-size 64 --output run
    python benchmarks/patches.py run/checkpoint-2000
    python benchmarks/patches.py --report                  # only print the table and draw the plot
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import peers
from lotlip_hf import LoTLIPModel, load_encoder
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.files import read_json_lines
from lotlip_hf.loading import use_medoids
from lotlip_hf.modeling import medoids_lotlip
from lotlip_hf.plots import COLOURS, figure, save
from lotlip_hf.scenes.dataset import scenes_dataset
from measure import RESULTS, in_turns, keep, machine

FILE = RESULTS / "patches.jsonl"
PLOT = Path(__file__).resolve().parent.parent / "docs" / "patches.png"
DEPTHS = (0.0, 1 / 3, 2 / 3)  # share of the layers before the one that chooses
SHARES = (0.75, 0.5, 0.25)  # of the patches
METHODS = ("medoids", "random")
FULL = ("all", 0.0, 1.0)
SETTINGS = [FULL, *((method, depth, share) for method in METHODS for depth in DEPTHS for share in SHARES)]


def at_random(states: Tensor, num_centers: int) -> Tensor:
    """Indices [B, K] of random tokens of [B, P, W], the same in each call."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(states.shape[1], generator=generator)[:num_centers] for _ in states]
    return torch.stack(rows).sort(dim=-1).values


@torch.inference_mode()
def embed(model: LoTLIPModel, pixel_values: Tensor, setting: tuple[str, float, float]) -> Tensor:
    """Embeddings [B, D] of images in a setting: method, depth and share."""
    method, depth, share = setting
    layers, patches = model.config.vision_config.num_hidden_layers, model.config.vision_config.num_patches
    use_medoids(model, max(1, round(share * patches)), int(depth * layers + 1e-6))
    choose = at_random if method == "random" else medoids_lotlip.medoids
    with patch.object(medoids_lotlip, "medoids", choose):
        return model.get_image_features(pixel_values, pooled_only=True).pooler_output


def retrieval(checkpoint: Path, num_images: int) -> list[float]:
    """R@1 in percent of each setting: the mean of both directions over long captions of Scenes."""
    encoder = load_encoder(checkpoint, device="cpu", dtype="float32")
    engine, model = encoder.lotlip()
    records = scenes_dataset(num_images, split="test")
    texts = encoder.encode_texts([captions[0] for captions in records["long_captions"]])
    pixels = np.concatenate([engine.pixels(record["image"], "image")["pixel_values"] for record in records])
    found = []
    for setting in SETTINGS:
        images = torch.cat([embed(model, part, setting) for part in torch.from_numpy(pixels).split(100)])
        own = recalls(images, texts, ks=[1])
        found.append(50 * (own["image_to_text_r1"] + own["text_to_image_r1"]))
    return found


def times(size: str, batch_size: int, repeats: int) -> list[float]:
    """Median seconds of each setting for a batch of images."""
    model = peers.make_model(size)
    side = model.config.vision_config.image_size
    pixel_values = torch.randn(batch_size, 3, side, side)
    calls = {str(setting): partial(embed, model, pixel_values, setting) for setting in SETTINGS}
    return list(in_turns(calls, repeats, "image tower").values())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown, with a line for each depth and share."""
    lines = ["| patches | from layer | R@1, medoids | R@1, random | images/s, medoids | speed |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    found = {(row["method"], row["depth"], row["share"]): row for row in rows}
    full = found[FULL]
    lines.append(f"| all | | {full['r1']:.1f} | | {full['images_per_second']:.2f} | 1 |")
    for depth in DEPTHS:
        for share in SHARES:
            own, other = (found[method, depth, share] for method in METHODS)
            speed = own["images_per_second"] / full["images_per_second"]
            cells = f"{own['r1']:.1f} | {other['r1']:.1f} | {own['images_per_second']:.2f} | {speed:.2f}"
            lines.append(f"| {share:.0%} | {_layer(depth)} | {cells} |")
    return "\n".join(lines)


def _layer(depth: float) -> str:
    return "first" if not depth else f"{depth:.0%} of the depth"


def draw(result: Mapping[str, Any], picture: Path) -> None:
    """Plots R@1 against speed for each method and depth."""
    plot = figure(7, 5)
    axes = plot.subplots()
    found = {(row["method"], row["depth"], row["share"]): row for row in result["rows"]}
    full = found[FULL]
    for method, style in zip(METHODS, ("-", ":"), strict=True):
        for depth, colour in zip(DEPTHS, COLOURS, strict=False):
            rows = [full, *(found[method, depth, share] for share in SHARES)]
            speeds = [row["images_per_second"] / full["images_per_second"] for row in rows]
            label = f"{method}, from {'the first layer' if not depth else _layer(depth)}"
            axes.plot(speeds, [row["r1"] for row in rows], f"o{style}", color=colour, markersize=4, label=label)
            for speed, row in zip(speeds[2:], rows[2:], strict=True):
                if method == "medoids":
                    note = f"{row['share']:.0%}"
                    axes.annotate(note, (speed, row["r1"]), (4, 4), textcoords="offset points", fontsize=8)
    axes.plot(1, full["r1"], "k*", markersize=11, label="all patches")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("speed of the image tower (ViT-B/16), all patches = 1")
    axes.set_ylabel(f"R@1 (%), {result['num_images']} pictures of Scenes")
    axes.grid(alpha=0.3)
    plot.legend(loc="outside lower center", ncols=3, fontsize=8)
    save(plot, picture)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all settings, saves the result, prints the table and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="model of Scenes")
    parser.add_argument("--num-images", type=int, default=500, help="pictures to search among (500)")
    parser.add_argument("--size", choices=peers.SIZES, default="base", help="size of the timed image tower (base)")
    parser.add_argument("--batch-size", type=int, default=8, help="images in a timed batch (8)")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed turns (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--results", type=Path, default=FILE, help="file to which the result is appended")
    parser.add_argument("--plot", type=Path, default=PLOT, help="picture to draw")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not arguments.report:
        if arguments.checkpoint is None:
            parser.error("CHECKPOINT is missing")
        found = retrieval(arguments.checkpoint, arguments.num_images)
        seconds = times(arguments.size, arguments.batch_size, arguments.repeats)
        rows = [
            {
                "method": method,
                "depth": depth,
                "share": share,
                "r1": r1,
                "images_per_second": arguments.batch_size / time,
            }
            for (method, depth, share), r1, time in zip(SETTINGS, found, seconds, strict=True)
        ]
        sizes = {name: getattr(arguments, name) for name in ("num_images", "size", "batch_size", "repeats")}
        keep({"checkpoint": arguments.checkpoint.name, **sizes, "rows": rows, **machine()}, arguments.results)
    result = [line for _, line in read_json_lines(arguments.results)][-1]
    print(table(result["rows"]))
    draw(result, arguments.plot)
    print(f"\nDrawn in {arguments.plot}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
