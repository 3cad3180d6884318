"""Fine-tune a checkpoint for search by an image, and keep its search by texts, as 2SFT and MCIP do.

    python examples/finetune_for_retrieval.py --model checkpoint --data pictures --output finetuned
    python examples/finetune_for_retrieval.py --model checkpoint --data pictures --output finetuned --method mcip

`pictures` is a folder of images with `metadata.jsonl`, whose records name their class as `group`. A fifth of the
classes is held out to measure with.

"2sft" has two stages: the image tower learns the classes (the term `margin`), which moves the images away from the
texts; then the image tower is locked, and the text tower follows it (`--lock-vision`). "mcip" trains both towers at
once, with `margin` and `caption_margin`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset

from lotlip_hf.data.collator import read_record
from lotlip_hf.data.records import without_images
from lotlip_hf.encoder import load_encoder
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.files import replacing, write_json
from lotlip_hf.metrics.linking import nearest_precision, split_groups
from lotlip_hf.terminal import printable_output
from lotlip_hf.training.batches import groups_of
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model

STAGES: dict[str, dict[str, dict[str, Any]]] = {
    "2sft": {
        "images": {"terms": ["margin"], "num_long_texts": 0},
        "texts": {"terms": ["infonce"], "num_long_texts": 1, "num_sentences": 0, "lock_vision": True},
    },
    "mcip": {"both": {"terms": ["margin", "caption_margin"], "num_long_texts": 2, "num_sentences": 0}},
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="records with classes as groups, as for lotlip train")
    parser.add_argument("--method", choices=STAGES, default="2sft", help="two stages, or one with captions")
    parser.add_argument("--output", type=Path, default=Path("finetuned"), help="new folder for the stages and report")
    parser.add_argument("--margin", type=float, default=0.5, help="angle in radians by which a class must win")
    parser.add_argument("--scale", type=float, default=64.0, help="factor of the cosines in margins")
    parser.add_argument("--batch-size", type=int, default=64, help="records in a batch")
    parser.add_argument("--num-epochs", type=float, default=3, help="passes of a stage over the training records")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="highest learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the order")
    return parser.parse_args(argv)


def measure(model: Any, records: Dataset, groups: np.ndarray) -> dict[str, float]:
    """Returns how often an image finds its class among images first, and a text (the longest) and image each other."""
    encoder = load_encoder(model)
    images = encoder.encode_images(read_record(record, encoder.engine.open)[1] for record in records)
    rows = [[record["short_caption"] or "", *record["long_captions"][:1]] for record in without_images(records)]
    found = recalls(images, encoder.encode_texts([max(row, key=len) for row in rows]))
    return {
        "image_to_image_r1": nearest_precision(images.numpy(), groups),
        **{name: found[name] for name in ("text_to_image_r1", "image_to_text_r1")},
    }


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains the stages and returns what was measured before and after each."""
    args = parse_arguments(argv)
    records = cast(Dataset, load_data(TrainingConfig(data=args.data))[0])
    groups = groups_of(records)
    training, held_out = split_groups(groups, (0.8, 0.2), args.seed)
    classes = args.output / "classes.txt"
    args.output.mkdir(parents=True, exist_ok=True)
    names = {record["group"] for record in without_images(records.select(training)) if record["group"]}
    with replacing(classes) as file:
        file.write("".join(f"{name}\n" for name in sorted(names)).encode())

    of_terms = {"margin": [f"classes={classes}"], "caption_margin": [], "infonce": []}
    for name in ("margin", "caption_margin"):
        of_terms[name] += [f"margin={args.margin}", f"scale={args.scale}"]
    checkpoint: Any = args.model
    report = {"start": measure(checkpoint, records.select(held_out), groups[held_out])}
    for name, stage in STAGES[args.method].items():
        config = TrainingConfig(
            model=str(checkpoint),
            data=args.data,
            output=str(args.output / name),
            term_options=[f"{term}.{option}" for term in stage["terms"] for option in of_terms[term]],
            batch_size=args.batch_size,
            num_epochs=args.num_epochs,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            seed=args.seed,
            trackers=[],
            **stage,
        )
        checkpoint = train(*load_or_start_model(config), records.select(training), config)
        report[name] = measure(checkpoint, records.select(held_out), groups[held_out])
    write_json(args.output / "report.json", report)
    print(f"On {len(held_out)} held-out pictures in {len(set(groups[held_out].tolist()))} classes:")
    for name, values in report.items():
        print(f"{name:>6}: " + ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in values.items()))
    print(f"Saved {checkpoint}")
    return report


if __name__ == "__main__":
    main()
