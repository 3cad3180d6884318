"""Plots: what can be written is found out beforehand, and is written."""

import re
import sys
from pathlib import Path

import pytest

from lotlip_hf.plots import check_plot, figure, save, wrapped


@pytest.mark.parametrize("kind", ["PNG", "jpg", "svg", "pdf"])
def test_what_passes_is_written(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.b.{kind}"
    check_plot(file)
    assert not file.exists()
    picture = figure(2, 1)
    picture.subplots().plot([1, 2])
    save(picture, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    signs = {"PNG": b"\x89PNG", "jpg": b"\xff\xd8", "svg": b"<?xml", "pdf": b"%PDF"}
    assert file.read_bytes().startswith(signs[kind])


@pytest.mark.parametrize("name", ["plot.bmp", "plot", "plot.raw", ".png"])
def test_kinds_that_are_not_written(tmp_path: Path, name: str) -> None:
    for call in (lambda: check_plot(tmp_path / name), lambda: save(figure(1, 1), tmp_path / name)):
        with pytest.raises(ValueError, match=re.escape(name)):
            call()
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (lambda: check_plot(tmp_path / "plot.png"), lambda: figure(1, 1)):
        with pytest.raises(ImportError, match="evaluation"):
            call()


def test_long_lines() -> None:
    assert wrapped("one two", 10) == "one two"
    assert wrapped("one two-three", 9) == "one\ntwo-three"
    assert wrapped(20 * "a", 8) == "aaaaaaaa\naaaaaaaa\naaaa"
    assert wrapped("", 8) == ""
