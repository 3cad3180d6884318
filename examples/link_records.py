"""Link records of the same thing by their pictures and texts, as CLIPPINGS does.

    python examples/link_records.py --model checkpoint --data pictures --output linked
    python examples/link_records.py --model checkpoint --data pictures --link unlabelled --output linked

`pictures` is a folder of images with `metadata.jsonl`, whose records name their `group`: the product, the article or
the place that they are about. Three fifths of the groups train the model with the term `groups`, which brings the
pooled embeddings of a group together. On a fifth the threshold is chosen at which single linkage finds the groups, and
on the last fifth the adjusted Rand index is measured, before and after. `links.jsonl` has the clusters of the records
in `--link`, or of the last fifth.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset

from lotlip_hf.data.collator import read_record
from lotlip_hf.data.records import ids_of, without_images
from lotlip_hf.encoder import load_encoder
from lotlip_hf.files import replacing, write_json
from lotlip_hf.metrics.linking import (
    adjusted_rand_index,
    best_threshold,
    clusters,
    nearest_precision,
    single_linkage,
    split_groups,
)
from lotlip_hf.terminal import printable_output
from lotlip_hf.training.batches import groups_of
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.terms.groups import pool

SHARES = (0.6, 0.2, 0.2)  # of the groups: training, choice of the threshold, measurement


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="records with groups, as for lotlip train")
    parser.add_argument("--link", help="records to link, as for lotlip train; by default the held-out ones")
    parser.add_argument("--text-column", help="column of the text of a record; by default the short caption")
    parser.add_argument("--output", type=Path, default=Path("linked"), help="new folder for model, report and links")
    parser.add_argument("--image-weight", type=float, default=0.3, help="weight of the image, 0 to 1")
    parser.add_argument("--hard-negatives", type=int, default=0, help="negatives of a record; 0: the whole batch")
    parser.add_argument("--group-size", type=int, default=3, help="records of a group in a batch")
    parser.add_argument("--batch-size", type=int, default=153, help="records in a batch")
    parser.add_argument("--num-epochs", type=float, default=10, help="passes over the training records")
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="highest learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the order")
    return parser.parse_args(argv)


def embed(model: Any, records: Dataset, image_weight: float) -> np.ndarray:
    """Returns the pooled embeddings of records."""
    encoder = load_encoder(model)
    images = encoder.encode_images(read_record(record, encoder.engine.open)[1] for record in records)
    texts = encoder.encode_texts([record["short_caption"] for record in without_images(records)])
    return pool(images, texts, image_weight).numpy()


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains the model, writes the links and returns the report."""
    args = parse_arguments(argv)
    config = TrainingConfig(
        model=args.model,
        data=args.data,
        short_column=args.text_column,
        output=str(args.output / "model"),
        terms=["groups"],
        term_options=[f"groups.image_weight={args.image_weight}", f"groups.hard_negatives={args.hard_negatives}"],
        group_size=args.group_size,
        batch_size=args.batch_size,
        num_epochs=args.num_epochs,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        num_long_texts=0,
        seed=args.seed,
        trackers=[],
    )
    records = cast(Dataset, load_data(config)[0])
    groups = groups_of(records)
    training, validation, test = split_groups(groups, SHARES, args.seed)
    links_of, report = records.select(test), dict[str, dict[str, float]]()
    if args.link is not None:
        links_of = cast(Dataset, load_data(TrainingConfig(data=args.link, short_column=args.text_column))[0])

    checkpoint: Any = args.model
    for when in ("before", "after"):
        if when == "after":
            checkpoint = train(*load_or_start_model(config), records.select(training), config)
        embeds, held_out = (embed(checkpoint, records.select(part), args.image_weight) for part in (validation, test))
        threshold = best_threshold(single_linkage(embeds), groups[validation])
        found = clusters(single_linkage(held_out), len(test), threshold)
        report[when] = {
            "threshold": threshold,
            "adjusted_rand_index": adjusted_rand_index(groups[test], found),
            "nearest": nearest_precision(held_out, groups[test]),
        }
    if args.link is not None:
        found = clusters(single_linkage(embed(checkpoint, links_of, args.image_weight)), len(links_of), threshold)
    write_json(args.output / "report.json", report)
    with replacing(args.output / "links.jsonl") as file:
        for one, cluster in zip(ids_of(links_of), found.tolist(), strict=True):
            file.write(json.dumps({"id": one, "cluster": cluster}).encode() + b"\n")
    print(f"On {len(test)} held-out records in {len(set(groups[test].tolist()))} groups:")
    for when, values in report.items():
        print(f"{when:>6}: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items()))
    print(f"{len(found)} records in {len(set(found.tolist()))} clusters: {args.output / 'links.jsonl'}")
    return report


if __name__ == "__main__":
    main()
