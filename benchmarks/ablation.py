"""
Repeats the paper's ablation study with a small model: long captions, corner tokens, sub-captions, token limits; and
compares methods of others beside it.

Trains a small model on Scenes for each setting and seed, and measures retrieval over 500 held-out scenes. Each result
is saved at once in `benchmarks/results/ablation.jsonl`, so an interrupted study resumes with the missing runs.

    python benchmarks/ablation.py                             # run the missing settings; print tables, draw the plot
    python benchmarks/ablation.py --only captions tokens-32   # run groups of settings, or single settings
    python benchmarks/ablation.py --report                    # run nothing; print tables, draw the plot

Each setting changes one option of `corners-2`. `corners-2` uses sub-captions of three sentences and 128 tokens, so it
is a member of every group, but is trained only once.

Without the corner mask (`mask-off`), all tokens attend to each other. With the mask, the feature of [CLS] does not
depend on the corner tokens, so these can be omitted at inference. Without the mask it depends on them, so `mask-off`
has corner tokens in every text, short and long, in training and in evaluation. Retrieval uses only the feature of
[CLS] in all settings.

The group `methods` adds terms, teachers and strategies to `sentences-all`, which has whole captions. The group
`continued` trains its model for 150 more steps, with and without terms for trained models. "True over false"
is the share of held-out pictures that are nearer to their caption than to the same caption with one wrong attribute.

Four held-out scenes share each short caption, so R@1 with short captions is at most about 25 %.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from lotlip_hf import Encoder, LoTLIPModel
from lotlip_hf.files import read_json_lines
from lotlip_hf.modeling import modeling_lotlip
from lotlip_hf.scenes.dataset import GROUP_SIZE, TAGS
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.log import LOG_NAME, read_log
from lotlip_hf.training.loop import NonFiniteLossError, train
from lotlip_hf.training.model import load_or_start_model
from measure import RESULTS as FOLDER
from measure import keep, machine

RESULTS = FOLDER / "ablation.jsonl"

# Options of `corners-2`
BASE: dict[str, Any] = {
    "model": "scenes",
    "num_corner_tokens": 2,
    "corner_mask": True,
    "max_text_length": 128,
    "data": "scenes",
    "num_scenes": 5000,
    "num_long_texts": 1,
    "num_sentences": 3,
    "batch_size": 64,
    "max_steps": 400,
    "learning_rate": 1.5e-3,
    "warmup_steps": 100,
    "weight_decay": 0.05,
    "beta2": 0.999,
    "eval_data": "scenes",
    "eval_split": "test",
    "eval_samples": 500,
}


# The model is held by its own moving average, as in the second stage of ProCLIP.
AVERAGE = {
    "terms": ["infonce", "instance"],
    "term_options": ["instance.of=image"],
    "teacher": "ema",
    "teacher_momentum": 0.99,
}
NEGATIVES = {"terms": ["infonce", "negatives:0.3"]}
TAGGED = {"terms": ["infonce", "tags"]}
# Harder at the start than a model can learn from: only for a trained model.
HARD = {"terms": ["infonce", "hard_negatives:0.3"], "term_options": ["hard_negatives.temperature=0.07"]}
# A second stage of a model that was trained with whole captions and the same seed.
CONTINUED = {"num_sentences": 0, "start_steps": 400, "max_steps": 150, "warmup_steps": 20, "learning_rate": 5e-4}


class Setting(NamedTuple):
    """Name of a setting, its label in the plot, and its changes to `BASE`."""

    name: str
    label: str
    changes: dict[str, Any]


def _numbered(name: str, option: str, labels: Mapping[int, str]) -> list[Setting]:
    return [Setting(f"{name}-{label}", label, {option: number}) for number, label in labels.items()]


GROUPS: dict[str, list[Setting]] = {
    "captions": [
        Setting("short", "short\nonly", {"num_long_texts": 0, "num_corner_tokens": 0}),
        Setting("long", "short\nand long", {"num_corner_tokens": 0}),
        Setting("corners-1", "1 corner", {"num_corner_tokens": 1}),
        Setting("corners-2", "2 corners", {}),
        Setting("corners-4", "4 corners", {"num_corner_tokens": 4}),
        Setting("mask-off", "2 corners,\nmask off", {"corner_mask": False}),
    ],
    "sentences": _numbered("sentences", "num_sentences", {1: "1", 2: "2", 3: "3", 4: "4", 0: "all"}),
    "tokens": _numbered("tokens", "max_text_length", {number: str(number) for number in (32, 64, 128, 192, 256)}),
    "methods": [
        Setting("sentences-all", "whole\ncaptions", {"num_sentences": 0}),
        *(
            Setting(name, label, {"num_sentences": 0, **changes})
            for name, label, changes in (
                ("negatives", "written\nnegatives", NEGATIVES),
                ("tags", "tags", TAGGED),
                ("soft-labels", "soft\nlabels", {"terms": ["soft_labels"]}),
                ("smoothing", "smoothed\nlabels", {"term_options": ["infonce.label_smoothing=0.1"]}),
                ("components", "primary\ncomponents", {"terms": ["primary_components"]}),
                ("mixed", "mixed\ncaptions", {"captions": "mixed"}),
                ("average", "moving\naverage", AVERAGE),
            )
        ),
    ],
    "continued": [
        Setting(f"continued-{name}", label, {**CONTINUED, **changes})
        for name, label, changes in (
            ("plain", "no further\nterm", {}),
            ("negatives", "written\nnegatives", NEGATIVES),
            ("tags", "tags", TAGGED),
            ("hard-negatives", "hard\nnegatives", HARD),
        )
    ],
}
TITLES = {
    "captions": "Captions and corner tokens",
    "sentences": "Sentences of a sub-caption",
    "tokens": "Token limit",
    "methods": "Methods of others",
    "continued": "Methods in a second stage",
}
# Two settings, and how the paper rates the first against the second, with long and with short captions. In the paper,
# long captions without corner tokens lower the recall of short captions, and corner tokens restore it.
COMPARISONS = [
    ("long", "short", "better", "worse"),
    ("corners-1", "long", "better", "better"),
    ("corners-2", "long", "better", "better"),
    ("corners-4", "long", "better", "better"),
    ("corners-2", "mask-off", "better", "-"),
    ("sentences-3", "sentences-1", "-", "-"),
    ("sentences-3", "sentences-all", "-", "-"),
    ("tokens-64", "tokens-32", "better", "-"),
    ("tokens-128", "tokens-64", "better", "-"),
    ("tokens-192", "tokens-128", "better", "-"),
    ("tokens-256", "tokens-192", "the same", "-"),
    *((setting.name, "sentences-all", "-", "-") for setting in GROUPS["methods"][1:]),
    *((setting.name, "continued-plain", "-", "-") for setting in GROUPS["continued"][1:]),
]
RECALLS = [f"{length}_{way}_r1" for length in ("long", "short") for way in ("image_to_text", "text_to_image")]


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the missing settings, and reports all results.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; by default those of the process.

    Returns:
        `int`: Exit status: 0, or 1 if a run diverged.
    """
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    base = {**BASE, "max_steps": arguments.steps, "num_scenes": arguments.num_scenes}
    base |= {"batch_size": arguments.batch_size, "eval_samples": arguments.eval_samples}
    base["warmup_steps"] = min(BASE["warmup_steps"], arguments.steps // 4)
    chosen = [
        setting
        for group, settings in GROUPS.items()
        for setting in settings
        if not arguments.only or group in arguments.only or setting.name in arguments.only
    ]
    failed = 0
    if not arguments.report:
        failed = run_study(base, chosen, arguments.seeds, arguments.results)
    report(base, arguments.seeds, arguments.results)
    return 1 if failed else 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    names = [*GROUPS, *dict.fromkeys(setting.name for settings in GROUPS.values() for setting in settings)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seeds = "random seeds of weights, data and drawn texts (0 1 2)"
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help=seeds)
    only = f"groups or settings to run, from {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=only)
    parser.add_argument("--steps", type=int, default=BASE["max_steps"], help="optimiser steps (%(default)s)")
    parser.add_argument("--num-scenes", type=int, default=BASE["num_scenes"], help="training scenes (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=BASE["batch_size"], help="images in a step (%(default)s)")
    parser.add_argument("--eval-samples", type=int, default=BASE["eval_samples"], help="held-out scenes (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results; the plot is saved next to it")
    parser.add_argument("--report", action="store_true", help="only print tables and draw the plot")
    return parser.parse_args(argv)


def run_study(base: Mapping[str, Any], settings: Sequence[Setting], seeds: Sequence[int], results: Path) -> int:
    """
    Runs every setting with every seed that has no result yet, seed after seed.

    Args:
        base (`Mapping[str, Any]`): Options that the settings change.
        settings (`Sequence[Setting]`): Settings.
        seeds (`Sequence[int]`): Seeds.
        results (`Path`): File to which each result is appended.

    Returns:
        `int`: Number of runs without a result, because their loss was not finite.
    """
    wanted: dict[str, tuple[Setting, dict[str, Any]]] = {}
    for seed in seeds:
        for setting in settings:
            options = {**base, **setting.changes, "seed": seed}
            # Settings with the same options share a run.
            wanted.setdefault(json.dumps(options, sort_keys=True), (setting, options))
    known = [entry["options"] for entry in read_results(results)]
    missing = [(setting, options) for setting, options in wanted.values() if options not in known]
    tqdm.write(f"{len(missing)} of {len(wanted)} runs are missing.")
    results.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    for setting, options in tqdm(missing, desc="Runs", unit="run", disable=not missing):
        name = f"{setting.name}, seed {options['seed']}"
        start = time.perf_counter()
        try:
            recalls = run(options)
        except NonFiniteLossError as error:
            failed += 1
            tqdm.write(f"{name}: no result. {error}", file=sys.stderr)
            continue
        entry = {
            "setting": setting.name,
            "options": options,
            "results": recalls,
            "seconds": round(time.perf_counter() - start, 1),
            **machine(),
        }
        keep(entry, results)
        long, short = (
            f"{100 * recalls[one]:.1f} / {100 * recalls[other]:.1f} %" for one, other in (RECALLS[:2], RECALLS[2:])
        )
        tqdm.write(f"{name}: R@1 {long} with long captions, {short} with short captions; {entry['seconds']:.0f} s")
    return failed


def run(options: Mapping[str, Any]) -> dict[str, float]:
    """
    Trains one model and evaluates it.

    Args:
        options (`Mapping[str, Any]`): Options of [`TrainingConfig`], `corner_mask`, and `start_steps`, the steps of a
            first stage with the options of `BASE`.

    Returns:
        `dict[str, float]`: Recalls from the training log, and `long_cut`, the share of long captions in the evaluation
        that the token limit truncates.
    """
    options = dict(options)
    has_mask, start_steps = options.pop("corner_mask"), options.pop("start_steps", 0)
    if start_steps:
        start = {name: options[name] if name in options else BASE[name] for name in BASE if name != "corner_mask"}
        of_start = {name: BASE[name] for name in ("learning_rate", "warmup_steps")} | {"max_steps": start_steps}
        options["model"] = start_of(json.dumps({**start, **of_start, "seed": options["seed"]}, sort_keys=True)).name
        del options["num_corner_tokens"], options["max_text_length"]  # those of the model
    with tempfile.TemporaryDirectory() as output:
        if any(term.startswith("tags") for term in options.get("terms", ())):
            Path(output, "tags.txt").write_text("\n".join(TAGS), encoding="utf-8")
            options["term_options"] = [f"tags.vocabulary={output}/tags.txt"]
        config = TrainingConfig(**options, output=f"{output}/run", trackers=[], num_workers=0)
        model, processor = load_or_start_model(config)
        records, eval_records = load_data(config)
        with nullcontext() if has_mask else corner_mask_off(model):
            train(model, processor, records, config, eval_records)
        evaluation = [entry for entry in read_log(Path(config.output, LOG_NAME)) if RECALLS[0] in entry][-1]
    captions = [captions[0] for captions in eval_records.select(range(config.eval_samples))["long_captions"]]
    lengths = [len(ids) for ids in processor.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
    cut = statistics.mean(length > processor.tokenizer.model_max_length for length in lengths)
    recalls = {name: value for name, value in evaluation.items() if name not in ("step", "epoch")}
    chosen = eval_records.select(range(config.eval_samples))
    return {**recalls, "long_cut": cut, "true_over_false": true_over_false(Encoder(model, processor), chosen)}


@cache
def start_of(options: str) -> tempfile.TemporaryDirectory:
    """Returns the folder of a model trained with options in JSON. The runs of a program share it."""
    folder = tempfile.TemporaryDirectory()
    config = TrainingConfig(**json.loads(options), output=f"{folder.name}/run", trackers=[], num_workers=0)
    model, processor = load_or_start_model(config)
    records, _ = load_data(config)
    train(model, processor, records, config)
    model.save_pretrained(folder.name)
    processor.save_pretrained(folder.name)
    return folder


def true_over_false(encoder: Encoder, records: Dataset) -> float:
    """Returns the share of images that are nearer to a caption than to the caption with one wrong attribute."""
    images = encoder.encode_images(records["image"], progress=False)
    true, false = (  # the first negative is the first long caption with an attribute exchanged
        encoder.encode_texts([captions[0] for captions in records[name]], progress=False)
        for name in ("long_captions", "negatives")
    )
    return ((images * true).sum(1) > (images * false).sum(1)).float().mean().item()


@contextmanager
def corner_mask_off(model: LoTLIPModel) -> Iterator[None]:
    """
    Removes the corner mask within the context: all tokens except padding attend to each other. Every text has corner
    tokens, also in evaluation.

    Args:
        model (`LoTLIPModel`): Model. No other model may be used within the context.
    """

    def with_corners(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "output_corner_embeds": True}

    def padding_mask(
        family: Any, config: PreTrainedConfig, inputs_embeds: torch.Tensor, is_text: torch.Tensor, *of_the_rule: Any
    ) -> Any:
        num_corner_tokens = inputs_embeds.shape[1] - is_text.shape[1]
        text_mask = torch.nn.functional.pad(is_text.bool(), (0, num_corner_tokens), value=True)
        return create_bidirectional_mask(config=config, inputs_embeds=inputs_embeds, attention_mask=text_mask)

    handle = model.text_model.register_forward_pre_hook(with_corners, with_kwargs=True)
    try:
        with (
            mock.patch.object(modeling_lotlip, "create_corner_mask", padding_mask),
            mock.patch.object(model.config.text_config.family, "takes_rows", False),  # rows have their own mask
        ):
            yield
    finally:
        handle.remove()


def read_results(results: Path) -> list[dict[str, Any]]:
    """
    Reads the results.

    Args:
        results (`Path`): File of results.

    Returns:
        `list[dict[str, Any]]`: Entries of all runs, with `options` and `results`. Empty if the file does not exist.

    Raises:
        `ValueError`: If a line is damaged.
    """
    return [entry for _, entry in read_json_lines(results)] if results.exists() else []


def report(base: Mapping[str, Any], seeds: Sequence[int], results: Path) -> None:
    """
    Prints the tables in Markdown, and draws the plot next to the results.

    Args:
        base (`Mapping[str, Any]`): Options that the settings change. Results with other options are ignored.
        seeds (`Sequence[int]`): Seeds to report.
        results (`Path`): File of results.

    Raises:
        `ValueError`: If there is no result to report.
    """
    entries = read_results(results)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for settings in GROUPS.values():
        for setting in settings:
            of_seed = {}
            for seed in seeds:
                options = {**base, **setting.changes, "seed": seed}
                match = [entry for entry in entries if entry["options"] == options]
                if match:
                    of_seed[seed] = match[-1]
            if of_seed:
                found[setting.name] = of_seed
    if not found:
        raise ValueError(
            f"{results}: none of its {len(entries)} runs has these options: {json.dumps(dict(base))}, "
            f"seeds {', '.join(map(str, seeds))}. Run the study without --report first."
        )
    print(
        f"\nR@1 in % over {base['eval_samples']} held-out scenes (chance: {100 / base['eval_samples']:.1f} %) after "
        f"{base['max_steps']} steps of {base['batch_size']} scenes (a second stage: {CONTINUED['max_steps']}). "
        "Mean and standard deviation over the seeds."
    )
    for group, settings in GROUPS.items():
        rows = [setting for setting in settings if setting.name in found]
        if not rows:
            continue
        columns = [name.removesuffix("_r1").replace("_", " ") for name in RECALLS]
        has_false = group in ("methods", "continued")
        last = "true over false" if has_false else "truncated captions"
        print(f"\n| {TITLES[group]} | {' | '.join(columns)} | {last} | seeds | seconds per run |")
        print("|---|" + "---:|" * (len(columns) + 3))
        for setting in rows:
            runs = list(found[setting.name].values())
            cells = [_mean_and_spread([100 * one["results"][name] for one in runs]) for name in RECALLS]
            if has_false:
                cells += [_mean_and_spread([100 * one["results"]["true_over_false"] for one in runs])]
            else:
                cells += [f"{100 * statistics.mean(one['results']['long_cut'] for one in runs):.0f} %"]
            cells += [str(len(runs))]
            cells += [f"{statistics.mean(one['seconds'] for one in runs):.0f}"]
            print(f"| {setting.label.replace(chr(10), ' ')} | {' | '.join(cells)} |")
    _print_comparisons(found)
    picture = results.with_suffix(".png")
    draw(found, picture)
    print(f"\nPlot: {os.path.relpath(picture)}")


def _print_comparisons(found: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    lines = []
    for name, other, *expected in COMPARISONS:
        seeds = sorted(found.get(name, {}).keys() & found.get(other, {}).keys())
        if not seeds:
            continue
        cells = []
        for length, of_paper in zip(("long", "short"), expected, strict=True):
            differences = [
                100 * (_both_ways(found[name][seed], length) - _both_ways(found[other][seed], length))
                for seed in seeds
            ]
            mean = statistics.mean(differences)
            if len(seeds) < 3:
                verdict = "too few seeds"
            elif abs(mean) > 2 * statistics.stdev(differences):
                verdict = "better" if mean > 0 else "worse"
            else:
                verdict = "no clear difference"
            cells += [of_paper, _mean_and_spread(differences, sign="+"), verdict]
        lines.append(f"| {name} | {other} | {' | '.join(cells)} | {len(seeds)} |")
    if lines:
        print(
            "\nDifferences in percentage points of R@1 (mean of both directions). A difference is clear if its mean "
            "over at least three seeds is more than twice its standard deviation.\n"
        )
        print("| setting | compared with | long: paper | long: here | | short: paper | short: here | | seeds |")
        print("|---|---|---|---:|---|---|---:|---|---:|")
        print("\n".join(lines))


def _both_ways(entry: Mapping[str, Any], length: str) -> float:
    """Returns the mean R@1 of both directions, for long or short captions."""
    return statistics.mean(entry["results"][name] for name in RECALLS if name.startswith(length))


def _mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def draw(found: Mapping[str, Mapping[int, Mapping[str, Any]]], picture: Path) -> None:
    """
    Plots R@1 with long and with short captions for each group of settings: a dot for every seed, the mean and the
    standard deviation.

    Args:
        found (`Mapping[str, Mapping[int, Mapping[str, Any]]]`): Result by name of the setting and by seed.
        picture (`Path`): File to write.
    """
    from matplotlib.figure import Figure

    groups = {group: [one for one in settings if one.name in found] for group, settings in GROUPS.items()}
    groups = {group: settings for group, settings in groups.items() if settings}
    figure = Figure(figsize=(1.2 + sum(0.9 + 0.75 * len(settings) for settings in groups.values()), 4.5))
    figure.set_layout_engine("constrained")
    widths = [1 + len(settings) for settings in groups.values()]
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (group, settings) in zip(panels, groups.items(), strict=True):
        for length, colour, shift in (("long", "C0", -0.12), ("short", "C1", 0.12)):
            values = [[100 * _both_ways(run, length) for run in found[one.name].values()] for one in settings]
            positions = [index + shift for index in range(len(settings))]
            means = [statistics.mean(of_seeds) for of_seeds in values]
            spreads = [statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0 for of_seeds in values]
            label = f"{length} captions: mean, standard deviation"
            axes.errorbar(positions, means, spreads, fmt="_", color=colour, markersize=14, capsize=4, label=label)
            for position, of_seeds in zip(positions, values, strict=True):
                axes.plot([position] * len(of_seeds), of_seeds, ".", color=colour, alpha=0.5)
        most = 100 / GROUP_SIZE
        axes.axhline(most, color="C1", linestyle=":", linewidth=1, label="maximum for short captions")
        axes.set_xticks(range(len(settings)), [one.label for one in settings])
        axes.set_xlim(-0.6, len(settings) - 0.4)
        axes.set_title(TITLES[group])
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("R@1 (%), both directions")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"ablation: error: {error}")
    except KeyboardInterrupt:
        sys.exit("ablation: interrupted. Finished runs are saved. Run the same command to resume.")
