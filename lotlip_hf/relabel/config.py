"""Options of a relabelling, from flags, a YAML file or both."""

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..data.mappings import MAPPINGS, ColumnMapping, check_mapping
from ..files import MAX_BYTES
from ..options import Parser, add_flags, add_options, build, check, convert, flags_of, option, options_of
from .captioners.base import REQUEST_FIELDS, CaptionerConfig
from .quality import REASONS, QualityRules

NO_ANSWER, NO_TEXT = "no_answer", "no_text"
# For a bad caption: request it again and drop it if it is still bad, drop it, or keep and mark it
Policy = Literal["retry", "drop", "keep"]
POLICIES: dict[str, Policy] = {
    **dict.fromkeys(REASONS, "retry"),
    "repeated_sentence": "keep",
    "cut_off": "keep",
}
# Options that may change in a resumed run: they affect only rounding. `captioners` have their own check.
RESUMABLE = frozenset({"output", "captioners", "max_image_bytes", "max_record_bytes"})
RESUMABLE_OF_CAPTIONERS = frozenset(
    {"batch_size", "device_map", "concurrency", "timeout", "max_retries", "max_answer_bytes"}
)


@dataclass
class RelabelConfig:
    """
    Options of a relabelling. `lotlip relabel --help` describes them.

    Raises:
        `ValueError`: If an option is missing, out of range or in conflict with another. The message names it.

    Example:

    ```python
    >>> config = RelabelConfig(data="pictures", output="relabelled", captioners=[CaptionerConfig(model="blip2")])
    >>> config.policies["loop"]
    'retry'
    ```
    """

    data: str = option(
        "Folder of images or of records, file of records, shards such as 'shards/*.tar', or data set on the Hub",
        group="Data",
    )
    output: str = option("Folder to write", group="Output", metavar="FOLDER")
    captioners: list[CaptionerConfig] = field(default_factory=list)
    mapping: str = option("Column names, as in `lotlip train --help`", "records", group="Data")
    image_column: str | None = option("Column of the images (default: from --mapping)", None)
    short_column: str | None = option(
        "Column of the raw captions; 'none' if there are none (default: from --mapping)", None
    )
    id_column: str | None = option("Column of the ids (default: from --mapping)", None)
    split: str | None = option(
        "Split to read; 'all' reads all (default: train on the Hub; required for a folder with several)", None
    )
    streaming: bool = option("Read records in order, without a copy on disk", False)
    max_record_bytes: int = option("Maximum size of a table line or shard sample, in bytes", MAX_BYTES, at_least=1)

    format: Literal["parquet", "webdataset"] = option("Format of the shards", "parquet", group="Output")
    shard_size: int = option("Records per shard", 1000, at_least=1)
    embed_images: bool = option(
        "Copy image files into Parquet shards; otherwise, shards contain the paths relative to the image folder",
        False,
    )

    tokenizer: str = option(
        "Checkpoint folder or Hub id of the tokenizer that counts tokens in the statistics",
        "google-bert/bert-base-uncased",
    )

    policies: dict[str, Policy] = field(default_factory=dict)
    max_attempts: int = option(
        "Maximum number of requests for a caption with the policy retry", 3, at_least=1, group="Bad captions"
    )
    rules: QualityRules = field(default_factory=QualityRules)
    seed: int = option(
        "Seed of sampled captions: those of a --temperature above 0, and retries", 0, group="Generation"
    )

    image_folder: str | None = option(
        "Folder that relative image paths start from (default: the folder of the file that contains them)",
        None,
        group="Images",
        metavar="FOLDER",
    )
    image_root: str | None = option(
        "Folder that images must be in, after links are followed (default: --image-folder)", None, metavar="FOLDER"
    )
    max_image_bytes: int = option("Maximum size of an image file, in bytes", MAX_BYTES, at_least=1)

    def __post_init__(self) -> None:
        check(self)
        if not self.captioners:
            raise ValueError("`captioners` is empty. Pass at least one captioning model with --captioner.")
        check_mapping(self.mapping)
        if others := sorted(self.policies.keys() - POLICIES.keys()):
            raise ValueError(f"`policies` must have keys from {', '.join(POLICIES)}, got {others[0]!r}.")
        self.policies = {**POLICIES, **self.policies}

    @property
    def copies_images(self) -> bool:
        """Whether the shards contain image files instead of paths."""
        return self.embed_images or self.format == "webdataset"

    @property
    def writes_long(self) -> bool:
        """Whether a captioner writes long captions."""
        return any(one.role == "long" for one in self.captioners)

    @property
    def uses_texts(self) -> bool:
        """
        Whether a captioner reads texts or writes something else than long captions. The shards then have all fields of
        the records.
        """
        return any(one.input != "image" or one.role != "long" for one in self.captioners)

    def column_mapping(self) -> ColumnMapping:
        """
        Returns the columns of the mapping, or of the options that replace them. Long captions are left out if new ones
        replace them and no prompt contains them.
        """
        mapping = MAPPINGS[self.mapping]
        if self.writes_long and not any("{captions}" in one.prompt for one in self.captioners):
            mapping = mapping.with_columns(long=())
        return mapping.with_columns(self.short_column, image=self.image_column, id=self.id_column)

    def identity(self) -> dict[str, Any]:
        """Returns the options that determine the output, without the captioners."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in RESUMABLE}
        options["data"] = os.path.normpath(self.data) if os.path.exists(self.data) else self.data
        return {name: _unplaced(value) for name, value in options.items()}

    def captioner_identities(self) -> list[dict[str, Any]]:
        """Returns the options of each captioner that determine its captions, so without the address of an endpoint."""
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
    """Replaces an absolute path by its last name and a digest."""
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    return f"{os.path.basename(value)} ({hashlib.blake2b(os.fsencode(value), digest_size=4).hexdigest()})"


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `lotlip relabel` to a parser."""
    titles = ("Data", "Captioners", "Generation", "Endpoint", "Output", "Bad captions", "Images")
    _, captioners, _, endpoint, _, bad, _ = map(parser.add_argument_group, titles)
    captioners.add_argument(
        "--captioner",
        action="append",
        metavar="NAME",
        help="Checkpoint folder or Hub id of a captioning model; repeat it for several models (required)",
    )
    add_options(parser, RelabelConfig)
    add_flags(parser, CaptionerConfig, without={"model"})
    bad.add_argument(
        "--policy",
        action="append",
        metavar="REASON=POLICY",
        help="What to do with a bad caption: retry (request it again, and drop it if it is still bad), drop, or "
        "keep (and mark it). Policies by default: "
        + ", ".join(f"{reason}={policy}" for reason, policy in POLICIES.items()),
    )
    bad.add_argument(
        "--rule",
        action="append",
        metavar="NAME=VALUE",
        help="Limit that makes a caption bad: "
        + ", ".join(f"{one.name}={one.default}" for one in dataclasses.fields(QualityRules)),
    )
    endpoint.add_argument(
        "--request-field",
        action="append",
        metavar="FIELD=NAME",
        help="Rename a field of requests (max_tokens=max_completion_tokens), or leave it out (NAME none). Fields: "
        + ", ".join(REQUEST_FIELDS),
    )


def read_config(arguments: argparse.Namespace) -> RelabelConfig:
    """
    Returns the options of flags and of the file of `--config`.

    Args:
        arguments (`argparse.Namespace`): Result of a parser with [`add_arguments`].

    Returns:
        [`RelabelConfig`]: The options.

    Raises:
        `ValueError`: If an option is unknown, missing, of a wrong type or out of range.
        `FileNotFoundError`: If the file does not exist.
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
            raise ValueError(f"{flag} must be NAME=VALUE, got {one!r}.")
        pairs[name] = value
    return pairs
