"""Measures the recipe `small-data` and its parts on real pictures: retrieval, time and memory.

Needs a folder with two encoders, `minilm` and `dinov2-small`, and two folders of records, `train` and `dev`. Each
setting trains by `lotlip train --recipe small-data` in a process of its own, once for each seed. Retrieval is measured
over `dev`, which no run sees. Each result is saved at once in `benchmarks/results/small-data.jsonl`.

    python benchmarks/small_data.py FOLDER                            # all settings, seeds 0 1 2; several hours
    python benchmarks/small_data.py FOLDER --only recipe --seeds 0    # one setting, one seed
    python benchmarks/small_data.py --report                          # run nothing; print the table
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lotlip_hf.encoder import load_encoder
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.files import parse_json, read_json_lines
from lotlip_hf.training.config import recipes
from lotlip_hf.training.stages import STAGES_NAME
from measure import RESULTS, keep, machine

FILE = RESULTS / "small-data.jsonl"
# Changes of each setting to the recipe: options of all stages and of single stages. `None` leaves out a stage.
SETTINGS: dict[str, dict[str, Any]] = {
    "heads": {"stages": {"towers": None}},
    "heads, random start": {"stages": {"heads": {"head_start": "random", "learning_rate": 1e-3}, "towers": None}},
    "heads, no dropout": {"stages": {"heads": {"state_dropout": 0.0}, "towers": None}},
    "heads, last layer only": {"image_layers": 1, "stages": {"towers": None}},
    "recipe": {},
    "recipe, no corner tokens": {"num_corner_tokens": 0, "stages": {"heads": {"lock_corner_tokens": False}}},
    # The steps of the recipe's second stage, but of the whole text tower, with new projections, as LiT trains
    "LiT": {
        "num_corner_tokens": 0,
        "image_layers": 1,
        "stages": {
            "heads": None,
            "towers": {"lock_text": False, "unlocked_text_layers": 0, "state_dropout": 0.0, "learning_rate": 1e-3},
        },
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the settings and prints the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with minilm, dinov2-small, train and dev")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--cache", help="cache of frozen states (an empty one for each run, to time all of it)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    if not arguments.report:
        if arguments.folder is None:
            parser.error("FOLDER is missing")
        for seed in arguments.seeds:
            for setting in arguments.only:
                for line in run(setting, seed, arguments.folder, arguments.cache):
                    keep(line, FILE)
    print_table([line for _, line in read_json_lines(FILE)])
    return 0


def run(setting: str, seed: int, folder: Path, cache: str | None) -> list[dict[str, Any]]:
    """Trains once and returns a line for each stage."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "run")
        config = Path(temporary, "config.yaml")
        config.write_text(yaml.safe_dump(options(setting)), encoding="utf-8")
        command = [sys.executable, "-m", "lotlip_hf", "train", "--config", str(config), "--output", str(output)]
        command += ["--text-model", str(folder / "minilm"), "--image-model", str(folder / "dinov2-small")]
        command += ["--data", str(folder / "train"), "--seed", str(seed), "--cache", cache or f"{temporary}/cache"]
        start = time.time()
        _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed.")
        measured = {"seconds": time.time() - start, "gigabytes": usage.ru_maxrss / 1e6}  # without its data workers
        common = {"setting": setting, "seed": seed, "warm": cache is not None, **measured}
        stages = parse_json((output / STAGES_NAME).read_bytes())
        return [
            {**common, "stage": stage, **measure(output / stage / checkpoint, folder / "dev"), **machine()}
            for stage, checkpoint in stages.items()
        ]


def options(setting: str) -> dict[str, Any]:
    """Returns the options of the recipe with the changes of a setting."""
    changes = dict(SETTINGS[setting])
    made = yaml.safe_load(recipes()["small-data"].read_text(encoding="utf-8"))
    for stage, own in changes.pop("stages", {}).items():
        if own is None:
            del made["stages"][stage]
        else:
            made["stages"][stage] |= own
    return {**made, **changes}


def measure(checkpoint: Path, records: Path) -> dict[str, float]:
    """Returns R@1 and R@10 in percent by long and short captions, the means of both directions."""
    encoder = load_encoder(checkpoint)
    rows = [row for _, row in read_json_lines(records / "metadata.jsonl")]
    images = encoder.encode_images([records / row["file_name"] for row in rows])
    results = {}
    for kind, texts in (
        ("long", [row["long_captions"][0] for row in rows]),
        ("short", [row["short_caption"] for row in rows]),
    ):
        found = recalls(images, encoder.encode_texts(texts))
        for k in (1, 10):
            results[f"{kind}_r{k}"] = 50 * (found[f"image_to_text_r{k}"] + found[f"text_to_image_r{k}"])
    return results


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """Prints the means and the spread over the seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["setting"], line["stage"]), []).append(line)
    names = ("long_r1", "long_r10", "short_r1", "short_r10")
    head = "".join(f"{name:>14}" for name in names) + f"{'seconds':>10}{'GB':>6}"
    print(f"{'setting':26} {'stage':8} {'seeds':>5}{head}")
    for (setting, stage), found in groups.items():
        cells = ""
        for name in names:
            values = [line[name] for line in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells += f"{statistics.mean(values):8.1f} ± {spread:3.1f}"
        seconds = statistics.mean(line["seconds"] for line in found)
        memory = max(line["gigabytes"] for line in found)
        print(f"{setting:26} {stage:8} {len(found):5}{cells}{seconds:10.0f}{memory:6.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
