"""`lotlip curate`: chooses records whose captions are balanced over a list of entries."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..data.mappings import MAPPINGS, ColumnMapping, check_mapping
from ..files import MAX_BYTES, check_output, write_json
from ..options import Parser, add_options, build, check, option, options_of
from ..terminal import print_tables

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

DESCRIPTION = """\
Choose records whose captions are balanced over a list of entries, as MetaCLIP does, and write their ids. With --keep,
`lotlip train` trains on these records only.

  lotlip curate --data "shards/*.tar" --metadata entries.txt --t 20000 --output ids.txt
  lotlip train --model checkpoint --data "shards/*.tar" --keep ids.txt --output run

An entry matches each caption that contains it between spaces. Entries with more than T matches keep a record with
probability T / matches; those with fewer keep all their records. Records without a match are dropped. An interrupted
command keeps its state in OUTPUT.partial; run it again to continue.
"""
SCENES = "scenes"


@dataclass(kw_only=True)
class CurateOptions:
    """Options of `lotlip curate`."""

    data: str = option(
        f"Folder or file of records, shards such as 'shards/*.tar', a data set on the Hub, or {SCENES!r}", group="Data"
    )
    mapping: str = option(f"Column names, by data set: {', '.join(MAPPINGS)}", "records")
    image_column: str | None = option("Column of the images (default: from --mapping)", None)
    short_column: str | None = option(
        "Column of the short captions; 'none' uses the first sentences of the long captions (default: from --mapping)",
        None,
    )
    long_columns: list[str] | None = option(
        "Columns of the long captions; 'none' if there are none (default: from --mapping)", None
    )
    id_column: str | None = option("Column of the ids (default: from --mapping)", None)
    split: str | None = option(
        "Split to read; 'all' reads all (default: train on the Hub; required for a folder with several)", None
    )
    streaming: bool = option("Read records in order, without a copy on disk", False)
    num_scenes: int = option(f"Pictures that --data {SCENES} draws", 5000, at_least=1)
    on_error: Literal["raise", "skip"] = option("Stop at a broken record, or count and drop it", "raise")
    max_record_bytes: int = option("Maximum size of a table line or shard sample, in bytes", MAX_BYTES, at_least=1)
    num_workers: int = option("Processes that match captions; 0 uses the main process", 0, at_least=0)

    metadata: str = option("Text file of entries, one a line", group="Balance", metavar="FILE")
    t: float = option("Number of matches of an entry from which on they are drawn", 20_000, above=0)
    seed: int = option("Seed of the draws", 0, at_least=0)

    output: str = option(
        "Text file of ids to write; its report gets the same name with .json", group="Output", metavar="FILE"
    )
    plot: str | None = option("Draw the matches before and after in this picture file", None, metavar="FILE")
    overwrite: bool = option("Replace existing outputs", False)

    def __post_init__(self) -> None:
        check(self)
        check_mapping(self.mapping)
        files = [os.path.realpath(file) for file in (self.output, self.report, self.plot) if file is not None]
        if len(set(files)) < len(files):
            raise ValueError("`output`, its report (.json) and `plot` are the same file. Pass different files.")

    @property
    def report(self) -> str:
        """The JSON file beside `output`."""
        return os.path.splitext(self.output)[0] + ".json"

    def column_mapping(self) -> ColumnMapping:
        """Returns the columns of the mapping, or of the options that replace them."""
        mapping = MAPPINGS[self.mapping].with_columns(self.short_column, image=self.image_column, id=self.id_column)
        if self.long_columns is None:
            return mapping
        return mapping.with_columns(long=() if self.long_columns == ["none"] else tuple(self.long_columns))

    def load(self) -> "Dataset | IterableDataset":
        """Loads the records."""
        from ..data.records import MissingColumn, load_records
        from ..scenes.dataset import scenes_dataset

        if self.data == SCENES:
            return scenes_dataset(self.num_scenes, self.seed, self.split or "train")
        try:
            return load_records(
                self.data,
                self.column_mapping(),
                self.split,
                streaming=self.streaming,
                image_root=os.path.abspath(os.sep),  # images are not opened
                max_record_bytes=self.max_record_bytes,
            )
        except MissingColumn as error:
            hint = f"Name it with `--{error.field}-column{'s' if error.field == 'long' else ''}`."
            raise MissingColumn(error.problem, error.field, hint) from error


def parser() -> Parser:
    """Returns the parser of the command."""
    flags = Parser(prog="lotlip curate", description=DESCRIPTION)
    add_options(flags, CurateOptions)
    return flags


def run(argv: Sequence[str]) -> None:
    """Writes the ids and the report, and prints the report."""
    options = build(CurateOptions, options_of(parser().parse_args(argv), CurateOptions))
    for file in (options.output, options.report):
        check_output(file, overwrite=options.overwrite)
    if options.plot is not None:
        from ..plots import check_plot

        check_plot(options.plot)
    from ..data.curation import Entries, curate
    from ..data.curation_report import plot, report, tables

    entries = Entries.read(options.metadata)  # fail before the records are read
    result = curate(
        options.load(),
        entries,
        options.output,
        t=options.t,
        seed=options.seed,
        on_error=options.on_error,
        num_workers=options.num_workers,
        options={"data": options.data, "split": options.split, **asdict(options.column_mapping())},
    )
    numbers = report(result, options.t)
    write_json(Path(options.report), {"t": options.t, "seed": options.seed, **numbers})
    if options.plot is not None:
        plot(result, options.t, options.plot)
    print_tables(tables(numbers))
    print(f"{result.records['kept']:,} ids in {options.output}, the report in {options.report}.")
