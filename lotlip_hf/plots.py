"""Colours and helpers that the plots of reports and studies share."""

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from .files import check_output, printable, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
DIRECTION_COLOURS = {"image_to_text": COLOURS[1], "text_to_image": COLOURS[3]}
# Formats that matplotlib writes and most programs do not show
NO_PICTURES = {"avif", "pgf", "raw", "rgba"}


def check_plot(file: str | os.PathLike) -> None:
    """
    Checks before long work that a plot can be drawn and written.

    Args:
        file (`str` or `os.PathLike`): Picture that will be written; the extension sets the format.

    Raises:
        `ImportError`: If matplotlib is not installed.
        `ValueError`: If matplotlib writes no format with this extension.
        `OSError`: If the file cannot be written; see [`~lotlip_hf.files.check_output`].
    """
    figure(1, 1)
    from matplotlib.backend_bases import FigureCanvasBase

    file = Path(file)
    kinds = sorted(set(FigureCanvasBase.get_supported_filetypes()) - NO_PICTURES)
    if file.suffix.lower().removeprefix(".") not in kinds:
        *most, last = (f".{kind}" for kind in kinds)
        raise ValueError(f"{file}: plots cannot have this extension. Use {', '.join(most)} or {last}.")
    check_output(file, overwrite=True)


def figure(width: float, height: float) -> "Figure":
    """
    Creates an empty figure.

    Args:
        width (`float`): Width in inches.
        height (`float`): Height in inches.

    Returns:
        `Figure`: The figure.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps every figure in memory until it is closed
    except ImportError as error:
        raise ImportError("matplotlib is not installed. Run pip install 'lotlip-hf[evaluation]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", file: str | os.PathLike) -> None:
    """
    Writes a figure to a file, and replaces an existing file.

    Args:
        figure (`Figure`): Figure.
        file (`str` or `os.PathLike`): Picture file to write. The extension determines the format.

    Raises:
        `ValueError`: If matplotlib writes no format with this extension.
        `OSError`: If the file cannot be written.
    """
    check_plot(file)
    with replacing(Path(file)) as picture:
        figure.savefig(picture, format=Path(file).suffix[1:].lower(), dpi=120)


def wrapped(text: str, width: int) -> str:
    """Wraps a text at `width` characters, and escapes `$`, which matplotlib reads as the start of a formula."""
    text = printable(" ".join(text.split()))
    return ("\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or text).replace("$", r"\$")
