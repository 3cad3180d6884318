"""Reports of results files: the LoTLIP paper's table with new rows, model card metadata, and a plot."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from ..files import check_output, markdown_text, replacing
from ..plots import COLOURS, check_plot, figure, save, wrapped
from .published import PAPER, PAPER_COLUMNS, PUBLISHED
from .runs import METRICS, Column, Run, Summary, summarise
from .tables import PROMPTS, RETRIEVAL, SEGMENTATION, Format, metric_table, study_table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_TITLES = {
    "image_to_text_r1": "R@1 (%), image to text",
    "text_to_image_r1": "R@1 (%), text to image",
    "accuracy_top1": "top-1 accuracy (%)",
    "mean_iou": "mean IoU (%)",
    "supported_parts": "parts of prompts (%)",
}
DETAILS = {
    RETRIEVAL: "Retrieval runs in full",
    "zero-shot-image-classification": "Classification runs in full",
    SEGMENTATION: "Segmentation runs in full",
    PROMPTS: "Prompts in full",
}
STUDY_TITLES = {"length": "Texts cut at several lengths", "sentences": "One sentence removed"}
# Hatches of bars. If there are more models than colours, the colours repeat with another hatch.
HATCHES = ("", "xx", "..", "\\\\", "++")
PUBLISHED_HATCH = "//"


def write_report(
    files: Sequence[str | os.PathLike],
    format: Format = "text",
    model_index_file: str | os.PathLike | None = None,
    plot_file: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """
    Runs `lotlip report`. Reads all files and checks both outputs before it writes anything.

    Args:
        files (`Sequence[str | os.PathLike]`): Results files of `lotlip evaluate`.
        format (`str`, *optional*, defaults to `"text"`): `"text"`, or `"markdown"` for a model card or README.
        model_index_file (`str` or `os.PathLike`, *optional*): File for [`model_index`].
        plot_file (`str` or `os.PathLike`, *optional*): File for [`draw_report`]. An existing file is overwritten.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to overwrite an existing `model_index_file`.

    Returns:
        `str`: The tables of [`report_tables`].

    Raises:
        `ResultsError`: If a file does not contain results.
        `ValueError`: If an output is a results file or the other output, or if an output is requested but all files
            are studies.
        `ImportError`: If a plot is requested but matplotlib is not installed.
        `OSError`: If a file cannot be read or written.

    Example:

    ```python
    >>> from lotlip_hf.evaluation.report import write_report

    >>> print(write_report(["iiw.json", "urban1k.json"], format="markdown"))  # doctest: +SKIP
    ```
    """
    taken = [Path(file).resolve() for file in files]
    for output in (Path(output) for output in (model_index_file, plot_file) if output is not None):
        if output.resolve() in taken:
            raise ValueError(f"{output} is already a results file or the other output. Pass another file name.")
        taken.append(output.resolve())
    if plot_file is not None:
        check_plot(plot_file)
    if model_index_file is not None:
        check_output(model_index_file, overwrite=overwrite)
    summary = summarise(files)
    if not summary.runs and (model_index_file or plot_file):
        raise ValueError("All files are studies. A model-index or a plot also needs results of an evaluation.")
    tables = report_tables(summary, format)
    metadata = "" if model_index_file is None else model_index(summary)
    if plot_file is not None:
        save(draw_report(summary), plot_file)
    if model_index_file is not None:
        with replacing(Path(model_index_file)) as file:
            file.write(metadata.encode())
    return tables


def _values(summary: Summary, column: Column, metric: str) -> dict[str, float]:
    """Returns the percentages of a column by row title, published models first."""
    values = {}
    for benchmark, title in PAPER_COLUMNS.items():
        if column == (title, RETRIEVAL):
            direction = list(METRICS[RETRIEVAL]).index(metric)
            values = {f"{model} (published)": scores[benchmark][direction] for model, scores in PUBLISHED.items()}
    for model in summary.models:
        if (model, column) in summary.runs:
            values[model] = 100 * summary.runs[model, column].metrics[metric]
    return values


def report_tables(summary: Summary, format: Format = "text") -> str:
    """
    Formats the LoTLIP paper's table of long-text retrieval: the published rows, marked as published, the models of the
    files, and a column for each further benchmark. Notes, all metrics of each run, and the studies follow. A number is
    marked with `*` if its run used only a part of the benchmark or, in a column of the paper, other settings.

    Args:
        summary (`Summary`): Summary of the results files.
        format (`str`, *optional*, defaults to `"text"`): `"text"` or `"markdown"`.

    Returns:
        `str`: The tables, without a final line break.
    """

    def title(text: str) -> str:
        return f"**{markdown_text(text)}**" if format == "markdown" else text

    blocks = []
    if summary.runs:
        shown = [(column, metric, name) for column in summary.columns for metric, name in METRICS[column.task].items()]
        head = [["", *(column.title for column, _, _ in shown)], ["model", *(name for _, _, name in shown)]]
        values = [_values(summary, column, metric) for column, metric, _ in shown]
        marked = {cell for cell, run in summary.runs.items() if run.remark}
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
        blocks += [title("R@1, top-1 accuracy, mIoU and supported parts (%)"), table(head, body, format)]
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
    """Formats a table with all metrics of the runs of a task."""
    counts = {"num_images": "images", "num_texts": "texts", "num_texts_cut": "texts cut", "max_length": "max tokens"}
    if task != RETRIEVAL:
        counts = {"num_images": "images", **({} if task == PROMPTS else {"num_classes": "classes"})}
    head, body = metric_table(task, {})
    body = [
        [run.label, run.column.title, *(str(run.protocol.get(count, "-")) for count in counts), *row]
        for run in runs
        for row in metric_table(task, run.metrics)[1]
    ]
    return table([["model", "data", *counts.values(), *head]], body, format, left=2)


def _lines(lines: Sequence[str], format: Format) -> str:
    if format == "markdown":  # escape links, images and tags in names; backticks come from this package
        lines = [line.replace("<", "&lt;").replace("[", r"\[") for line in lines]
    return "\n".join(f"- {line}" if format == "markdown" else line for line in lines)


def model_index(summary: Summary) -> str:
    """
    Formats the results as `model-index`, the metadata of model cards on the Hub
    (https://huggingface.co/docs/hub/model-cards). If a number is marked in the tables, its `args` contain the reason.

    Args:
        summary (`Summary`): Summary of the results files. Studies are ignored.

    Returns:
        `str`: YAML.
    """
    entries: dict[str, dict[str, Any]] = {}  # model name -> entry
    for run in summary.runs.values():
        marks = {"num_images": run.protocol["num_images"]} if run.part else {}
        apart = {**run.texts, **run.rules}
        marks |= {name: apart[name] for name in apart if name in run.protocol and apart[name] is not None}
        marks |= run.other_rules
        results = [
            replace(result, dataset_args={**(result.dataset_args or {}), **marks} or None) for result in run.entries
        ]
        # convert runs separately, because huggingface_hub merges the runs on one data set
        (entry,) = eval_results_to_model_index(run.name, results)
        entries.setdefault(run.name, {"name": run.name, "results": []})["results"] += entry["results"]
    return yaml_dump({"model-index": list(entries.values())}, sort_keys=False)


def draw_report(summary: Summary) -> "Figure":
    """
    Draws bars of R@1 of the models and of published models on the same data, and of top-1 accuracies.

    Args:
        summary (`Summary`): Summary of the results files. Studies are ignored.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    panels: dict[str, list[Column]] = {}
    own_columns = {column for _, column in summary.runs}
    for column in (column for column in summary.columns if column in own_columns):
        for metric in METRICS[column.task]:
            panels.setdefault(metric, []).append(column)
    published = [f"{model} (published)" for model in PUBLISHED]
    looks: dict[str, dict[str, Any]] = {
        model: {"facecolor": str(0.85 - 0.13 * number), "hatch": PUBLISHED_HATCH}
        for number, model in enumerate(published)
    }
    for number, model in enumerate(summary.models):
        turn, colour = divmod(number, len(COLOURS))
        looks[model] = {"facecolor": COLOURS[colour], "hatch": HATCHES[turn % len(HATCHES)]}

    rows = {metric: [_values(summary, column, metric) for column in columns] for metric, columns in panels.items()}
    # bars and gaps between groups have width 1; a group has at least width 4, for its title
    widths = {metric: sum(max(len(group), 4) + 1 for group in groups) for metric, groups in rows.items()}
    width = max(20, *widths.values())
    shown = [model for model in looks if any(model in group for groups in rows.values() for group in groups)]
    names = {model: wrapped(model, 60) for model in shown}
    remarks = [run for run in summary.runs.values() if run.remark]
    if remarks:
        reasons = ["not the whole benchmark"] if any(run.part for run in remarks) else []
        reasons += ["other settings than the paper"] if any(run.other_rules for run in remarks) else []
        names["*"] = f"* {', or '.join(reasons)}"
        looks["*"] = {"facecolor": "white", "alpha": 0}
    inches = 2 + 0.3 * width
    longest = max(len(line) for name in names.values() for line in name.splitlines())
    columns = max(1, min(3, int(inches / (0.7 + 0.07 * longest))))  # legend: 0.07 inches per character
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
            for bar_number, (model, value) in enumerate(group.items()):
                run = summary.runs.get((model, column))
                is_marked = run is not None and run.remark is not None
                alpha = 0.45 if is_marked else 1
                bar = axes.bar(first + bar_number, value, 1, edgecolor="white", alpha=alpha, **looks[model])
                axes.bar_label(bar, fmt="%.1f*" if is_marked else "%.1f", rotation=90, padding=2, fontsize=7)
            start += space + 1
        axes.set_xticks(ticks, [wrapped(column.title, 16) for column in panels[metric]])
        axes.set_xlim(-1, width - 1)
        axes.set_ylim(0, 115)  # leaves space for the numbers above the bars
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel(PANEL_TITLES[metric])
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles = [Patch(edgecolor="white", **looks[name]) for name in names]
    picture.legend(handles, list(names.values()), loc="outside lower center", ncols=columns, fontsize=8)
    return picture
