"""The outcome of a run: a table of recalls beside linear heads, `results.json`, and `report.html` with examples."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..data.record import RecordError, check_record
from ..distributed import rank
from ..encoder import Encoder
from ..evaluation.retrieval import ranks
from ..evaluation.tables import table
from ..files import printable, replacing, write_json
from ..images import Background, ImageError, ImageSource, background_of, image_source, load_image
from ..loading import load_model
from ..plots import DIRECTIONS
from ..states import FrozenStates
from ..terminal import print_tables
from .checkpoint import checkpoint_step
from .config import TrainingConfig
from .data_checks import text_records
from .frozen import fill_images
from .linear_heads import linear_heads, pair_states, sampled, whole_captions
from .log import read_log

logger = logging.get_logger(__name__)

RESULTS_NAME, REPORT_NAME = "results.json", "report.html"
HEADS = "linear heads (baseline)"
KINDS, KS = ("long", "short"), (1, 5, 10)
# Examples of a group, ranked pictures of an example, side of a thumbnail in pixels, characters of a shown caption
EXAMPLES, TOP, SIDE, CAPTION = 5, 5, 144, 600
GROUPS = {
    "first": "Found first",
    "near": "Nearly found (2nd to 10th)",
    "far": "Farthest from their picture",
}


@dataclass(frozen=True)
class StageResult:
    """
    A finished run, or a finished stage of one.

    Args:
        name (`str`): Name in the table.
        checkpoint (`str` or `os.PathLike`): Folder of the model.
        recalls (`Mapping[str, float]`): Recalls of the checkpoint, from [`~lotlip_hf.training.validation.validate`].
        config (`TrainingConfig`): Options of the stage.
    """

    name: str
    checkpoint: str | os.PathLike
    recalls: Mapping[str, float]
    config: TrainingConfig


class Row(NamedTuple):
    """A row of the table."""

    name: str
    recalls: Mapping[str, float]


class Example(NamedTuple):
    """A caption, the rank of its picture, and the pictures ranked first, as indices with their similarities."""

    index: int
    rank: float
    top: list[tuple[int, float]]


class Pairs(NamedTuple):
    """Intact evaluation records: all records, and the index, the id and the caption of each intact one [N]."""

    records: Any
    indices: list[int]
    ids: list[str]
    captions: list[str]

    def image(self, number: int) -> ImageSource:
        return image_source(self.records[self.indices[number]]["image"]).source


def write_outcome(
    output: str | os.PathLike,
    stages: Sequence[StageResult],
    records: Dataset | IterableDataset,
    eval_records: Dataset | IterableDataset,
) -> None:
    """
    Prints the recalls of a run and writes them to `results.json`, and writes `report.html` with held-out pictures as
    they are ranked by their long captions. The last stage is the model; earlier stages are rows of the table. If a
    stage had both towers frozen, another row has the recalls of two linear heads on the same states
    ([`~lotlip_hf.training.linear_heads.linear_heads`]), and a warning follows if the model is below them.

    Every process must call it. The main process writes.

    Args:
        output (`str` or `os.PathLike`): Folder to write to.
        stages (`Sequence[StageResult]`): The stages in their order, at least one.
        records (`Dataset` or `IterableDataset`): Training records.
        eval_records (`Dataset` or `IterableDataset`): Evaluation records. As in the run, the first `eval_samples` are
            used.

    Raises:
        `OSError`: If a checkpoint cannot be read or a file cannot be written.
        `ImageError`, `RecordError`: If a record is broken and `on_error` is `"raise"`.
    """
    config = stages[-1].config
    if isinstance(eval_records, IterableDataset):
        held_out = cast(Dataset, list(islice(eval_records, config.eval_samples)))
    else:
        held_out = eval_records.select(range(min(config.eval_samples, len(eval_records))))
    heads = _heads(stages, records, held_out)
    if rank():
        return
    output = Path(output)
    rows = [Row(stages[-1].name, stages[-1].recalls), *(Row(stage.name, stage.recalls) for stage in stages[:-1])]
    rows += [] if heads is None else [Row(HEADS, heads)]
    below = below_heads(stages[-1].recalls, heads)
    tables = recall_tables(rows, len(held_out))
    print_tables("\n\n".join(f"{title}\n{table(head, body, 'text')}" for title, head, body in tables))
    if below is not None:
        logger.warning(below)
    results = {
        "checkpoint": os.fspath(stages[-1].checkpoint),
        "num_images": len(held_out),
        "rows": [{"name": row.name, "recalls": dict(row.recalls)} for row in rows],
        "below_linear_heads": None if heads is None else below is not None,
    }
    write_json(output / RESULTS_NAME, results)
    model, processor = load_model(stages[-1].checkpoint)
    encoder = Encoder(model, processor)
    pairs = _pairs(held_out, config)
    page = _page(tables, below, pairs, _examples(encoder, pairs), background_of(processor))
    with replacing(output / REPORT_NAME) as file:
        file.write(page.encode())
    print(f"{output / RESULTS_NAME} has the numbers, {output / REPORT_NAME} has examples.")


def logged_recalls(checkpoint: Path) -> dict[str, float]:
    """Returns the recalls of a checkpoint in the log of its run."""
    step = checkpoint_step(checkpoint.name)
    names = recall_names()
    entries = [entry for entry in read_log(checkpoint.parent) if entry["step"] == step and names[0] in entry]
    return {name: entries[-1][name] for name in names}


def recall_names() -> list[str]:
    """Returns the keys of the recalls in the table."""
    return [f"{kind}_{direction}_r{k}" for kind in KINDS for direction in DIRECTIONS for k in KS]


def below_heads(recalls: Mapping[str, float], heads: Mapping[str, float] | None) -> str | None:
    """Returns a warning if a model is below linear heads by long or short captions, on average over the recalls."""
    parts = []
    for kind in KINDS if heads is not None else ():
        names = [name for name in recall_names() if name.startswith(kind)]
        model, baseline = (100 * mean(each[name] for name in names) for each in (recalls, heads))
        if model < baseline:
            parts.append(f"{model:.1f} % instead of {baseline:.1f} % by {kind} captions")
    if not parts:
        return None
    return (
        f"The model is below two linear heads on the frozen states: a mean recall of {', and '.join(parts)}. Try more "
        "steps, larger batches or another learning rate."
    )


def recall_tables(rows: Sequence[Row], number: int) -> list[tuple[str, list[list[str]], list[list[str]]]]:
    """Returns the tables of long and of short captions: title, two rows of column titles, and rows."""
    head = [
        ["", *(name for name in DIRECTIONS.values() for _ in KS)],
        ["", *(f"R@{k}" for _ in DIRECTIONS for k in KS)],
    ]
    return [
        (
            f"Retrieval by {kind} captions (%), over {number:,} pictures",
            head,
            [
                [row.name, *(f"{100 * row.recalls[name]:.1f}" for name in recall_names() if name.startswith(kind))]
                for row in rows
            ],
        )
        for kind in KINDS
    ]


def _heads(
    stages: Sequence[StageResult], records: Dataset | IterableDataset, held_out: Dataset
) -> dict[str, float] | None:
    """Recalls of linear heads on the states of the first stage with two frozen towers, which the cache has."""
    for stage in stages:
        config = stage.config
        if not config.has_frozen_towers:
            continue
        if config.no_cache or isinstance(records, IterableDataset):
            reason = "`no_cache` is set" if config.no_cache else "the records are a stream"
            if not rank():
                print(f"The table has no linear heads, because {reason}.")
            return None
        model, processor = load_model(stage.checkpoint)
        encoder = Encoder(model, processor)
        frozen = {
            modality: FrozenStates(encoder, modality, config.cache, config.cache_dtype)
            for modality in ("image", "text")
        }
        filled = [
            fill_images(each, frozen["image"], config, model.device)
            for each in (records.select(sampled(len(records), config.seed)), held_out)
        ]
        train, held = (pair_states(each, frozen, config, model.device) for each in filled)
        return None if rank() else linear_heads(train, held, config.seed)
    return None


def _pairs(records: Dataset, config: TrainingConfig) -> Pairs:
    pairs, draw = Pairs(records, [], [], []), whole_captions(config)
    for index, row in enumerate(text_records(records)):
        try:
            record = check_record({"image": None, **row})
        except RecordError:
            continue
        pairs.indices.append(index)
        pairs.ids.append(record["id"])
        pairs.captions.append(draw([record], [Random(0)])[0].long[0])
    return pairs


def _examples(encoder: Encoder, pairs: Pairs) -> dict[str, list[Example]]:
    """Chooses examples of each group by the rank of a caption's picture among the readable pictures."""
    read = {
        index: embedding
        for index, embedding in encoder.iterate_images(map(pairs.image, range(len(pairs.ids))))
        if not isinstance(embedding, ImageError)
    }
    if not read:
        return {}
    kept = sorted(read)
    images = torch.stack([read[index] for index in kept])
    texts = encoder.encode_texts([pairs.captions[index] for index in kept], progress=False)
    found = ranks(images, texts).text_to_image.tolist()
    order = sorted(range(len(kept)), key=lambda row: found[row])
    groups = {
        "first": [row for row in order if found[row] < 2],
        "near": [row for row in order if 2 <= found[row] <= 10],
        "far": [row for row in reversed(order) if found[row] > 10],
    }
    chosen = {}
    for name, rows in groups.items():
        if name != "far":  # spread over the records, not the first ones
            rows = Random(0).sample(rows, min(EXAMPLES, len(rows)))
        chosen[name] = []
        for row in rows[:EXAMPLES]:
            top = (images @ texts[row]).topk(min(TOP, len(kept)))
            listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            chosen[name].append(Example(kept[row], found[row], [(kept[each], score) for each, score in listed]))
    return chosen


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; margin: 2em auto; max-width: 1040px; padding: 0 1em; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; }
th, td { padding: 0.25em 0.8em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead tr:last-child th { border-bottom: 1px solid #808080; }
tbody tr:first-child { font-weight: 600; }
.warning { background: #fff3d6; border-left: 4px solid #e69f00; padding: 0.5em 1em; }
.example { border-top: 1px solid #d8d8d8; padding: 1em 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-end; }
figure { margin: 0; width: 152px; text-align: center; font-size: 13px; color: #606060; }
figure img, .missing { border: 3px solid #e8e8e8; }
.query { margin-right: 22px; }
.right img { border-color: #009e73; }
.caption { margin: 0 0 0.6em; overflow-wrap: anywhere; }
"""


def _page(
    tables: Sequence[tuple[str, Sequence[Sequence[str]], Sequence[Sequence[str]]]],
    warning: str | None,
    pairs: Pairs,
    examples: Mapping[str, Sequence[Example]],
    background: Background,
) -> str:
    """Returns the page, which loads nothing and runs nothing."""
    parts = [] if warning is None else [f'<p class="warning">{_text(warning)}</p>']
    for title, head, body in tables:
        groups = "".join(f'<th colspan="{len(KS)}">{_text(name)}</th>' for name in DIRECTIONS.values())
        parts += [f"<h2>{_text(title)}</h2>", f"<table><thead><tr><th></th>{groups}</tr>", _row(head[-1], "th")]
        parts += ["</thead><tbody>", *(_row(cells, "td") for cells in body), "</tbody></table>"]
    parts.append(
        f"<h2>Held-out pictures by their long captions</h2><p>Each caption ranks {len(pairs.ids):,} pictures. Its own "
        f"picture is on the left, and has a green frame if it is among the first {TOP}. Under a picture is its "
        "similarity.</p>"
    )
    thumbnails = _Thumbnails(pairs, background)
    for name, group in examples.items():
        if group:
            parts.append(f"<h3>{GROUPS[name]}</h3>")
        for example in group:
            figures = [thumbnails.figure(example.index, f"rank {example.rank:g}", "query")]
            for index, score in example.top:
                figures.append(thumbnails.figure(index, f"{score:.3f}", "right" if index == example.index else ""))
            caption = pairs.captions[example.index]
            caption = caption if len(caption) <= CAPTION else f"{caption[:CAPTION]}..."
            parts.append(
                f'<div class="example"><p class="caption" dir="auto">{_text(caption)}</p>'
                f'<div class="pictures">{"".join(figures)}</div></div>'
            )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>Outcome of the training</title><style>{STYLE}</style></head>\n"
        "<body><h1>Outcome of the training</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(value: str) -> str:
    """Escapes a text; white space becomes one space."""
    return html.escape(printable(" ".join(value.split())))


class _Thumbnails:
    """Pictures of at most `SIDE` pixels as JPEG within the page, each decoded once."""

    def __init__(self, pairs: Pairs, background: Background) -> None:
        self.pairs, self.background = pairs, background
        self.drawn: dict[int, str] = {}

    def figure(self, index: int, note: str, name: str) -> str:
        """Returns a picture with a note below."""
        if index not in self.drawn:
            self.drawn[index] = self._draw(index)
        record = _text(self.pairs.ids[index])
        return (
            f'<figure class="{name}"><img src="{self.drawn[index]}" alt="{record}" title="{record}">'
            f"<figcaption>{note}</figcaption></figure>"
        )

    def _draw(self, index: int) -> str:
        picture = load_image(self.pairs.image(index), background=self.background)
        picture.thumbnail((SIDE, SIDE))
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=80)
        return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
