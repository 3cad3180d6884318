"""`lotlip search`: ranks the images of a folder by descriptions or by other images."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..files import one_line
from ..options import Parser, make_parser, option, parse
from ..terminal import text_table, write_styled
from .model import IMAGE_ROOT, ModelOptions, PatchOptions, report_skipped

if TYPE_CHECKING:
    from ..encoder import Encoder
    from ..search import ImageIndex, SearchResult

DESCRIPTION = """\
Rank the images of a folder by how well a description fits them, or by other images. The first search embeds all images
and keeps an index in the hidden folder .lotlip; later searches embed only new and changed images.

  lotlip search --model checkpoint --images photos "A ginger cat on a sofa."
  lotlip search --model checkpoint --images photos --save-grid grid.png "A cat."
  lotlip search --model checkpoint --images photos --image cat.jpg
  lotlip search --model composed --images photos --image cat.jpg "is asleep"
  lotlip search --model checkpoint --images photos "A cat on a sofa." --without "A sofa."
  lotlip search --model checkpoint --images photos --like night1.jpg night2.jpg --unlike day.jpg

Answer many queries with one start, from a file, a pipe or the keyboard:

  lotlip search --model checkpoint --images photos --queries queries.txt --json
  lotlip search --model checkpoint --images photos --queries -
"""
logger = logging.getLogger(__name__)

MAX_LINE = 1 << 20  # bytes of a query, 3000 times as long as what most models read


@dataclass(kw_only=True)
class IndexOptions(ModelOptions):
    """Options of a model and the index of a folder of images."""

    index: str | None = option(
        "Folder of the index (default: .lotlip in --images)", None, group="Search", metavar="FOLDER"
    )
    image_root: str | None = option(IMAGE_ROOT, None, metavar="FOLDER")

    def build_index(self, encoder: "Encoder", images: str) -> "ImageIndex":
        """Embeds new and changed images, and returns the index."""
        from ..search import build_index

        return build_index(
            encoder,
            images,
            index_folder=self.index,
            image_root=self.image_root,
            batch_size=self.batch_size or 32,
        )


@dataclass(kw_only=True)
class SearchOptions(IndexOptions, PatchOptions):
    """Options of `lotlip search`."""

    text: str | None = option(
        "Description to search for; not needed with --queries, --image or --like",
        None,
        group="Search",
        metavar="TEXT",
        positional=True,
    )
    images: str = option("Folder of images, including its subfolders", metavar="FOLDER")
    queries: str | None = option(
        "File with one description on each line; - reads the keyboard or a pipe", None, metavar="FILE"
    )
    image: str | None = option("Search by this image, which may be anywhere", None, metavar="FILE")
    without: str | None = option("Ignore what this text says of the images", None, metavar="TEXT")
    like: list[str] = option(
        "Search for images like these files, which may be anywhere", default_factory=list, metavar="FILE"
    )
    unlike: list[str] = option("Search for images unlike these files", default_factory=list, metavar="FILE")
    top: int = option("Number of images to show", 5, at_least=1)
    json: bool = option("Print one JSON object for each query", False)
    save_grid: str | None = option("Draw the ranked images in this picture file", None, metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries is not None:
            for name, value in (("TEXT", self.text), ("--save-grid", self.save_grid)):
                if value is not None:
                    raise ValueError(f"{name} does not work with --queries. Leave one of them out.")
        elif self.text is None and self.image is None and not self.like:
            raise ValueError(
                "`text` is missing: pass a description (TEXT), --queries, or images with --image or --like."
            )


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(SearchOptions, prog="lotlip search", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Searches and prints the ranked images."""
    options = parse(SearchOptions, argv, parser())
    if options.queries is not None:
        source = 0 if options.queries == "-" else options.queries
        with open(source, "rb", closefd=source != 0) as file:
            answer_all(options, file)
        return
    if options.save_grid:
        from ..grid import check_picture

        check_picture(options.save_grid)
    encoder = options.load()
    query = embedder(encoder, options)(options.text)
    index = options.build_index(encoder, options.images)
    results = index.search(query, options.top)
    show(results, title(options, options.text), options)
    report_skipped(index.skipped)
    if options.save_grid:
        from ..grid import save_grid

        save_grid(results, options.save_grid, title(options, options.text), encoder.engine.background)
        print(f"Drawn in {options.save_grid}.", file=sys.stderr)


