"""Text and Markdown tables of results."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..files import markdown_text
from ..plots import DIRECTIONS
from ..terminal import text_table

Format = Literal["text", "markdown"]
RETRIEVAL = "image-text-retrieval"
# Titles of the columns of retrieval metrics.
RETRIEVAL_HEAD = ("direction", "R@1 (%)", "95 % interval", "R@5 (%)", "R@10 (%)", "median rank")
ACCURACIES = {
    "accuracy_top1": "top-1 (%)",
    "accuracy_top5": "top-5 (%)",
    "mean_per_class_recall": "mean per class (%)",
}
SEGMENTATION = "image-segmentation"
OVERLAPS = {
    "mean_iou": "mIoU (%)",
    "pixel_accuracy": "pixels (%)",
    "calibrated_mean_iou": "calibrated mIoU (%)",
    "calibrated_pixel_accuracy": "calibrated pixels (%)",
}
PROMPTS = "text-to-image"
ROUNDING = 1e-6  # of cosines: texts with the same tokens, such as those cut before a word, are equal
# Title and factor of each score of prompts.
SCORES = {
    "supported_parts": ("parts (%)", 100),
    "supported_words": ("words (%)", 100),
    "composed_score": ("composed x 100", 100),
    "clip_score": ("CLIPScore", 1),
}
TINY_PIPELINE = 50_000_000  # parameters; those of Stable Diffusion 1.5 are 20 times as many
# Title, factor and format of each column of a study.
STUDIES: dict[str, dict[str, tuple[str, float, str]]] = {
    "length": {
        "max_length": ("tokens", 1, "d"),
        "image_to_text_r1": ("I2T R@1 (%)", 100, ".2f"),
        "text_to_image_r1": ("T2I R@1 (%)", 100, ".2f"),
        "texts_cut": ("texts cut (%)", 100, ".1f"),
        "mean_tokens": ("mean tokens", 1, ".1f"),
        "text_flops": ("GFLOPs per text", 1e-9, ".3g"),
    },
    "sentences": {
        "sentence": ("removed sentence", 1, "d"),
        "num_texts": ("texts", 1, "d"),
        "num_read": ("within limit", 1, "d"),
        "image_to_text_r1": ("I2T R@1 (%)", 100, ".2f"),
        "text_to_image_r1": ("T2I R@1 (%)", 100, ".2f"),
        "image_to_text_r1_lost": ("I2T lost (%)", 100, ".2f"),
        "text_to_image_r1_lost": ("T2I lost (%)", 100, ".2f"),
        "image_to_text_mean_rank_lost": ("I2T ranks lost", 1, ".2f"),
        "text_to_image_mean_rank_lost": ("T2I ranks lost", 1, ".2f"),
        "score_lost": ("score lost", 1, ".4f"),
    },
}


def study_table(study: str, rows: Sequence[Mapping[str, Any]], format: Format = "text") -> str:
    """
    Formats the rows of a study as a table.

    Args:
        study (`str`): `"length"` or `"sentences"`.
        rows (`Sequence[Mapping[str, Any]]`): Rows from [`~lotlip_hf.evaluation.studies.length_study`] or
            [`~lotlip_hf.evaluation.studies.sentence_ablation`].
        format (`str`, *optional*, defaults to `"text"`): `"text"` or `"markdown"`.

    Returns:
        `str`: The table.
    """
    columns = STUDIES[study]
    cells = [
        ["-" if row[name] is None else f"{factor * row[name]:{spec}}" for name, (_, factor, spec) in columns.items()]
        for row in rows
    ]
    return table([[title for title, _, _ in columns.values()]], cells, format, left=0)


def metric_table(task: str, metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """
    Formats metrics for [`table`], with a row for each direction of retrieval or one row.

    Args:
        task (`str`): `"image-text-retrieval"`, `"zero-shot-image-classification"`, `"image-segmentation"` or
            `"text-to-image"`.
        metrics (`Mapping[str, float]`): Metrics by name: shares from 0 to 1, shown in percent, scores and ranks. A
            missing metric is shown as `-`.

    Returns:
        `tuple[list[str], list[list[str]]]`: The titles of the columns, and the rows.
    """

    def percent(name: str) -> str:
        return f"{100 * metrics[name]:.2f}" if name in metrics else "-"

    if task == PROMPTS:
        return [title for title, _ in SCORES.values()], [_scores(metrics)]
    if task != RETRIEVAL:
        shares = OVERLAPS if task == SEGMENTATION else ACCURACIES
        return list(shares.values()), [[percent(name) for name in shares]]
    rows = []
    for direction, name in DIRECTIONS.items():
        low, high = percent(f"{direction}_r1_low"), percent(f"{direction}_r1_high")
        interval = "-" if "-" in (low, high) else f"{low} - {high}"
        first, *others = (percent(f"{direction}_r{k}") for k in (1, 5, 10))
        rank = metrics.get(f"{direction}_median_rank")
        rows.append([name, first, interval, *others, "-" if rank is None else f"{rank:g}"])
    return list(RETRIEVAL_HEAD), rows


def prompt_table(metrics: Mapping[str, float], rows: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any]) -> str:
    """
    Formats the scores of prompts as a text table, with the means in the last row.

    Args:
        metrics (`Mapping[str, float]`): Means from [`~lotlip_hf.pictures.prompt_metrics`].
        rows (`Sequence[Mapping[str, Any]]`): Rows from the same function.
        protocol (`Mapping[str, Any]`): Protocol of the results.

    Returns:
        `str`: The table. A line below it says so if the pipeline is too small to draw what prompts say.
    """
    cells = []
    for row in rows:
        missing = ", ".join(part["text"] for part in row["parts"] if part["cosine_lost"] <= ROUNDING)
        cells.append([shortened(row["prompt"], 40), shortened(missing, 40), *_scores(row)])
    head = ["prompt", "unsupported parts", *(title for title, _ in SCORES.values())]
    text = table([head], [*cells, ["mean", "", *_scores(metrics)]], "text", left=2)
    if protocol.get("pipeline_parameters", TINY_PIPELINE) < TINY_PIPELINE:
        number = f"{protocol['pipeline_parameters']:,}"
        text += (
            f"\n\nThe pipeline has {number} parameters: this checks the machinery, and the scores say nothing else."
        )
    return text


def _scores(metrics: Mapping[str, float]) -> list[str]:
    return [f"{factor * metrics[name]:.2f}" if name in metrics else "-" for name, (_, factor) in SCORES.items()]


def shortened(text: str, most: int) -> str:
    """Returns a text with at most a number of characters, the last ones dots if it is cut."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def table(head: Sequence[Sequence[str]], body: Sequence[Sequence[str]], format: Format, left: int = 1) -> str:
    """
    Formats rows as a table.

    Args:
        head (`Sequence[Sequence[str]]`): A row of column titles, optionally preceded by a row of group titles.
        body (`Sequence[Sequence[str]]`): Rows of cells.
        format (`str`): `"text"` or `"markdown"`.
        left (`int`, *optional*, defaults to 1): Number of left-aligned columns; the others are right-aligned.

    Returns:
        `str`: The table.
    """
    if format == "markdown":
        # a Markdown table has only one row of titles
        titles = [" ".join(filter(None, parts)) for parts in zip(*head, strict=True)]
        rules = ["---" if column < left else "---:" for column in range(len(titles))]
        rows = [[cell if cell == "-" else markdown_text(cell) for cell in row] for row in (titles, *body)]
        rows.insert(1, rules)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return text_table(head, body, range(left))
