"""Search a folder of images with a description: an index of the folder, kept up to date, and its ranked results."""

import contextlib
import hashlib
import io
import logging
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel

from .encoder import encode_texts, iterate_image_embeddings
from .files import check_output, printable, replacing
from .images import WHITE, Background, ImageError, find_images, image_extensions, load_image
from .store import EmbeddingStore, fingerprint

logger = logging.getLogger(__name__)

INDEX_FOLDER = ".lotlip"
# Rows that are read from the index at a time.
SEARCH_BLOCK = 16384
# Sans serif fonts with many characters, under the names that they have on Linux, macOS and Windows.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "PingFang.ttc",
    "msyh.ttc",
)
# An index is rewritten when more of its rows are out of date than in use, and at least so many.
MIN_DEAD_ROWS = 1024


@dataclass(frozen=True)
class SearchResult:
    """
    An image that was found.

    Args:
        path (`Path`): the file.
        score (`float`): cosine similarity of the image and the description, from -1 to 1.
    """

    path: Path
    score: float


@dataclass
class ImageIndex:
    """
    The embeddings of a folder's images. Made by `build_index`.

    Args:
        folder (`Path`): the folder.
        files (`list[str]`): the images, relative to the folder, sorted.
        rows (`np.ndarray`): int64, of shape [N]: where in `embeddings` each file's embedding is.
        embeddings (`np.ndarray`): float32, of shape [at least N, P], normalised; mapped from the index's file.
        skipped (`dict[str, str]`): images without an embedding, relative to the folder, and the reason.
        fingerprint (`str`): of the image tower that made the embeddings.
    """

    folder: Path
    files: list[str]
    rows: np.ndarray
    embeddings: np.ndarray
    skipped: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def search(self, query_embedding: torch.Tensor, top: int = 5) -> list[SearchResult]:
        """
        Ranks the images.

        Args:
            query_embedding (`torch.Tensor`): normalised, of shape [P], from the model that made the index.
            top (`int`, *optional*, defaults to 5): how many images to return.

        Returns:
            `list[SearchResult]`: the best first, equal ones by name; all images if there are fewer than `top`.

        Raises:
            ValueError: if `top` is less than 1 or the embedding's shape does not fit the index.
        """
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        width = self.embeddings.shape[1]
        if tuple(query_embedding.shape) != (width,):
            raise ValueError(
                f"`query_embedding` must have the shape [{width}] of the index, got {list(query_embedding.shape)}."
            )
        query = query_embedding.detach().cpu().float().numpy()
        scores = np.empty(len(self.embeddings), dtype=np.float32)
        for start in range(0, len(scores), SEARCH_BLOCK):
            scores[start : start + SEARCH_BLOCK] = self.embeddings[start : start + SEARCH_BLOCK] @ query
        scores = scores[self.rows]
        # Copies of an image may differ in the last bits of their scores.
        best = np.argsort(-scores.round(6), kind="stable")[:top]
        # Rows that came with the folder may be of any length.
        return [SearchResult(self.folder / self.files[index], float(scores[index].clip(-1, 1))) for index in best]


