"""`lotlip convert`: checkpoints of other layouts and formats, by the modules of `conversion/`."""

from collections.abc import Sequence
from importlib import import_module

from ..options import Parser

# Each kind, its module, and what it makes
KINDS = {
    "official": ("official", "an official LoTLIP checkpoint to a checkpoint folder, and back"),
    "clip": ("clip", "a CLIP of transformers, or its text encoder, to LoTLIP"),
    "open-clip": ("clip", "a CLIP in the layout of open_clip, OpenAI or Long-CLIP to LoTLIP (the flags of clip)"),
    "stock": ("stock", "a LoTLIP to classes of transformers alone"),
    "onnx": ("onnx", "a LoTLIP to ONNX, for ONNX Runtime"),
}


def run(argv: Sequence[str]) -> int | None:
    """Converts, by the module of the kind that comes first."""
    if argv and argv[0] in KINDS:
        return import_module(f"lotlip_hf.conversion.{KINDS[argv[0]][0]}").main(argv[1:])
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        raise ValueError(f"lotlip convert takes a kind first: lotlip convert official {argv[0]} ...; see --help.")
    kinds = "".join(f"  {kind:9} {what}\n" for kind, (_, what) in KINDS.items())
    parser = Parser(
        prog="lotlip convert",
        usage="lotlip convert [--help] kind ...",
        description=f"kinds (lotlip convert KIND --help):\n{kinds}",
    )
    parser.add_argument("kind", choices=KINDS, help="what is converted")
    parser.parse_args(argv)
    return None
