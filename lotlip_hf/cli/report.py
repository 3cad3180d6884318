"""`lotlip report`: compares results of `lotlip evaluate` with the published ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..options import Parser, check, make_parser, option, parse
from ..terminal import print_tables

DESCRIPTION = """\
Print the table of the LoTLIP paper, with its published rows and your results.

  lotlip report iiw.json urban1k.json --plot report.png
"""


@dataclass(kw_only=True)
class ReportOptions:
    """Options of `lotlip report`."""

    results: list[str] = option(
        "Result files of `lotlip evaluate`", group="Report", metavar="RESULTS", positional=True
    )
    format: Literal["text", "markdown"] = option("Format of the tables", "text")
    plot: str | None = option("Draw the table as bars in this picture file", None, metavar="FILE")
    model_index: str | None = option(
        "Write the results as the model-index of a model card to this YAML file", None, metavar="FILE"
    )
    overwrite: bool = option("Replace an existing --model-index file", False)

    def __post_init__(self) -> None:
        check(self)


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(ReportOptions, prog="lotlip report", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Prints the tables."""
    options = parse(ReportOptions, argv, parser())
    from ..evaluation.report import write_report

    print_tables(
        write_report(options.results, options.format, options.model_index, options.plot, overwrite=options.overwrite)
    )
