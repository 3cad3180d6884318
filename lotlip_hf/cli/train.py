"""`lotlip train`: trains a model."""

from collections.abc import Sequence

from ..options import Parser

DESCRIPTION = """\
Train or fine-tune LoTLIP on images with short and long captions. This trains a small model on drawn pictures in
minutes.

  lotlip train --model scenes --data scenes --eval-data scenes --max-steps 1000 --learning-rate 1e-3

This trains two pretrained encoders on your own records with two GPUs. The second command continues the run.

  accelerate launch --num_processes 2 -m lotlip_hf train --text-model google-bert/bert-base-uncased \\
      --image-model google/vit-base-patch16-224-in21k --data "shards/*.tar" --mapping dreamlip --output run
  accelerate launch --num_processes 2 -m lotlip_hf train --output run --resume

On CPUs, use `torchrun --nproc_per_node 2` to start several processes. Each run saves its options in
`training_config.yaml`, which `--config` reads. Such a file can have `stages`, which train one after the other, each
with its own options.
"""


def parser() -> Parser:
    """Returns the parser of the command."""
    from ..training.config import make_parser

    return make_parser(prog="lotlip train", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Trains a model and prints where it is saved."""
    from ..training.config import parse_arguments

    config = parse_arguments(argv, prog="lotlip train", description=DESCRIPTION)
    from accelerate import PartialState

    from ..images import ImageError
    from ..training.stages import train_config

    try:
        checkpoint = train_config(config)
    except ImageError as error:
        raise ValueError(f"{error}. Pass --on-error skip to count and skip such images.") from error
    except RuntimeError as error:  # a NaN loss, a full disk or memory, a lost process
        raise OSError(str(error)) from error
    PartialState().print(f"The model is in {checkpoint}.")
    PartialState().destroy_process_group()
