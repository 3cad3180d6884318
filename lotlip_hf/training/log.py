"""The log of a run, one JSON object per line, and the training curve drawn from it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import append_json_line, read_json_lines, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_NAME = "log.jsonl"
CURVE_NAME = "curve.png"
RECALLS = {
    "long_image_to_text_r1": ("long, image to text", "C0", "-"),
    "long_text_to_image_r1": ("long, text to image", "C0", "--"),
    "short_image_to_text_r1": ("short, image to text", "C1", "-"),
    "short_text_to_image_r1": ("short, text to image", "C1", "--"),
}
# The smoothing window reaches this fraction of the points to either side.
SMOOTHING = 0.03


class RunLog:
    """
    The log of a run. Each line is flushed, so that a killed process loses no line.

    The next line replaces an incomplete last line, which a killed process can leave.

    Args:
        path (`str` or `os.PathLike`): The file, created with the first line; lines are appended to an existing file.

    Example:

    ```python
    >>> import tempfile
    >>> from lotlip_hf.training.log import RunLog, read_log

    >>> log = RunLog(f"{tempfile.mkdtemp()}/log.jsonl")
    >>> for step in (10, 20, 30):
    ...     log.write({"step": step, "loss": 2.5})
    >>> log.truncate(20)
    >>> read_log(log.path)
    [{'step': 10, 'loss': 2.5}, {'step': 20, 'loss': 2.5}]
    ```
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Appends a line with a `step` and its values. NaN and infinity become null, as JSON has neither."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        append_json_line(self.path, finite)

    def truncate(self, step: int) -> None:
        """Removes the lines after a step, which a resumed run writes again."""
        if not self.path.exists():
            return
        kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
        with replacing(self.path) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Reads the log of a run. The run may be in progress.

    Args:
        path (`str` or `os.PathLike`): The file `log.jsonl`, or the folder of the run.

    Returns:
        `list[dict[str, Any]]`: The lines in the order of writing, each with `step`, without an incomplete last line.

    Raises:
        `FileNotFoundError`: If there is no log.
        `LineError`: If a line other than an incomplete last line is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LOG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Pass the folder of a run or its `{LOG_NAME}`.")
    return [entry for _, entry in read_json_lines(path, _is_entry)]


def _is_entry(_: int, value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("step"), int)
        and all(
            isinstance(each, int | float | None) for name, each in value.items() if is_loss(name) or name in RECALLS
        )
    )


def is_loss(name: str) -> bool:
    """Returns whether a log key is the loss or one of its terms."""
    return name == "loss" or name.startswith("loss_")


def draw_curve(log_path: str | os.PathLike, picture_path: str | os.PathLike) -> None:
    """
    Draws the training curve: the loss and its terms, raw and smoothed. If the run was evaluated, a second panel shows
    R@1 of long and short captions in both directions.

    Args:
        log_path (`str` or `os.PathLike`): The log, or the folder of the run.
        picture_path (`str` or `os.PathLike`): The picture to write. The extension determines the format.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `FileNotFoundError`: If there is no log.
        `ValueError`: If the log is damaged, or has neither a loss nor an evaluation.
    """
    try:
        from matplotlib.figure import Figure  # unlike pyplot, `Figure` opens no window
    except ImportError as error:
        raise ImportError("The training curve needs matplotlib: pip install 'lotlip-hf[train]'") from error

    entries = read_log(log_path)
    steps = [entry for entry in entries if entry.get("loss") is not None]
    evaluations = [entry for entry in entries if any(entry.get(name) is not None for name in RECALLS)]
    panels = [(draw, shown) for draw, shown in ((_draw_losses, steps), (_draw_recalls, evaluations)) if shown]
    if not panels:
        raise ValueError(f"{log_path} has neither a loss nor an evaluation to draw.")
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (draw, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, shown)
        axes.set_xlabel("step")
        axes.set_xlim(0, max(entry["step"] for entry in entries) * 1.02 or 1)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture_path, dpi=120)


def _draw_losses(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    # Terms that are 0 throughout are not drawn. A single term is the loss itself.
    terms = sorted({name for entry in entries for name in entry if name.startswith("loss_") and entry[name]})
    lowest = 0.0
    for number, name in enumerate(["loss", *(terms if len(terms) > 1 else ())]):
        colour = f"C{number - 1}" if number else "0.3"
        label = name.removeprefix("loss_").replace("_", " ")
        points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
        if points:
            at_steps, values = zip(*points, strict=True)
            lowest = min(lowest, *values)
            axes.plot(at_steps, values, color=colour, alpha=0.25, linewidth=1)
            marker = "o" if len(points) == 1 else None  # a single point has no line
            axes.plot(at_steps, _smoothed(values), color=colour, label=label, marker=marker)
    axes.set_ylim(bottom=1.05 * lowest)
    axes.set_ylabel("loss")
    axes.set_title("Training loss (smoothed; pale: raw)")


def _draw_recalls(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    for name, (label, colour, style) in RECALLS.items():
        points = [(entry["step"], 100 * entry[name]) for entry in entries if entry.get(name) is not None]
        if points:
            at_steps, values = zip(*points, strict=True)
            label = f"{label}: {values[-1]:.1f} %"
            axes.plot(at_steps, values, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    highest = max(100 * entry[name] for entry in entries for name in RECALLS if entry.get(name) is not None)
    axes.set_ylim(0, min(100, 1.2 * highest) or 1)  # keeps small recalls visible
    axes.set_ylabel("R@1 (%)")
    axes.set_title("Retrieval on held-out pairs (legend: last value)")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Returns means over centred windows, which are smaller near the ends."""
    reach = round(SMOOTHING * len(values))
    smoothed = []
    for index in range(len(values)):
        half = min(reach, index, len(values) - 1 - index)
        window = values[index - half : index + half + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
