"""`lotlip explain`: shows what a model sees in a picture by a description."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..files import printable
from ..options import Parser, make_parser, option, parse
from ..terminal import text_table, write_styled
from .model import DeviceOptions

DESCRIPTION = """\
Explain the score of a picture and a description: the score of each sentence and what is lost without it, what the
picture says of each word, heat maps over the picture, and what the text's tokens attend to. Two models or two pictures
are shown side by side.

  lotlip explain --model checkpoint --image cat.jpg --output page.html "A ginger cat sleeps. It is striped."
  lotlip explain --model checkpoint --image cat.jpg dog.jpg --pictures drawn "A ginger cat sleeps."
"""


@dataclass(kw_only=True)
class ExplainOptions(DeviceOptions):
    """Options of `lotlip explain`."""

    text: str | None = option("Description of the pictures", None, group="Explain", metavar="TEXT", positional=True)
    model: list[str] = option("Checkpoint folder or Hub id of a LoTLIP, one or more", metavar="MODEL")
    image: list[str] = option("Picture, one or more", metavar="FILE")
    output: str | None = option("Write a page with heat maps to this file", None, metavar="FILE")
    pictures: str | None = option(
        "Write a PNG file for each model and picture to this new or empty folder", None, metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for values in (self.image, self.model):
            # "--image cat.jpg TEXT" puts the description into the list
            if self.text is None and len(values) > 1 and " " in values[-1] and not os.path.exists(values[-1]):
                self.text = values.pop()
        if self.text is None:
            raise ValueError("`text` (TEXT) is missing. Put the description, in quotes, before the options.")


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(ExplainOptions, prog="lotlip explain", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Explains and prints the scores of the sentences."""
    options = parse(ExplainOptions, argv, parser())
    from ..explain import explain
    from ..explain_page import save_pictures, write_page
    from ..files import check_output

    if options.output:
        check_output(options.output, overwrite=True)
    if options.pictures:
        check_output(options.pictures, folder=True)
    explanations = []
    for name in options.model:
        encoder = options.load_named(name)
        found = [explain(encoder, image, options.text or "") for image in options.image]
        if [Path(one).name for one in options.model].count(Path(name).name) > 1:  # checkpoint-100 of two runs
            found = [replace(one, model=name) for one in found]
        explanations += found
    for one in explanations:
        lines = [[f"{one.score:.4f}", "", "the whole text"]]
        for sentence in one.sentences:
            lost = "" if sentence.lost is None else f"{sentence.lost:+.4f}"
            lines.append([f"{sentence.score:.4f}", lost, printable(sentence.text)])
        write_styled(f"{printable(one.model)}, {printable(one.image)}\n", "bold", sys.stdout)
        print(text_table([["score", "lost without", "sentence"]], lines, left=[2], rule=False))
        if one.num_cut:
            print(
                f"The last {one.num_cut} of {len(one.words)} words are beyond {one.max_length} tokens and are cut.\n"
            )
    if options.output:
        write_page(explanations, options.output)
        print(f"Written to {options.output}.", file=sys.stderr)
    if options.pictures:
        save_pictures(explanations, options.pictures)
        print(f"Drawn in {options.pictures}.", file=sys.stderr)
