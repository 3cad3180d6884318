"""Files of results as the LoTLIP paper's table beside its published rows, as a card's metadata, and as a plot."""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from ..files import check_output, markdown_text, replacing
from ..hub.push import read_results, result_file
from ..plots import COLOURS, DIRECTIONS, check_plot, figure, save, wrapped
from .benchmarks.registry import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["text", "markdown"]
# R@1 in percent, image to text and text to image.
Published = dict[str, tuple[float, float]]

PAPER = "LoTLIP (NeurIPS 2024), https://arxiv.org/abs/2410.05249"
# The paper's columns by the names of their benchmarks, and its rows by model and pairs trained on.
PAPER_COLUMNS = {"dci": "DCI", "iiw": "IIW", "sharegpt4v-10k": "SV-10k", "urban1k": "Urban-1k"}
PUBLISHED: dict[str, Published] = {
    "CLIP ViT-B/32, 400M pairs": {
        "dci": (43.06, 40.32),
        "iiw": (86.76, 84.15),
        "sharegpt4v-10k": (58.08, 51.77),
        "urban1k": (60.90, 47.00),
    },
    "CLIP ViT-B/16, 400M pairs": {
        "dci": (45.45, 43.01),
        "iiw": (88.24, 87.58),
        "sharegpt4v-10k": (60.22, 56.16),
        "urban1k": (67.10, 52.90),
    },
    "Long-CLIP ViT-B/16, 400M pairs": {
        "dci": (51.68, 57.28),
        "iiw": (89.61, 93.20),
        "sharegpt4v-10k": (79.24, 77.06),
        "urban1k": (78.90, 79.50),
    },
    "LoTLIP ViT-B/32, 100M pairs": {
        "dci": (59.90, 56.36),
        "iiw": (93.14, 91.83),
        "sharegpt4v-10k": (83.76, 78.97),
        "urban1k": (84.10, 81.80),
    },
    "LoTLIP ViT-B/16, 100M pairs": {
        "dci": (64.11, 62.63),
        "iiw": (94.28, 92.65),
        "sharegpt4v-10k": (88.40, 82.72),
        "urban1k": (88.80, 84.80),
    },
}
RETRIEVAL = "image-text-retrieval"
# What a column of each task shows.
METRICS = {
    RETRIEVAL: {"image_to_text_r1": "I2T", "text_to_image_r1": "T2I"},
    "zero-shot-image-classification": {"accuracy_top1": "top-1"},
}
PANEL_TITLES = {
    "image_to_text_r1": "R@1 (%), image to text",
    "text_to_image_r1": "R@1 (%), text to image",
    "accuracy_top1": "top-1 accuracy (%)",
}
# The columns of runs in full; numbers are in percent, ranks apart.
RETRIEVAL_HEAD = ("direction", "R@1 (%)", "95 % interval", "R@5 (%)", "R@10 (%)", "median rank")
ACCURACIES = {
    "accuracy_top1": "top-1 (%)",
    "accuracy_top5": "top-5 (%)",
    "mean_per_class_recall": "mean per class (%)",
}
# Names of shares, of runs and in the rows of studies.
SHARE = re.compile(r"(image_to_text|text_to_image)_r\d+(_low|_high)?|accuracy_top\d+|mean_per_class_recall|texts_cut")
# Where a protocol says whether it was done as the paper does it; beside how long texts were.
PAPER_RULES = ("normalization", "search")
EXACT = ("exact", "FAISS Flat")
# What a protocol says of the outcome rather than of the rules, and what changes no number of the table.
NO_RULES = {
    *("num_images", "first_images", "num_texts", "num_texts_cut", "num_duplicate_texts", "num_classes"),
    *("bootstrap", "batch_size", "max_length_asked"),  # the last one is in `max_length`, too
}
# Where a protocol says which of a data set's texts were read: other texts, another column of the table.
TEXT_RULES = ("captions", "text_column")
# What else decides a run's numbers: of how much of the data, of which revision, and what it held.
DATA_RULES = ("part", "revision", "data")
# Titles, factors and formats of a study's columns.
STUDIES: dict[str, dict[str, tuple[str, float, str]]] = {
    "length": {
        "max_length": ("tokens", 1, "d"),
        "image_to_text_r1": ("I2T R@1 (%)", 100, ".2f"),
        "text_to_image_r1": ("T2I R@1 (%)", 100, ".2f"),
        "texts_cut": ("texts cut (%)", 100, ".1f"),
        "mean_tokens": ("mean tokens", 1, ".1f"),
        "text_flops": ("GFLOPs a text", 1e-9, ".3g"),
    },
    "sentences": {
        "sentence": ("sentence left out", 1, "d"),
        "num_texts": ("texts", 1, "d"),
        "num_read": ("read", 1, "d"),
        "image_to_text_r1": ("I2T R@1 (%)", 100, ".2f"),
        "text_to_image_r1": ("T2I R@1 (%)", 100, ".2f"),
        "image_to_text_r1_lost": ("I2T lost (%)", 100, ".2f"),
        "text_to_image_r1_lost": ("T2I lost (%)", 100, ".2f"),
        "image_to_text_mean_rank_lost": ("I2T places lost", 1, ".2f"),
        "text_to_image_mean_rank_lost": ("T2I places lost", 1, ".2f"),
        "score_lost": ("score lost", 1, ".4f"),
    },
}
DETAILS = {
    RETRIEVAL: "The retrieval runs of the table in full",
    "zero-shot-image-classification": "The classification runs of the table in full",
}
STUDY_TITLES = {"length": "Texts cut at a number of tokens", "sentences": "A sentence left out"}
# Of bars: a model's after all colours were used, round by round, and the published ones'.
HATCHES = ("", "xx", "..", "\\\\", "++")
PUBLISHED_HATCH = "//"


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
        if self.protocol.get("search", "exact") not in EXACT:
            others["search"] = self.protocol["search"]
        return others

    @property
    def remark(self) -> str | None:
        """What keeps its numbers from being read as the whole benchmark's, by the paper's rules."""
        words = {
            "normalization": "captions not normalised",
            "max_length": f"texts cut at {self.other_rules.get('max_length')} tokens",
            "search": f"searched by {self.other_rules.get('search')} and not exactly",
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


def read_run(file: str | os.PathLike) -> Run:
    """
    Reads a file that `lotlip evaluate` wrote.

    Args:
        file: The JSON file.

    Returns:
        What it says.

    Raises:
        ValueError: if it is no such file, or lacks something; the message names it and says what.
        OSError: if it cannot be read; the message names it.
    """
    try:
        content = result_file(file)
        study = content.get("study")
        if study is None:
            metrics = {result.metric_type: result.metric_value for result in read_results(file)}
            if content["task"] not in METRICS:
                raise ValueError(f"`task` is {content['task']!r}, expected one of {', '.join(METRICS)}")
            lacking = [f"`{name}`" for name in METRICS[content["task"]] if name not in metrics]
            if lacking:
                raise ValueError(f"`metrics` lacks {', '.join(lacking)}")
            _check_numbers("metrics", metrics)
        else:
            metrics = {}
            if study not in STUDIES:
                raise ValueError(f"`study` is {study!r}, expected one of {', '.join(STUDIES)}")
            study_table(study, content["rows"])
            for place, row in enumerate(content["rows"]):
                _check_numbers(f"rows[{place}]", row)
        date = datetime.fromisoformat(content["date"])
        run = Run(
            file=os.fspath(file),
            model=str(PurePosixPath(_name(content, "model"))),  # "folder/" is "folder"
            revision=content.get("model_revision"),
            fingerprint=json.dumps(content.get("model_fingerprint"), sort_keys=True),
            benchmark=_name(content, "benchmark"),
            task=content.get("task", ""),
            dataset=content["dataset"],
            data_fingerprint=content.get("data_fingerprint") or "",
            protocol=content["protocol"],
            metrics=metrics,
            date=date if date.tzinfo else date.replace(tzinfo=timezone.utc),
            study=study,
            rows=content.get("rows", ()),
            dtype=content.get("dtype"),
        )
        if not isinstance(run.protocol["num_images"], int):
            raise ValueError(f"`protocol.num_images` is {run.protocol['num_images']!r}, expected a whole number")
        _name(run.dataset, "name")
        return run
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise type(error)(f"{file}: {what}; expected a JSON file that `lotlip evaluate --output` wrote.") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if str(error).startswith(f"{file}: "):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file}: no results of `lotlip evaluate` ({what}).") from error


