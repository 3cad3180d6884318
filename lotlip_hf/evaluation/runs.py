"""Files of results: what each says, which of them count, and what tells them apart."""

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
from .tables import RETRIEVAL, STUDIES, study_table

# What a column of each task shows.
METRICS = {
    RETRIEVAL: {"image_to_text_r1": "I2T", "text_to_image_r1": "T2I"},
    "zero-shot-image-classification": {"accuracy_top1": "top-1"},
}
# What a protocol says of the outcome rather than of the rules, and what changes no number of the table.
NO_RULES = {
    *("num_images", "first_images", "num_texts", "num_texts_cut", "num_duplicate_texts", "num_classes"),
    *("bootstrap", "batch_size", "max_length_asked"),  # the last one is in `max_length`, too
}
# Where a protocol says which of a data set's texts were read: other texts, another column of the table.
TEXT_RULES = ("captions", "text_column")
# What else decides a run's numbers: of how much of the data, of which revision, and what it held.
DATA_RULES = ("part", "revision", "data")


class Column(NamedTuple):
    """A column of the table: what stands over it, and the task whose metrics it shows."""

    title: str
    task: str


@dataclass(frozen=True)
class Run:
    """
    A file of results.

    Args:
        file: Where it was read from.
        model, revision: What was evaluated.
        fingerprint: Of the model's weights and settings.
        dtype: Of the weights, if the file says it.
        benchmark, task, dataset, data_fingerprint, protocol: On what, and how.
        metrics: Numbers by name; empty for a study.
        date: When.
        study: `"length"` or `"sentences"` where the file holds a study.
        rows: The study's.
        entries: The metrics as a card's metadata has them.
        name: What a table calls the model.
        texts: Of `TEXT_RULES`, what tells its column from others of the same data.
        rules: What tells it from the model's other runs on the same data.
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
        """The row that it stands in. Other rules than in the model's other runs stand in others."""
        return _with_words(self.name, self.rules)

    @property
    def column(self) -> Column:
        """The column that it stands in. Other splits than a benchmark's own stand in others, as do other texts."""
        task = TASKS.get(self.benchmark)
        split = self.dataset.get("split")
        title = PAPER_COLUMNS.get(self.benchmark) or str(self.dataset["name"])
        is_own_split = not split or (task is not None and split == task.split)
        return Column(_with_words(title if is_own_split else f"{title} ({split})", self.texts), self.task)

    @property
    def part(self) -> str | None:
        """What was evaluated, if it was not the whole benchmark."""
        task = TASKS.get(self.benchmark)
        count = self.protocol["num_images"]
        if task is not None and task.num_images and self.dataset.get("split") in (task.split, None):
            if count > task.num_images:
                return f"{count} images in place of {task.num_images}"
            return f"{count} of {task.num_images} images alone" if count < task.num_images else None
        return f"the first {count} images alone" if "first_images" in self.protocol else None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides its numbers, beside the model and the column."""
        protocol = {name: value for name, value in self.protocol.items() if name not in {*NO_RULES, *TEXT_RULES}}
        own = (self.part, self.dataset.get("revision"), self.data_fingerprint)
        return {**protocol, **dict(zip(DATA_RULES, own, strict=True))}

    @property
    def other_rules(self) -> dict[str, Any]:
        """In a column of the paper's, what the protocol says that is not as the paper does it."""
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
        """What keeps its numbers from being read as the whole benchmark's, by the paper's rules."""
        words = {
            "normalization": "captions not normalised",
            "max_length": f"texts cut at {self.other_rules.get('max_length')} tokens",
        }
        parts = [self.part] if self.part else []
        return "; ".join([*parts, *(words[name] for name in self.other_rules)]) or None


