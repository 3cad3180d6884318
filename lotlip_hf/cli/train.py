"""`lotlip train`: a run of training."""

from collections.abc import Sequence

DESCRIPTION = """\
Train LoTLIP on one short and several long captions an image. Small and quick, on pictures drawn for the purpose:

    lotlip train --model scenes --data scenes --eval-data scenes --max-steps 1000 --learning-rate 1e-3

From two pretrained encoders, on your own records, in two processes:

    accelerate launch --num_processes 2 -m lotlip_hf train --text-model google-bert/bert-base-uncased \\
        --image-model google/vit-base-patch16-224-in21k --data "shards/*.tar" --mapping dreamlip --output run
    accelerate launch --num_processes 2 -m lotlip_hf train --output run --resume

Processes on CPUs are started by `torchrun --nproc_per_node 2`; `accelerate launch` starts one alone there. Options can
come from a file too: `--config train.yaml`; each run keeps its own in `training_config.yaml`."""


def run(argv: Sequence[str]) -> None:
    """Trains, and says where the checkpoint is."""
    from ..training.config import parse_arguments

    config = parse_arguments(argv, prog="lotlip train", description=DESCRIPTION)
    from accelerate import PartialState

    from ..training.data import load_data
    from ..training.loop import train
    from ..training.model import load_or_start_model

    try:
        records, eval_records = load_data(config)  # what is wrong with them is said before models are loaded
        model, processor = load_or_start_model(config)
        checkpoint = train(model, processor, records, config, eval_records)
    except RuntimeError as error:  # a loss that is not a number, a full disk or memory, a process that was lost
        raise OSError(str(error)) from error
    PartialState().print(f"The model is in {checkpoint}.")
    PartialState().destroy_process_group()
