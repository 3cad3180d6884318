"""Runs from results files: which of them a report shows, and under which titles."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from .benchmarks.registry import TASKS
from .published import PAPER_COLUMNS
from .results import CAPTIONS, SHARE, entries_of, parsed
from .retrieval import telling_metrics
from .tables import PROMPTS, RETRIEVAL, SEGMENTATION, STUDIES, shortened, study_table

# Metrics that a report shows for each task.
METRICS = {
    RETRIEVAL: {"image_to_text_r1": "I2T", "text_to_image_r1": "T2I"},
    "zero-shot-image-classification": {"accuracy_top1": "top-1"},
    SEGMENTATION: {"mean_iou": "mIoU"},
    PROMPTS: {"supported_parts": "parts"},
}
# Fields of a protocol that are counts, or settings that do not change a number of the report.
NO_RULES = {
    *("num_images", "first_images", "num_texts", "num_texts_cut", "num_duplicate_texts", "num_classes"),
    *("pipeline_fingerprint", "pipeline_parameters"),  # with other pictures, the data differ
    *("bootstrap", "batch_size", "max_length_asked"),  # `max_length` includes `max_length_asked`
}
# Fields of a protocol that choose the texts of a data set. Runs on different texts get different columns.
TEXT_RULES = ("captions", "text_column")
# Settings of the data: the evaluated part, the revision and the contents.
DATA_RULES = ("part", "revision", "data")


class Column(NamedTuple):
    """A column of the report: its title, and the task of its metrics."""

    title: str
    task: str


@dataclass(frozen=True)
class Run:
    """
    An evaluation or a study, read from a results file. Other fields are those of the file.

    Args:
        file (`str`): Path of the file.
        fingerprint (`str`): Fingerprint of the weights and settings of the model.
        metrics (`Mapping[str, float]`): Metrics by name; empty for a study.
        study (`str`, *optional*): `"length"` or `"sentences"` for a study.
        rows (`Sequence[Mapping[str, Any]]`, *optional*): Rows of the study.
        entries (`Sequence[EvalResult]`, *optional*): Metrics as entries of a model card's `model-index`.
        name (`str`, *optional*): Name of the model in the report.
        texts (`Mapping[str, Any]`, *optional*): Settings that choose the texts, if other runs use other texts.
        rules (`Mapping[str, Any]`, *optional*): Settings that differ from those of other runs of the same model.
    """

    file: str
    model: str
    revision: str | None
    fingerprint: str
    benchmark: str
    task: str
    dataset: Mapping[str, Any]
    data_fingerprint: str
    protocol: Mapping[str, Any]
    metrics: Mapping[str, float]
    date: datetime
    study: str | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    entries: Sequence[EvalResult] = ()
    dtype: str | None = None
    name: str = ""
    texts: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Title of its row in the report. Runs of a model with different settings get different rows."""
        return _with_words(self.name, self.rules)

    @property
    def column(self) -> Column:
        """Its column in the report. Runs on other splits or other texts of a benchmark get separate columns."""
        task = TASKS.get(self.benchmark)
        split = self.dataset.get("split")
        title = PAPER_COLUMNS.get(self.benchmark) or str(self.dataset["name"])
        is_own_split = not split or (task is not None and split == task.split)
        return Column(_with_words(title if is_own_split else f"{title} ({split})", self.texts), self.task)

    @property
    def part(self) -> str | None:
        """Description of the evaluated part, or `None` for the whole benchmark."""
        task = TASKS.get(self.benchmark)
        count = self.protocol["num_images"]
        if task is not None and task.num_images and self.dataset.get("split") in (task.split, None):
            if count > task.num_images:
                return f"{count} images instead of {task.num_images}"
            return f"only {count} of {task.num_images} images" if count < task.num_images else None
        return f"only the first {count} images" if "first_images" in self.protocol else None

    @property
    def identity(self) -> dict[str, Any]:
        """All settings that affect the metrics, except for the model and the benchmark."""
        protocol = {name: value for name, value in self.protocol.items() if name not in {*NO_RULES, *TEXT_RULES}}
        own = (self.part, self.dataset.get("revision"), self.data_fingerprint)
        return {**protocol, **dict(zip(DATA_RULES, own, strict=True))}

    @property
    def other_rules(self) -> dict[str, Any]:
        """Settings that differ from the paper; empty unless the run is in a column of the paper."""
        if self.task != RETRIEVAL or self.benchmark not in PAPER_COLUMNS:
            return {}
        others: dict[str, Any] = {}
        if "normalization" in self.protocol and self.protocol["normalization"] is None:
            others["normalization"] = "none"
        if self.protocol.get("max_length_asked") and self.protocol.get("num_texts_cut") != 0:
            others["max_length"] = self.protocol["max_length_asked"]
        return others

    @property
    def remark(self) -> str | None:
        """Note if the run used only a part of the benchmark or other settings than the paper, else `None`."""
        words = {
            "normalization": "captions not normalised",
            "max_length": f"texts cut at {self.other_rules.get('max_length')} tokens",
        }
        parts = [self.part] if self.part else []
        return "; ".join([*parts, *(words[name] for name in self.other_rules)]) or None


