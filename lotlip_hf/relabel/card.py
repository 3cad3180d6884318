"""Statistics (table 6 of the LoTLIP paper), histograms and the data set card of a relabelled data set."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData
from transformers import PreTrainedTokenizerBase

from ..data.sentences import split_sentences
from ..evaluation.tables import Format, table
from ..files import markdown_text, printable, replacing, write_json
from ..plots import COLOURS, figure, save, wrapped
from .captioners.base import ROLES, published_name
from .chunks import SUFFIXES
from .config import NO_ANSWER, NO_TEXT, RelabelConfig
from .quality import REASONS

CARD = "README.md"
HISTOGRAMS = "histograms.png"
STATISTICS = "statistics.json"
EXPLAINED = {
    **REASONS,
    NO_ANSWER: "The endpoint or the model's processor rejects the image or the text.",
    NO_TEXT: "The record lacks a text that the prompt needs.",
}
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")  # by digits
COUNTED = ("tokens", "sub_captions")
ALL = "all long captions"


def shard_statistics(
    details: Sequence[Sequence[Mapping[str, Any]]],
    images: int,
    raw_captions: Sequence[str],
    config: RelabelConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """
    Computes the counts of a shard, which [`merge_statistics`] adds up. `details` is the column `captions` of all
    readable images. `images` is the number of images with a caption; only these are in the shard.
    """
    raw = {
        "tokens": Counter(num_tokens(tokenizer, text) for text in raw_captions),
        "sub_captions": Counter(len(split_sentences(text)) for text in raw_captions),
    }
    captioners = []
    for number in range(len(config.captioners)):
        captions = [one[number] for one in details]
        kept = [caption for caption in captions if caption["dropped"] is None]
        dropped = [caption for caption in captions if caption["dropped"] is not None]
        captioners.append(
            {
                **{name: Counter(caption[name] for caption in kept if caption["tokens"]) for name in COUNTED},
                "dropped": len(dropped),
                "asked_again": sum(caption["attempts"] > 1 for caption in captions),
                "marked": Counter(reason for caption in kept for reason in caption["reasons"]),
                "dropped_for": Counter(
                    reason
                    for caption in dropped
                    for reason in caption["reasons"]
                    if config.policies.get(reason) != "keep"
                ),
                "mended": Counter(
                    reason
                    for caption in kept
                    for reason in caption["earlier_reasons"]
                    if reason not in caption["reasons"]
                ),
            }
        )
    return {"images": images, "raw": raw, "captioners": captioners}


def merge_statistics(config: RelabelConfig, shards: Sequence[Mapping[str, Any]], num_skipped: int) -> dict[str, Any]:
    """
    Adds up the counts of all shards, and computes means. The result has `images`, `skipped`, and `captions`: a list of
    the statistics of the raw captions, of each captioner, and of all long captions if a captioner writes them.
    """
    images = sum(shard["images"] for shard in shards)
    rows = [_merged("raw captions", [shard["raw"] for shard in shards])]
    for number, captioner in enumerate(config.captioners):
        name = published_name(captioner.model) + ("" if captioner.role == "long" else f" ({captioner.role})")
        rows.append(_merged(name, [shard["captioners"][number] for shard in shards]))
    if config.writes_long:
        long = [row for row, captioner in zip(rows[1:], config.captioners, strict=True) if captioner.role == "long"]
        rows.append(_merged(ALL, [{name: row[name] for name in COUNTED} for row in long]))
    return {"images": images, "skipped": num_skipped, "captions": rows}


def _merged(name: str, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        for what, value in part.items():
            if isinstance(value, Mapping):
                counts = merged.setdefault(what, Counter())
                for key, count in value.items():
                    counts[int(key) if what in COUNTED else key] += count
            else:
                merged[what] = merged.get(what, 0) + value
    for what in COUNTED:
        merged.setdefault(what, Counter())
    texts = sum(merged["tokens"].values())
    means = {f"mean_{what}": _mean(merged[what]) for what in COUNTED}
    merged = {
        what: dict(sorted(value.items())) if isinstance(value, Counter) else value for what, value in merged.items()
    }
    return {"name": name, "texts": texts, **means, **merged}


def _mean(counts: Mapping[int, int]) -> float | None:
    total = sum(counts.values())
    return sum(value * count for value, count in counts.items()) / total if total else None


def statistics_table(statistics: Mapping[str, Any], format: Format = "markdown") -> str:
    """Returns table 6 of the LoTLIP paper for a data set."""
    rows = []
    for row in statistics["captions"]:
        means = ["-" if row[f"mean_{what}"] is None else f"{row[f'mean_{what}']:.2f}" for what in COUNTED[::-1]]
        rows.append([row["name"], f"{statistics['images']:,}", f"{row['texts']:,}", *means])
    return table([["captions", "images", "texts", "mean sub-captions", "mean tokens"]], rows, format)


def write_card(config: RelabelConfig, statistics: Mapping[str, Any], revisions: Sequence[Sequence[str]]) -> None:
    """Writes `README.md`, `histograms.png` and `statistics.json` to the folder of the data set."""
    folder = Path(config.output)
    write_json(folder / STATISTICS, statistics)
    _draw_histograms(statistics, folder / HISTOGRAMS)
    with replacing(folder / CARD) as file:
        file.write(_card(config, statistics, revisions).encode())


def _card(config: RelabelConfig, statistics: Mapping[str, Any], revisions: Sequence[Sequence[str]]) -> str:
    images = statistics["images"]
    metadata = DatasetCardData(
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["lotlip", "long-captions", "synthetic"],
        size_categories=[SIZES[min(max(len(str(images)) - 3, 0), len(SIZES) - 1)]],
        configs=[{"config_name": "default", "data_files": f"data/*{SUFFIXES[config.format]}"}],
    )
    captioners = [
        f"| {_cell(published_name(one.model))} | {_cell(', '.join(known)) or '-'} | "
        f"{'an endpoint' if one.endpoint else 'transformers'} | "
        f"{f'{one.input} | {ROLES[one.role]} | ' if config.uses_texts else ''}{_cell(one.prompt) or '(none)'} | "
        f"{_code(one.published_settings())} | {_code(json.dumps(dict(one.retry)))} |"
        for one, known in zip(config.captioners, revisions, strict=False)
    ]
    rows = statistics["captions"][1 : len(captioners) + 1]
    reasons = [
        reason for reason in EXPLAINED if any(reason in row[kind] for row in rows for kind in KINDS if kind in row)
    ]
    quality = [
        f"| {reason}: {EXPLAINED[reason]} | {config.policies.get(reason, 'drop')} | "
        + " | ".join(f"{sum(row.get(kind, {}).get(reason, 0) for row in rows):,}" for kind in KINDS)
        + " |"
        for reason in reasons
    ]
    rules = ", ".join(f"`{name}` {value}" for name, value in dataclasses.asdict(config.rules).items())
    return CARD_TEXT.format(
        metadata=metadata.to_yaml(),
        images=f"{images:,}",
        captioners="\n".join(captioners),
        number=len(config.captioners),
        models="model" if len(config.captioners) == 1 else "models",
        title="long captions" if config.writes_long else "captions",
        written="Long captions" if not config.uses_texts else "Captions",
        long=LONG if config.writes_long else "long captions of the source data",
        head=" input | field |" if config.uses_texts else "",
        rule=" --- | --- |" if config.uses_texts else "",
        columns=ROLE_COLUMNS if config.uses_texts else "",
        details=", `.input`, `.role`" if config.uses_texts else "",
        table=statistics_table(statistics),
        tokenizer=_code(published_name(config.tokenizer)),
        skipped=f"{statistics['skipped']:,}",
        rules=rules,
        quality="\n".join([*QUALITY_HEAD, *quality]) if quality else "No caption has a problem.",
    )


LONG = "one caption by each model that writes long captions, in the order above; empty if it was dropped"
ROLE_COLUMNS = """\
| `rewrites`, `negatives`, `tags` | texts by the models with this field, or those of the source data if there is none |
| `regions`, `group` | those of the source data |
"""
KINDS = ("mended", "marked", "dropped_for")
QUALITY_HEAD = (
    "| problem | policy | fixed by another attempt | kept and marked | dropped |",
    "| --- | --- | --- | --- | --- |",
)
CARD_TEXT = """\
---
{metadata}
---

