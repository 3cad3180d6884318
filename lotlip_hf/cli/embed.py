"""`lotlip embed`: writes embeddings of images or texts to a Parquet file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..files import check_output
from ..options import Parser, make_parser, option, parse
from .model import IMAGE_ROOT, ModelOptions, report_skipped

if TYPE_CHECKING:
    from ..encoder import Encoder

DESCRIPTION = """\
Write normalised embeddings of images or texts to a Parquet file with the columns `file` or `text`, and `embedding`. An
interrupted command keeps its embeddings in OUTPUT.partial; run it again to continue.

  lotlip embed --model checkpoint --images photos --output images.parquet
  lotlip embed --model checkpoint --texts captions.txt --output texts.parquet

`--pooled` fills the cache that `lotlip train` reads with --lock-vision or --lock-text. The towers then compute nothing
again.

  lotlip embed --pooled --model checkpoint --images photos
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
    output: str | None = option("Parquet file to write", None, group="Output", metavar="FILE")
    overwrite: bool = option("Replace an existing output", False)
    pooled: bool = option("Keep the pooled states of frozen towers in --cache, instead of writing a file", False)
    cache: str | None = option(
        "Folder that keeps the pooled states (default: $HF_HOME/lotlip)", None, metavar="FOLDER"
    )
    cache_dtype: Literal["float32", "bfloat16"] | None = option(
        "Type of the states in --cache, as in `lotlip train` (default: float32)", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None and self.texts is None) or (self.images and self.texts and not self.pooled):
            raise ValueError("Pass either --images or --texts.")
        if self.image_root and not self.images:
            raise ValueError("--image-root works with --images only. Leave it out.")
        if self.pooled == (self.output is not None):
            raise ValueError("Pass either --output or --pooled.")
        if not self.pooled and (self.cache or self.cache_dtype):
            raise ValueError("--cache and --cache-dtype work with --pooled only. Leave them out.")
        if self.pooled and self.dtype == "auto":
            self.dtype = "float32"  # as in training


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(EmbedOptions, prog="lotlip embed", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Embeds images or texts and prints how many."""
    options = parse(EmbedOptions, argv, parser())
    from ..embed import check_texts, embed_images, embed_texts

    if options.output is not None:
        check_output(options.output, overwrite=options.overwrite)
    if options.texts:
        check_texts(options.texts, options.column)  # fail before the model is loaded
    encoder = options.load()
    if options.output is None:
        _keep_states(options, encoder)
        return
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


def _keep_states(options: EmbedOptions, encoder: "Encoder") -> None:
    """Fills the cache of pooled states, and prints its path."""
    from ..embed import keep_image_states, keep_text_states
    from ..states import FrozenStates

    dtype = options.cache_dtype or "float32"
    if options.images:
        states = FrozenStates(encoder, "image", options.cache, dtype)
        count, computed, skipped = keep_image_states(
            states, options.images, image_root=options.image_root, batch_size=options.batch_size or 32
        )
        report_skipped(skipped)
        print(f"States of {count} images in {states.store.path}, {computed} of them new.")
    if options.texts:
        states = FrozenStates(encoder, "text", options.cache, dtype)
        count = keep_text_states(states, options.texts, column=options.column, batch_size=options.batch_size or 64)
        print(f"States of {count} texts in {states.store.path}.")