@dataclass(frozen=True)
class Summary:
    """
    Summary of results files.

    Args:
        models (`Sequence[str]`): Titles of the rows, in the order of the files.
        columns (`Sequence[Column]`): Columns of the paper, then further columns in the order of the files.
        runs (`Mapping[tuple[str, Column], Run]`): The run shown in each row and column.
        studies (`Sequence[Run]`): All studies.
        notes (`Sequence[str]`): Notes on the table.
    """

    models: Sequence[str]
    columns: Sequence[Column]
    runs: Mapping[tuple[str, Column], Run]
    studies: Sequence[Run]
    notes: Sequence[str]


def _run(file: str | os.PathLike, content: Mapping[str, Any]) -> Run:
    """Makes a run from the contents of a results file, and checks every value that a table or plot uses."""
    dataset, protocol, metrics, study = content["dataset"], content["protocol"], {}, content.get("study")
    kind, known = ("task", METRICS) if study is None else ("study", STUDIES)
    if content[kind] not in known:
        raise ValueError(f"`{kind}` is {content[kind]!r} instead of {' or '.join(known)}")
    if study is None:
        metrics = telling_metrics(content["metrics"], protocol)
        _check_numbers("metrics", {**{name: metrics[name] for name in METRICS[content["task"]]}, **metrics})
    else:
        study_table(study, content["rows"])
        for number, row in enumerate(content["rows"]):
            _check_numbers(f"rows[{number}]", row)
    if not isinstance(protocol["num_images"], int):
        raise ValueError(f"`protocol.num_images` is {protocol['num_images']!r} instead of an integer")
    date = datetime.fromisoformat(content["date"])
    return Run(
        file=os.fspath(file),
        model=str(PurePosixPath(content["model"])),  # removes the slash at the end of "folder/"
        revision=content.get("model_revision"),
        fingerprint=json.dumps(content.get("model_fingerprint"), sort_keys=True),
        benchmark=content["benchmark"],
        task=content.get("task", ""),
        dataset=dataset,
        data_fingerprint=content.get("data_fingerprint") or "",
        protocol=protocol,
        metrics=metrics,
        date=date if date.tzinfo else date.replace(tzinfo=timezone.utc),
        study=study,
        rows=content.get("rows", ()),
        entries=entries_of(content) if study is None else (),
        dtype=content.get("dtype"),
    )


