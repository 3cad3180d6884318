"""Train a LoTLIP from nothing in a few minutes, and search with it: `make quickstart`.

Trains a small model on Scenes, pictures of shapes that come with short and long captions, measures retrieval over 500
held-out scenes with the checkpoint as `AutoModel` loads it, and ranks them for a long description.

    python examples/quickstart.py --output quickstart

With `--shuffle-captions` every picture gets the captions of another one: there is nothing to learn then, and retrieval
stays at chance.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from shlex import join

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from lotlip_hf import Encoder
from lotlip_hf.cli import main as lotlip
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.scenes.dataset import GROUP_SIZE, scenes_dataset
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.log import CURVE_NAME
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model

NUM_HELD_OUT = 500


def options(output: Path) -> TrainingConfig:
    """What a small model learns Scenes with."""
    return TrainingConfig(
        output=str(output),
        model="scenes",
        data="scenes",
        num_scenes=5000,
        eval_data="scenes",
        eval_steps=100,
        max_steps=700,
        batch_size=64,
        learning_rate=1.5e-3,
        warmup_steps=100,
        num_long_texts=1,
        num_sentences=0,  # whole captions: a model this small learns them sooner than their parts
        # a short caption is one of the four features that the loss is the mean of
        term_options=["infonce.short_loss_weight=2"],
        num_workers=1,
    )


def shuffle_captions(records: Dataset, seed: int = 0) -> Dataset:
    """The pictures of a data set, each with the captions of another."""
    order = np.random.default_rng(seed).permutation(len(records))
    captions = ["short_caption", "long_captions"]
    return concatenate_datasets(
        [records.remove_columns(captions), records.select_columns(captions).select(order)], axis=1
    )


def measure(checkpoint: Path, records: Dataset) -> dict[str, float]:
    """Retrieval over all records, by their first long caption and by their short one."""
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    image_embeds = Encoder(model, processor).encode_images([record["image"] for record in records])
    results = {}
    for kind, texts in (
        ("long", [captions[0] for captions in records["long_captions"]]),
        ("short", records["short_caption"]),
    ):
        found = recalls(image_embeds, Encoder(model, processor).encode_texts(list(texts)))
        results |= {f"{kind}_{name}": value for name, value in found.items()}
    return results


def print_table(results: dict[str, float]) -> None:
    """Print R@1 of [`measure`]."""
    print(f"\nRetrieval over {NUM_HELD_OUT} held-out scenes: R@1, by chance {1 / NUM_HELD_OUT:.1%}")
    print("                 image to text  text to image")
    for kind in ("long", "short"):
        first, second = (results[f"{kind}_{direction}_r1"] for direction in ("image_to_text", "text_to_image"))
        print(f"  {kind:5} captions {first:13.1%}  {second:13.1%}")
    print(f"{GROUP_SIZE} scenes share a short caption, so that nobody finds more than {1 / GROUP_SIZE:.0%} by it.")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, search.

    Args:
        argv: Arguments of the command line; by default those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for everything it makes")
    parser.add_argument("--shuffle-captions", action="store_true", help="train on captions of other pictures")
    parser.add_argument("--max-steps", type=int, help="train for fewer steps")
    arguments = parser.parse_args(argv)
    run, images, picture = arguments.output / "run", arguments.output / "images", arguments.output / "ranked.png"
    logging.disable_progress_bar()  # of loading and saving weights; ours stay
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much where cores are busy
    for folder in (run, images):  # of an earlier quickstart
        shutil.rmtree(folder, ignore_errors=True)

    config = options(run)
    if arguments.max_steps is not None:
        config.max_steps = arguments.max_steps
    records, eval_records = load_data(config)
    if arguments.shuffle_captions:
        records = shuffle_captions(records)
    checkpoint = train(*load_or_start_model(config), records, config, eval_records)

    held_out = scenes_dataset(NUM_HELD_OUT, split="test")
    results = measure(checkpoint, held_out)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print_table(results)

    images.mkdir(parents=True)
    for record in held_out:
        record["image"].save(images / f"{record['id']}.png")
    wanted = held_out[0]
    command = ["search", "--model", checkpoint, "--images", images, "--save-grid", picture, wanted["long_captions"][0]]
    words = [str(word) for word in command]
    print(f"\nOne of them, {wanted['id']}.png, by its long caption:\n\n$ {join(['lotlip', *words])}", flush=True)
    if status := lotlip(words):
        return status
    print(f"""
The model               {checkpoint} (AutoModel.from_pretrained)
Its training curve      {run / CURVE_NAME}
The ranked pictures     {picture}
""")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
