"""
The app of a Space: the page of `lotlip demo` for the models in the variables LOTLIP_MODEL and LOTLIP_COMPARE.

    LOTLIP_MODEL=checkpoint python examples/space/app.py
"""

import os
import sys
from collections.abc import Sequence

from lotlip_hf.cli import main as lotlip


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page until Ctrl-C. Has the options of `lotlip demo`, which override the variables."""
    variables = {"--model": os.environ.get("LOTLIP_MODEL"), "--compare": os.environ.get("LOTLIP_COMPARE")}
    words = [word for flag, value in variables.items() if value for word in (flag, value)]
    return lotlip(["demo", *words, *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
