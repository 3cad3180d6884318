"""Finds the files of a data set from folders, patterns and splits."""

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
# Words in the names of files and folders that denote a split, as in `datasets`.
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
    The files belong to several splits, or not to the requested one.

    Args:
        problem (`str`): What is wrong.
        splits (`Sequence[str]`): The existing splits.
        option (`str`, *optional*, defaults to `"split"`): Name of the option that selects the split.
    """

    def __init__(self, problem: str, splits: Sequence[str], option: str = "split") -> None:
        self.problem, self.splits = problem, splits
        flag = f"--{option.replace('_', '-')}"
        advice = (
            f"Choose one, for example `{flag} {splits[0]}`, or `{flag} {ALL_SPLITS}`."
            if splits
            else "Remove the option."
        )
        super().__init__(f"`{option}`: {problem}. {advice}")


def is_hub_name(source: object) -> bool:
    """Returns whether a source has the form of a Hub id (`owner/name`) and is not an existing file or folder."""
    if not isinstance(source, str) or os.path.exists(source) or not HUB_NAME.fullmatch(source):
        return False
    return os.path.splitext(source)[1].lower() not in KINDS  # "pictures/metadata.jsonl" is a file, not a Hub id


def find_files(source: str | os.PathLike | Sequence[str | os.PathLike], split: str | None = None) -> list[str]:
    """
    Finds the files of a data set.

    Args:
        source (`str` or `os.PathLike` or `Sequence`): Folders, files and patterns, as in [`load_records`].
        split (`str`, *optional*): The split, as in [`load_records`].

    Returns:
        `list[str]`: The files. The files of each folder and pattern are sorted by name.

    Raises:
        `FileNotFoundError`: If there are no files.
        `SplitError`: If the files belong to several splits, or not to the requested one.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    found: dict[str, str] = {}  # file -> its path relative to the source
    splits: dict[str, None] = {}
    for pattern in itertools.chain.from_iterable(map(_expanded, sources)):
        files = _find(pattern)
        own = dict.fromkeys(filter(None, map(_split_of, files.values())))
        if split is None and len({SPLIT_WORDS[word] for word in own}) > 1:
            raise SplitError(f"{printable(pattern)} has the splits {', '.join(sorted(own))}", sorted(own))
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
    if not chosen and (splits or wanted != "train"):  # files without a split in their names are the split "train"
        existing = f"only {', '.join(sorted(splits))}" if splits else "and its file names contain no split"
        raise SplitError(f"{printable(source)} has no split {split!r}, {existing}", sorted(splits))
    return chosen or list(found)


def _split_of(name: str) -> str | None:
    """Returns the first word in a path that denotes a split."""
    for part in os.path.splitext(name)[0].split(os.sep):
        if match := SPLIT_WORD.search(part):
            return match[1].lower()
    return None


def _expanded(source: str | os.PathLike) -> Iterator[str]:
    """Expands the braces of a pattern as a shell does: `{00..10}`, `{a,b}`."""
    pattern = os.fspath(source)
    match = next((match for match in BRACES.finditer(pattern) if "," in match[1] or RANGE.fullmatch(match[1])), None)
    if match is None or os.path.exists(pattern):
        yield pattern
        return
    parts: Iterable[str] = match[1].split(",")
    if numbers := RANGE.fullmatch(match[1]):
        first, last, step = int(numbers[1]), int(numbers[2]), max(1, int(numbers[3] or 1))
        is_padded = any(len(bound) > 1 and bound.startswith("0") for bound in (numbers[1], numbers[2]))
        width = max(len(numbers[1]), len(numbers[2])) if is_padded else 0
        steps = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        parts = (f"{number:0{width}}" for number in steps)
    for part in parts:
        yield from _expanded(pattern[: match.start()] + part + pattern[match.end() :])


def _find(source: str) -> dict[str, str]:
    """Returns the files of a folder or pattern, sorted by name, with their paths relative to it."""
    path = Path(source)
    if path.is_dir():
        for name in METADATA_NAMES:
            if (path / name).is_file():
                return {str(path / name): name}
        for extensions in ((".tar",), (".parquet",), (".jsonl", ".jsonlines"), (".json",), (".csv", ".tsv")):
            files = (file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file())
            names = {str(file): str(file.relative_to(path)) for file in files}
            # Skip hidden files, such as the index of `lotlip search`.
            if found := {file: name for file, name in sorted(names.items()) if f"{os.sep}." not in f"{os.sep}{name}"}:
                return found
        raise FileNotFoundError(
            f"{printable(path)} has no {', '.join(METADATA_NAMES)} and no other data files ({', '.join(KINDS)})."
        )
    if path.is_file():
        return {str(path): path.name}
    files = sorted(file for file in glob.glob(source, recursive=True) if os.path.isfile(file))
    if not files:
        raise FileNotFoundError(
            f"{printable(path)} does not exist, matches no file, and is not a Hub id (owner/name)."
        )
    start = os.path.dirname(re.split(r"[*?\[]", source, maxsplit=1)[0])
    return {file: os.path.relpath(file, start or ".") for file in files}


def kind_of(files: Sequence[str]) -> str:
    """Returns the kind of all files: `"csv"`, `"json"`, `"parquet"` or `"webdataset"`. Raises an error for several."""
    extensions = {os.path.splitext(file)[1].lower() for file in files}
    if unknown := sorted(extensions - KINDS.keys()):
        raise ValueError(
            f"{printable(files[0])}: the extension {unknown[0]!r} is not supported. Use one of {', '.join(KINDS)}."
        )
    kinds = sorted({KINDS[extension] for extension in extensions})
    if len(kinds) > 1:
        raise ValueError(f"{printable(files[0])}: all files must be of one kind, got {' and '.join(kinds)}.")
    return kinds[0]
