"""`examples/quickstart.py`: what it makes, and that what it learns is in the captions."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from transformers import AutoModel

from lotlip_hf import LoTLIPModel
from lotlip_hf.training.log import read_log
from scripts import load_script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load_script("examples/quickstart.py")


def test_it_trains_measures_and_searches(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "quickstart"
    for _ in range(2):  # what an earlier one left is no hindrance
        assert quickstart.main(["--output", str(output), "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out

    assert isinstance(AutoModel.from_pretrained(output / "run" / "checkpoint-2"), LoTLIPModel)
    results = json.loads((output / "results.json").read_text())
    for kind in ("long", "short"):
        shown = re.findall(rf"{kind} +captions +([\d.]+)% +([\d.]+)%", printed)[-1]
        for number, direction in zip(shown, ("image_to_text", "text_to_image"), strict=True):
            assert float(number) == pytest.approx(100 * results[f"{kind}_{direction}_r1"], abs=0.051)
    ranked = re.findall(r"^ *\d+ +-?\d\.\d+ +(\S+)$", printed.split("$ lotlip search ")[-1], flags=re.MULTILINE)
    assert len(ranked) == 5
    assert {Path(path).parent for path in ranked} == {output / "images"}
    assert len(list((output / "images").glob("*.png"))) == quickstart.NUM_HELD_OUT
    for picture in (output / "ranked.png", output / "run" / "curve.png"):
        assert str(picture) in printed
        with Image.open(picture) as image:
            assert min(image.size) > 200


@pytest.mark.timeout(1500)
def test_it_learns_what_long_captions_say(quickstart: ModuleType, tmp_path: Path) -> None:
    assert quickstart.main(["--output", str(tmp_path), "--max-steps", "150"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["long_image_to_text_r1"] >= 0.1  # the whole run's 0.6 take four times as long; chance is 0.002
    assert results["long_text_to_image_r1"] >= 0.1
    evaluations = [entry for entry in read_log(tmp_path / "run") if "long_image_to_text_r1" in entry]
    assert len(evaluations) == 2


@pytest.mark.timeout(1500)
def test_it_stays_at_chance_when_captions_are_shuffled(quickstart: ModuleType, tmp_path: Path) -> None:
    assert quickstart.main(["--output", str(tmp_path), "--shuffle-captions", "--max-steps", "60"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    # chance is one hit in 500; eight or more by chance are one run in 100,000; with captions in order it is 5 % here
    assert all(value < 8 / 500 for name, value in results.items() if name.endswith("_r1"))
