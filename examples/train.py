"""Train LoTLIP: one short and several long captions an image.

Small and quick, on pictures drawn for the purpose:

    python examples/train.py --model scenes --data scenes --eval-data scenes --max-steps 1000 --learning-rate 1e-3

From two pretrained encoders, on your own records, in two processes:

    accelerate launch --num_processes 2 examples/train.py --text-model google-bert/bert-base-uncased \\
        --image-model google/vit-base-patch16-224-in21k --data "shards/*.tar" --mapping dreamlip --output run
    accelerate launch --num_processes 2 examples/train.py --output run --resume

Processes on CPUs are started by `torchrun --nproc_per_node 2`; `accelerate launch` starts one alone there.

Options can come from a file too: `--config train.yaml`; each run keeps its own in `training_config.yaml`.
"""

import signal
import sys
from collections.abc import Sequence

from accelerate import PartialState

from lotlip_hf.terminal import printable_lines, printable_output
from lotlip_hf.training.config import parse_arguments
from lotlip_hf.training.data import load_data
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Train and say where the checkpoint is; 2 after an error, said in one line; 130 after Ctrl-C, 143 by SIGTERM."""
    try:
        config = parse_arguments(argv, description=__doc__)
        records, eval_records = load_data(config)  # what is wrong with them is said before models are loaded
        model, processor = load_or_start_model(config)
        checkpoint = train(model, processor, records, config, eval_records)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {printable_lines(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("Interrupted.", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    PartialState().print(f"The model is in {checkpoint}.")
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