def report(files: Sequence[str | os.PathLike], format: Format = "text") -> str:
    """
    The LoTLIP paper's table of long-text retrieval: its published rows, marked as such, and the models of these files;
    a column more for each other benchmark. Beneath, what a reader has to know of the numbers, each run in full, and
    each study.

    Runs of a model that differ in anything that decides the numbers stand side by side: on other captions in columns
    of their own, by other rules (a limit of tokens, a part of the images, ...) in rows of their own. Of several by the
    same rules the newest counts. Numbers of a part and, in the paper's columns, by other rules are marked.

    Args:
        files: What `lotlip evaluate` wrote.
        format: `"text"`, or `"markdown"` for a card or README.

    Returns:
        The tables, without a line end.

    Raises:
        ValueError: if a file holds no results; the message names it. If `format` is another.
        OSError: if a file cannot be read.

    Example:

    ```python
    >>> from lotlip_hf.evaluation.report import report

    >>> print(report(["iiw.json", "urban1k.json"], format="markdown"))  # doctest: +SKIP
    ```
    """
    return _report(summarise(files), format)


def model_index(files: Sequence[str | os.PathLike]) -> str:
    """
    The results as `model-index`, which model cards on the Hub have in their metadata; see
    https://huggingface.co/docs/hub/model-cards. Runs are chosen as in [`report`]; one that is marked there says why in
    its `args`.

    Args:
        files: What `lotlip evaluate` wrote; studies among them are left out.

    Returns:
        YAML.

    Raises:
        ValueError: if a file holds no results, or none of them holds any but a study's.
        OSError: if a file cannot be read.
    """
    return _model_index(summarise(files))


