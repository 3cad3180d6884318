"""Train a small LoTLIP from scratch in a few minutes and search with it (`make quickstart`).

    python examples/quickstart.py --output quickstart

The model is trained on Scenes, drawn pictures of shapes with short and long captions. The example then loads the
checkpoint with `AutoModel`, measures retrieval over 500 held-out scenes, and ranks them for a long description. With
`--shuffle-captions`, each picture gets the captions of another picture, and retrieval stays at chance.
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
    """Returns the options for training a small model on Scenes."""
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
        num_sentences=0,  # a model of this size learns whole captions sooner than sub-captions
        # By default, the short text is only one of four features in the loss.
        term_options=["infonce.short_loss_weight=2"],
        num_workers=1,
    )


def shuffle_captions(records: Dataset, seed: int = 0) -> Dataset:
    """Shuffles the captions among the pictures."""
    order = np.random.default_rng(seed).permutation(len(records))
    captions = ["short_caption", "long_captions"]
    return concatenate_datasets(
        [records.remove_columns(captions), records.select_columns(captions).select(order)], axis=1
    )


def measure(checkpoint: Path, records: Dataset) -> dict[str, float]:
    """Measures retrieval over all records with their first long caption and with their short caption."""
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
    """Prints the R@1 of [`measure`]."""
    print(f"\nRetrieval over {NUM_HELD_OUT} held-out scenes: R@1, by chance {1 / NUM_HELD_OUT:.1%}")
    print("                 image to text  text to image")
    for kind in ("long", "short"):
        first, second = (results[f"{kind}_{direction}_r1"] for direction in ("image_to_text", "text_to_image"))
        print(f"  {kind:5} captions {first:13.1%}  {second:13.1%}")
    print(f"{GROUP_SIZE} scenes share a short caption, so its R@1 cannot exceed {1 / GROUP_SIZE:.0%}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures and searches, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for all results")
    parser.add_argument("--shuffle-captions", action="store_true", help="give each picture the captions of another")
    parser.add_argument("--max-steps", type=int, help="number of training steps (700)")
    arguments = parser.parse_args(argv)
    run, images, picture = arguments.output / "run", arguments.output / "images", arguments.output / "ranked.png"
    logging.disable_progress_bar()  # hides the bars of loading and saving weights
    torch.set_num_threads(1)  # a small model gains nothing from more threads and loses time on busy cores
    for folder in (run, images):  # from an earlier call
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
    print(f"\nSearch for {wanted['id']}.png by its long caption:\n\n$ {join(['lotlip', *words])}", flush=True)
    if status := lotlip(words):
        return status
    print(f"""
Model               {checkpoint} (AutoModel.from_pretrained)
Training curve      {run / CURVE_NAME}
Ranked pictures     {picture}
""")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
