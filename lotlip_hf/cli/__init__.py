"""The command `lotlip`: each command is a module of its name, with `parser()` and `run(argv)`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from ..options import Parser, nearest
from ..terminal import print_headed, run

COMMANDS = (
    "search",
    "demo",
    "explain",
    "embed",
    "train",
    "relabel",
    "curate",
    "prompts",
    "evaluate",
    "report",
    "convert",
    "push",
)
OVERVIEW = """\
LoTLIP finds images by descriptions, short or a paragraph long. In these commands,
`checkpoint` is a folder made by `lotlip convert` or `lotlip train`, or a Hub id.

Search a folder of photos:
  lotlip search --model checkpoint --images photos "A ginger cat on a sofa."

Search them on a page in your browser:
  lotlip demo --model checkpoint --images photos

See which sentences and words of a description fit a picture, and where:
  lotlip explain --model checkpoint --image cat.jpg --output page.html "A ginger cat. It sleeps."

Write embeddings to a file:
  lotlip embed --model checkpoint --images photos --output images.parquet

Train or fine-tune a model:
  lotlip train --model checkpoint --data "shards/*.tar" --output run

Write long captions for images:
  lotlip relabel --data photos --captioner llava-hf/llava-1.5-7b-hf --output captions

Choose records with balanced captions:
  lotlip curate --data "shards/*.tar" --metadata entries.txt --output ids.txt

Learn prompts for your classes from a few pictures of each:
  lotlip prompts --model checkpoint --data animals --output animals.safetensors

Evaluate a model and compare results:
  lotlip evaluate --model checkpoint --task scenes --output results.json
  lotlip report results.json

Convert a checkpoint and publish it:
  lotlip convert official --checkpoint weiwu-ww/LoTLIP-ViT-B-16-100M --output checkpoint
  lotlip push checkpoint --repo-id name/my-lotlip

Get help:
  lotlip COMMAND --help
  lotlip --help
"""
EXIT_STATUS = """\
Exit status:
  0    Done. Skipped images are listed on standard error.
  2    Stopped by a wrong argument or by an error, which the message explains.
  130  Interrupted (143 by SIGTERM). Finished work is kept; the same command continues.
  141  The output pipe was closed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments. By default `sys.argv[1:]`.

    Returns:
        `int`: The exit status, as in `lotlip --help`.
    """
    return run("lotlip", lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Returns the parser of each command by the command's full name, such as `"search"` or `"convert clip"`."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name in COMMANDS:
        module = import_module(f".{name}", __name__)
        found |= module.parsers() if name == "convert" else {name: module.parser()}
    return found


def _dispatch(argv: list[str]) -> int | None:
    shown_version = f"lotlip {version('lotlip-hf')}"
    if not argv:
        print_headed(f"{OVERVIEW}\n{shown_version}\n")
        return None
    if argv[0] in COMMANDS:
        return import_module(f".{argv[0]}", __name__).run(argv[1:])
    if not argv[0].startswith("-"):
        close = nearest(argv[0], COMMANDS)
        suggestion = f" Did you mean {close!r}?" if close else ""
        raise ValueError(f"Unknown command {argv[0]!r}.{suggestion} Commands: {', '.join(COMMANDS)}.")
    parser = Parser(prog="lotlip", usage="lotlip COMMAND [options]", description=OVERVIEW, epilog=EXIT_STATUS)
    parser.add_argument("--version", action="version", version=shown_version, help="Show the version and exit")
    parser.parse_args(argv)
    return None
