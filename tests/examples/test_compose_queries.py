"""`examples/compose_queries.py`, run as it is: the file of triplets on a tiny CLIP, and Scenes on a trained model."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tiny_clip
from lotlip_hf import load_encoder
from lotlip_hf.cli import main as lotlip
from lotlip_hf.compose import load_composer
from scripts import load_script


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script("examples/compose_queries.py")


def test_triplets_of_a_file_train_a_checkpoint(
    example: ModuleType, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tiny_clip.save_clip(tmp_path / "clip")
    data = tmp_path / "triplets.jsonl"
    rows = [
        {"reference": f"a {one} and a {two}", "change": f"is red {number}", "target": f"a red {one} and the {two}"}
        for number in range(4)
        for one, two in (("cat", "house"), ("dog", "car"), ("car", "cat"))
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", tmp_path / "clip", "--data", data, "--output", tmp_path / "composed", "--device", "cpu"]
    flags += ["--held-out", 4, "--batch-size", 4, "--composer-steps", 3, "--steps", 2, "--learning-rate", "1e-3"]
    report = example.main([*map(str, flags)])
    assert set(report["after"]) - set(report["before"]) == {"composed"}
    log = json.loads((tmp_path / "composed" / "compose.json").read_text())
    assert [len(losses) for losses in log["losses"].values()] == [3, 2]
    encoder = load_encoder(tmp_path / "composed", device="cpu")
    assert load_composer(tmp_path / "composed", encoder) is not None
    trained, weights = encoder.engine.model.state_dict(), clip.state_dict()
    for name, weight in weights.items():
        is_trained = name.startswith(("text_model.", "text_projection.")) and not name.endswith("position_ids")
        assert torch.equal(weight, trained[name]) != is_trained, name
    words = ["--model", tmp_path / "composed", "--images", photos, "--image", photos / "a.png", "is red"]
    assert lotlip(["search", *map(str, words)]) == 0
    with pytest.raises(SystemExit, match="exists"):
        example.main([*map(str, flags)])
    data.write_text(json.dumps(rows[0]) + '\n{"reference": "a cat"}\n')
    with pytest.raises(SystemExit, match="line 2.*change"):
        example.main([*map(str, [*flags, "--output", tmp_path / "other"])])


@pytest.mark.slow
def test_composed_queries_find_changed_scenes(example: ModuleType, trained_on_scenes: Path, tmp_path: Path) -> None:
    flags = ["--model", trained_on_scenes, "--data", "scenes", "--output", tmp_path / "composed", "--device", "cpu"]
    flags += ["--num-scenes", 200, "--held-out", 40, "--batch-size", 64]
    flags += ["--composer-steps", 250, "--steps", 120, "--learning-rate", "1e-4"]
    report = example.main([*map(str, flags)])
    before, after = report["before"], report["after"]
    alone = max(before[name] for name in ("image", "change"))
    assert after["composed"] > alone + 0.1
    assert after["composed"] > before["sum of image and change"]
    assert after["whole description"] > before["whole description"] - 0.05
