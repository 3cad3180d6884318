"""`lotlip relabel`: writes long captions for images, and rewrites, negatives and tags."""

import os
import sys
from collections.abc import Sequence

from ..options import Parser, add_flags, build, flags_of
from ..relabel.config import add_arguments, read_config
from ..terminal import print_tables
from .model import ImageOptions

DESCRIPTION = """\
Write long captions for images with one or several captioning models. The output is a folder of shards that
`lotlip train` reads. An interrupted command continues when it is run again.

  lotlip relabel --data photos --captioner llava-hf/llava-1.5-7b-hf --output captions

With --input text or both, prompts contain captions of the record, and with --role the answers are rewrites, negatives
or tags.

Several processes can share the work.

  torchrun --nproc-per-node 2 -m lotlip_hf relabel --data photos --captioner llava-hf/llava-1.5-7b-hf \\
      --output captions
"""


def parser() -> Parser:
    """Returns the parser of the command."""
    flags = Parser(prog="lotlip relabel", description=DESCRIPTION)
    add_arguments(flags)
    add_flags(flags, ImageOptions)
    return flags


def run(argv: Sequence[str]) -> None:
    """Writes captions and prints their statistics."""
    arguments = parser().parse_args(argv)
    config = read_config(arguments)
    build(ImageOptions, flags_of(arguments, ImageOptions)).apply()

    import torch
    from accelerate import PartialState

    from ..relabel.card import CARD, statistics_table
    from ..relabel.run import SKIPPED, relabel

    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        statistics = relabel(config)
    except torch.OutOfMemoryError as error:
        raise OSError(f"{error} Finished captions are kept. Run the same command to continue.") from error
    finally:
        state.destroy_process_group()
    if statistics is None:
        print(f"This process's share of {config.output} is done. The last process writes the card.")
        return
    print_tables(statistics_table(statistics, "text"))
    print(f"The shards are in {config.output}, described in {CARD}.")
    if statistics["skipped"]:
        what = "1 record was" if statistics["skipped"] == 1 else f"{statistics['skipped']} records were"
        print(f"{what} skipped. The reasons are in {os.path.join(config.output, SKIPPED)}.", file=sys.stderr)
