"""The tables of docs/neighbours.md: each part that works names how and a test; each of the 52 systems has a row."""

import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import lotlip_hf
from lotlip_hf import cli
from lotlip_hf.training.config import parse_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
# The 48 systems that have a paper on arXiv; the others are three surveys and a thesis.
PAPERS = """
2109.01134 2112.01518 2205.00823 2211.08769 2211.13854 2212.08653 2304.03464 2305.16349 2305.20088 2308.12045
2309.16671 2310.07699 2310.11628 2312.00674 2403.05135 2403.15378 2403.17064 2404.01889 2405.07883 2406.07844
2406.09188 2407.14439 2408.00441 2408.00744 2408.05706 2408.15914 2409.01179 2409.01936 2409.12011 2410.02746
2411.04997 2411.19346 2412.04429 2412.09169 2412.11556 2412.17741 2412.18404 2412.18645 2503.20826 2504.01137
2504.17432 2505.21549 2505.24517 2506.04344 2507.22431 2509.09118 2510.10224 2510.18795
""".split()
OTHERS = ("three surveys of text embeddings", "a thesis on text vectors")
Row = dict[str, str]


@cache
def rows() -> list[Row]:
    """The rows of the tables of methods, by heading. A row without a method is one of the method above."""
    found: list[Row] = []
    headings: list[str] = []
    for line in (REPOSITORY / "docs" / "neighbours.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            headings = []
        elif not headings:
            headings = cells
        elif set(cells) != {"---"} and "method" in headings:
            row = dict(zip(headings, cells, strict=True))
            row["method"] = row["method"] or found[-1]["method"]
            found.append(row)
    return found


WORKING = [row for row in rows() if "how" in row]
ABSENT = [row for row in rows() if "how" not in row]


def paper(row: Row) -> str:
    """The arXiv number of a row's method, or its name."""
    number = re.search(r"arxiv\.org/abs/(\d{4}\.\d{5})", row["method"])
    return row["method"] if number is None else number[1]


def test_each_system_has_a_row() -> None:
    working, absent = ({paper(row) for row in part} for part in (WORKING, ABSENT))
    assert len(PAPERS) + 4 == 52
    assert {*PAPERS, *OTHERS} <= working | absent
    assert not working & absent


def test_a_system_without_a_working_part_has_a_reason() -> None:
    assert len(ABSENT) == len({paper(row) for row in ABSENT})
    for row in ABSENT:
        assert len(row["why not"].split()) > 2, row["method"]


@pytest.mark.parametrize("row", WORKING, ids=lambda row: paper(row))
def test_how_names_what_exists(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    for name in ("tags.txt", "classes.txt"):
        (tmp_path / name).write_text("cat\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"`(.*?)`", row["how"])[0]
    if code.startswith("lotlip_hf."):
        value = lotlip_hf
        for name in code.split(".")[1:]:
            value = getattr(value, name, None) or importlib.import_module(f"{value.__name__}.{name}")
    elif code.startswith(("lotlip train", "--")):
        words = shlex.split(code.removeprefix("lotlip train"))
        parse_arguments(words if "--data" in words else [*words, "--model", "checkpoint", "--data", "pictures"])
    else:
        program, command, *words = shlex.split(code)
        name = f"{command} {words.pop(0)}" if command == "convert" else command
        assert program == "lotlip"
        cli.parsers()[name].parse_args(words)


@pytest.mark.parametrize("row", WORKING, ids=lambda row: paper(row))
def test_its_test_exists(row: Row) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row["test"])
    assert named
    for file, name in named:
        assert re.search(rf"^def {name}\(", (REPOSITORY / file).read_text(encoding="utf-8"), flags=re.MULTILINE), name
