"""The docs site builds without a warning, and has an entry for each page, command, option and public name."""

import argparse
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import lotlip_hf
from lotlip_hf.cli import parsers

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^\t\$\(BIN\)/python (-m sphinx .*)$", makefile, flags=re.MULTILINE)
    assert found is not None
    arguments = (
        found[1].replace("build/doctrees", f"{folder}/doctrees").replace("build/docs", f"{folder}/html").split()
    )
    assert "-W" in arguments
    built = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    return folder / "html"


@pytest.fixture(scope="module")
def entries(site: Path) -> set[tuple[str, str]]:
    """The role and the name of each entry of the site's inventory."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return set(re.findall(r"^(.+?) (\S+:\S+) -?\d+ ", zlib.decompress(packed).decode(), flags=re.MULTILINE))


def test_every_page_is_in_the_contents(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    pages = {file.stem for file in (REPOSITORY / "docs").glob("*.md")} - {"index"}
    assert {"start", "search-images", "train", "contributing", "changelog"} <= pages
    for page in [*pages, "api/index", "commands/index"]:
        assert (site / f"{page}.html").is_file(), page
        assert f'href="{page}.html"' in home, page


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for file in site.rglob("*.html"):
        loaded = re.findall(r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(https?:)?//""", file.read_text())
        assert not loaded, file.name


def test_every_option_is_on_the_page_of_its_command(site: Path, entries: set[tuple[str, str]]) -> None:
    commands = parsers()
    assert {"search", "train", "convert clip"} <= commands.keys()
    for name, parser in commands.items():
        assert (site / "commands" / f"{name.replace(' ', '-')}.html").is_file()
        options = [action for action in parser._actions if action.help != argparse.SUPPRESS]
        for option in (word for action in options for word in action.option_strings):
            assert (f"lotlip-{name.replace(' ', '-')}.{option}", "std:cmdoption") in entries, f"{name} {option}"


def test_every_public_name_has_an_entry(entries: set[tuple[str, str]]) -> None:
    documented = {name for name, role in entries if role.startswith("py:")}
    assert {f"lotlip_hf.{name}" for name in lotlip_hf.__all__} <= documented
