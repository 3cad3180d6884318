"""Facts of a training run that a model card states: options, length and validation."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from huggingface_hub.utils import validate_repo_id

from ..data.records import MAPPINGS
from ..data.sampling import STRATEGIES
from ..files import parse_json, read_regular
from ..training.checkpoint import MAX_PROGRESS, PROGRESS, STATE, checkpoint_step
from ..training.config import CONFIG_NAME, RESUMABLE, SCENES, TrainingConfig, choices
from ..training.log import LOG_NAME, read_log

# Options that the card leaves out, in addition to options that do not change the weights
HOUSEKEEPING = set(
    "image_folder streaming shuffle_buffer no_cache eval_data eval_split eval_samples eval_steps".split()
)
# Option -> condition on other options under which it has an effect
NEEDS = {
    "num_scenes": lambda options: options.get("data") == SCENES,
    "num_epochs": lambda options: not options.get("max_steps"),
    "unlocked_vision_layers": lambda options: options.get("lock_vision"),
    "unlocked_text_layers": lambda options: options.get("lock_text"),
    "layer_decay": lambda options: options.get("layer_decay", 1) != 1,
    "text_dtype": lambda options: options.get("lock_text"),
    "cache_dtype": lambda options: (
        (options.get("lock_vision") or options.get("lock_text")) and not options.get("no_cache")
    ),
}
RECALL = re.compile(r"(long|short)_(image_to_text|text_to_image)_r(\d{1,6})", re.ASCII)
MAX_NUMBER = 1 << 63
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|tar|parquet|ya?ml|zip|pt)$")


@dataclass(frozen=True)
class Run:
    """
    A training run, as described by the files beside a checkpoint.

    Args:
        options (`Mapping[str, Any]`): Options of the run by name, as in the file; not validated.
        step (`int`, *optional*): Step after which the checkpoint was saved.
        num_processes (`int`, *optional*): Number of processes.
        num_records (`int`, *optional*): Number of records of the training data; `None` for a stream.
        num_seen (`int`, *optional*): Number of images that all processes have seen.
        recalls (`Mapping[str, float]`): Recalls on the validation data at this step, by their names in the run's log.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    num_processes: int | None = None
    num_records: int | None = None
    num_seen: int | None = None
    recalls: Mapping[str, float] = field(default_factory=dict)


