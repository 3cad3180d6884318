"""
Options as dataclasses: a field made by [`option`] is a flag (`--batch-size 8`, `--batch_size 8`) and a line of a YAML
file (`batch_size: 8`); [`check`] compares its value with its annotation and its bounds.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import operator
import os
import sys
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from .files import printable

T = TypeVar("T")
BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def option(
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    positional: bool = False,
    **field: Any,
) -> Any:
    """
    A field of a dataclass that is a flag.

    Args:
        help (`str`): what `--help` says; the default is added, but for `None`, which the text explains.
        at_least, above, at_most, below (`float`, *optional*): bounds of a number, or of each number of a list.
        metavar (`str`, *optional*): what `--help` calls the value.
        positional (`bool`, *optional*, defaults to `False`): whether the value has no flag before it.
        **field: as of `dataclasses.field`, such as `default`.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    return dataclasses.field(
        metadata={"help": help, "bounds": bounds, "metavar": metavar, "positional": positional}, **field
    )


def check(config: Any) -> None:
    """
    Gives the fields of a dataclass the types of their annotations, for its `__post_init__`.

    Args:
        config: The dataclass. Fields of other types than `bool`, `int`, `float`, `str`, `Literal`, lists and mappings
            of these, and `None`, stay as they are.

    Raises:
        ValueError: if a value is of another type or out of bounds; the message names the field.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = convert(field.name, getattr(config, field.name), hints[field.name])
        bounds = field.metadata.get("bounds") or {}
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not all(BOUNDS[words](number, bound) for words, bound in bounds.items()):
                expected = " and ".join(f"{words} {bound}" for words, bound in bounds.items())
                raise ValueError(f"`{field.name}` must be {expected}, got {number}.")
        object.__setattr__(config, field.name, value)


def convert(name: str, value: Any, hint: Any) -> Any:
    """
    The value of an option, from Python, a flag or a YAML file, in the type of an annotation.

    Raises:
        ValueError: if it has none; the message names the option.
    """
    kind, is_optional = _kind(hint)
    if value is None and is_optional:
        return None
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        value = "no" if value is False and "no" in inner else value  # YAML reads a bare `no` as false
        expected = f"one of {', '.join(inner)}"
        if value in inner:
            return value
    elif origin is list:
        expected = "one value or a list"
        if not isinstance(value, Mapping):
            return [convert(name, one, inner[0]) for one in (value if isinstance(value, list | tuple) else [value])]
    elif origin in (dict, Mapping):
        expected = "lines of `name: value`"
        if isinstance(value, Mapping):
            return {key: convert(f"{name}.{key}", one, inner[1]) for key, one in value.items()}
    elif kind is bool:
        expected = "true or false"
        word = str(value).lower()
        if word in WORDS:
            return WORDS[word]
    elif kind in (int, float):
        expected = "a whole number" if kind is int else "a finite number"
        if not isinstance(value, bool) and not (kind is int and isinstance(value, float)):
            with contextlib.suppress(OverflowError, TypeError, ValueError):
                number = kind(value)
                if kind is int or math.isfinite(number):
                    return number
    elif kind is str:
        expected = "one value"
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
        if isinstance(value, int | float):
            return str(value).lower() if isinstance(value, bool) else str(value)
    else:
        return value
    raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def choices(hint: Any) -> tuple[str, ...]:
    """The words that an annotation allows; empty if it is no `Literal`."""
    kind, _ = _kind(hint)
    return get_args(kind) if get_origin(kind) is Literal else ()


def _kind(hint: Any) -> tuple[Any, bool]:
    """An annotation without `None`, and whether it had one."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next(kind for kind in kinds if kind is not types.NoneType), types.NoneType in kinds


def unknown(name: str, known: Iterable[str]) -> ValueError:
    """The error of an option that does not exist, with the one that may be meant."""
    close = difflib.get_close_matches(name, list(known), 1)
    return ValueError(f"unknown option {printable(name)}. {f'Did you mean {close[0]}?' if close else 'See --help.'}")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a `ValueError` of one line. Options may be spelt with underscores, but not in part."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # pyright: ignore
        """The options. Those of [`add_flags`] that are not given are left out."""
        words = list(sys.argv[1:] if args is None else args)
        for index in range(words.index("--") if "--" in words else len(words)):
            flag, mark, value = words[index].partition("=")
            if flag.startswith("--"):
                words[index] = flag.replace("_", "-") + mark + value
        namespace, others = self.parse_known_args(words)
        if others and others[0].startswith("-"):
            raise unknown(others[0].partition("=")[0], self._option_string_actions)
        if others:
            raise ValueError(
                f"{others[0]} is one value too many. A pattern goes between quotes, or the shell makes names of it."
            )
        return namespace

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. See --help.")


