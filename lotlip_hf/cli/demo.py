"""`lotlip demo`: serves a page that ranks pictures by a description and explains the ranking."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from ..options import Parser, make_parser, option, parse
from .model import report_skipped
from .search import IndexOptions

DESCRIPTION = """\
Open a page in your browser that ranks pictures by a description, shows how well each sentence fits each picture, and
explains the first picture. With --images, it ranks a folder with the index of `lotlip search`; otherwise, you drop
pictures on the page. The page needs gradio: pip install 'lotlip-hf[space]'

  lotlip demo --model checkpoint --images photos
  lotlip demo --model checkpoint --compare openai/clip-vit-base-patch16
"""


@dataclass(kw_only=True)
class DemoOptions(IndexOptions):
    """Options of `lotlip demo`."""

    images: str | None = option(
        "Folder of images, including its subfolders; without it, drop pictures on the page",
        None,
        group="Search",
        metavar="FOLDER",
    )
    compare: str | None = option("Second checkpoint, shown beside the first", None, group="Page", metavar="NAME")
    port: int | None = option(
        "Port of the page (default: the first free one from 7860)", None, at_least=1, at_most=65535
    )
    share: bool = option("Create a public link through gradio's servers", False)


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(DemoOptions, prog="lotlip demo", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Serves the page until Ctrl-C."""
    options = parse(DemoOptions, argv, parser())
    from ..demo import Model, draw_examples, indexed, serve, shown_name

    models = []
    for name in filter(None, (options.model, options.compare)):
        encoder = options.load_named(name)
        models.append(Model(shown_name(name), encoder))
        if options.images is not None:
            index = options.build_index(encoder, options.images)
            report_skipped(index.skipped)
            models[-1].photos = indexed(index)
    with tempfile.TemporaryDirectory() as folder:
        examples = ([], []) if options.images else draw_examples(folder)
        serve(models, examples, options.port, options.share)
