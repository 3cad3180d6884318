"""`lotlip report`: results of `lotlip evaluate` beside the published ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..options import check, option, parse

DESCRIPTION = "Print the paper's table with the results of `lotlip evaluate` beside the published rows."


@dataclass(kw_only=True)
class ReportOptions:
    """Every option of `lotlip report`."""

    results: list[str] = option("JSON files that `lotlip evaluate` wrote", positional=True)
    format: Literal["text", "markdown"] = option("of the tables", "text")
    model_index: str | None = option("write the entries of a model card's model-index (YAML)", None)
    plot: str | None = option("draw the table in this picture", None)
    overwrite: bool = option("replace the model-index file if it is there already", False)

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Prints the tables."""
    options = parse(ReportOptions, argv, prog="lotlip report", description=DESCRIPTION)
    from ..evaluation.report import write_report

    print(
        write_report(options.results, options.format, options.model_index, options.plot, overwrite=options.overwrite)
    )