def load_run(checkpoint: Path | None) -> Run:
    """
    Reads the files of a training run in a checkpoint and in its parent folder.

    Args:
        checkpoint (`Path`, *optional*): The checkpoint's folder.

    Returns:
        `Run`: The run. Unknown facts are `None` or empty.

    Raises:
        `ValueError`: If the options or the log cannot be read. The message names the file.
    """
    if checkpoint is None:
        return Run()
    step = checkpoint_step(checkpoint.name)
    folders = [checkpoint] if step is None else [checkpoint, checkpoint.parent]
    path = next((folder / CONFIG_NAME for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    if path is None:
        return Run(step=step)
    content = read_regular(path)
    try:
        options = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected options by name, got a {type(options).__name__}.")
    options = {name: value for name, value in options.items() if _is_plain(value)}
    recalls: dict[str, float] = {}
    if step is not None and (checkpoint.parent / LOG_NAME).is_file():
        for entry in read_log(checkpoint.parent):
            if entry["step"] == step:
                found = {name: value for name, value in entry.items() if RECALL.fullmatch(name)}
                recalls |= {k: v for k, v in found.items() if isinstance(v, int | float) and 0 <= v <= 1}
    return Run(options, step, **_progress(checkpoint / STATE), recalls=recalls)


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, a number of usual size, or a list of these. Nested aliases of YAML can be huge."""
    if isinstance(value, list):
        return all(not isinstance(one, list) and _is_plain(one) for one in value)
    return isinstance(value, str | float) or (isinstance(value, int) and abs(value) < MAX_NUMBER)


def _progress(state: Path) -> dict[str, int]:
    """Returns the numbers of processes, records and seen images, or `{}` if the files are missing or damaged."""
    with suppress(OSError, ValueError, TypeError, LookupError):
        files = sorted(state.glob(f"*-{PROGRESS}"))
        parts = [parse_json(read_regular(file, MAX_PROGRESS)) for file in files]
        numbers = {"num_processes": len(parts), "num_seen": sum(part["counts"]["records"] for part in parts)}
        numbers |= {"num_records": parts[0]["data"]["num_records"]} if "num_records" in parts[0]["data"] else {}
        return (
            numbers if all(isinstance(number, int) and 0 < number < MAX_NUMBER for number in numbers.values()) else {}
        )
    return {}


def stated_options(options: Mapping[str, Any]) -> dict[str, str]:
    """
    Selects the options that are set and change the weights. Paths and free text are left out.

    Args:
        options (`Mapping[str, Any]`): Options by name, not validated.

    Returns:
        `dict[str, str]`: Values by name, escaped for Markdown.
    """
    stated = {}
    for name in TrainingConfig.__dataclass_fields__:
        value = options.get(name)
        if name in RESUMABLE | HOUSEKEEPING or not NEEDS.get(name, bool)(options):
            continue
        if isinstance(value, bool):
            shown = "yes" if value else ""
        elif isinstance(value, int | float):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
        elif isinstance(value, list):
            words = name in ("terms", "term_options") and re.fullmatch(r"[\w.:=+-]+", "".join(map(str, value)))
            shown = ", ".join(map(str, value)) if words or all(isinstance(one, int) for one in value) else ""
        else:
            known = (SCENES, *choices(name), *(STRATEGIES if name == "captions" else ()))
            known += tuple(MAPPINGS) if name == "mapping" else ()
            shown = value if value in known or is_hub_id(value) else ""
        if shown:
            stated[name] = f"{shown}, of each process" if name == "batch_size" else shown
    return stated


def training_rows(run: Run) -> list[tuple[str, str]]:
    """
    Summarises how a model was trained.

    Args:
        run (`Run`): The run.

    Returns:
        `list[tuple[str, str]]`: Subject and text, in Markdown. Subjects without known facts are left out.
    """
    options = stated_options(run.options)
    rows = {
        "Captions": _captions(options),
        "Objective": ", ".join(f"`{term}`" for term in options.get("terms", "").split(", ") if term),
        "Batch": _batch(run, options),
        "Length": _length(run, options),
    }
    return [(subject, text) for subject, text in rows.items() if text]


def _captions(options: Mapping[str, str]) -> str:
    strategy, number, sentences = (options.get(name) for name in ("captions", "num_long_texts", "num_sentences"))
    if strategy == "whole_captions":
        return "short caption and one whole long caption of each image, in each step"
    if strategy != "sub_captions" or number is None or sentences is None:
        return strategy or ""
    if number == "0":
        return "short captions only"
    kind, of = (
        ("whole long caption", "") if sentences == "0" else ("sub-caption", f" of {_count(sentences, 'sentence')}")
    )
    return f"short caption and {_count(number, kind)}{of} of each image, in each step"


def _batch(run: Run, options: Mapping[str, str]) -> str:
    size, batches = run.options.get("batch_size"), options.get("gradient_accumulation_steps", "1")
    if not isinstance(size, int):
        return ""
    shown = f"{size:,} images of each process" if run.num_processes is None else f"{size * run.num_processes:,} images"
    return shown if batches == "1" else f"{shown}, {batches} batches a step"


def _length(run: Run, options: Mapping[str, str]) -> str:
    steps, epochs = options.get("max_steps"), options.get("num_epochs")
    parts = []
    if run.step is not None:
        parts.append(f"{run.step:,} steps" + (f" of {steps}" if steps not in (None, str(run.step)) else ""))
    elif steps is not None or epochs is not None:
        parts.append(f"{steps} steps" if steps is not None else _count(epochs, "epoch"))
    if run.num_seen is not None:
        parts.append(f"{run.num_seen:,} images seen")
        if run.num_records is not None:
            parts.append(f"{run.num_seen / run.num_records:.1f} epochs of {run.num_records:,} records")
    return ", ".join(parts)


def _count(number: str | None, noun: str) -> str:
    return f"{number} {noun}" if number == "1" else f"{number} {noun}s"


def pretrained_models(options: Mapping[str, Any]) -> list[str]:
    """Returns the Hub ids of the models that a run started from."""
    return [name for key in ("model", "text_model", "image_model") if is_hub_id(name := options.get(key))]


def validation_texts(options: Mapping[str, Any]) -> str:
    """Describes the validation data: number of images and kind of texts."""
    number, data = options.get("eval_samples"), options.get("eval_data")
    images = "held-out images"
    if isinstance(number, int):
        images = f"{number:,} held-out scenes" if data == SCENES else f"up to {number:,} images"
    return f"{images}, each with its short caption and one long caption"


def is_hub_id(name: Any) -> TypeGuard[str]:
    """Returns whether an option is a Hub id. Paths are not published."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    if not name or name.count("/") != 1 or os.path.exists(name):
        return False
    return checkpoint_step(name.split("/")[1]) is None and DATA_FILE.search(name) is None
