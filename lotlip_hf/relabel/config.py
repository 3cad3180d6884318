"""Every option of a relabelling in one typed config, filled by flags, a YAML file, or both."""

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..files import MAX_BYTES
from ..options import Parser, add_flags, add_options, build, check, convert, flags_of, option, options_of
from .captioners.base import REQUEST_FIELDS, CaptionerConfig
from .quality import REASONS, QualityRules

if TYPE_CHECKING:
    from ..data.records import ColumnMapping

NO_ANSWER = "no_answer"
# What is done with a caption that something is wrong with: asked for again and dropped if that does not help, dropped,
# or kept and marked.
Policy = Literal["retry", "drop", "keep"]
POLICIES: dict[str, Policy] = {
    **dict.fromkeys(REASONS, "retry"),
    "repeated_sentence": "keep",
    "cut_off": "keep",
}
# What may differ when a run goes on, of the options and of those of a captioner: it decides who does the work and in
# what portions, which at most changes how numbers are rounded. The captioners are compared one by one.
RESUMABLE = frozenset({"output", "captioners", "max_image_bytes", "max_record_bytes"})
RESUMABLE_OF_CAPTIONERS = frozenset(
    {"batch_size", "device_map", "concurrency", "timeout", "max_retries", "max_answer_bytes"}
)


@dataclass
class RelabelConfig:
    """
    Every option of a relabelling, `lotlip relabel --help` in Python.

    Raises:
        ValueError: if an option is missing, out of range, or contradicts another; the message names it.

    Example:

    ```python
    >>> config = RelabelConfig(data="pictures", output="relabelled", captioners=[CaptionerConfig(model="blip2")])
    >>> config.policies["loop"]
    'retry'
    ```
    """

    data: str = option("a folder of images or of records, a file of records, shards/*.tar, or a data set on the Hub")
    output: str = option("folder that is written; the same command goes on where a run stopped")
    captioners: list[CaptionerConfig] = field(default_factory=list)

    # The records
    mapping: str = option("names of the columns, as `lotlip train` has them", "records")
    image_column: str | None = option("column of the images, in place of the mapping's", None)
    short_column: str | None = option(
        "column of the raw captions, in place of the mapping's; 'none': there are none", None
    )
    id_column: str | None = option("column of the ids, in place of the mapping's", None)
    image_folder: str | None = option("what relative paths of images start from", None)
    image_root: str | None = option("folder that images must lie in; by default the image folder", None)
    max_image_bytes: int = option("bytes of an image file that is read, at most", MAX_BYTES, at_least=1)
    max_record_bytes: int = option("largest line of a table or sample of a shard that is read", MAX_BYTES, at_least=1)
    split: str | None = option(
        "split of a data set on the Hub (train), or of a folder that holds several; 'all': all", None
    )
    streaming: bool = option("read in order, without a copy on disk", False)

    # The output
    format: Literal["parquet", "webdataset"] = option("of the shards", "parquet")
    shard_size: int = option("records that a shard is made of", 1000, at_least=1)
    embed_images: bool = option(
        "copy image files into Parquet shards, which otherwise hold their paths from the image folder on, for "
        "--image-folder of the training",
        False,
    )
    tokenizer: str = option(
        "checkpoint folder or Hub id of the tokenizer that counts tokens; one in the Hub's cache needs no network",
        "google-bert/bert-base-uncased",
    )

    # The captions
    policies: dict[str, Policy] = field(default_factory=dict)
    max_attempts: int = option("how often a caption is asked for at most, where the policy is retry", 3, at_least=1)
    rules: QualityRules = field(default_factory=QualityRules)
    seed: int = option("seed of the captions that are drawn (temperature above 0, and retries)", 0)

    def __post_init__(self) -> None:
        check(self)
        if not self.captioners:
            raise ValueError("`captioners` is empty: name at least one model that writes captions (--captioner).")
        from ..data.records import MAPPINGS  # with `datasets`, which `--help` does not wait for

        if self.mapping not in MAPPINGS:
            raise ValueError(f"`mapping` must be one of {', '.join(MAPPINGS)}, got {self.mapping!r}.")
        if others := sorted(self.policies.keys() - POLICIES.keys()):
            raise ValueError(f"`policies` must be of {', '.join(POLICIES)}, got {others[0]!r}.")
        self.policies = {**POLICIES, **self.policies}

    @property
    def copies_images(self) -> bool:
        """Whether the shards hold the files of images, not their paths."""
        return self.embed_images or self.format == "webdataset"

    def column_mapping(self) -> "ColumnMapping":
        """The mapping's columns, those that options name in their place; of long captions none is read."""
        from ..data.records import MAPPINGS

        mapping = replace(MAPPINGS[self.mapping], long=())
        if self.short_column is not None:
            mapping = replace(mapping, short=None if self.short_column == "none" else self.short_column)
        columns = {"image": self.image_column, "id": self.id_column}
        return replace(mapping, **{name: column for name, column in columns.items() if column is not None})

    def identity(self) -> dict[str, Any]:
        """What decides about the output, but for the captioners."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in RESUMABLE}
        options["data"] = os.path.normpath(self.data) if os.path.exists(self.data) else self.data
        return {name: _unplaced(value) for name, value in options.items()}

    def captioner_identities(self) -> list[dict[str, Any]]:
        """What decides about each captioner's captions. Which address an endpoint has does not."""
        return [
            {
                name: _unplaced(value) if name == "model" else value
                for name, value in dataclasses.asdict(one).items()
                if name not in RESUMABLE_OF_CAPTIONERS
            }
            | {"endpoint": one.endpoint is not None}
            for one in self.captioners
        ]