def add_flags(parser: Any, config_class: type, without: Collection[str] = ()) -> None:
    """
    Adds a flag for each [`option`] of a dataclass.

    Args:
        parser (`Parser`): the parser, or a group of it.
        config_class (`type`): the dataclass.
        without (`Collection[str]`, *optional*): names of fields that get none.
    """
    hints = get_type_hints(config_class)
    # which a flag with an optional value would swallow
    has_positional = any(field.metadata.get("positional") for field in dataclasses.fields(config_class))
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata or field.name in without:
            continue
        kind, is_optional = _kind(hints[field.name])
        words, is_list = choices(hints[field.name]), get_origin(kind) is list
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        help = field.metadata["help"]
        if default not in (None, dataclasses.MISSING, False, "") and default != []:
            help = f"{help} ({' '.join(map(str, default)) if is_list else default})"
        metavar = (
            "{" + ",".join(words) + "}" if words else field.metadata["metavar"] or {int: "N", float: "X"}.get(kind)
        )
        settings: dict[str, Any] = {
            "help": help.replace("%", "%%"),
            "metavar": metavar,
            "nargs": "+" if is_list else None,
        }
        if field.metadata["positional"]:
            parser.add_argument(field.name, **settings)
            continue
        if kind is bool and has_positional:
            settings = {"help": settings["help"], "action": "store_true"}
        elif kind is bool:
            settings |= {"nargs": "?", "const": True, "metavar": "false"}
        flag = field.name.replace("_", "-")
        parser.add_argument(f"--{flag}", default=argparse.SUPPRESS, **settings)
        if kind is bool and is_optional:
            parser.add_argument(
                f"--no-{flag}",
                dest=field.name,
                action="store_const",
                const=False,
                default=argparse.SUPPRESS,
                help=f"the opposite of --{flag}",
            )


def add_options(parser: Any, config_class: type) -> None:
    """Adds `--config FILE`, and the flags of a dataclass."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags count more")
    add_flags(parser, config_class)


def flags_of(arguments: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The fields of a dataclass that flags set, not yet checked."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def options_of(arguments: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The fields that the file of `--config` and flags set, which count more; not yet checked."""
    file = {} if arguments.config is None else read_yaml(arguments.config, config_class)
    return {**file, **flags_of(arguments, config_class)}


def build(config_class: type[T], options: Mapping[str, Any]) -> T:
    """The dataclass, whose `__post_init__` checks the options."""
    for field in dataclasses.fields(config_class):  # pyright: ignore[reportArgumentType]
        if field.name not in options and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"--{field.name.replace('_', '-')} is missing. See --help.")
    return config_class(**options)


def parse(config_class: type[T], argv: Sequence[str] | None, prog: str, description: str) -> T:
    """The options of a command that takes flags alone."""
    parser = Parser(prog=prog, description=description)
    add_flags(parser, config_class)
    return build(config_class, flags_of(parser.parse_args(argv), config_class))


def read_yaml(file: str | os.PathLike, config_class: type) -> dict[str, Any]:
    """
    Reads a file of options.

    Args:
        file (`str` or `os.PathLike`): lines of `option: value`.
        config_class (`type`): the dataclass whose fields they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: on an option that is unknown or of a wrong type; the message names file and option.
    """
    import yaml

    try:
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: no such file of options.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        # not the whole message, which quotes the line: a password may be in it
        reason, mark = getattr(error, "problem", None) or type(error).__name__, getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"{file}: not a YAML file ({printable(reason)}{line}).") from None
    if not isinstance(options, dict | None):
        raise ValueError(f"{file}: expected lines of `option: value`, got {type(options).__name__}.")
    hints = get_type_hints(config_class)
    try:
        for name, value in (options or {}).items():
            if name not in hints:
                raise unknown(str(name), hints)
            options[name] = convert(name, value, hints[name])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return options or {}