def summarise(files: Sequence[str | os.PathLike]) -> Summary:
    """
    Reads results files and chooses the run for each cell of a report.

    Runs of a model on different captions get different columns. Runs with other settings (a limit in tokens, a part of
    the images, ...) get different rows. The newest of several runs with the same settings is shown.

    Args:
        files (`Sequence[str | os.PathLike]`): Results files of `lotlip evaluate`.

    Returns:
        `Summary`: Models, columns and runs in the order of the files, and notes.

    Raises:
        `ResultsError`: If a file does not contain results.
        `OSError`: If a file cannot be read.
    """
    unique = {Path(file).resolve(): file for file in files}
    runs = _named([parsed(file, partial(_run, file)) for file in unique.values()])
    evaluations = _distinguish([run for run in runs if run.study is None])
    notes: list[str] = []
    candidates: dict[tuple[str, Column], list[Run]] = {}
    for run in evaluations:
        candidates.setdefault((run.label, run.column), []).append(run)
    chosen: dict[tuple[str, Column], Run] = {}
    for cell, own in candidates.items():
        chosen[cell] = best = max(own, key=lambda run: run.date)
        for run in own:
            if run is not best:
                reason = "is newer" if best.date > run.date else "comes first"
                notes.append(f"{best.label} on {best.column.title}: {run.file} is not shown; {best.file} {reason}.")
    models = list(dict.fromkeys(run.label for run in evaluations))
    paper = [Column(title, RETRIEVAL) for title in PAPER_COLUMNS.values()]
    columns = list(dict.fromkeys([*paper, *(run.column for run in evaluations)]))
    for column in columns:
        notes += _differences([chosen[model, column] for model in models if (model, column) in chosen])
    return Summary(models, columns, chosen, [run for run in runs if run.study is not None], notes)


def _distinguish(runs: Sequence[Run]) -> list[Run]:
    """Adds to each run the choice of texts that distinguishes its column and the settings that distinguish its row."""
    for rule in TEXT_RULES:
        columns = _values_of(runs, lambda run: run.column, lambda run, rule=rule: run.protocol.get(rule))
        runs = [
            replace(run, texts={**run.texts, rule: run.protocol.get(rule)}) if len(columns[run.column]) > 1 else run
            for run in runs
        ]
    differing: set[tuple[str, Column | None, str]] = set()
    names = list(dict.fromkeys(name for run in runs for name in run.identity))
    for name in names:
        values = _values_of(runs, lambda run: (run.name, run.column), lambda run, name=name: run.identity.get(name))
        for (model, column), own in values.items():
            if len(own) > 1:
                # settings of the data only concern this column; other settings concern all runs of the model
                differing.add((model, column if name in DATA_RULES else None, name))
    rules = [
        [name for name in names if {(run.name, None, name), (run.name, run.column, name)} & differing] for run in runs
    ]
    runs = [
        replace(run, rules={name: run.identity.get(name) for name in own})
        for run, own in zip(runs, rules, strict=True)
    ]
    rows = _values_of(runs, lambda run: (run.label, run.column), lambda run: run.identity)
    files = _endings({run.file: 1 for run in runs})
    return [
        replace(run, rules={**run.rules, "file": files[run.file]}) if len(rows[run.label, run.column]) > 1 else run
        for run in runs
    ]


def _values_of(runs: Sequence[Run], key: Callable[[Run], Any], value: Callable[[Run], Any]) -> dict[Any, set[str]]:
    """Groups the distinct values of runs by key."""
    values: dict[Any, set[str]] = {}
    for run in runs:
        values.setdefault(key(run), set()).add(json.dumps(value(run), sort_keys=True))
    return values


def _with_words(name: str, rules: Mapping[str, Any]) -> str:
    words = ", ".join(filter(None, (_words(rule, value) for rule, value in rules.items())))
    return f"{name} ({words})" if words else name


def _words(rule: str, value: Any) -> str:
    """Describes a setting for a title; returns an empty string for a default."""
    if rule == "normalization":
        return "" if value else "captions not normalised"
    if value is None or rule == "data":  # a checksum tells a reader nothing
        return ""
    if rule == "captions" and value in CAPTIONS:
        return f"{value} captions"
    if rule == "max_length":
        return f"{value} tokens"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(text if rule in (*TEXT_RULES, "part", "file") else f"{rule} {text}", 60)


