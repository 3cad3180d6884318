"""`lotlip embed`: the embeddings of images or texts, as a Parquet file."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..files import check_output
from ..options import option, parse
from .model import ModelOptions, report_skipped

DESCRIPTION = """\
Write normalised embeddings to a Parquet file with the columns `file` or `text`, and `embedding`. After an interruption
the same command goes on from what is kept in OUTPUT.partial."""


@dataclass(kw_only=True)
class EmbedOptions(ModelOptions):
    """Every option of `lotlip embed`."""

    images: str | None = option("folder of images, with its subfolders", None)
    image_root: str | None = option("the folder that pictures must lie in, links followed (--images)", None)
    texts: str | None = option(".txt (a text on each line), .jsonl, .json, .csv, .tsv or .parquet", None)
    column: str = option("column of the texts, or a way into one: `conversations[1].value`", "text")
    output: str = option("the Parquet file to write")
    overwrite: bool = option("replace the output if it is there already", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.texts is None):
            raise ValueError("Give --images or --texts, one of the two.")
        if self.texts and self.image_root:
            raise ValueError("--image-root is of --images, not of --texts.")


def run(argv: Sequence[str]) -> None:
    """Embeds, and says how many."""
    options = parse(EmbedOptions, argv, prog="lotlip embed", description=DESCRIPTION)
    from ..embed import check_texts, embed_images, embed_texts

    check_output(options.output, overwrite=options.overwrite)
    if options.texts:
        check_texts(options.texts, options.column)  # before the model is loaded
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