def plot_report(files: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """
    Draws R@1 of the models in the files beside the published ones on the same data, and top-1 accuracies where there
    are some. Runs are chosen and marked as in [`report`].

    Args:
        files: What `lotlip evaluate` wrote.
        output: The picture; its extension says of which kind it is.

    Raises:
        ImportError: without matplotlib.
        ValueError: if a file holds no results, or none of them holds any but a study's.
        OSError: if a file cannot be read or written.
        ValueError, OSError: as [`~lotlip_hf.plots.check_plot`].
    """
    check_plot(output)
    save(_draw(summarise(files)), output)


def write_report(
    files: Sequence[str | os.PathLike],
    format: Format = "text",
    model_index_file: str | os.PathLike | None = None,
    plot_file: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """
    What `lotlip report` does. Every file is read, and it is clear that all can be written, before anything is.

    Args:
        files, format: As in [`report`].
        model_index_file: Where to write [`model_index`], if anywhere.
        plot_file: Where to draw [`plot_report`], if anywhere; in place of what there may be.
        overwrite: Whether `model_index_file` may be there already.

    Returns:
        The tables.

    Raises:
        ImportError, ValueError, OSError: as the three; also if a file of results would be written over, or both
            outputs are the same.
        FileExistsError: if `model_index_file` is there already and not to be overwritten.
        NotADirectoryError: if the folder of an output is not there.
    """
    _check_outputs(files, model_index_file, plot_file, overwrite)
    summary = summarise(files)
    tables = _report(summary, format)
    metadata = "" if model_index_file is None else _model_index(summary)
    picture = None if plot_file is None else _draw(summary)
    if picture is not None and plot_file is not None:
        save(picture, plot_file)
    if model_index_file is not None:
        with replacing(Path(model_index_file)) as file:
            file.write(metadata.encode())
    return tables


def _check_outputs(
    files: Sequence[str | os.PathLike],
    model_index_file: str | os.PathLike | None,
    plot_file: str | os.PathLike | None,
    overwrite: bool,
) -> None:
    taken = {Path(file).resolve(): "one of the files of results" for file in files}
    for output in (model_index_file, plot_file):
        if output is None:
            continue
        own = Path(output).resolve()
        if own in taken:
            raise ValueError(f"{output} is {taken[own]}: choose another to write to.")
        taken[own] = "where the model-index goes"
    if plot_file is not None:
        check_plot(plot_file)
    if model_index_file is not None:
        check_output(model_index_file, overwrite=overwrite)


def study_table(study: str, rows: Sequence[Mapping[str, Any]], format: Format = "text") -> str:
    """
    The rows of a study as a table.

    Args:
        study: `"length"` or `"sentences"`.
        rows: What [`~lotlip_hf.evaluation.studies.length_study`] or
            [`~lotlip_hf.evaluation.studies.sentence_ablation`] returned.
        format: As in [`report`].

    Raises:
        KeyError, TypeError, ValueError: if the rows are not those of such a study.
    """
    columns = STUDIES[study]
    cells = [
        ["-" if row[name] is None else f"{factor * row[name]:{spec}}" for name, (_, factor, spec) in columns.items()]
        for row in rows
    ]
    return table([[title for title, _, _ in columns.values()]], cells, format, left=0)


def metric_table(task: str, metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """
    Metrics as the head and the rows of a [`table`]: a row for each direction of a retrieval, one for accuracies.

    Args:
        task: `"image-text-retrieval"` or `"zero-shot-image-classification"`.
        metrics: Shares from 0 to 1, which the table has in percent, and ranks, by name; those that are not there are
            left open.

    Returns:
        The titles of the columns, and the rows.
    """

    def percent(name: str) -> str:
        return f"{100 * metrics[name]:.2f}" if name in metrics else "-"

    if task != RETRIEVAL:
        return list(ACCURACIES.values()), [[percent(name) for name in ACCURACIES]]
    rows = []
    for direction, name in DIRECTIONS.items():
        low, high = percent(f"{direction}_r1_low"), percent(f"{direction}_r1_high")
        interval = "-" if "-" in (low, high) else f"{low} - {high}"
        first, *others = (percent(f"{direction}_r{k}") for k in (1, 5, 10))
        rank = metrics.get(f"{direction}_median_rank")
        rows.append([name, first, interval, *others, "-" if rank is None else f"{rank:g}"])
    return list(RETRIEVAL_HEAD), rows


def summarise(files: Sequence[str | os.PathLike]) -> Summary:
    """
    Reads files of results and chooses those that count.

    Args:
        files: What `lotlip evaluate` wrote.

    Returns:
        Models, columns and runs in the order of the files, and notes on what a table of them does not show.

    Raises:
        ValueError: if there are no files, or one holds no results.
        OSError: if one cannot be read.
    """
    if not files:
        raise ValueError("`files` is empty: there is nothing to report.")
    unique = {Path(file).resolve(): file for file in files}
    runs = _named([read_run(file) for file in unique.values()])
    evaluations = _apart([run for run in runs if run.study is None])
    notes: list[str] = []
    candidates: dict[tuple[str, Column], list[Run]] = {}
    for run in evaluations:
        candidates.setdefault((run.label, run.column), []).append(run)
    chosen: dict[tuple[str, Column], Run] = {}
    for place, own in candidates.items():
        chosen[place] = best = max(own, key=lambda run: run.date)
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
    if rule == "captions" and value in ("all", "long", "short"):
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
    for name in _rules(runs):
        if name in PAPER_RULES and any(run.other_rules for run in runs):
            continue  # said of each run already
        models: dict[str, list[str]] = {}
        for run in runs:
            value = json.dumps(run.protocol.get(name), ensure_ascii=False, sort_keys=True)
            models.setdefault(value, []).append(run.label)
        if len(models) > 1:
            said = "; ".join(f"{_short(value)} for {', '.join(labels)}" for value, labels in models.items())
            notes.append(f"{runs[0].column.title}: `{name}` differs: {said}.")
    return notes


def _rules(runs: Sequence[Run]) -> list[str]:
    """The names in the protocols that say how it was done."""
    return [name for name in dict.fromkeys(name for run in runs for name in run.protocol) if name not in NO_RULES]


def _check_numbers(where: str, numbers: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that names the number that is none, or is out of its range."""
    for name, value in numbers.items():
        if value is None:  # of a study: not known
            continue
        if not math.isfinite(value):
            raise ValueError(f"`{where}.{name}` is {value}, expected a number")
        if SHARE.fullmatch(name) and not 0 <= value <= 1:
            raise ValueError(f"`{where}.{name}` is {value}, expected a share from 0 to 1")
        if name.endswith("_rank") and value < 1:
            raise ValueError(f"`{where}.{name}` is {value}, expected a rank of at least 1")


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _name(content: Mapping[str, Any], name: str) -> str:
    if not isinstance(content[name], str) or not content[name]:
        raise ValueError(f"`{name}` is {content[name]!r}, expected a name")
    return content[name]


def _values(summary: Summary, column: Column, metric: str) -> dict[str, float]:
    """Percentages of a column by the rows' titles, those of published models first."""
    values = {}
    for benchmark, title in PAPER_COLUMNS.items():
        if column == (title, RETRIEVAL):
            direction = list(METRICS[RETRIEVAL]).index(metric)
            values = {f"{model} (published)": scores[benchmark][direction] for model, scores in PUBLISHED.items()}
    for model in summary.models:
        if (model, column) in summary.runs:
            values[model] = 100 * summary.runs[model, column].metrics[metric]
    return values


def _report(summary: Summary, format: Format) -> str:
    if format not in get_args(Format):
        raise ValueError(f"`format` must be one of {', '.join(get_args(Format))}, got {format!r}.")

    def title(text: str) -> str:
        return f"**{markdown_text(text)}**" if format == "markdown" else text

    blocks = []
    if summary.runs:
        shown = [(column, metric, name) for column in summary.columns for metric, name in METRICS[column.task].items()]
        head = [["", *(column.title for column, _, _ in shown)], ["model", *(name for _, _, name in shown)]]
        values = [_values(summary, column, metric) for column, metric, _ in shown]
        marked = {place for place, run in summary.runs.items() if run.remark}
        body = [
            [
                model,
                *(
                    f"{rows[model]:.2f}{'*' if (model, column) in marked else ''}" if model in rows else "-"
                    for (column, _, _), rows in zip(shown, values, strict=True)
                ),
            ]
            for model in [*(f"{model} (published)" for model in PUBLISHED), *summary.models]
        ]
        blocks += [title("R@1 and top-1 accuracy (%)"), table(head, body, format)]
        blocks.append(_lines([f"Published: {PAPER}.", *summary.notes], format))
        for task, heading in DETAILS.items():
            own = [run for run in summary.runs.values() if run.task == task]
            if own:
                blocks += [title(heading), _details(task, own, format)]
    for run in summary.studies:
        part = f" ({run.part})" if run.part else ""
        blocks.append(title(f"{STUDY_TITLES[run.study or '']}: {run.label} on {run.column.title}{part}"))
        blocks.append(study_table(run.study or "", run.rows, format))
    return "\n\n".join(blocks)


def _details(task: str, runs: Sequence[Run], format: Format) -> str:
    """The table of runs in full; what a run does not say is left open."""
    counts = {"num_images": "images", "num_texts": "texts", "num_texts_cut": "cut", "max_length": "at tokens"}
    if task != RETRIEVAL:
        counts = {"num_images": "images", "num_classes": "classes"}
    head, body = metric_table(task, {})
    body = [
        [run.label, run.column.title, *(str(run.protocol.get(count, "-")) for count in counts), *row]
        for run in runs
        for row in metric_table(task, run.metrics)[1]
    ]
    return table([["model", "data", *counts.values(), *head]], body, format, left=2)


def _lines(lines: Sequence[str], format: Format) -> str:
    if format == "markdown":  # names in them make no link, image or tag; backticks are ours
        lines = [line.replace("<", "&lt;").replace("[", r"\[") for line in lines]
    return "\n".join(f"- {line}" if format == "markdown" else line for line in lines)


def table(head: Sequence[Sequence[str]], body: Sequence[Sequence[str]], format: Format, left: int = 1) -> str:
    """
    Rows as a table, the first `left` columns flush left and the others right. Of several rows of the head the first
    gives groups of columns, which stand together.
    """
    if format == "markdown":
        # one row of the head is all that Markdown has
        titles = [" ".join(filter(None, parts)) for parts in zip(*head, strict=True)]
        rules = ["---" if place < left else "---:" for place in range(len(titles))]
        rows = [[cell if cell == "-" else markdown_text(cell) for cell in row] for row in (titles, *body)]
        rows.insert(1, rules)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    rows = [*head[-1:], *body]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for title, places in _groups(head[0]) if len(head) > 1 else ():
        # in the middle over its columns, which are as wide together as it is
        span = sum(widths[place] for place in places) + 2 * (len(places) - 1)
        widths[places[-1]] += max(0, len(title) - span)
        lines.append(title.center(max(span, len(title))))
    lines = ["  ".join(lines).rstrip()] if lines else []
    for row in rows:
        aligned = (
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(aligned).rstrip())
    lines.insert(len(head), "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _groups(titles: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Titles, and the columns that each stands over."""
    return [
        (title, [place for place, _ in group])
        for title, group in itertools.groupby(enumerate(titles), key=lambda item: item[1])
    ]


def _model_index(summary: Summary) -> str:
    entries: dict[str, dict[str, Any]] = {}  # by name, without the path of a folder
    for run in summary.runs.values():
        marks = {"num_images": run.protocol["num_images"]} if run.part else {}
        apart = {**run.texts, **run.rules}
        marks |= {name: apart[name] for name in apart if name in run.protocol and apart[name] is not None}
        marks |= run.other_rules
        results = [
            replace(result, dataset_args={**(result.dataset_args or {}), **marks} or None)
            for result in read_results(run.file)
        ]
        # each run by itself: huggingface_hub would join those of one data set
        (entry,) = eval_results_to_model_index(run.name, results)
        entries.setdefault(run.name, {"name": run.name, "results": []})["results"] += entry["results"]
    if not entries:
        raise ValueError("The files hold studies alone, which no model-index takes: add results of an evaluation.")
    return yaml_dump({"model-index": list(entries.values())}, sort_keys=False)


def _draw(summary: Summary) -> "Figure":
    if not summary.runs:
        raise ValueError(
            "The files hold studies alone, whose plots `lotlip evaluate` draws: add results of an evaluation."
        )
    panels: dict[str, list[Column]] = {}
    own_columns = {column for _, column in summary.runs}
    for column in (column for column in summary.columns if column in own_columns):
        for metric in METRICS[column.task]:
            panels.setdefault(metric, []).append(column)
    published = [f"{model} (published)" for model in PUBLISHED]
    looks: dict[str, dict[str, Any]] = {
        model: {"facecolor": str(0.85 - 0.13 * place), "hatch": PUBLISHED_HATCH}
        for place, model in enumerate(published)
    }
    for place, model in enumerate(summary.models):
        turn, colour = divmod(place, len(COLOURS))
        looks[model] = {"facecolor": COLOURS[colour], "hatch": HATCHES[turn % len(HATCHES)]}

    rows = {metric: [_values(summary, column, metric) for column in columns] for metric, columns in panels.items()}
    # bars are 1 wide, and as far apart are the groups; a group takes the place of four, for its title
    widths = {metric: sum(max(len(group), 4) + 1 for group in groups) for metric, groups in rows.items()}
    width = max(20, *widths.values())
    shown = [model for model in looks if any(model in group for groups in rows.values() for group in groups)]
    names = {model: wrapped(model, 60) for model in shown}
    remarks = [run for run in summary.runs.values() if run.remark]
    if remarks:
        reasons = ["not the whole benchmark"] if any(run.part for run in remarks) else []
        reasons += ["other rules than the paper's"] if any(run.other_rules for run in remarks) else []
        names["*"] = f"* {', or '.join(reasons)}"
        looks["*"] = {"facecolor": "white", "alpha": 0}
    inches = 2 + 0.3 * width
    longest = max(len(line) for name in names.values() for line in name.splitlines())
    columns = max(1, min(3, int(inches / (0.7 + 0.07 * longest))))  # of the legend, whose characters are 0.07 wide
    lines = sum(name.count("\n") + 1 for name in names.values()) / columns
    picture = figure(inches, 0.8 + 2.8 * len(panels) + 0.16 * max(0, lines - 2))

    from matplotlib.patches import Patch

    for axes, (metric, groups) in zip(
        picture.subplots(len(panels), 1, squeeze=False)[:, 0], rows.items(), strict=True
    ):
        start, ticks = 0.0, []
        for column, group in zip(panels[metric], groups, strict=True):
            space = max(len(group), 4)
            ticks.append(start + (space - 1) / 2)
            first = start + (space - len(group)) / 2
            for place, (model, value) in enumerate(group.items()):
                run = summary.runs.get((model, column))
                is_marked = run is not None and run.remark is not None
                alpha = 0.45 if is_marked else 1
                bar = axes.bar(first + place, value, 1, edgecolor="white", alpha=alpha, **looks[model])
                axes.bar_label(bar, fmt="%.1f*" if is_marked else "%.1f", rotation=90, padding=2, fontsize=7)
            start += space + 1
        axes.set_xticks(ticks, [wrapped(column.title, 16) for column in panels[metric]])
        axes.set_xlim(-1, width - 1)
        axes.set_ylim(0, 115)  # room for the numbers
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel(PANEL_TITLES[metric])
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles = [Patch(edgecolor="white", **looks[name]) for name in names]
    picture.legend(handles, list(names.values()), loc="outside lower center", ncols=columns, fontsize=8)
    return picture
