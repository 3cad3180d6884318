"""`lotlip search`: the images of a folder that fit a description best."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..files import printable
from ..options import option, parse
from .model import ModelOptions, report_skipped

DESCRIPTION = """\
Rank the images of a folder by how well a description fits them. The images are embedded once; an index in the folder's
hidden .lotlip keeps that, and each search brings it up to date."""


@dataclass(kw_only=True)
class SearchOptions(ModelOptions):
    """Every option of `lotlip search`."""

    images: str = option("folder of images, with its subfolders")
    image_root: str | None = option("the folder that pictures must lie in, links followed (--images)", None)
    top: int = option("how many images to show", 5, at_least=1)
    save_grid: str | None = option("draw the ranked images in this picture", None)
    index: str | None = option("keep the index in this folder instead", None)
    text: str = option("the description", positional=True)


def run(argv: Sequence[str]) -> None:
    """Searches, and prints the ranked images."""
    options = parse(SearchOptions, argv, prog="lotlip search", description=DESCRIPTION)
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
    print("rank    score  file")
    for rank, result in enumerate(results, 1):
        print(f"{rank:4}  {result.score:7.4f}  {printable(result.path)}")
    report_skipped(index.skipped)
    if options.save_grid:
        save_grid(results, options.save_grid, options.text, encoder.engine.background)
        print(f"Drawn in {options.save_grid}.", file=sys.stderr)
