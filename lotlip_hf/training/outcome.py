"""The outcome of a run: a table of recalls beside linear heads, `results.json`, and `report.html` with examples."""

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import NamedTuple, cast

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..data.record import Record
from ..distributed import rank
from ..encoder import Encoder
from ..evaluation.tables import table
from ..files import printable, replacing, write_json
from ..loading import load_model
from ..plots import DIRECTIONS
from ..states import FrozenStates
from ..terminal import print_tables
from .checkpoint import checkpoint_step
from .config import TrainingConfig
from .frozen import fill_images
from .linear_heads import linear_heads, pair_states, sampled
from .log import LOG_NAME, read_log
from .page import Table, ranked_page
from .validation import RECALL_KEYS

logger = logging.get_logger(__name__)

RESULTS_NAME, REPORT_NAME = "results.json", "report.html"
HEADS = "linear heads (baseline)"


class StageResult(NamedTuple):
    """
    A finished run or stage: its name in the table, the folder of its model, the recalls of the model from
    [`~lotlip_hf.training.validation.validate`], and its options.
    """

    name: str
    checkpoint: str | os.PathLike
    recalls: Mapping[str, float]
    config: TrainingConfig


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
    stage = stages[-1]
    if isinstance(eval_records, IterableDataset):
        held_out = list(islice(eval_records, stage.config.eval_samples))
    else:
        held_out = eval_records.select(range(min(stage.config.eval_samples, len(eval_records))))
    frozen = _frozen_stage(stages, records)
    encoder = heads = None
    if frozen is not None:
        encoder = Encoder(*load_model(frozen.checkpoint))
        heads = _heads(encoder, frozen.config, cast(Dataset, records), held_out)
    if rank():
        return
    output = Path(output)
    rows = {each.name: each.recalls for each in (stage, *stages[:-1])}
    rows |= {} if heads is None else {HEADS: heads}
    below = below_heads(stage.recalls, heads)
    tables = recall_tables(rows, len(held_out))
    print_tables("\n\n".join(f"{title}\n{table(head, body, 'text')}" for title, head, body in tables))
    if below is not None:
        logger.warning(below)
    results = {
        "checkpoint": os.fspath(stage.checkpoint),
        "num_images": len(held_out),
        "rows": [{"name": name, "recalls": dict(recalls)} for name, recalls in rows.items()],
        "below_linear_heads": None if heads is None else below is not None,
    }
    write_json(output / RESULTS_NAME, results)
    if encoder is None or frozen is not stage:
        encoder = Encoder(*load_model(stage.checkpoint))
    page = ranked_page(tables, below, encoder, held_out, stage.config)
    with replacing(output / REPORT_NAME) as file:
        file.write(page.encode())
    print(f"{output / RESULTS_NAME} has the numbers, {output / REPORT_NAME} has examples.")


def logged_recalls(checkpoint: Path) -> dict[str, float]:
    """
    Returns the recalls of a checkpoint in the log of its run.

    Raises:
        `ValueError`: If the log lacks them.
    """
    step, path = checkpoint_step(checkpoint.name), checkpoint.parent / LOG_NAME
    names = [*RECALL_KEYS["long"], *RECALL_KEYS["short"]]
    for entry in reversed(read_log(path) if path.exists() else []):
        if entry["step"] == step and all(isinstance(entry.get(name), float | int) for name in names):
            return {name: entry[name] for name in names}
    raise ValueError(
        f"{printable(path)} lacks the recalls of {checkpoint.name}, which the report needs. Pass `--report false`."
    )


def below_heads(recalls: Mapping[str, float], heads: Mapping[str, float] | None) -> str | None:
    """Returns a warning if a model is below linear heads by long or short captions, on average over the recalls."""
    parts = []
    for kind, names in RECALL_KEYS.items() if heads is not None else ():
        model, baseline = (round(100 * mean(each[name] for name in names), 1) for each in (recalls, heads))
        if model < baseline:
            parts.append(f"{model:.1f} % instead of {baseline:.1f} % by {kind} captions")
    if not parts:
        return None
    return (
        f"The model is below two linear heads on the frozen states: a mean recall of {', and '.join(parts)}. Try more "
        "steps, larger batches or another learning rate."
    )


def recall_tables(rows: Mapping[str, Mapping[str, float]], number: int) -> list[Table]:
    """Returns the tables of long and of short captions over `number` pictures, with a row of recalls for each name."""
    tables = []
    for kind, names in RECALL_KEYS.items():
        parts = [name.removeprefix(f"{kind}_").rsplit("_r", 1) for name in names]
        head = [["", *(DIRECTIONS[direction] for direction, _ in parts)], ["", *(f"R@{k}" for _, k in parts)]]
        body = [[name, *(f"{100 * recalls[key]:.1f}" for key in names)] for name, recalls in rows.items()]
        tables.append(Table(f"Retrieval by {kind} captions (%), over {number:,} pictures", head, body))
    return tables


def _frozen_stage(stages: Sequence[StageResult], records: Dataset | IterableDataset) -> StageResult | None:
    """Returns the first stage with two frozen towers, if the cache has their states."""
    stage = next((stage for stage in stages if stage.config.has_frozen_towers), None)
    if stage is not None and (stage.config.no_cache or isinstance(records, IterableDataset)):
        reason = "`no_cache` is set" if stage.config.no_cache else "the records are a stream"
        if not rank():
            print(f"The table has no linear heads, because {reason}.")
        return None
    return stage


def _heads(
    encoder: Encoder, config: TrainingConfig, records: Dataset, held_out: Dataset | list[Record]
) -> dict[str, float] | None:
    """Returns the recalls of linear heads on the states of frozen towers, on the main process."""
    frozen = {
        modality: FrozenStates(encoder, modality, config.cache, config.cache_dtype) for modality in ("image", "text")
    }
    chosen = records.select(sampled(len(records), config.seed))
    filled = [fill_images(each, frozen["image"], config, encoder.device) for each in (chosen, held_out)]
    train, held = (pair_states(each, frozen, config, encoder.device) for each in filled)
    return None if rank() else linear_heads(train, held, config.seed)
