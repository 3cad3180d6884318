"""
Options as dataclasses: a field made by [`option`] is a flag (`--batch-size 8`, `--batch_size 8`) and an entry of a
YAML file (`batch_size: 8`). [`check`] checks the types and bounds of all fields.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import math
import operator
import os
import sys
import textwrap
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from .files import printable
from .terminal import print_headed

T = TypeVar("T")
SWITCHES = "To turn off an option that the file of --config turns on, write false after it: {} false"
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

# Usual abbreviations of options, for suggestions
ABBREVIATIONS = {"--lr": "--learning-rate", "lr": "learning_rate"}
# Removed options, with their replacements
REPLACED = {
    "loss": "use `--terms sigmoid` for sigmoid; infonce is the default",
    "num_primary_components": "use `--terms primary_components --term-options primary_components.num_components=32`",
    "short_loss_weight": "use `--term-options infonce.short_loss_weight=2`",
    "long_loss_weight": "use `--term-options infonce.long_loss_weight=2`",
}


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    group: str = "",
    metavar: str = "",
    positional: bool = False,
    **settings: Any,
) -> Any:
    """
    Makes a field of a dataclass that is a flag.

    Args:
        help (`str`): Text of `--help`. The default is appended to the text, except the default `None`.
        default (`Any`, *optional*): Default value. An option without a default is required.
        group (`str`, *optional*): Title under which `--help` lists the option. Defaults to that of the previous field.
        metavar (`str`, *optional*): Name of the value in `--help`, such as `FILE`.
        positional (`bool`, *optional*, defaults to `False`): Whether the option is a positional argument.
        **settings: Bounds of a number or of each number of a list (`at_least`, `above`, `at_most`, `below`), and
            arguments of `dataclasses.field`.
    """
    bounds = {name: settings.pop(name) for name in BOUNDS if name in settings}
    metadata = {"help": help, "bounds": bounds, "group": group, "metavar": metavar, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata, **settings)


def check(config: Any) -> None:
    """
    Converts the fields of a dataclass to the types of their annotations. Call it in `__post_init__`.

    Args:
        config (`Any`): Instance of a dataclass.

    Raises:
        `ValueError`: If a value is of another type or out of bounds. The message names the field.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = convert(field.name, getattr(config, field.name), hints[field.name])
        bounds = field.metadata.get("bounds", {})
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not all(BOUNDS[name](number, bound) for name, bound in bounds.items()):
                expected = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
                raise ValueError(f"`{field.name}` must be {expected}, got {number}.")
        object.__setattr__(config, field.name, value)


def convert(name: str, value: Any, hint: Any) -> Any:
    """
    Converts the value of an option, from Python, a flag or a YAML file, to the type of an annotation: `bool`, `int`,
    `float`, `str`, `Path`, `Literal`, a list or mapping of these, a dataclass of options, or `None`. Values of other
    types are returned unchanged.

    Args:
        name (`str`): Name of the option, for messages.
        value (`Any`): Value.
        hint (`Any`): Annotation.

    Returns:
        `Any`: The converted value.

    Raises:
        `ValueError`: If the value does not fit the annotation. The message names the option.
    """
    kind, is_optional = _kind(hint)
    origin, inner = get_origin(kind), get_args(kind)
    if value is None and is_optional:
        return None
    if origin is Literal:
        expected = f"one of {', '.join(inner)}"
        if value in inner or (value is False and "no" in inner):  # YAML reads a bare `no` as false
            return value or "no"
    elif origin is list:
        expected = "one value or a list such as [a, b]"
        if not isinstance(value, Mapping):
            return [convert(name, one, inner[0]) for one in (value if isinstance(value, list | tuple) else [value])]
    elif origin in (dict, Mapping):
        expected = "a mapping with entries `name: value`"
        if isinstance(value, Mapping):
            return {key: convert(f"{name}.{key}", one, inner[1]) for key, one in value.items()}
    elif kind is bool:
        expected = "true or false"
        if str(value).lower() in WORDS:
            return WORDS[str(value).lower()]
    elif kind in (int, float):
        expected = "a whole number" if kind is int else "a finite number"
        if not isinstance(value, bool) and not (kind is int and isinstance(value, float)):
            with contextlib.suppress(OverflowError, TypeError, ValueError):
                number = kind(value)
                if kind is int or math.isfinite(number):
                    return number
    elif kind in (str, Path):
        expected = "one value"
        if isinstance(value, str | os.PathLike):
            return kind(os.fspath(value))
        if isinstance(value, int | float):
            return kind(str(value).lower() if isinstance(value, bool) else str(value))
    elif dataclasses.is_dataclass(kind):
        expected = "a mapping with entries `option: value`"
        if isinstance(value, str):
            return build(kind, {dataclasses.fields(kind)[0].name: value})
        if isinstance(value, Mapping):
            return build(kind, _of_entries(value, kind))
        if isinstance(value, kind):
            return value
    else:
        return value
    if isinstance(value, Mapping):  # do not show its values, which may contain a password
        advice = "If a value contains a colon, leave out the space after it or quote the value."
        raise ValueError(f"`{name}` must be {expected}, got a mapping. {advice}")
    raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def choices(hint: Any) -> tuple[str, ...]:
    """Returns the values of a `Literal` annotation; empty for other annotations."""
    kind, _ = _kind(hint)
    return get_args(kind) if get_origin(kind) is Literal else ()