def answer_all(options: SearchOptions, file: BinaryIO) -> None:
    """Answers the queries of a file one after another. Reports a line that is no query, and goes on."""
    encoder = options.load()
    embed = embedder(encoder, options)
    index = options.build_index(encoder, options.images)
    report_skipped(index.skipped)
    at_terminal = os.isatty(file.fileno())
    for number, line in enumerate(lines(file, "> " if at_terminal else ""), 1):
        if not line.strip():
            continue
        try:
            if len(line) >= MAX_LINE:
                raise ValueError(f"longer than {MAX_LINE:,} bytes")
            text = line.decode("utf-8-sig").strip()
            results = index.search(embed(text), options.top)
        except ValueError as error:
            logger.warning("Line %d is skipped: %s", number, one_line(error))
            if options.json:  # so that a program that waits for an answer to each query gets one
                print(json.dumps({"query": line[:80].decode(errors="replace"), "error": str(error)}), flush=True)
            continue
        if not options.json and not at_terminal:
            write_styled(f"{title(options, text)}\n", "bold", sys.stdout)
        show(results, title(options, text), options)


def lines(file: BinaryIO, prompt: str) -> Iterator[bytes]:
    """Yields the lines of a file as soon as they are there. Of a longer line, yields the first `MAX_LINE` bytes."""
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        line = rest = file.readline(MAX_LINE)
        while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE)
        if not line:
            print(end="\n" if prompt else "", file=sys.stderr)  # Ctrl-D leaves the cursor behind the prompt
            return
        yield line


def embedder(encoder: "Encoder", options: SearchOptions) -> Callable[[str | None], np.ndarray]:
    """Returns a function of a text that returns the embedding [P] to search for: the sum of the text and the images of
    the options, without the part along another text. A composer of the model joins the text and `--image`."""
    from ..engines.exported import is_exported
    from ..search import encode_query

    image = composer = None
    if options.image is not None:
        ((_, image),) = encoder.image_rows([options.image])
        if isinstance(image, Exception):
            raise image
        if not is_exported(options.model):  # PyTorch is there
            from ..compose import load_composer

            composer = load_composer(options.model, encoder)
    others = []
    if options.like or options.unlike:
        from ..metrics import direction

        others.append(np.asarray(direction(options.like, options.unlike, encoder)))
    without = None if options.without is None else encode_query(encoder, options.without)

    def parts(text: str | None) -> list[np.ndarray]:
        """The embeddings of the description and `--image`."""
        if composer is not None and image is not None and text is not None:
            return [composer.query(encoder, image, text)]
        return [*([] if image is None else [image]), *([] if text is None else [encode_query(encoder, text)])]

    def embed(text: str | None) -> np.ndarray:
        query = np.sum([*others, *parts(text)], axis=0)
        if without is not None:
            query = query - (query @ without) * without
        norm = np.linalg.norm(query)
        if norm < 1e-5:
            raise ValueError("The parts of the query cancel out (--without, --unlike). Leave one of them out.")
        return query / norm

    return embed


def show(results: Sequence["SearchResult"], query: str, options: SearchOptions) -> None:
    """Prints the results of a query, at once."""
    if options.json:
        found = [
            {"rank": rank, "score": round(result.score, 6), "file": str(result.path)}
            for rank, result in enumerate(results, 1)
        ]
        print(json.dumps({"query": query, "results": found}), flush=True)
        return
    rows = [[str(rank), f"{result.score:.4f}", str(result.path)] for rank, result in enumerate(results, 1)]
    header, *others = text_table([["rank", "score", "file"]], rows, left=[2], rule=False).splitlines(keepends=True)
    write_styled(header, "bold", sys.stdout)
    print("".join(others), flush=True)


def title(options: SearchOptions, text: str | None) -> str:
    """What is searched for, in words."""
    images = [("image", [options.image] if options.image else []), ("like", options.like), ("unlike", options.unlike)]
    words = [f"{name} {', '.join(Path(file).name for file in files)}" for name, files in images if files]
    words += [] if options.without is None else [f'without "{options.without}"']
    texts = [] if text is None else [f'"{text}"' if words else text]
    return ", ".join([*texts, *words])
