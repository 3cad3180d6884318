"""`examples/quickstart.py`, run as it is."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import lotlip_hf.search


@pytest.fixture
def quickstart(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", repository / "examples" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every image that is embedded from here on."""
    paths = []
    iterate = lotlip_hf.search.iterate_image_embeddings

    def counting(model: object, processor: object, images: list[Path], **options: object) -> object:
        paths.extend(images)
        return iterate(model, processor, images, **options)

    monkeypatch.setattr(lotlip_hf.search, "iterate_image_embeddings", counting)
    return paths


def ranked(output: str) -> list[list[str]]:
    """The files of each ranked table of an output, in order."""
    tables = output.split("$ lotlip search ")[1:3]
    return [re.findall(r"^ *\d+ +-?\d\.\d+ +(\S+)$", table, flags=re.MULTILINE) for table in tables]


def test_it_ranks_photographs_and_embeds_each_once(
    quickstart: ModuleType, embedded: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quickstart"
    assert quickstart.main(["--output", str(output)]) == 0
    photographs = [output / "images" / name for name in quickstart.PHOTOGRAPHS]
    assert sorted(embedded) == sorted(photographs)
    tables = ranked(capsys.readouterr().out)
    assert len(tables) == 2
    for table in tables:
        assert len(set(table)) == 5
        assert set(map(Path, table)) <= set(photographs)
    with Image.open(output / "ranked.png") as picture:
        assert min(picture.size) > 200

    # Again, as `make quickstart` does in a process of its own: the same ranking, out of the index that is there.
    before = quickstart.index_files(output / "images")
    again = subprocess.run(
        [sys.executable, quickstart.__file__, "--output", str(output)], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert ranked(again.stdout) == tables
    assert quickstart.index_files(output / "images") == before


def test_it_fails_when_the_second_search_embeds_again(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = quickstart.run

    def forgetful(*arguments: object) -> None:
        if arguments[-1] == quickstart.SECOND_DESCRIPTION:
            (tmp_path / "images" / "moon.png").touch()
        run(*arguments)

    monkeypatch.setattr(quickstart, "run", forgetful)
    assert quickstart.main(["--output", str(tmp_path)]) == 1
    assert "embedded photographs again" in capsys.readouterr().err


def test_it_says_when_scikit_image_is_missing(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install scikit-image"):
        quickstart.main(["--output", str(tmp_path)])
