"""A run's log, one JSON object a line, and the training curve drawn from it."""

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
# The smoothed loss is a mean over this share of the run's lines on either side.
SMOOTHING = 0.03


class RunLog:
    """
    The log of a run: each line is on its way to the disk when `write` returns, so that a killed process loses none.

    Half a line that a killed process has left at the end is replaced by the next one.

    Args:
        path: The file; made with the first line. An existing one is added to.

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
        """Adds a line: a `step` and its numbers; JSON has no NaN and no infinity, which become null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        append_json_line(self.path, finite)

    def truncate(self, step: int) -> None:
        """Drops the lines after a step, which a resumed run writes again; `ValueError` if the log is damaged."""
        if not self.path.exists():
            return
        kept = [entry for entry in read_log(self.path) if entry["step"] <= step]
        with replacing(self.path) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Reads a run's log, also while the run goes on.

    Args:
        path: The file `log.jsonl`, or the run's folder.

    Returns:
        The lines, in the order in which they were written, each with `step`. Half a line at the end, of a run that
        writes or that was killed, is left out.

    Raises:
        FileNotFoundError: if there is no log.
        LineError: if another line is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LOG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no log of a run.")
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
    """Whether a name is that of the loss, or of a share of it."""
    return name == "loss" or name.startswith("loss_")


def draw_curve(log_path: str | os.PathLike, picture_path: str | os.PathLike) -> None:
    """
    Draws the training curve: the loss and its shares, smoothed and as they were, and where the run was evaluated R@1
    of long and of short captions in both directions.

    Args:
        log_path: The run's log, or its folder.
        picture_path: The picture; its extension says of which kind it is.

    Raises:
        ImportError: without matplotlib.
        FileNotFoundError: if there is no log.
        ValueError: if the log is damaged, or holds neither a loss nor an evaluation.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot there is no window and nothing to close
    except ImportError as error:
        raise ImportError("The training curve is drawn by matplotlib: pip install lotlip-hf[train]") from error

    entries = read_log(log_path)
    steps = [entry for entry in entries if entry.get("loss") is not None]
    evaluations = [entry for entry in entries if any(entry.get(name) is not None for name in RECALLS)]
    panels = [(draw, shown) for draw, shown in ((_draw_losses, steps), (_draw_recalls, evaluations)) if shown]
    if not panels:
        raise ValueError(f"{log_path}: there is nothing to draw, neither a loss nor an evaluation.")
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (draw, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, shown)
        axes.set_xlabel("step")
        axes.set_xlim(0, max(entry["step"] for entry in entries) * 1.02 or 1)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture_path, dpi=120)


def _draw_losses(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    # shares that are not 0 throughout; one alone is the loss
    shares = sorted({name for entry in entries for name in entry if name.startswith("loss_") and entry[name]})
    lowest = 0.0
    for number, name in enumerate(["loss", *(shares if len(shares) > 1 else ())]):
        colour = f"C{number - 1}" if number else "0.3"
        label = name.removeprefix("loss_").replace("_", " ")
        points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
        if points:
            at, values = zip(*points, strict=True)
            lowest = min(lowest, *values)
            axes.plot(at, values, color=colour, alpha=0.25, linewidth=1)
            # a single point has no line
            axes.plot(at, _smoothed(values), color=colour, label=label, marker="o" if len(points) == 1 else None)
    axes.set_ylim(bottom=1.05 * lowest)
    axes.set_ylabel("loss")
    axes.set_title("Training loss (smoothed; pale: as it was)")


def _draw_recalls(axes: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    for name, (label, colour, style) in RECALLS.items():
        points = [(entry["step"], 100 * entry[name]) for entry in entries if entry.get(name) is not None]
        if points:
            at, values = zip(*points, strict=True)
            label = f"{label}: {values[-1]:.1f} %"
            axes.plot(at, values, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    highest = max(100 * entry[name] for entry in entries for name in RECALLS if entry.get(name) is not None)
    axes.set_ylim(0, min(100, 1.2 * highest) or 1)  # where recalls are small, too, they are seen
    axes.set_ylabel("R@1 (%)")
    axes.set_title("Retrieval on held-out pairs (legend: last value)")


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over as much before as after, and so less of it towards the ends."""
    reach = round(SMOOTHING * len(values))
    smoothed = []
    for place in range(len(values)):
        own = min(reach, place, len(values) - 1 - place)
        window = values[place - own : place + own + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
