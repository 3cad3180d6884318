"""Which files a source of records means: folders, patterns, splits; or a data set on the Hub."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..files import printable
from .readers import KINDS

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Words for the splits of a data set in the names of files and folders, as `datasets` knows them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = {word: split for split, words in SPLITS.items() for word in words}
SPLIT_WORD = re.compile(rf"(?<![^-._ 0-9])({'|'.join(SPLIT_WORDS)})(?![^-._ 0-9])", re.IGNORECASE)
ALL_SPLITS = "all"
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")


class SplitError(ValueError):
    """
    Files that are several splits, or not the one that was asked for.

    Args:
        problem (`str`): what is wrong, in a sentence.
        splits (`Sequence[str]`): the splits that there are.
        option (`str`, *optional*, defaults to `"split"`): the option that says which.
    """

    def __init__(self, problem: str, splits: Sequence[str], option: str = "split") -> None:
        self.problem, self.splits = problem, splits
        advice = (
            f"say which (--{option.replace('_', '-')} {splits[0]}; {ALL_SPLITS}: all)" if splits else "leave it out"
        )
        super().__init__(f"`{option}`: {problem}; {advice}.")


def is_hub_name(source: object) -> bool:
    """Whether a source has the form of a data set's name on the Hub, and there is no such folder or file."""
    if not isinstance(source, str) or os.path.exists(source) or not HUB_NAME.fullmatch(source):
        return False
    return os.path.splitext(source)[1].lower() not in KINDS  # "pictures/metadata.jsonl" has the form of a name too


def find_files(source: str | os.PathLike | Sequence[str | os.PathLike], split: str | None = None) -> list[str]:
    """
    The files that a source means.

    Args:
        source (`str`, `os.PathLike` or a sequence of them): folders, files and patterns, as in [`load_records`].
        split (`str`, *optional*): the split, as in [`load_records`].

    Returns:
        `list[str]`: the files; those of each folder and pattern sorted by name.

    Raises:
        FileNotFoundError: if there is none.
        SplitError: if they are of several splits, or of none that was asked for.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    found: dict[str, str] = {}  # file to what its folder or pattern leaves of its path
    splits: dict[str, None] = {}
    for one in itertools.chain.from_iterable(map(_expanded, sources)):
        files = _find(one)
        own = dict.fromkeys(filter(None, map(_split_of, files.values())))
        if split is None and len({SPLIT_WORDS[word] for word in own}) > 1:
            raise SplitError(f"{printable(one)} holds {', '.join(sorted(own))}", sorted(own))
        found |= files
        splits |= own
    if split is None or split == ALL_SPLITS:
        return list(found)
    wanted = SPLIT_WORDS.get(split.lower(), split)
    chosen = [
        file
        for file, name in found.items()
        if SPLIT_WORDS.get(_split_of(name) or "") == wanted or split in os.path.splitext(name)[0].split(os.sep)
    ]
    if not chosen and (splits or wanted != "train"):  # files that are no splits are to train on
        there = f"it holds {', '.join(sorted(splits))}" if splits else "its files are one split"
        raise SplitError(f"{printable(source)} holds no {split!r}: {there}", sorted(splits))
    return chosen or list(found)


def _split_of(name: str) -> str | None:
    """The first word for a split in a path."""
    for part in os.path.splitext(name)[0].split(os.sep):
        if match := SPLIT_WORD.search(part):
            return match[1].lower()
    return None


def _expanded(source: str | os.PathLike) -> Iterator[str]:
    """A pattern with braces as all that it stands for, as shells expand it: `{00..10}`, `{a,b}`."""
    pattern = os.fspath(source)
    match = next((match for match in BRACES.finditer(pattern) if "," in match[1] or RANGE.fullmatch(match[1])), None)
    if match is None or os.path.exists(pattern):
        yield pattern
        return
    parts: Iterable[str] = match[1].split(",")
    if numbers := RANGE.fullmatch(match[1]):
        first, last, step = int(numbers[1]), int(numbers[2]), max(1, int(numbers[3] or 1))
        is_padded = any(len(one) > 1 and one.startswith("0") for one in (numbers[1], numbers[2]))
        width = max(len(numbers[1]), len(numbers[2])) if is_padded else 0
        steps = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        parts = (f"{number:0{width}}" for number in steps)
    for part in parts:
        yield from _expanded(pattern[: match.start()] + part + pattern[match.end() :])


def _find(source: str) -> dict[str, str]:
    """The files of a folder or pattern, sorted by name, and what it leaves of their paths."""
    path = Path(source)
    if path.is_dir():
        for name in METADATA_NAMES:
            if (path / name).is_file():
                return {str(path / name): name}
        for extensions in ((".tar",), (".parquet",), (".jsonl", ".jsonlines"), (".json",), (".csv", ".tsv")):
            files = (file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
            names = {str(file): str(file.relative_to(path)) for file in files}
            # what is hidden is not the user's data: `lotlip search` keeps its index so
            if found := {file: name for file, name in sorted(names.items()) if f"{os.sep}." not in f"{os.sep}{name}"}:
                return found
        raise FileNotFoundError(
            f"{printable(path)}: holds neither {', '.join(METADATA_NAMES)} nor files that are read "
            f"({', '.join(KINDS)})."
        )
    if path.is_file():
        return {str(path): path.name}
    files = sorted(file for file in glob.glob(source, recursive=True) if os.path.isfile(file))
    if not files:
        raise FileNotFoundError(
            f"{printable(path)}: no such file or folder, and no data set's name on the Hub (owner/name)."
        )
    start = os.path.dirname(re.split(r"[*?\[]", source, maxsplit=1)[0])
    return {file: os.path.relpath(file, start or ".") for file in files}


def kind_of(files: Sequence[str]) -> str:
    """The one kind of the files of a data set: `"csv"`, `"json"`, `"parquet"` or `"webdataset"`."""
    extensions = {os.path.splitext(file)[1].lower() for file in files}
    if unknown := sorted(extensions - KINDS.keys()):
        raise ValueError(f"{printable(files[0])}: {unknown[0] or 'no extension'} is not one of {', '.join(KINDS)}.")
    kinds = sorted({KINDS[extension] for extension in extensions})
    if len(kinds) > 1:
        raise ValueError(
            f"{printable(files[0])}: the files of one data set must be of one kind, got {' and '.join(kinds)}."
        )
    return kinds[0]
