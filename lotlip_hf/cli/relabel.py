"""`lotlip relabel`: long captions for a set of images."""

import os
import sys
from collections.abc import Sequence

from ..options import Parser, add_flags, build, flags_of
from ..relabel.config import add_arguments, read_config
from .model import ImageOptions

DESCRIPTION = """\
Write long captions for the images of a data set, by one or several captioning models, as shards that `lotlip train`
reads as they are. After an interruption the same command goes on from there. With several processes
(`torchrun --nproc-per-node 2 -m lotlip_hf relabel ...`) each does its share."""


def run(argv: Sequence[str]) -> None:
    """Relabels, and prints what was written."""
    parser = Parser(prog="lotlip relabel", description=DESCRIPTION)
    add_arguments(parser)
    add_flags(parser, ImageOptions)
    arguments = parser.parse_args(argv)
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
        raise OSError(f"{error} What was done is kept; the same command goes on from there.") from error
    finally:
        state.destroy_process_group()
    if statistics is None:
        print(f"This process's share of {config.output} is done; the last process to end writes the card.")
        return
    print(statistics_table(statistics))
    print(f"{config.output} holds the shards, and what they are in {CARD}.")
    if statistics["skipped"]:
        what = "1 record was" if statistics["skipped"] == 1 else f"{statistics['skipped']} records were"
        print(f"{what} skipped: {os.path.join(config.output, SKIPPED)} says why.", file=sys.stderr)
