"""Options: what a value becomes, which are refused, and what flags and a file of options say together."""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lotlip_hf.options import Parser, add_options, build, check, make_parser, option, options_of, parse


@dataclass
class Options:
    name: str = option("its name")
    count: int = option("how many", 2, at_least=1)
    share: float | None = option("of all", None, at_least=0, below=1)
    precision: Literal["no", "half"] = option("of numbers", "no")
    fast: bool = option("whether to hurry", False)
    sizes: list[int] = option("of each", at_least=1, default_factory=list)
    clean: bool | None = option("whether to clean", None)
    more: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)


def read(*argv: object) -> Options:
    parser = Parser()
    add_options(parser, Options)
    return build(Options, options_of(parser.parse_args([str(one) for one in argv]), Options))


def test_flags_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("name: 7\nshare: 1e-3\nprecision: no\nfast: true\nsizes: 3\nmore: {a: 1}\nclean: null\n")
    assert read("--config", file) == Options("7", 2, 0.001, "no", True, [3], None, {"a": 1.0})
    given = read("--config", file, "--name=a_b", "--fast", "no", "--sizes", 1, 2, "--no-clean")
    assert (given.name, given.fast, given.sizes, given.clean) == ("a_b", False, [1, 2], False)
    file.write_text("")
    assert read("--config", file, "--name", tmp_path) == Options(tmp_path)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--name"),
        (["--name"], "--name"),
        (["--name=a", "b"], "'b'"),
        (["--name=a", "--cuont=3"], "Did you mean --count"),
        (["--name=a", "--count=0"], "count"),
        (["--name=a", "--count=2.0"], "count"),
        (["--name=a", "--count=1e3"], "count"),
        (["--name=a", "--share=1"], "share"),
        (["--name=a", "--share=nan"], "share"),
        (["--name=a", "--precision=full"], "no, half"),
        (["--name=a", "--fast=perhaps"], "fast"),
        (["--name=a", "--sizes", "1", "0"], "sizes"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], word: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=word) as caught:
        read(*flags)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nmae: a", "Did you mean name"),
        ("1: a", "option 1"),
        ("name: [a, b]", "name"),
        ("name: {a: b}", "name"),
        ("count: many", "count"),
        ("count: 2.5", "count"),
        ("count: true", "count"),
        ("count: null", "count"),
        ("fast: 3", "fast"),
        ("more: 3", "more"),
        ("more: {a: b}", r"more\.a"),
        ("sizes: {a: secret}", "sizes.*colon"),
        ("- name", "list"),
        ("name: [", "not a YAML file"),
        ("[" * 10_000, "not a YAML file"),
        ("endpoint: http://me:secret@host\n: : :", "not a YAML file"),
    ],
)
def test_a_wrong_file_is_named(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"options.yaml: .*{word}") as caught:
        read("--config", tmp_path / "options.yaml")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [10**400, "9" * 400, float("inf"), [], object()])
def test_what_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="share"):
        Options("a", share=value)


def test_help_says_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    shown = capsys.readouterr().out
    for word in ("its name (required)", "how many (default: 2)", "{no,half}", "--no-clean"):
        assert re.search(re.escape(word), shown)


def test_help_has_groups_and_a_short_usage() -> None:
    @dataclass(kw_only=True)
    class Base:
        model: str = option("its model", group="Model")

    @dataclass(kw_only=True)
    class Derived(Base):
        device: str | None = option("its device", None, group="Model")
        texts: list[str] = option("its texts", group="Input", metavar="TEXT", positional=True)
        fast: bool = option("whether to hurry", False)

    shown = make_parser(Derived, prog="x").format_help()
    assert shown.splitlines()[0] == "Usage: x [options] TEXT ..."
    assert re.findall(r"^\S.*:$", shown, re.MULTILINE) == ["Model:", "Input:", "General:"]
    flags = re.findall(r"^  (\S.*?)  ", shown, re.MULTILINE)
    assert flags == ["--model NAME", "--device NAME", "TEXT ...", "--fast", "-h, --help"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--name x", (None, [])),
        ("text --name x", ("text", [])),
        ("--files a b --name x text", ("text", ["a", "b"])),
        ("text --files a b", ("text", ["a", "b"])),
    ],
)
def test_a_positional_argument_with_a_default_may_be_left_out(words: str, expected: tuple[str, list[str]]) -> None:
    @dataclass(kw_only=True)
    class Optional:
        text: str | None = option("its text", None, metavar="TEXT", positional=True)
        name: str = option("its name", "x")
        files: list[str] = option("its files", default_factory=list)

    found = parse(Optional, words.split(), make_parser(Optional, prog="x"))
    assert (found.text, found.files) == expected


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_is_as_wide_as_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = Parser(prog="x", description="word " * 100 + "\n\n  x --indented " + "line " * 30)
    add_options(parser, Options)
    lines = parser.format_help().splitlines()
    (indented,) = [line for line in lines if "--indented" in line]
    assert indented.endswith("line line ")
    assert columns - 8 < max(len(line) for line in lines if line != indented) < columns


@pytest.mark.parametrize("argv", [[], ["--help"], ["train", "--help"], ["relabel", "--help"], ["search", "--help"]])
def test_nothing_large_is_imported(argv: list[str]) -> None:
    command = str(Path(sys.executable).with_name("lotlip"))
    code = f"""
import atexit, sys
atexit.register(lambda: print({{"torch", "transformers", "datasets"}} & {{*sys.modules}}))
sys.argv = [{command!r}]
import lotlip_hf.cli
lotlip_hf.cli.main({argv!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n")
