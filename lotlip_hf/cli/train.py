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
`training_config.yaml`, which `--config` reads.
"""


def parser() -> Parser:
    """Returns the parser of the command."""
    from ..training.config import make_parser

    return make_parser(prog="lotlip train", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Trains a model and prints where it is saved."""
    from ..training.config import parse_arguments

    config = parse_arguments(argv, prog="lotlip train", description=DESCRIPTION)
    import torch
    from accelerate import PartialState

    from ..files import printable
    from ..images import ImageError
    from ..training.data import load_data
    from ..training.loop import train
    from ..training.model import describe_text, load_or_start_model

    try:
        records, eval_records = load_data(config)  # fail before models are loaded
        model, processor = load_or_start_model(config)
        if config.text_model is not None and not config.resume:
            state = PartialState(cpu=not torch.accelerator.is_available())  # else, CPUs are not connected
            state.print(f"{printable(config.text_model)}: {describe_text(model, processor)}.")
        checkpoint = train(model, processor, records, config, eval_records)
    except ImageError as error:
        raise ValueError(f"{error}. Pass --on-error skip to count and skip such images.") from error
    except RuntimeError as error:  # a NaN loss, a full disk or memory, a lost process
        raise OSError(str(error)) from error
    PartialState().print(f"The model is in {checkpoint}.")
    PartialState().destroy_process_group()