def build_index(
    model: PreTrainedModel,
    processor: Any,
    folder: str | os.PathLike,
    *,
    index_folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    batch_size: int = 32,
    progress: bool = True,
    dimension: int | None = None,
) -> ImageIndex:
    """
    Embeds the images of a folder that are new or have changed, and returns the index of all.

    The index is kept in the folder's hidden `.lotlip`, keyed by the image tower's weights and by each file's name,
    size and modification time. Every embedding is kept as soon as it is computed: after an interruption the same call
    goes on. An image that cannot be read is skipped, and listed in `ImageIndex.skipped`.

    Args:
        model (`PreTrainedModel`): LoTLIP, or any model with CLIP's `get_image_features`.
        processor (`ProcessorMixin`): its processor.
        folder (`str` or `os.PathLike`): the folder; its subfolders belong to it, hidden ones do not.
        index_folder (`str` or `os.PathLike`, *optional*):
            Where to keep the index instead, for a folder that cannot be written to. It may hold those of many folders.
        image_root (`str` or `os.PathLike`, *optional*, defaults to `folder`):
            The folder that links in `folder` must not lead out of.
        batch_size (`int`, *optional*, defaults to 32): images in a batch.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.
        dimension (`int`, *optional*): of the model's embeddings; an index of another is renamed, and made anew.

    Returns:
        `ImageIndex`: the index.

    Raises:
        NotADirectoryError: if `folder` is not a folder.
        ValueError: if it has no images, or none that can be read.
        OSError: if the index cannot be written.
    """
    folder = Path(folder)
    files, skipped = find_images(folder, image_root)
    if not files and not skipped:
        extensions = ", ".join(
            sorted(image_extensions() & {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tiff", ".bmp"})
        )
        raise ValueError(f"{folder}: no images in this folder or below it (files that end in {extensions}, ...).")
    made_by = fingerprint(model, processor, "image")
    root, name = folder, INDEX_FOLDER
    advice = "name a folder that can be written to with --index DIR (`index_folder`)"
    if index_folder is not None:
        advice = "choose a folder that can be written to"
        # Files are known by their relative paths: indexes of several folders stay apart.
        digest = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
        root, name = Path(index_folder), f"{folder.resolve().name or 'root'}-{digest}"
    version = {"size": int, "mtime_ns": int}
    with EmbeddingStore(root / name / made_by, advice, root=root, fields=version, dimension=dimension) as store:
        outdated = [name for name, status in files.items() if not _is_current(store.entries.get(name), status)]
        done = 0
        try:
            for index, result in iterate_image_embeddings(
                model,
                processor,
                [folder / name for name in outdated],
                batch_size=batch_size,
                progress=progress and bool(outdated),
            ):
                name = outdated[index]
                version = {"size": files[name].st_size, "mtime_ns": files[name].st_mtime_ns}
                if not isinstance(result, ImageError):
                    store.append(name, result.numpy(), **version)
                    done += 1
                elif result.transient:
                    skipped[name] = result.reason
                else:
                    store.append(name, None, error=result.reason, **version)
        except KeyboardInterrupt:
            logger.warning(
                "Interrupted: %d embeddings are kept in %s, %d of them new; the same command goes on from there.",
                sum("row" in entry for entry in store.entries.values()),
                store.folder,
                done,
            )
            raise
        entries = {name: store.entries[name] for name in files if name not in skipped}
        skipped |= {name: entry["error"] for name, entry in entries.items() if "error" in entry}
        embedded = [name for name, entry in entries.items() if "row" in entry]
        if store.rows - len(embedded) > max(len(embedded), MIN_DEAD_ROWS):
            store.compact(list(entries))
        rows = np.array([store.entries[name]["row"] for name in embedded], dtype=np.int64)
        index = ImageIndex(folder, embedded, rows, store.embeddings(), dict(sorted(skipped.items())), made_by)
    if not index.files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(index.skipped.items())[:5])
        raise ValueError(f"{folder}: none of its {len(index.skipped)} images can be read ({reasons}).")
    return index


def search_folder(
    model: PreTrainedModel,
    processor: Any,
    folder: str | os.PathLike,
    text: str,
    *,
    top: int = 5,
    index_folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> list[SearchResult]:
    """
    Ranks the images of a folder by how well a description fits them.

    Args:
        model (`PreTrainedModel`): LoTLIP, or another dual encoder.
        processor (`ProcessorMixin`): its processor.
        folder (`str` or `os.PathLike`): the folder.
        text (`str`): the description, as long as the model takes.
        top (`int`, *optional*, defaults to 5): how many images to return.
        index_folder, image_root, batch_size, progress: as in `build_index`.

    Returns:
        `list[SearchResult]`: the best first.

    Raises:
        ValueError, OSError: as `build_index`; ValueError if `text` is empty.

    Example:

    ```python
    >>> from lotlip_hf.encoder import load_model
    >>> from lotlip_hf.search import search_folder

    >>> model, processor = load_model("path/to/checkpoint")  # doctest: +SKIP
    >>> search_folder(model, processor, "photos", "A red kite. A boy holds its string.")  # doctest: +SKIP
    ```
    """
    query = encode_query(model, processor, text)
    index = build_index(
        model,
        processor,
        folder,
        index_folder=index_folder,
        image_root=image_root,
        batch_size=batch_size,
        progress=progress,
        dimension=len(query),
    )
    return index.search(query, top)


def encode_query(model: PreTrainedModel, processor: Any, text: str) -> torch.Tensor:
    """
    Encodes one description.

    Args:
        model (`PreTrainedModel`): LoTLIP, or another dual encoder.
        processor (`ProcessorMixin`): its processor.
        text (`str`): the description.

    Returns:
        `torch.Tensor`: its normalised embedding [P].

    Raises:
        ValueError: if the description is empty.
    """
    if not text.strip():
        raise ValueError("The description to search for is empty.")
    return encode_texts(model, processor, [text], progress=False)[0]


def check_picture(output: str | os.PathLike) -> None:
    """
    Finds out before the long work whether a picture can be written.

    Args:
        output (`str` or `os.PathLike`): the picture to be.

    Raises:
        ValueError: if its extension is not that of an image format that PIL writes.
        OSError: as [`~lotlip_hf.files.check_output`].
    """
    image_extensions()  # fills PIL's registry
    if Image.registered_extensions().get(Path(output).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{output}: expected a picture that ends in .png, .jpg or another extension that PIL writes.")
    check_output(output, overwrite=True)


def save_grid(
    results: Sequence[SearchResult], output: str | os.PathLike, title: str, background: Background = WHITE
) -> None:
    """
    Draws ranked images side by side, each with its rank, score and name, under the description.

    Args:
        results (`Sequence[SearchResult]`): what to draw, at least one.
        output (`str` or `os.PathLike`): the picture to write; its extension gives the format.
        title (`str`): the description, wrapped; its end is left out if it takes more than eight lines.
        background (`str` or `Sequence[int]`, *optional*, defaults to `"white"`):
            What transparent pictures show; see [`~lotlip_hf.images.load_image`].

    Raises:
        ValueError, OSError: if there are no results; as `check_picture`.
    """
    if not results:
        raise ValueError("`results` is empty: there is nothing to draw.")
    check_picture(output)
    side, margin, caption = 280, 20, 62  # pixels
    columns = min(5, len(results)) if len(results) < 5 or len(results) % 4 else 4
    width = max(3, columns) * (side + margin) + margin
    names = [printable(result.path.name) for result in results]
    written = title + "".join(names)
    title_font, rank_font, name_font = (_font(size, written) for size in (20, 22, 15))
    # Lines differ a little in width from the text's average.
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
    canvas.save(picture, Image.registered_extensions()[Path(output).suffix.lower()])
    with replacing(Path(output)) as file:
        file.write(picture.getvalue())


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Of the fonts of this machine, one that has most of the characters of `text`. PIL's own has just ASCII."""

    def missing(font: ImageFont.FreeTypeFont) -> int:
        box = bytes(font.getmask("\U0010ffff"))  # no character: what stands for those that a font lacks
        return sum(bytes(font.getmask(character)) == box for character in characters)

    characters = {character for character in text if character.isprintable() and not character.isspace()}
    fonts = []
    for name in FONTS:
        with contextlib.suppress(OSError):  # not on this machine
            fonts.append(ImageFont.truetype(name, size))
    return min(fonts, key=missing, default=ImageFont.load_default(size))


def _is_current(entry: dict[str, Any] | None, status: os.stat_result) -> bool:
    return entry is not None and (entry["size"], entry["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