@dataclass(frozen=True)
class Summary:
    """
    What files of results say together.

    Args:
        models: Labels of rows, in the order of the files.
        columns: The paper's, then others in the order of the files.
        runs: By model and column, the run that counts.
        studies: All of them.
        notes: What a table does not show.
    """

    models: Sequence[str]
    columns: Sequence[Column]
    runs: Mapping[tuple[str, Column], Run]
    studies: Sequence[Run]
    notes: Sequence[str]


def _run(file: str | os.PathLike, content: Mapping[str, Any]) -> Run:
    """What a file of `lotlip evaluate` says; a table or a plot that comes later finds no value of a wrong type."""
    dataset, protocol, metrics, study = content["dataset"], content["protocol"], {}, content.get("study")
    kind, known = ("task", METRICS) if study is None else ("study", STUDIES)
    if content[kind] not in known:
        raise ValueError(f"`{kind}` is {content[kind]!r}, expected one of {', '.join(known)}")
    if study is None:
        metrics = telling_metrics(content["metrics"], protocol)
        _check_numbers("metrics", {**{name: metrics[name] for name in METRICS[content["task"]]}, **metrics})
    else:
        study_table(study, content["rows"])
        for number, row in enumerate(content["rows"]):
            _check_numbers(f"rows[{number}]", row)
    if not isinstance(protocol["num_images"], int):
        raise ValueError(f"`protocol.num_images` is {protocol['num_images']!r}, expected a whole number")
    date = datetime.fromisoformat(content["date"])
    return Run(
        file=os.fspath(file),
        model=str(PurePosixPath(content["model"])),  # "folder/" is "folder"
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
    Reads files of results and chooses those that count.

    Runs of a model that differ in anything that decides the numbers stand side by side: on other captions in columns
    of their own, by other rules (a limit of tokens, a part of the images, ...) in rows of their own. Of several by the
    same rules the newest counts.

    Args:
        files (`Sequence[str | os.PathLike]`): what `lotlip evaluate` wrote.

    Returns:
        `Summary`: models, columns and runs in the order of the files, and notes on what a table of them does not show.

    Raises:
        ResultsError: if one holds no results.
        OSError: if one cannot be read.
    """
    unique = {Path(file).resolve(): file for file in files}
    runs = _named([parsed(file, partial(_run, file)) for file in unique.values()])
    evaluations = _apart([run for run in runs if run.study is None])
    notes: list[str] = []
    candidates: dict[tuple[str, Column], list[Run]] = {}
    for run in evaluations:
        candidates.setdefault((run.label, run.column), []).append(run)
    chosen: dict[tuple[str, Column], Run] = {}
    for cell, own in candidates.items():
        chosen[cell] = best = max(own, key=lambda run: run.date)
        for run in own:
            if run is not best:
                reason = "is newer" if best.date > run.date else "was named first"
                notes.append(
                    f"{best.label} on {best.column.title}: {best.file} counts, which {reason}, and not {run.file}."
                )
    models = list(dict.fromkeys(run.label for run in evaluations))
    paper = [Column(title, RETRIEVAL) for title in PAPER_COLUMNS.values()]
    columns = list(dict.fromkeys([*paper, *(run.column for run in evaluations)]))
    for column in columns:
        notes += _differences([chosen[model, column] for model in models if (model, column) in chosen])
    return Summary(models, columns, chosen, [run for run in runs if run.study is not None], notes)


def _apart(runs: Sequence[Run]) -> list[Run]:
    """The runs with what tells them apart: where their texts differ by column, where a model's rules do by row."""
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
                # a model's rules are those of its row; a part and a revision are of one data set
                differing.add((model, column if name in DATA_RULES else None, name))
    told = [
        [name for name in names if {(run.name, None, name), (run.name, run.column, name)} & differing] for run in runs
    ]
    runs = [
        replace(run, rules={name: run.identity.get(name) for name in own}) for run, own in zip(runs, told, strict=True)
    ]
    rows = _values_of(runs, lambda run: (run.label, run.column), lambda run: run.identity)
    files = _endings({run.file: 1 for run in runs})
    return [
        replace(run, rules={**run.rules, "file": files[run.file]}) if len(rows[run.label, run.column]) > 1 else run
        for run in runs
    ]


def _values_of(runs: Sequence[Run], key: Callable[[Run], Any], value: Callable[[Run], Any]) -> dict[Any, set[str]]:
    """By key, the different values."""
    values: dict[Any, set[str]] = {}
    for run in runs:
        values.setdefault(key(run), set()).add(json.dumps(value(run), sort_keys=True))
    return values


def _with_words(name: str, rules: Mapping[str, Any]) -> str:
    words = ", ".join(filter(None, (_words(rule, value) for rule, value in rules.items())))
    return f"{name} ({words})" if words else name


def _words(rule: str, value: Any) -> str:
    """A rule as words of a title; empty if it is as usual."""
    if rule == "normalization":
        return "" if value else "captions not normalised"
    if value is None or rule == "data":  # a checksum tells a reader nothing
        return ""
    if rule == "captions" and value in CAPTIONS:
        return f"{value} captions"
    if rule == "max_length":
        return f"{value} tokens"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _short(text if rule in (*TEXT_RULES, "part", "file") else f"{rule} {text}")


def _named(runs: Sequence[Run]) -> list[Run]:
    """The runs with names: a model's, and where models of the same name differ, what tells them apart."""
    names = _endings({run.model: _least_parts(run.model) for run in runs})
    files = _endings({run.file: 1 for run in runs})
    states: dict[str, dict[tuple[str | None, str], Run]] = {}  # each with the first run of it
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
    """Of how many parts of its path a model's name has at least: a trainer's `checkpoint-700` alone says little."""
    parts = PurePosixPath(model).parts
    is_id = len(parts) == 2 and parts[0] not in ("/", "..", "~")
    return 2 if is_id or re.fullmatch(r"checkpoint-\d+", PurePosixPath(model).name) else 1


def _endings(paths: Mapping[str, int]) -> dict[str, str]:
    """The last parts of paths: as many as given, or as tell them apart."""
    parts = {path: PurePosixPath(path).parts or (path,) for path in paths}
    endings = {}
    for path, own in parts.items():
        most = len(own)
        alone = (
            count
            for count in range(min(paths[path], most), most)
            if sum(others[-count:] == own[-count:] for others in parts.values()) == 1
        )
        endings[path] = str(PurePosixPath(*own[-next(alone, most) :]))
    return endings


def _differences(runs: Sequence[Run]) -> list[str]:
    """What keeps the runs of a column from being compared, and which are on a part of the data alone."""
    notes = []
    for run in runs:
        if run.remark:
            notes.append(f"{run.label} on {run.column.title} (*): {run.remark}.")
    if len({run.data_fingerprint for run in runs}) > 1:
        notes.append(f"{runs[0].column.title}: not all models had the same images and texts.")
    for name in dict.fromkeys(name for run in runs for name in run.protocol if name not in NO_RULES):
        if name == "normalization" and any(run.other_rules for run in runs):
            continue  # said of each run already
        models: dict[str, list[str]] = {}
        for run in runs:
            value = json.dumps(run.protocol.get(name), ensure_ascii=False, sort_keys=True)
            models.setdefault(value, []).append(run.label)
        if len(models) > 1:
            said = "; ".join(f"{_short(value)} for {', '.join(labels)}" for value, labels in models.items())
            notes.append(f"{runs[0].column.title}: `{name}` differs: {said}.")
    return notes


def _check_numbers(where: str, numbers: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that names the number that is none, or is out of its range."""
    for name, value in numbers.items():
        if value is None:  # of a study: not known
            continue
        low, high = (0, 1) if SHARE.fullmatch(name) else (1 if name.endswith("_rank") else -sys.float_info.max, None)
        if not low <= value <= (high or sys.float_info.max):
            raise ValueError(f"`{where}.{name}` is {value}, expected a number (shares from 0 to 1, ranks from 1)")


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
