"""`examples/relabel_then_train.py`: what it makes of few pictures, and what its parts say."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from lotlip_hf import LoTLIPModel
from lotlip_hf.data.records import load_records
from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.scenes.dataset import render, scene, short_caption
from lotlip_hf.training.log import read_log
from scripts import load_script

pytestmark = pytest.mark.slow
NUM_PICTURES = 12


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own for `datasets`, and none of accelerate's state for the next test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script("examples/relabel_then_train.py")


def test_descriptions_are_true_and_name_everything(example: ModuleType) -> None:
    scenes = [scene(index) for index in range(6)]
    descriptions = [example.description(one, 0) for one in scenes]
    for one, text in zip(scenes, descriptions, strict=True):
        sentences = split_sentences(text)
        assert len(sentences) == len(one.objects) + 1
        for item in one.objects:
            assert sum(f" {item.colour} {item.shape}" in sentence for sentence in sentences) >= 1
        assert one.background in sentences[-1]
        assert example.description(one, 0) == text
    assert example.true_share(scenes, descriptions) == 1
    # a description of another picture is not true, but for a background that both have
    others = [*descriptions[1:], descriptions[0]]
    assert example.true_share(scenes, others) < 0.2
    half = [f"{text} {other}" for text, other in zip(descriptions, others, strict=True)]
    assert 0.4 < example.true_share(scenes, half) < 0.6
    assert any(example.description(one, 1) != text for one, text in zip(scenes, descriptions, strict=True))


def test_the_captioner_learns_and_is_saved_as_it_was_trained(example: ModuleType, tmp_path: Path) -> None:
    scenes = [scene(index, seed=1) for index in range(8)]
    first = example.train_captioner(scenes, tmp_path / "first", num_steps=1)
    last = example.train_captioner(scenes, tmp_path / "last", num_steps=25)
    assert first > 4  # more than e^4 words seem as likely
    assert last < first - 0.5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "last")
    processor = AutoProcessor.from_pretrained(tmp_path / "last")
    chat = [{"role": "user", "content": [{"type": "image", "image": render(scenes[0])}]}]
    inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")
    # the beginning that it was trained on
    assert inputs["input_ids"].tolist() == [processor.tokenizer([example.PROMPT]).input_ids[0]]
    text = example.description(scenes[0], 0)
    tokens = processor.tokenizer([example.PROMPT + text + example.END], return_tensors="pt").input_ids
    assert processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == text
    assert processor.tokenizer.unk_token_id not in tokens
    with torch.no_grad():
        logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
    start = inputs["input_ids"].shape[1]
    loss = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1], tokens[0, start:])
    assert float(loss) < first - 0.5


def test_it_relabels_trains_and_compares(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "NUM_HELD_OUT", 20)
    monkeypatch.setattr(example, "NUM_DRAWS", 2)
    output = tmp_path / "output"
    sizes = f"--num-scenes {NUM_PICTURES} --num-described 8 --captioner-steps 2 --train-steps 2"
    for _ in range(2):  # what an earlier one left is no hindrance
        assert example.main(["--output", str(output), *sizes.split()]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    printed = capsys.readouterr().out

    records = list(load_records(output / "data"))
    assert [record["id"] for record in records] == [scene(index).id for index in range(NUM_PICTURES)]
    assert [record["short_caption"] for record in records] == [
        short_caption(scene(index)) for index in range(NUM_PICTURES)
    ]
    assert all(len(record["long_captions"]) == 1 for record in records)
    assert (output / "data" / "README.md").exists()
    assert records[0]["short_caption"] in printed
    assert records[0]["long_captions"][0] in printed

    results = json.loads((output / "results.json").read_text())
    assert 0 <= results.pop("captioner")["true_share"] <= 1
    assert list(results) == ["short and new long captions", "short captions alone"]
    for folder, (name, values) in zip(("run-long", "run-short"), results.items(), strict=True):
        assert isinstance(AutoModel.from_pretrained(output / folder / "checkpoint-2"), LoTLIPModel)
        last = read_log(output / folder)[-1]
        shown = re.findall(rf"{name} +([\d.]+)% +([\d.]+)%", printed)[-1]
        for number, direction in zip(shown, ("image_to_text_r1", "text_to_image_r1"), strict=True):
            assert values[direction] == last[f"long_{direction}"]
            assert 0 <= values[direction] <= 1
            assert float(number) == pytest.approx(100 * values[direction], abs=0.051)
    losses = {folder: read_log(output / folder)[0] for folder in ("run-long", "run-short")}
    assert losses["run-long"]["loss_infonce_long"] > 0
    assert not losses["run-short"].get("loss_infonce_long")
    assert all(math.isfinite(line["loss"]) for line in losses.values())