# {images} images with {title}

{written} by {number} {models}, written with `lotlip relabel` of lotlip-hf. They are made for LoTLIP
([arXiv:2410.05249](https://arxiv.org/abs/2410.05249)), which trains on one short and several long captions per image.

## Statistics

The columns are those of table 6 of the paper. A sub-caption is a sentence. {tokenizer} counts the tokens, without
special tokens.

{table}

![Histograms of the lengths of the captions](histograms.png)

Skipped records: {skipped}. Their image is unreadable, or they have no caption. `skipped.jsonl` lists the reasons.

## Captioning models

| model | revision | run by |{head} prompt | settings | changes for further attempts |
| --- | --- | --- |{rule} --- | --- | --- |
{captioners}

## Quality of the captions

{quality}

Limits: {rules}. An answer that was cut off is trimmed to its last complete sentence.

## Columns

| column | contents |
| --- | --- |
| `id` | id of the record in the source data |
| `image` | contents and name of the image file, or only its path relative to the image folder (see `--embed-images`) |
| `short_caption` | raw caption, or the first sentence of the first long caption if there is no raw caption |
| `long_captions` | {long} |
{columns}| `captions` | details of the answer of each model, in the order above |
| `captions.model`, `.revision`, `.prompt`, `.settings`{details} | model, prompt and settings (JSON) of the caption |
| `captions.attempts` | number of attempts |
| `captions.tokens`, `.sub_captions` | length in tokens and in sub-captions |
| `captions.reasons`, `.earlier_reasons` | problems of the caption, and problems of earlier attempts |
| `captions.dropped` | dropped text, or the reason why there is no text |

## Use

```bash
lotlip train --data FOLDER --text-model google-bert/bert-base-uncased \\
    --image-model google/vit-base-patch16-224-in21k --output run
```

If `image` is a path, add `--image-folder FOLDER`.
"""


def _draw_histograms(statistics: Mapping[str, Any], file: Path) -> None:
    rows = [row for row in statistics["captions"] if row["texts"] and row["name"] != ALL]
    picture = figure(8, 3.6)
    for axes, what, label in zip(picture.subplots(1, 2), COUNTED, ("tokens", "sub-captions"), strict=True):
        longest = max((value for row in rows for value in row[what]), default=1)
        width = max(1, -(-(longest + 1) // 40))
        edges = range(0, longest + 1 + width, width)
        for number, row in enumerate(rows):
            axes.hist(
                list(row[what]),
                bins=edges,
                weights=[count / row["texts"] for count in row[what].values()],
                histtype="step",
                align="left",
                linewidth=1.5,
                color=COLOURS[number % len(COLOURS)],
                label=wrapped(row["name"], 40),
            )
        axes.set_xlabel(f"{label} per caption")
        axes.set_ylabel("share of captions")
        axes.grid(alpha=0.3)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    if handles:
        picture.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    save(picture, file)


def num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Returns the number of tokens of a text, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _cell(text: str) -> str:
    """Escapes a text for a table cell of Markdown."""
    return markdown_text(" ".join(text.split()))


def _code(text: str) -> str:
    """Formats a text as a code span of Markdown, also in a table."""
    return "`{}`".format(printable(text).replace("`", "'").replace("|", "\\|"))
