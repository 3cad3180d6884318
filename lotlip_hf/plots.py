"""What the plots of reports and studies share: how they look, and which pictures can be written."""

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from .files import check_output, printable, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
# Of Okabe and Ito's palette, which people tell apart however they see colours.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
DIRECTION_COLOURS = {"image_to_text": COLOURS[1], "text_to_image": COLOURS[3]}
# What matplotlib writes and hardly anything shows, or not everywhere.
NO_PICTURES = {"avif", "pgf", "raw", "rgba"}


def check_plot(file: str | os.PathLike) -> None:
    """
    Finds out before the long work whether a plot can be drawn and written.

    Args:
        file: The picture to be; its extension says of which kind it is.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the extension is not that of a kind of picture that matplotlib writes; the message names those.
        OSError: as [`~lotlip_hf.files.check_output`].
    """
    figure(1, 1)
    from matplotlib.backend_bases import FigureCanvasBase

    file = Path(file)
    kinds = sorted(set(FigureCanvasBase.get_supported_filetypes()) - NO_PICTURES)
    if file.suffix.lower().removeprefix(".") not in kinds:
        *most, last = (f".{kind}" for kind in kinds)
        raise ValueError(f"{file}: expected a picture that ends in {', '.join(most)} or {last}.")
    check_output(file, overwrite=True)


def figure(width: float, height: float) -> "Figure":
    """
    An empty figure.

    Args:
        width, height: In inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot there is no window and nothing to close
    except ImportError as error:
        raise ImportError("Plots are drawn by matplotlib: pip install 'lotlip-hf[evaluation]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", file: str | os.PathLike) -> None:
    """
    Writes a figure, in place of what there may be.

    Args:
        figure: What [`figure`] gave, drawn on.
        file: The picture.

    Raises:
        ValueError, OSError: as [`check_plot`], or if it cannot be written.
    """
    check_plot(file)
    with replacing(Path(file)) as picture:
        figure.savefig(picture, format=Path(file).suffix[1:].lower(), dpi=120)


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most `width` characters, with all its words, none of it taken for a formula."""
    text = printable(" ".join(text.split()))
    return ("\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or text).replace("$", r"\$")
