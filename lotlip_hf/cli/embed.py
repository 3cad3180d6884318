"""`lotlip embed`: writes embeddings of images or texts to a Parquet file."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..files import check_output
from ..options import Parser, make_parser, option, parse
from .model import IMAGE_ROOT, ModelOptions, report_skipped

DESCRIPTION = """\
Write normalised embeddings of images or texts to a Parquet file with the columns `file` or `text`, and `embedding`. An
interrupted command keeps its embeddings in OUTPUT.partial; run it again to continue.

  lotlip embed --model checkpoint --images photos --output images.parquet
  lotlip embed --model checkpoint --texts captions.txt --output texts.parquet
"""


@dataclass(kw_only=True)
class EmbedOptions(ModelOptions):
    """Options of `lotlip embed`."""

    images: str | None = option("Folder of images, including its subfolders", None, group="Input", metavar="FOLDER")
    texts: str | None = option(
        "File of texts: .txt (one text per line), .jsonl, .json, .csv, .tsv or .parquet", None, metavar="FILE"
    )
    column: str = option("Column of the texts, or a path inside one: `conversations[1].value`", "text")
    image_root: str | None = option(IMAGE_ROOT, None, metavar="FOLDER")
    output: str = option("Parquet file to write", group="Output", metavar="FILE")
    overwrite: bool = option("Replace an existing output", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.texts is None):
            raise ValueError("Pass either --images or --texts.")
        if self.texts and self.image_root:
            raise ValueError("--image-root works with --images only. Leave it out.")


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(EmbedOptions, prog="lotlip embed", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Embeds images or texts and prints how many."""
    options = parse(EmbedOptions, argv, parser())
    from ..embed import check_texts, embed_images, embed_texts

    check_output(options.output, overwrite=options.overwrite)
    if options.texts:
        check_texts(options.texts, options.column)  # fail before the model is loaded
    encoder = options.load()
    if options.images:
        count, skipped = embed_images(
            encoder,
            options.images,
            options.output,
            image_root=options.image_root,
            batch_size=options.batch_size or 32,
            overwrite=options.overwrite,
        )
        report_skipped(skipped)
    else:
        count = embed_texts(
            encoder,
            options.texts or "",
            options.output,
            column=options.column,
            batch_size=options.batch_size or 64,
            overwrite=options.overwrite,
        )
    print(f"{count} embeddings in {options.output}.")
