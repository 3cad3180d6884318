"""Every option of a relabelling in one typed config, filled by flags, a YAML file, or both."""

import argparse
import dataclasses
import hashlib
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..files import MAX_BYTES, printable
from .captioners.base import REQUEST_FIELDS, CaptionerConfig, check_options, option
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
    mapping: str = option("names of the columns, as `examples/train.py` has them", default="records")
    image_column: str | None = option("column of the images, in place of the mapping's", default=None)
    short_column: str | None = option(
        "column of the raw captions, in place of the mapping's; 'none': there are none", default=None
    )
    id_column: str | None = option("column of the ids, in place of the mapping's", default=None)
    image_folder: str | None = option("what relative paths of images start from", default=None)
    image_root: str | None = option("folder that images must lie in; by default the image folder", default=None)
    max_image_bytes: int = option("bytes of an image file that is read, at most", default=MAX_BYTES)
    max_record_bytes: int = option("largest line of a table or sample of a shard that is read", default=MAX_BYTES)
    split: str | None = option(
        "split of a data set on the Hub (train), or of a folder that holds several; 'all': all", default=None
    )
    streaming: bool = option("read in order, without a copy on disk", default=False)

    # The output
    format: Literal["parquet", "webdataset"] = option("of the shards", default="parquet")
    shard_size: int = option("records that a shard is made of", default=1000)
    embed_images: bool = option(
        "copy image files into Parquet shards, which otherwise hold their paths from the image folder on, for "
        "--image-folder of the training",
        default=False,
    )
    tokenizer: str = option(
        "checkpoint folder or Hub id of the tokenizer that counts tokens; one in the Hub's cache needs no network",
        default="google-bert/bert-base-uncased",
    )

    # The captions
    policies: dict[str, Policy] = field(default_factory=dict)
    max_attempts: int = option("how often a caption is asked for at most, where the policy is retry", default=3)
    rules: QualityRules = field(default_factory=QualityRules)
    seed: int = option("seed of the captions that are drawn (temperature above 0, and retries)", default=0)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.captioners:
            raise ValueError("`captioners` is empty: name at least one model that writes captions (--captioner).")
        from ..data.records import MAPPINGS  # with `datasets`, which `--help` does not wait for

        if self.mapping not in MAPPINGS:
            raise ValueError(f"`mapping` must be one of {', '.join(MAPPINGS)}, got {self.mapping!r}.")
        for name in ("shard_size", "max_attempts", "max_image_bytes", "max_record_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for reason, policy in self.policies.items():
            if reason not in POLICIES:
                raise ValueError(f"`policies` must be of {', '.join(POLICIES)}, got {reason!r}.")
            if policy not in get_args(Policy):
                raise ValueError(f"The policy of {reason} must be {', '.join(get_args(Policy))}, got {policy!r}.")
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


# Options that a flag sets for a captioner; `retry`, `extra_body` and `model` are for the file of options.
_CAPTIONER_FLAGS = [
    one for one in dataclasses.fields(CaptionerConfig) if "help" in one.metadata and one.name != "model"
]
_FLAGS = [one for one in dataclasses.fields(RelabelConfig) if "help" in one.metadata]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `lotlip relabel`. Those that are not given are not in what the parser returns."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags count more")
    parser.add_argument(
        "--captioner",
        action="append",
        metavar="MODEL",
        help="checkpoint folder or Hub id of a model that writes captions; several, by several --captioner",
    )
    _add_flags(parser, RelabelConfig, _FLAGS)
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
    group = parser.add_argument_group("options of every captioner")
    _add_flags(group, CaptionerConfig, _CAPTIONER_FLAGS)
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
    given = vars(arguments)
    options = _read_yaml(Path(given["config"])) if given.get("config") else {}
    options.update({one.name: given[one.name] for one in _FLAGS if one.name in given})
    options["policies"] = {**options.get("policies", {}), **_pairs("--policy", given.get("policy"))}
    rules = {**options.get("rules", {}), **_pairs("--rule", given.get("rule"))}
    hints = get_type_hints(QualityRules)
    if unknown := sorted(rules.keys() - hints.keys()):
        raise ValueError(f"--rule: {unknown[0]} is not one of {', '.join(hints)}.")
    numbers = {name: _number(value, hints[name]) if isinstance(value, str) else value for name, value in rules.items()}
    options["rules"] = QualityRules(**numbers)
    captioners: list[dict[str, Any]] = [{"model": model} for model in given.get("captioner") or ()]
    captioners = captioners or options.get("captioners", [])
    flags = {one.name: given[one.name] for one in _CAPTIONER_FLAGS if one.name in given}
    pairs = _pairs("--request-field", given.get("request_field"))
    if pairs:
        flags["request_fields"] = {name: None if sent == "none" else sent for name, sent in pairs.items()}
    options["captioners"] = [CaptionerConfig(**{**captioner, **flags}) for captioner in captioners]
    for name in ("data", "output"):
        if name not in options:
            raise ValueError(f"--{name} is missing.")
    return RelabelConfig(**options)


def _add_flags(parser: Any, config_class: type, fields: Sequence[dataclasses.Field]) -> None:
    hints = get_type_hints(config_class)
    for one in fields:
        flag, help = f"--{one.name.replace('_', '-')}", one.metadata["help"].replace("%", "%%")
        if hints[one.name] is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=help)
            continue
        kind = _plain(hints[one.name])
        choices = get_args(kind) if get_origin(kind) is Literal else None
        if one.default not in (None, dataclasses.MISSING):
            help = f"{help} ({one.default})"
        parser.add_argument(
            flag,
            type=str if choices else kind,
            choices=choices,
            metavar=None if choices else {int: "N", float: "X"}.get(kind, "..."),
            default=argparse.SUPPRESS,
            help=help,
        )


def _plain(hint: Any) -> Any:
    """The type of an option that may be `None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(one for one in get_args(hint) if one is not type(None))
    return hint


def _pairs(flag: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for one in given or ():
        name, _, value = one.partition("=")
        if not name or not value:
            raise ValueError(f"{flag} takes NAME=VALUE, got {one!r}.")
        pairs[name] = value
    return pairs


def _number(text: str, kind: type) -> Any:
    """The number, or the text as it is, which the rules refuse."""
    try:
        return kind(text)
    except ValueError:
        return text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file of options.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # not the whole message, which quotes the line: a password may be in it
        reason, mark = getattr(error, "problem", None) or type(error).__name__, getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"{path}: not a YAML file ({printable(reason)}{line}).") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected lines of `option: value`, got {type(options).__name__}.")
    known = [one.name for one in dataclasses.fields(RelabelConfig)]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"{path}: unknown option {unknown[0]}. There are: {', '.join(known)}.")
    for name in ("policies", "rules"):
        if not isinstance(options.get(name, {}), Mapping):
            raise ValueError(f"{path}: `{name}` must be lines of `name: value`, got {options[name]!r}.")
    captioners = options.get("captioners", [])
    if not isinstance(captioners, list):
        raise ValueError(f"{path}: `captioners` must be a list, got {type(captioners).__name__}.")
    allowed = [one.name for one in dataclasses.fields(CaptionerConfig)]
    for number, one in enumerate(captioners):
        if isinstance(one, str):
            captioners[number] = {"model": one}
        elif not isinstance(one, Mapping) or "model" not in one or one.keys() - set(allowed):
            found = ", ".join(map(printable, one)) if isinstance(one, Mapping) else type(one).__name__
            raise ValueError(f"{path}: a captioner has `model` and any of {', '.join(allowed)}, got {found}.")
    return options
