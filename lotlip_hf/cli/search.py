"""`lotlip search`: ranks the images of a folder by a description or by other images."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import Parser, make_parser, option, parse
from ..terminal import text_table, write_styled
from .model import IMAGE_ROOT, ModelOptions, report_skipped

if TYPE_CHECKING:
    from torch import Tensor

    from ..encoder import Encoder

DESCRIPTION = """\
Rank the images of a folder by how well a description fits them, or by other images. The first search embeds all images
and keeps an index in the hidden folder .lotlip; later searches embed only new and changed images.

  lotlip search --model checkpoint --images photos "A ginger cat on a sofa."
  lotlip search --model checkpoint --images photos --save-grid grid.png "A cat."
  lotlip search --model checkpoint --images photos "A cat on a sofa." --without "A sofa."
  lotlip search --model checkpoint --images photos --like night1.jpg night2.jpg --unlike day.jpg
"""


@dataclass(kw_only=True)
class SearchOptions(ModelOptions):
    """Options of `lotlip search`."""

    text: str | None = option(
        "Description to search for; not needed with --like", None, group="Search", metavar="TEXT", positional=True
    )
    images: str = option("Folder of images, including its subfolders", metavar="FOLDER")
    without: str | None = option("Ignore what this text says of the images", None, metavar="TEXT")
    like: list[str] = option(
        "Search for images like these files, which may be anywhere", default_factory=list, metavar="FILE"
    )
    unlike: list[str] = option("Search for images unlike these files", default_factory=list, metavar="FILE")
    top: int = option("Number of images to show", 5, at_least=1)
    save_grid: str | None = option("Draw the ranked images in this picture file", None, metavar="FILE")
    index: str | None = option("Folder of the index (default: .lotlip in --images)", None, metavar="FOLDER")
    image_root: str | None = option(IMAGE_ROOT, None, metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is None and not self.like:
            raise ValueError("`text` is missing: pass a description (TEXT) or images with --like.")


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(SearchOptions, prog="lotlip search", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Searches and prints the ranked images."""
    options = parse(SearchOptions, argv, parser())
    from ..grid import check_picture, save_grid
    from ..search import build_index

    if options.save_grid:
        check_picture(options.save_grid)
    encoder = options.load()
    query = query_of(encoder, options)
    index = build_index(
        encoder,
        options.images,
        index_folder=options.index,
        image_root=options.image_root,
        batch_size=options.batch_size or 32,
    )
    results = index.search(query, options.top)
    rows = [[str(rank), f"{result.score:.4f}", str(result.path)] for rank, result in enumerate(results, 1)]
    header, *lines = text_table([["rank", "score", "file"]], rows, left=[2], rule=False).splitlines(keepends=True)
    write_styled(header, "bold", sys.stdout)
    print("".join(lines))
    report_skipped(index.skipped)
    if options.save_grid:
        save_grid(results, options.save_grid, title(options), encoder.engine.background)
        print(f"Drawn in {options.save_grid}.", file=sys.stderr)


def query_of(encoder: "Encoder", options: SearchOptions) -> "Tensor":
    """The embedding [P] to search for: of the text, of the direction between images, or their sum."""
    from ..metrics import direction, without_text
    from ..metrics.direction import checked_direction
    from ..search import encode_query

    parts = [] if options.text is None else [encode_query(encoder, options.text)]
    if options.like or options.unlike:
        parts.append(direction(options.like, options.unlike, encoder))
    query = sum(parts[1:], parts[0])
    if options.without is not None:
        query = without_text(query, encode_query(encoder, options.without))
    return checked_direction(query, "The parts of the query cancel out (--without, --unlike)")


def title(options: SearchOptions) -> str:
    """What is searched for, in words."""
    images = [(name, getattr(options, name)) for name in ("like", "unlike")]
    words = [f"{name} {', '.join(Path(file).name for file in files)}" for name, files in images if files]
    words += [] if options.without is None else [f'without "{options.without}"']
    text = [] if options.text is None else [f'"{options.text}"' if words else options.text]
    return ", ".join([*text, *words])
