"""`examples/finetune_for_retrieval.py`, run as it is: on a tiny checkpoint, and on one that knows Scenes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption
from lotlip_hf.scenes.small import small_model
from lotlip_hf.training.checkpoint import list_checkpoints
from scripts import load_script

pytestmark = pytest.mark.usefixtures("alone")


def write_records(folder: Path, number: int) -> Path:
    """The class of a scene is the colour and shape of its large object."""
    folder.mkdir()
    rows = []
    for index in range(number):
        one = scene(index, split="validation")
        render(one).save(folder / f"{index}.png")
        captions = {"short_caption": short_caption(one), "long_captions": long_captions(one)}
        group = f"{one.objects[0].colour} {one.objects[0].shape}"
        rows.append({"file_name": f"{index}.png", **captions, "group": group})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("method", ["2sft", "mcip"])
def test_the_stages(method: str, tmp_path: Path) -> None:
    """The first stage of 2SFT leaves the text tower as it is, the second one the image tower."""
    for part in small_model(hidden_size=32, num_hidden_layers=1):
        part.save_pretrained(tmp_path / "checkpoint")
    data, output = write_records(tmp_path / "pictures", 60), tmp_path / "finetuned"
    argv = ["--model", str(tmp_path / "checkpoint"), "--data", str(data), "--output", str(output), "--method", method]
    report = load_script("examples/finetune_for_retrieval.py").main([*argv, "--batch-size", "16", "--num-epochs", "1"])
    assert json.loads((output / "report.json").read_text()) == report
    stages = [*report][1:]
    assert stages == {"2sft": ["images", "texts"], "mcip": ["both"]}[method]
    folders = [tmp_path / "checkpoint", *(list_checkpoints(output / stage)[-1] for stage in stages)]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for number, stage in enumerate(stages, 1):
        changed = {name for name, value in weights[number].items() if not value.equal(weights[number - 1][name])}
        towers = {"vision": "images", "text": "texts"}
        for tower, own in towers.items():
            assert any(name.startswith(f"{tower}_model") for name in changed) == (stage in (own, "both"))
