"""`lotlip embed`: writes embeddings of images or texts to Parquet files."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..files import MAX_BYTES, check_output
from ..options import Parser, make_parser, option, parse
from .model import IMAGE_ROOT, PatchOptions, report_skipped

if TYPE_CHECKING:
    from ..encoder import Encoder

DESCRIPTION = """\
Write normalised embeddings of images or texts to a Parquet file with the columns `file` or `text`, and `embedding`. An
interrupted command keeps its embeddings in OUTPUT.partial; run it again to continue.

  lotlip embed --model checkpoint --images photos --output images.parquet
  lotlip embed --model checkpoint --texts captions.txt --output texts.parquet

`--data` reads what `lotlip train` reads, and writes a folder of shards, which several processes can share.

  lotlip embed --model checkpoint --data 'shards/*.tar' --keep url year:int64 --output embeddings
  torchrun --nproc-per-node 8 -m lotlip_hf embed --model checkpoint --data 'shards/*.tar' --output embeddings

`--pooled` fills the cache that `lotlip train` reads with --lock-vision or --lock-text. The towers then compute nothing
again.

  lotlip embed --pooled --model checkpoint --images photos
"""


# Options that are arguments of `open_source`
OF_SOURCE = "keep split image_column id_column image_folder image_root max_record_bytes".split()


@dataclass(kw_only=True)
class EmbedOptions(PatchOptions):
    """Options of `lotlip embed`."""

    images: str | None = option("Folder of images, including its subfolders", None, group="Input", metavar="FOLDER")
    texts: str | None = option(
        "File of texts: .txt (one text per line), .jsonl, .json, .csv, .tsv or .parquet", None, metavar="FILE"
    )
    data: str | None = option(
        "Data set of images: a folder or file of records, shards such as 'shards/*.tar', or its Hub id", None
    )
    column: str = option("Column of the texts, or a path inside one: `conversations[1].value`", "text")
    image_root: str | None = option(IMAGE_ROOT, None, metavar="FOLDER")
    split: str | None = option(
        "Split of --data; 'all' reads all (default: train on the Hub; required for a folder with several)", None
    )
    image_column: str | None = option("Column of the images of --data (default: image or file_name)", None)
    id_column: str | None = option("Column of the ids of --data (default: id, or else the path)", None)
    image_folder: str | None = option(
        "Folder that image paths in --data start from (default: the folder of the file that contains them)",
        None,
        metavar="FOLDER",
    )
    max_record_bytes: int | None = option(
        f"Maximum size of a table line or shard sample of --data, in bytes (default: {MAX_BYTES})", None, at_least=1
    )
    output: str | None = option(
        "Parquet file to write, or with --data the folder", None, group="Output", metavar="FILE"
    )
    keep: list[str] | None = option(
        "Columns of --data to copy for filters: NAME for texts, or NAME:TYPE such as year:int64", None
    )
    shard_size: int | None = option("Records of --data in a shard (default: 10000)", None, at_least=1)
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
        inputs = [one for one in (self.images, self.texts, self.data) if one]
        if not inputs or (len(inputs) > 1 and (self.data or not self.pooled)):
            raise ValueError("Pass one of --images, --texts and --data.")
        if self.image_root and not (self.images or self.data):
            raise ValueError("--image-root works with --images or --data only. Leave it out.")
        for name in (*OF_SOURCE, "shard_size") if not self.data else ():
            if getattr(self, name) is not None and name != "image_root":
                raise ValueError(f"--{name.replace('_', '-')} works with --data only. Leave it out.")
        if self.data and (self.overwrite or self.pooled):
            raise ValueError("--overwrite and --pooled do not work with --data. Leave them out.")
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
    if options.data:
        _embed_data(options, options.data, options.output or "")
        return
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


def _embed_data(options: EmbedOptions, data: str, output: str) -> None:
    """Writes the shards of this process, and prints how many embeddings they contain."""
    import torch
    from accelerate import PartialState

    from ..shards import SHARD_SIZE, SKIPPED, embed_source, open_source

    state = PartialState(cpu=options.device == "cpu" or not torch.accelerator.is_available())
    try:
        if state.num_processes > 1 and options.device is None:
            options.device = str(state.device)
        if os.path.isdir(data) and Path(output).resolve().is_relative_to(Path(data).resolve()):
            raise ValueError(f"{output} is inside the data folder {data}. Choose another --output.")
        given = {name: getattr(options, name) for name in OF_SOURCE if getattr(options, name) is not None}
        source = open_source(data, **given)  # fails before the model is loaded
        embedded, skipped = embed_source(
            options.load(),
            source,
            output,
            shard_size=options.shard_size or SHARD_SIZE,
            batch_size=options.batch_size or 32,
            rank=state.process_index,
            world_size=state.num_processes,
            progress=state.is_main_process,
        )
    except KeyboardInterrupt:
        print(f"The finished shards are in {output}. Run the same command to continue.", file=sys.stderr)
        raise
    finally:
        state.destroy_process_group()
    process = f" by process {state.process_index + 1} of {state.num_processes}" if state.num_processes > 1 else ""
    print(f"{embedded} embeddings in {output}{process}.")
    if skipped:
        what = "1 record was" if skipped == 1 else f"{skipped} records were"
        print(f"{what} skipped{process}, listed in {os.path.join(output, SKIPPED.format('*'))}.", file=sys.stderr)
