"""`lotlip push`: a checkpoint on the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..files import printable
from ..options import check, option, parse

DESCRIPTION = """\
Publish a checkpoint on the Hub: weights, configuration, tokenizer, processor, code and model card, in one commit.
After an interruption the same command sends what is missing."""


@dataclass(kw_only=True)
class PushOptions:
    """Every option of `lotlip push`."""

    checkpoint: str = option("checkpoint folder or Hub id of a LoTLIP", positional=True)
    repo_id: str = option("repository, which is made if need be")
    private: bool = option("make a new repository private", False)
    revision: str | None = option("branch, which is made if need be (main)", None)
    dry_run: str | None = option("write what would be published to this folder, and stop", None)
    commit_message: str | None = option("of the commit (Upload LoTLIP)", None)
    max_shard_size: str | None = option("largest file of weights (5GB)", None)
    license: str | None = option(
        "of the weights, such as apache-2.0; without one others have no right to use them", None
    )
    base_model: list[str] = option("Hub ids of the models that it was made from", default_factory=list)
    dataset: list[str] = option("Hub ids of the data sets that it was trained on", default_factory=list)
    language: list[str] = option("languages that it reads (en)", default_factory=list)
    tag: list[str] = option("more tags", default_factory=list)
    results: list[str] = option("results of evaluations, JSON files", default_factory=list)

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Publishes, and prints the address of the commit."""
    options = parse(PushOptions, argv, prog="lotlip push", description=DESCRIPTION)
    from ..hub.push import CardFields, push, write_repository

    card = CardFields(
        license=options.license,
        base_model=options.base_model,
        datasets=options.dataset,
        language=options.language,
        tags=options.tag,
        results=options.results,
    )
    settings = {"card": card, "max_shard_size": options.max_shard_size}
    if options.dry_run:
        folder = write_repository(options.checkpoint, options.dry_run, options.repo_id, **settings)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:>13,}  {printable(file.relative_to(folder))}")
        print(f"{folder} is what would be published as {options.repo_id}.")
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
