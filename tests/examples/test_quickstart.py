"""`examples/quickstart.py`: what it makes, and that what it learns is in the captions."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModel

from lotlip_hf import LoTLIPModel
from lotlip_hf.training.log import read_log
from scripts import load_script

pytestmark = pytest.mark.slow


STEPS = ["--max-steps", "60"]  # of 700


@pytest.mark.timeout(1500)
def test_it_learns_measures_and_searches_and_stays_at_chance_when_captions_are_shuffled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart, output = load_script("examples/quickstart.py"), tmp_path / "quickstart"
    assert quickstart.main(["--output", str(output), "--shuffle-captions", *STEPS]) == 0
    results = json.loads((output / "results.json").read_text())
    # chance is one hit in 500; eight or more by chance are one run in 100,000
    assert all(value < 8 / 500 for name, value in results.items() if name.endswith("_r1"))
    # ten hits in 500; 30 or more are one run in a million
    assert results["long_image_to_text_r10"] < 0.06
    assert results["long_text_to_image_r10"] < 0.06

    # what an earlier one left is no hindrance
    assert quickstart.main(["--output", str(output), *STEPS]) == 0
    printed = capsys.readouterr().out
    assert isinstance(AutoModel.from_pretrained(output / "run" / "checkpoint-60"), LoTLIPModel)
    results = json.loads((output / "results.json").read_text())
    assert results["long_image_to_text_r10"] >= 0.1  # 0.19 here; the whole run's R@1 is 0.6
    assert results["long_text_to_image_r10"] >= 0.1
    (evaluation,) = [entry for entry in read_log(output / "run") if "long_image_to_text_r10" in entry]
    assert evaluation["long_image_to_text_r10"] >= 0.1
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