def _named(runs: Sequence[Run]) -> list[Run]:
    """Adds names to the runs: the name of the model, with a suffix if models of the same name differ."""
    names = _endings({run.model: _least_parts(run.model) for run in runs})
    files = _endings({run.file: 1 for run in runs})
    states: dict[str, dict[tuple[str | None, str], Run]] = {}  # model -> its versions, each with the first run
    for run in runs:
        states.setdefault(run.model, {}).setdefault((run.revision, run.fingerprint), run)

    def label(run: Run) -> str:
        own, name = states[run.model], names[run.model]
        if len(own) == 1:
            return name
        if len({first.revision for first in own.values()}) == len(own):
            is_commit = re.fullmatch("[0-9a-f]{40}", run.revision or "")
            return f"{name}@{run.revision[:7] if is_commit else run.revision}" if run.revision else name
        if len({first.dtype for first in own.values()}) == len(own):
            return f"{name} ({run.dtype or 'dtype unknown'})"
        first = own[run.revision, run.fingerprint]
        return f"{name} ({files[first.file]})"

    return [replace(run, name=label(run)) for run in runs]


def _least_parts(model: str) -> int:
    """Returns the minimum number of path parts in a model's name: 2 for a Hub id or a trainer's `checkpoint-700`."""
    parts = PurePosixPath(model).parts
    is_id = len(parts) == 2 and parts[0] not in ("/", "..", "~")
    return 2 if is_id or re.fullmatch(r"checkpoint-\d+", PurePosixPath(model).name) else 1


def _endings(paths: Mapping[str, int]) -> dict[str, str]:
    """Shortens paths to their last parts: at least the given number, and enough to be unique."""
    parts = {path: PurePosixPath(path).parts or (path,) for path in paths}
    endings = {}
    for path, own in parts.items():
        most = len(own)
        unique_counts = (
            count
            for count in range(min(paths[path], most), most)
            if sum(others[-count:] == own[-count:] for others in parts.values()) == 1
        )
        endings[path] = str(PurePosixPath(*own[-next(unique_counts, most) :]))
    return endings


def _differences(runs: Sequence[Run]) -> list[str]:
    """Returns notes on the runs of a column: their remarks, and differences that make them incomparable."""
    notes = []
    for run in runs:
        if run.remark:
            notes.append(f"{run.label} on {run.column.title} (*): {run.remark}.")
    if len({run.data_fingerprint for run in runs}) > 1:
        notes.append(f"{runs[0].column.title}: the models were evaluated on different images or texts.")
    for name in dict.fromkeys(name for run in runs for name in run.protocol if name not in NO_RULES):
        if name == "normalization" and any(run.other_rules for run in runs):
            continue  # the remark of each run already states this
        models: dict[str, list[str]] = {}
        for run in runs:
            value = json.dumps(run.protocol.get(name), ensure_ascii=False, sort_keys=True)
            models.setdefault(value, []).append(run.label)
        if len(models) > 1:
            values = "; ".join(f"{shortened(value, 60)} for {', '.join(labels)}" for value, labels in models.items())
            notes.append(f"{runs[0].column.title}: `{name}` differs: {values}.")
    return notes


def _check_numbers(where: str, numbers: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if a number is out of range, and a `TypeError` if it is not a number."""
    for name, value in numbers.items():
        if value is None:  # unknown FLOPs of a study
            continue
        low, high = (0, 1) if SHARE.fullmatch(name) else (1 if name.endswith("_rank") else -sys.float_info.max, None)
        if not low <= value <= (high or sys.float_info.max):
            raise ValueError(f"`{where}.{name}` is {value}; shares are from 0 to 1, ranks from 1")
