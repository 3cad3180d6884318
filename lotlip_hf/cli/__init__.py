"""The command `lotlip`: each command is a file of its name, with its options and `run(argv)`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from ..options import Parser
from ..terminal import run

COMMANDS = {
    "search": "rank the images of a folder by a description",
    "embed": "write the embeddings of images or texts to a Parquet file",
    "evaluate": "score a model on a benchmark",
    "report": "set results beside the published ones",
    "train": "train a model on short and long captions",
    "relabel": "write long captions for a set of images",
    "convert": "make a checkpoint folder of another model, or another format of a checkpoint",
    "push": "publish a checkpoint on the Hub",
}
EXIT_STATUS = """\
exit status:
  0    done, even if images were skipped: they are listed on the standard error output
  2    stopped: wrong arguments, or an error that the message explains
  130  interrupted (143 by SIGTERM); what was done is kept, and the same command goes on from there
  141  whoever read the output stopped reading
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments; by default those of the process.

    Returns:
        `int`: the exit status, as in `lotlip --help`.
    """
    return run("lotlip", lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def _dispatch(argv: list[str]) -> int | None:
    if argv and argv[0] in COMMANDS:
        return import_module(f".{argv[0]}", __name__).run(argv[1:])
    commands = "".join(f"  {name:9} {what}\n" for name, what in COMMANDS.items())
    parser = Parser(
        prog="lotlip",
        usage="lotlip [--help] [--version] command ...",
        description=f"LoTLIP: images and long descriptions.\n\ncommands (lotlip COMMAND --help):\n{commands}",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"lotlip {version('lotlip-hf')}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.parse_args(argv)
