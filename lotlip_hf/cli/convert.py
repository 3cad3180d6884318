"""`lotlip convert`: converts checkpoints with the modules of `conversion/`."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..options import Parser

# Module and description of each kind
KINDS = {
    "official": ("official", "an official LoTLIP checkpoint to a checkpoint folder, and back"),
    "clip": ("clip", "a CLIP of transformers, or its text encoder, to LoTLIP"),
    "open-clip": ("clip", "a CLIP in the layout of open_clip, OpenAI or Long-CLIP to LoTLIP"),
    "stock": ("stock", "a LoTLIP to classes that transformers includes"),
    "onnx": ("onnx", "a LoTLIP to ONNX, for ONNX Runtime"),
    "openvino": ("openvino", "a LoTLIP to OpenVINO, the fastest on CPUs of Intel and AMD"),
}


def parsers() -> dict[str, Parser]:
    """Returns the parser of each kind by the command's full name, and that of `convert` itself."""
    kinds = {f"convert {kind}": _module(kind).parser(f"lotlip convert {kind}") for kind in KINDS}
    return {"convert": _parser(), **kinds}


def run(argv: Sequence[str]) -> int | None:
    """Converts a checkpoint with the module of the kind, which is the first argument."""
    if argv and argv[0] in KINDS:
        return _module(argv[0]).main(argv[1:])
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        raise ValueError(f"lotlip convert needs a kind first: lotlip convert official {argv[0]} ...; see --help.")
    _parser().parse_args(argv)
    return None


def _module(kind: str) -> Any:
    return import_module(f"lotlip_hf.conversion.{KINDS[kind][0]}")


def _parser() -> Parser:
    kinds = "".join(f"  lotlip convert {kind:9}  {what}\n" for kind, (_, what) in KINDS.items())
    parser = Parser(
        prog="lotlip convert",
        usage="lotlip convert KIND [options]",
        description=f"Convert a checkpoint. Each kind has its own options: lotlip convert KIND --help\n\n{kinds}",
    )
    parser.add_argument_group("Conversion").add_argument(
        "kind", choices=KINDS, metavar="KIND", help="Kind of conversion"
    )
    return parser
