"""Draws ranked images side by side in one picture."""

import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .files import check_output, printable, replacing
from .images import WHITE, Background, ImageError, image_extensions, load_image
from .search import SearchResult

# Key of the description in the metadata of a PNG file
DESCRIPTION = "lotlip search"


def check_picture(output: str | os.PathLike) -> None:
    """
    Checks before long work that a picture can be written.

    Args:
        output (`str` or `os.PathLike`): Picture that will be written.

    Raises:
        `ValueError`: If PIL writes no format with this file extension.
        `OSError`: If the file cannot be written; see [`~lotlip_hf.files.check_output`].
    """
    image_extensions()  # fills PIL's registry
    if Image.registered_extensions().get(Path(output).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{output}: PIL writes no format with this extension. Use .png or .jpg, for example.")
    check_output(output, overwrite=True)


def save_grid(
    results: Sequence[SearchResult], output: str | os.PathLike, title: str, background: Background = WHITE
) -> None:
    """
    Draws ranked images side by side, each with its rank, score and file name, below the description.

    Args:
        results (`Sequence[SearchResult]`): Ranked images, at least one.
        output (`str` or `os.PathLike`): Picture to write; the extension sets the format.
        title (`str`): Description, which is wrapped and cut after eight lines.
        background (`str` or `Sequence[int]`, *optional*, defaults to `"white"`): Colour behind transparent pixels; see
            [`~lotlip_hf.images.load_image`].

    Raises:
        `ValueError`: If there are no results or PIL writes no format with the extension of `output`.
        `OSError`: If the picture cannot be written.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.grid import save_grid
    >>> from lotlip_hf.search import build_index, encode_query

    >>> encoder, text = load_encoder("checkpoint"), "A cat sleeps on a red sofa."
    >>> results = build_index(encoder, "photos").search(encode_query(encoder, text))
    >>> save_grid(results, "ranked.png", text)
    ```
    """
    if not results:
        raise ValueError("`results` is empty. Pass at least one search result.")
    check_picture(output)
    side, margin, caption = 280, 20, 62  # pixels
    columns = min(5, len(results)) if len(results) < 5 or len(results) % 4 else 4
    width = max(3, columns) * (side + margin) + margin
    names = [printable(result.path.name) for result in results]
    title_font, rank_font, name_font = (font(size) for size in (20, 22, 15))
    # 0.94, because some lines are wider than the average width of a character suggests.
    characters = int(0.94 * (width - 2 * margin) / (title_font.getlength(title or " ") / max(1, len(title))))
    lines = textwrap.wrap(title, characters, max_lines=8, placeholder=" ...")
    top = margin + 28 * len(lines) + (margin if lines else 0)
    height = top + math.ceil(len(results) / columns) * (side + caption + margin)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((margin, margin + 28 * number), line, "#202020", title_font)
    for number, result in enumerate(results):
        left = margin + number % columns * (side + margin)
        upper = top + number // columns * (side + caption + margin)
        draw.rectangle((left, upper, left + side - 1, upper + side - 1), "#f0f0f0")
        try:
            picture = load_image(result.path, background=background)
            scale = side / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            canvas.paste(picture, (left + (side - picture.width) // 2, upper + (side - picture.height) // 2))
        except ImageError as error:
            draw.text((left + 10, upper + 10), "\n".join(textwrap.wrap(error.reason, 34)), "#a02020", name_font)
        draw.text((left, upper + side + 8), f"{number + 1}", "#202020", rank_font)
        draw.text((left + side, upper + side + 10), f"{result.score:.4f}", "#606060", name_font, anchor="ra")
        name = names[number]
        kept = len(name) // 2
        while name_font.getlength(name) > side:
            kept -= 1
            name = f"{names[number][:kept]}...{names[number][-kept:]}"
        draw.text((left, upper + side + 37), name, "#606060", name_font)
    picture = io.BytesIO()
    metadata = PngImagePlugin.PngInfo()
    metadata.add_itxt(DESCRIPTION, title.encode(errors="backslashreplace").decode())
    canvas.save(picture, Image.registered_extensions()[Path(output).suffix.lower()], pnginfo=metadata)
    with replacing(Path(output)) as file:
        file.write(picture.getvalue())


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Loads DejaVu Sans, which covers most alphabets, or PIL's default font, in a size in pixels."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