def _unplaced(value: Any) -> Any:
    """A path of this machine as the last name in it and a digest, without the folders above."""
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    return f"{os.path.basename(value)} ({hashlib.blake2b(os.fsencode(value), digest_size=4).hexdigest()})"


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `lotlip relabel`."""
    add_options(parser, RelabelConfig)
    parser.add_argument(
        "--captioner",
        action="append",
        metavar="MODEL",
        help="checkpoint folder or Hub id of a model that writes captions; several, by several --captioner",
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="REASON=POLICY",
        help="what is done with captions that something is wrong with: retry (ask again, and drop what does not get "
        "better), drop, or keep (and mark). The reasons, and the policies by default: "
        + " ".join(f"{reason}={policy} ({REASONS[reason]})" for reason, policy in POLICIES.items()),
    )
    parser.add_argument(
        "--rule",
        action="append",
        metavar="NAME=VALUE",
        help="a limit of what is wrong: "
        + ", ".join(f"{one.name} ({one.default})" for one in dataclasses.fields(QualityRules)),
    )
    group = parser.add_argument_group("Endpoint")
    add_flags(parser, CaptionerConfig, without={"model"})
    group.add_argument(
        "--request-field",
        action="append",
        metavar="NAME=NAME",
        help="what an endpoint calls a field of the request (max_tokens=max_completion_tokens), or none if it refuses "
        f"it: {', '.join(REQUEST_FIELDS)}",
    )


def read_config(arguments: argparse.Namespace) -> RelabelConfig:
    """
    The config that flags and the file of options make.

    Args:
        arguments: What the parser of [`add_arguments`] returned.

    Raises:
        ValueError: on an option that is unknown, missing, of a wrong type or out of range.
        FileNotFoundError: if there is no such file of options.
    """
    options = options_of(arguments, RelabelConfig)
    options["policies"] = {**options.get("policies", {}), **_pairs("--policy", arguments.policy)}
    rules = vars(options.get("rules", QualityRules())) | _pairs("--rule", arguments.rule)
    options["rules"] = convert("rules", rules, QualityRules)
    flags = flags_of(arguments, CaptionerConfig)
    if pairs := _pairs("--request-field", arguments.request_field):
        flags["request_fields"] = {name: None if sent == "none" else sent for name, sent in pairs.items()}
    captioners = list(map(CaptionerConfig, arguments.captioner or ())) or options.get("captioners", [])
    options["captioners"] = [replace(one, **flags) for one in captioners]
    return build(RelabelConfig, options)


def _pairs(flag: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for one in given or ():
        name, _, value = one.partition("=")
        if not name or not value:
            raise ValueError(f"{flag} takes NAME=VALUE, got {one!r}.")
        pairs[name] = value
    return pairs
