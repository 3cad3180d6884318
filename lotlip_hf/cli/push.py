"""`lotlip push`: publishes a checkpoint on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..options import Parser, check, make_parser, option, parse
from ..terminal import print_tables, text_table

DESCRIPTION = """\
Publish a checkpoint on the Hub: weights, configuration, tokenizer, processor, code and model card, in one commit. Sign
in first with `hf auth login`. If the upload is interrupted, run the command again.

  lotlip push checkpoint --repo-id name/my-lotlip --license apache-2.0 --dry-run preview
  lotlip push checkpoint --repo-id name/my-lotlip --license apache-2.0
"""


@dataclass(kw_only=True)
class PushOptions:
    """Options of `lotlip push`."""

    checkpoint: str = option(
        "Checkpoint folder or Hub id of a LoTLIP", group="Repository", metavar="CHECKPOINT", positional=True
    )
    repo_id: str = option("Hub id of the repository; a missing one is created")
    private: bool = option("Make a new repository private", False)
    revision: str | None = option("Branch to write to; a missing one is created (default: main)", None)
    commit_message: str | None = option("Message of the commit (default: Upload LoTLIP)", None, metavar="TEXT")
    max_shard_size: str | None = option(
        "Maximum size of a weights file, such as 500MB (default: 5GB)", None, metavar="SIZE"
    )
    dry_run: str | None = option("Write the files to this folder and publish nothing", None, metavar="FOLDER")
    license: str | None = option(
        "License of the weights, such as apache-2.0; without a license, the weights may not be used by other people",
        None,
        group="Model card",
    )
    base_model: list[str] = option("Hub ids of the models that this one was made from", default_factory=list)
    dataset: list[str] = option("Hub ids of the data sets that the model was trained on", default_factory=list)
    language: list[str] = option(
        "Languages of the texts, as two-letter codes (default: en)", default_factory=list, metavar="CODE"
    )
    tag: list[str] = option("Further tags", default_factory=list)
    results: list[str] = option(
        "Result files of `lotlip evaluate`, shown on the card", default_factory=list, metavar="FILE"
    )
    picture: str | None = option(
        "Picture of ranked examples for the card, as `lotlip search --save-grid` draws it", None, metavar="FILE"
    )

    def __post_init__(self) -> None:
        check(self)


def parser() -> Parser:
    """Returns the parser of the command."""
    return make_parser(PushOptions, prog="lotlip push", description=DESCRIPTION)


def run(argv: Sequence[str]) -> None:
    """Publishes a checkpoint and prints the address of the commit."""
    options = parse(PushOptions, argv, parser())
    from ..hub.card import CardFields, warn_unstated
    from ..hub.push import push, write_repository

    card = CardFields(
        license=options.license,
        base_model=options.base_model,
        datasets=options.dataset,
        language=options.language,
        tags=options.tag,
        results=options.results,
        picture=options.picture,
    )
    settings = {"card": card, "max_shard_size": options.max_shard_size}
    if options.dry_run:
        folder = write_repository(options.checkpoint, options.dry_run, options.repo_id, **settings)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        rows = [[f"{file.stat().st_size:,}", str(file.relative_to(folder))] for file in files]
        print_tables(text_table([["bytes", "file"]], rows, left=[1]))
        print(f"Dry run: {folder} contains the files of {options.repo_id}. Nothing was published.")
        warn_unstated((folder / "README.md").read_bytes())
        return
    commit = push(
        options.checkpoint,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        commit_message=options.commit_message,
        **settings,
    )
    print(commit.commit_url)
