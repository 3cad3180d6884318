"""Prompts of a diffusion pipeline, with what must be in the pictures."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...data.readers import every_row
from ...files import printable
from ...images import ImageError, ImageSource
from ...words import find_phrase
from ..tasks import Part
from .collect import Row, Source, Task
from .files import field_of, string_of


def rows(source: Source) -> Iterator[Row]:
    """Yields the prompts, with their images if the file names them."""
    file = Path(source.data or "")
    if not file.is_file():
        raise FileNotFoundError(f"{source.data}: no such file. Pass a file of prompts. {source.advice}")
    source.where = source.name = source.id = file.name
    source.roots = (os.fspath(source.options.image_root or file.parent),)
    for number, row in enumerate(every_row(file), start=1):
        where = f"{file}, row {number}"
        prompt = string_of(row, "prompt", where)
        listed = field_of(row, "parts", where)
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{where}: 'parts' is {listed!r:.80} instead of a list of phrases of the prompt.")
        parts = [_part(one, prompt, where) for one in listed]
        name = f"{number}: {printable(prompt[:60])}"
        if row.get("image") is None:
            yield Row(name, load=partial(_no_image, name), texts=(prompt,), parts=parts)
        else:
            yield Row(name, (file.parent / string_of(row, "image", where),), texts=(prompt,), parts=parts)


def _part(value: Any, prompt: str, where: str) -> Part:
    """Reads a part: a phrase of the prompt, or an object with `text` and `box`."""
    text = value if isinstance(value, str) else string_of(value, "text", where)
    if find_phrase(prompt, text) is None:
        raise ValueError(f"{where}: 'parts' has {text!r:.80}, which is no phrase of the prompt. Write it as there.")
    box = None if isinstance(value, str) else value.get("box")
    match box:
        case None:
            return Part(text)
        case [x0, y0, x1, y1] if all(type(one) in (int, float) for one in box):
            if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:
                return Part(text, (x0, y0, x1, y1))
    raise ValueError(f"{where}: 'box' is {box!r:.80}. Write [x0, y0, x1, y1] in [0, 1] from the top left corner.")


def _no_image(name: str) -> ImageSource:
    raise ImageError(name, "the file names no image; draw it with --pipeline")


TASK = Task(
    key="prompts",
    name="prompts",
    id="prompts",
    description="pictures of a diffusion pipeline: what the prompts ask for and the pictures have",
    source=(
        "write a file of JSON lines with `prompt`, `parts` (phrases of the prompt, or objects with `text` and `box`) "
        "and, unless --pipeline draws the pictures, `image` (a path from the folder of the file)."
    ),
    rows=rows,
    options=("num_images",),
    normalize=False,
)
