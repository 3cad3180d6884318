"""`lotlip search`: ranks the images of a folder by a description."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..options import Parser, make_parser, option, parse
from ..terminal import text_table, write_styled
from .model import IMAGE_ROOT, ModelOptions, report_skipped

DESCRIPTION = """\
Rank the images of a folder by how well a description fits them. The first search embeds all images and keeps an index
in the hidden folder .lotlip; later searches embed only new and changed images.

  lotlip search --model checkpoint --images photos "A ginger cat on a sofa."
  lotlip search --model checkpoint --images photos --save-grid grid.png "A cat."
"""


@dataclass(kw_only=True)
class SearchOptions(ModelOptions):
    """Options of `lotlip search`."""

    text: str = option("Description to search for", group="Search", metavar="TEXT", positional=True)
    images: str = option("Folder of images, including its subfolders", metavar="FOLDER")
    top: int = option("Number of images to show", 5, at_least=1)
    save_grid: str | None = option("Draw the ranked images in this picture file", None, metavar="FILE")
    index: str | None = option("Folder of the index (default: .lotlip in --images)", None, metavar="FOLDER")
    image_root: str | None = option(IMAGE_ROOT, None, metavar="FOLDER")


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(SearchOptions, prog="lotlip search", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Searches and prints the ranked images."""
    options = parse(SearchOptions, argv, parser())
    from ..grid import check_picture, save_grid
    from ..search import build_index, encode_query

    if options.save_grid:
        check_picture(options.save_grid)
    encoder = options.load()
    query = encode_query(encoder, options.text)
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
        save_grid(results, options.save_grid, options.text, encoder.engine.background)
        print(f"Drawn in {options.save_grid}.", file=sys.stderr)