def _kind(hint: Any) -> tuple[Any, bool]:
    """Returns an annotation without `None`, and whether the annotation allows `None`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next(kind for kind in kinds if kind is not types.NoneType), types.NoneType in kinds


def unknown(name: Any, known: Iterable[str]) -> ValueError:
    """Returns the error of an unknown option, which suggests the nearest one."""
    plain = str(name).removeprefix("--").replace("-", "_")
    if plain in REPLACED:
        return ValueError(f"Unknown option {printable(name)}: {REPLACED[plain]}.")
    wanted = ABBREVIATIONS.get(str(name), str(name))
    close = nearest(wanted, [one for one in known if one not in ("-h", "--help")])
    return ValueError(f"Unknown option {printable(name)}. {f'Did you mean {close}?' if close else 'See --help.'}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is nearest to a mistyped one, or `None` if none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)


class _Formatter(argparse.HelpFormatter):
    """Wraps help to the width of the terminal. Indented lines of a description are not wrapped."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, max_help_position=32, **settings)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        words = [self._format_action_invocation(action) for action in actions if not action.option_strings]
        super().add_usage(usage or " ".join(["%(prog)s [options]", *words]), actions, groups, "Usage: ")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(one if "\n " in f"\n{one}" else textwrap.fill(one, width) for one in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Returns an option as help shows it: `--batch-size N`, `--resume`, `-h, --help`, `TEXT`."""
        value = action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}"
        value = f"{value} ..." if action.nargs == "+" else value
        if not action.option_strings:
            return str(value)
        return ", ".join(action.option_strings) + ("" if action.nargs == 0 or action.const is True else f" {value}")


class Parser(argparse.ArgumentParser):
    """
    A parser that raises errors as a one-line `ValueError`. Options may contain underscores, but not be abbreviated.
    """

    color = False  # disables the colours of Python 3.14

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_Formatter, **options)
        self._optionals.title = "General"
        self.add_argument("-h", "--help", action="help", help="Show this help and exit")

    def add_argument_group(self, title: str | None = None, *arguments: Any, **settings: Any) -> Any:
        """Returns the group with this title, or adds a new group before the general options."""
        for group in self._action_groups:
            if group.title == title:
                return group
        group = super().add_argument_group(title, *arguments, **settings)
        self._action_groups.sort(key=lambda one: one is getattr(self, "_optionals", None))
        return group

    def _print_message(self, message: str, file: Any = None) -> None:
        print_headed(message, file)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # pyright: ignore
        """Returns the options. Flags of [`add_flags`] that are not given are missing in the result."""
        words = list(sys.argv[1:] if args is None else args)
        for index in range(words.index("--") if "--" in words else len(words)):
            flag, mark, value = words[index].partition("=")
            if flag.startswith("--"):
                words[index] = flag.replace("_", "-") + mark + value
        namespace, others = self.parse_known_args(words)
        if others and others[0].startswith("-"):
            raise unknown(others[0].partition("=")[0], self._option_string_actions)
        if others:
            raise ValueError(f"Unexpected argument {others[0]!r}. Quote texts with spaces and glob patterns.")
        return namespace

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.rstrip('.')}. See --help.")


def groups_of(config_class: type) -> dict[str, list[dataclasses.Field]]:
    """Returns each [`option`] of a dataclass by the title of its group. Inherited options come last."""
    fields = {field.name: field for field in dataclasses.fields(config_class) if "help" in field.metadata}
    groups: dict[str, list[dataclasses.Field]] = {}
    title = "Options"
    for owner in config_class.__mro__:
        for field in [fields[name] for name in inspect.get_annotations(owner) if name in fields]:
            title = field.metadata["group"] or title
            groups.setdefault(title, []).append(field)
    return groups


def add_flags(parser: Parser, config_class: type, without: Collection[str] = ()) -> None:
    """Adds a flag for each [`option`] of a dataclass, in groups."""
    hints, groups = get_type_hints(config_class), groups_of(config_class)
    # a flag with an optional value would consume the positional argument
    has_positional = any(field.metadata["positional"] for members in groups.values() for field in members)
    for title, members in groups.items():
        group = parser.add_argument_group(title)
        for field in sorted(members, key=lambda one: not _is_required(one)):
            if field.name not in without:
                _add_flag(group, field, hints[field.name], has_positional)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _add_flag(group: Any, field: dataclasses.Field, hint: Any, has_positional: bool) -> None:
    kind, is_optional = _kind(hint)
    words, is_list = choices(hint), get_origin(kind) is list
    help = field.metadata["help"]
    default = field.default if field.default_factory is dataclasses.MISSING else " ".join(field.default_factory())
    if _is_required(field):
        help = f"{help} (required)"
    elif kind is not bool and default not in (None, ""):
        help = f"{help} (default: {default})"
    one = get_args(kind)[0] if is_list else kind
    metavar = "{" + ",".join(words) + "}" if words else {int: "N", float: "NUMBER"}.get(one, "NAME")
    settings: dict[str, Any] = {"help": help.replace("%", "%%")}
    if kind is not bool:
        settings |= {"metavar": field.metadata["metavar"] or metavar, "nargs": "+" if is_list else None}
    elif has_positional:
        settings["action"] = "store_true"
    else:
        settings |= {"nargs": "?", "const": True, "metavar": "false"}
    if field.metadata["positional"]:
        if not _is_required(field):
            settings |= {"nargs": "?", "default": argparse.SUPPRESS}
        group.add_argument(field.name, **settings)
        return
    flag = field.name.replace("_", "-")
    group.add_argument(f"--{flag}", default=argparse.SUPPRESS, **settings)
    if kind is bool and is_optional:
        settings = {"action": "store_const", "const": False, "default": argparse.SUPPRESS}
        group.add_argument(f"--no-{flag}", dest=field.name, help=f"The opposite of --{flag}", **settings)


def add_options(parser: Parser, config_class: type) -> None:
    """Adds the flags of a dataclass and `--config FILE`."""
    add_flags(parser, config_class)
    if switches := [action.option_strings[0] for action in parser._actions if action.const is True]:
        parser.epilog = SWITCHES.format(switches[-1])
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")


def flags_of(arguments: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """Returns the fields of a dataclass that flags set, unchecked."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def options_of(arguments: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """Returns the fields that flags or the file of `--config` set, unchecked. Flags override the file."""
    file = {} if arguments.config is None else read_yaml(arguments.config, config_class)
    return {**file, **flags_of(arguments, config_class)}


def build(config_class: type[T], options: Mapping[str, Any]) -> T:
    """Returns the dataclass, whose `__post_init__` checks the options."""
    for field in dataclasses.fields(config_class):  # pyright: ignore[reportArgumentType]
        if field.name not in options and _is_required(field):
            raise ValueError(f"`{field.name}` (--{field.name.replace('_', '-')}) is missing. See --help.")
    return config_class(**options)


def make_parser(config_class: type, **settings: Any) -> Parser:
    """Returns a parser of the flags of a dataclass; `settings` are those of `argparse.ArgumentParser`."""
    parser = Parser(**settings)
    add_flags(parser, config_class)
    return parser


def parse(config_class: type[T], argv: Sequence[str] | None, parser: Parser) -> T:
    """Returns the options of a command that has flags only."""
    return build(config_class, flags_of(parser.parse_args(argv), config_class))


def read_yaml(file: str | os.PathLike, config_class: type) -> dict[str, Any]:
    """
    Reads a YAML file with entries `option: value`, which are fields of a dataclass.

    Args:
        file (`str` or `os.PathLike`): File.
        config_class (`type`): Dataclass.

    Returns:
        `dict[str, Any]`: Values by option.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If an option is unknown or of a wrong type. The message names file and option.
    """
    import yaml

    try:
        options = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        # the whole message quotes the line, which may contain a password
        reason, mark = getattr(error, "problem", None) or type(error).__name__, getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"{file}: not a YAML file ({printable(reason)}{line}).") from None
    if not isinstance(options, dict | None):
        raise ValueError(f"{file}: expected entries `option: value`, got a {type(options).__name__}.")
    try:
        return _of_entries(options or {}, config_class)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _of_entries(entries: Mapping[Any, Any], config_class: type) -> dict[str, Any]:
    """Converts the entries of a file to the types of a dataclass's fields."""
    hints = get_type_hints(config_class)
    if others := [name for name in entries if name not in hints]:
        raise unknown(others[0], hints)
    return {name: convert(name, value, hints[name]) for name, value in entries.items()}
