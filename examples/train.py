"""Train LoTLIP in several processes: `lotlip train` as a script for launchers.

    accelerate launch --num_processes 2 examples/train.py --text-model google-bert/bert-base-uncased \\
        --image-model google/vit-base-patch16-224-in21k --data "shards/*.tar" --mapping dreamlip --output run
"""

import sys
from collections.abc import Sequence

from lotlip_hf import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `lotlip train` and returns the exit status."""
    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
