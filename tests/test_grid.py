"""The picture of ranked images."""

import os
from pathlib import Path

import pytest
from PIL import Image

from lotlip_hf.grid import save_grid
from lotlip_hf.search import SearchResult


@pytest.mark.slow
def test_the_grid_shows_every_result(tmp_path: Path) -> None:
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "orange"]
    results = []
    for number, colour in enumerate(colours):
        name = "a very long name " * 8 if number == 1 else str(number)
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (1, 500) if number == 2 else (40, 30), colour).save(path)
        results.append(SearchResult(path, 0.5 - number / 10))
    results.append(SearchResult(tmp_path / "gone.png", -0.5))
    long_text = "A long description with 猫 and é. " * 60
    for count in (1, 4, 8):
        output = tmp_path / f"grid{count}.png"
        save_grid(results[:count], output, long_text)
        with Image.open(output) as grid:
            shown = {colour for _, colour in grid.convert("RGB").getcolors(1 << 24) or []}
            assert grid.width < 2000
        assert {(255, 0, 0)} <= shown
        assert ((255, 165, 0) in shown) == (count == 8)


def test_the_grid_shows_transparent_pictures_on_the_background(tmp_path: Path) -> None:
    clip_art = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clip_art.paste((255, 0, 0, 255), (10, 10, 30, 30))
    clip_art.save(tmp_path / "art.png")
    for background, shown in (("white", (255, 255, 255)), ("#00ff00", (0, 255, 0)), (None, (0, 0, 0))):
        save_grid([SearchResult(tmp_path / "art.png", 0.5)], tmp_path / "grid.png", "", background)
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.getpixel((60, 60)) == shown


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    result = SearchResult(tmp_path / "a.png", 0.5)
    with pytest.raises(ValueError, match="results"):
        save_grid([], tmp_path / "grid.png", "text")
    for name in ("grid", "grid.xyz", "grid.psd"):
        with pytest.raises(ValueError, match=name):
            save_grid([result], tmp_path / name, "text")
    with pytest.raises(NotADirectoryError, match="missing"):
        save_grid([result], tmp_path / "missing" / "grid.png", "text")


@pytest.mark.parametrize("name", [b"two\nlines.png", b"no text \xff.png"])
def test_the_grid_takes_any_file_name(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    Image.new("RGB", (24, 20), "red").save(path)
    save_grid([SearchResult(path, 0.5)], tmp_path / "grid.png", "a description")
    assert Image.open(tmp_path / "grid.png").height > 300
