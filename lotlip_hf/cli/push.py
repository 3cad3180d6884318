"""`lotlip push`: publishes a checkpoint on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..files import printable
from ..options import check, option, parse

DESCRIPTION = """\
Publish a checkpoint on the Hub: weights, configuration, tokenizer, processor, code and model card, in one commit.
After an interruption, the same command sends the missing files. The command lists the facts that the model card does
not state."""


@dataclass(kw_only=True)
class PushOptions:
    """Every option of `lotlip push`."""

    checkpoint: str = option("checkpoint folder or Hub id", positional=True)
    repo_id: str = option("repository, such as me/my-lotlip; created if needed")
    private: bool = option("make a new repository private", False)
    revision: str | None = option("branch, created if needed (main)", None)
    dry_run: str | None = option("write the repository's files to this folder and publish nothing", None)
    commit_message: str | None = option("title of the commit (Upload LoTLIP)", None)
    max_shard_size: str | None = option("maximum size of a file of weights (5GB)", None)
    license: str | None = option(
        "license of the weights, such as apache-2.0; without one, other people have no right to use them", None
    )
    base_model: list[str] = option("Hub ids of the models that the weights were trained from", default_factory=list)
    dataset: list[str] = option("Hub ids of the training data sets", default_factory=list)
    language: list[str] = option("languages of the texts, as ISO 639 codes (en)", default_factory=list)
    tag: list[str] = option("tags in addition to the usual ones", default_factory=list)
    results: list[str] = option("JSON files of `lotlip evaluate`, shown on the model card", default_factory=list)
    picture: str | None = option(
        "picture of ranked examples on the model card, such as `lotlip search --save-grid` draws", None
    )

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Publishes, and prints the address of the commit."""
    options = parse(PushOptions, argv, prog="lotlip push", description=DESCRIPTION)
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
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:>13,}  {printable(file.relative_to(folder))}")
        print(f"{folder} contains the files of {options.repo_id}. Nothing was published.")
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
