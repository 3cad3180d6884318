"""`benchmarks/ablation.py`: trains what is missing and nothing twice, and reports what there is."""

import json
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

import tiny
from lotlip_hf import LoTLIPModel
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.loop import NonFiniteLossError
from scripts import load_script

SMALL = "--steps 2 --num-scenes 16 --batch-size 8 --eval-samples 12".split()


@pytest.fixture
def ablation() -> ModuleType:
    return load_script("benchmarks/ablation.py")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results" / "ablation.jsonl"


class FakeRun:
    """Stands for the training: notes what it is asked for, and answers recalls that follow from setting and seed."""

    def __init__(self, ablation: ModuleType, long: dict[str, float] | None = None, stop_after: int | None = None):
        self.ablation, self.long, self.stop_after = ablation, long or {}, stop_after
        self.done: list[tuple[str, int]] = []

    def name(self, options: dict[str, Any]) -> str:
        """The first setting with these options, whatever the steps."""
        settings = [setting for group in self.ablation.GROUPS.values() for setting in group]
        varied = {option for setting in settings for option in setting.changes}
        wanted = {option: options[option] for option in varied}
        return next(one.name for one in settings if wanted.items() <= {**self.ablation.BASE, **one.changes}.items())

    def __call__(self, options: dict[str, Any]) -> dict[str, float]:
        if len(self.done) == self.stop_after:
            raise KeyboardInterrupt
        name = self.name(options)
        self.done.append((name, options["seed"]))
        long = self.long.get(name, 0.4) + 0.01 * options["seed"]
        if long < 0:
            raise NonFiniteLossError("Step 3: the loss is nan.")
        recalls = {recall: long if recall.startswith("long") else 0.2 for recall in self.ablation.RECALLS}
        return {**recalls, "long_cut": 0.125}


@pytest.mark.slow
def test_a_study_and_another_look(ablation, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = [*SMALL, "--only", "short", "mask-off", "--seeds", "0", "--results", str(results)]
    assert ablation.main(arguments) == 0
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert [entry["setting"] for entry in entries] == ["short", "mask-off"]
    assert [entry["options"]["corner_mask"] for entry in entries] == [True, False]
    for entry in entries:
        assert set(ablation.RECALLS) < entry["results"].keys()
        assert all(0 <= value <= 1 for value in entry["results"].values())
        assert entry["options"]["max_steps"] == 2
        assert entry["versions"]["torch"] == torch.__version__
        assert entry["machine"]["cpu"]
        assert entry["machine"]["threads"] == 1
    content = results.read_text()
    assert str(tmp_path) not in content
    assert socket.gethostname() not in content
    first_report = capsys.readouterr().out

    results.with_suffix(".png").unlink()
    monkeypatch.setattr(ablation, "train", pytest.fail)
    assert ablation.main(arguments) == 0
    assert results.read_text() == content
    assert "0 of them to be done" in (again := capsys.readouterr().out)
    assert again[again.index("R@1 in %") :] == first_report[first_report.index("R@1 in %") :]
    for label in ("short only", "2 corners, mask off"):
        assert f"| {label} |" in again
    with Image.open(results.with_suffix(".png")) as picture:
        assert min(picture.size) > 300


def test_an_interrupted_study_goes_on(ablation, results, monkeypatch, capsys):
    arguments = ["--results", str(results)]
    first, second = FakeRun(ablation, stop_after=17), FakeRun(ablation)
    monkeypatch.setattr(ablation, "run", first)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(arguments)
    monkeypatch.setattr(ablation, "run", second)
    assert ablation.main(arguments) == 0
    names = list(dict.fromkeys(setting.name for group in ablation.GROUPS.values() for setting in group))
    # the base is one run under three names
    names = [name for name in names if name not in ("sentences-3", "tokens-128")]
    assert first.done + second.done == [(name, seed) for seed in (0, 1, 2) for name in names]
    assert len(results.read_text().splitlines()) == 42
    table = capsys.readouterr().out
    assert "42 runs, 25 of them to be done" in table
    for label in ("2 corners", "3", "128"):
        assert f"\n| {label} | 41.0 ± 1.0 | 41.0 ± 1.0 | 20.0 ± 0.0 | 20.0 ± 0.0 | 12 % | 3 |" in table


def test_other_options_are_other_runs(ablation, results, monkeypatch):
    for steps, number in (("300", 1), ("400", 1), ("300", 0)):
        monkeypatch.setattr(ablation, "BASE", {**ablation.BASE, "max_steps": int(steps)})
        monkeypatch.setattr(ablation, "run", fake := FakeRun(ablation))
        ablation.main(["--only", "long", "--seeds", "0", "--steps", steps, "--results", str(results)])
        assert len(fake.done) == number
    with pytest.raises(ValueError, match="holds 2 runs, none of them with these options"):
        ablation.main(["--report", "--steps", "500", "--results", str(results)])


def test_what_differs_from_the_paper_is_said(ablation, results, monkeypatch, capsys):
    long = {"short": 0.1, "long": 0.5, "corners-1": 0.4, "corners-2": 0.5}
    monkeypatch.setattr(ablation, "run", FakeRun(ablation, long))
    ablation.main(["--only", *long, "--results", str(results)])
    table = capsys.readouterr().out
    assert "\n| long | short | better | +40.0 ± 0.0 | better | worse | +0.0 ± 0.0 | no clear difference | 3 |" in table
    assert "\n| corners-1 | long | better | -10.0 ± 0.0 | worse |" in table
    assert "\n| corners-2 | long | better | +0.0 ± 0.0 | no clear difference |" in table
    assert "mask-off" not in table


def test_a_run_without_a_result(ablation, results, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "run", fake := FakeRun(ablation, {"long": -1.0}))
    arguments = ["--only", "short", "long", "corners-1", "--seeds", "0", "--results", str(results)]
    assert ablation.main(arguments) == 1
    assert [name for name, _ in fake.done] == ["short", "long", "corners-1"]
    assert [json.loads(line)["setting"] for line in results.read_text().splitlines()] == ["short", "corners-1"]
    assert "long, seed 0: no result. Step 3: the loss is nan." in capsys.readouterr().err


def test_nothing_to_report(ablation, results):
    with pytest.raises(ValueError, match="holds 0 runs"):
        ablation.main(["--report", "--results", str(results)])
    results.parent.mkdir()
    results.write_text('{"options": {}}\n{"opt\n')
    with pytest.raises(ValueError, match=r"ablation\.jsonl, line 2"):
        ablation.main(["--report", "--results", str(results)])


def test_settings_are_options(ablation):
    names = [setting.name for group in ablation.GROUPS.values() for setting in group]
    assert len(set(names)) == len(names)
    assert {name for one, other, *_ in ablation.COMPARISONS for name in (one, other)} <= set(names)
    for group in ablation.GROUPS.values():
        assert sum(not setting.changes or setting.changes.items() <= ablation.BASE.items() for setting in group) == 1
        for setting in group:
            options = {**ablation.BASE, **setting.changes}
            assert options.keys() == ablation.BASE.keys(), setting
            options.pop("corner_mask")
            assert TrainingConfig(**options).num_corner_tokens == options["num_corner_tokens"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_mask_off_lets_words_see_the_corners(ablation, attention):
    model = LoTLIPModel(tiny.config(num_corner_tokens=2)).eval()
    model.set_attn_implementation(attention)
    torch.nn.init.normal_(model.text_model.corner_embeds)
    input_ids, long_input_ids = tiny.input_ids(3, 9), tiny.input_ids(3, 1, 12)
    input_ids[1, 6:] = 0
    attention_mask = (input_ids != 0).long()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "long_input_ids": long_input_ids}
    inputs["pixel_values"] = tiny.pixel_values()

    def features() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, output_corner_embeds=False).text_embeds

    masked = features()
    with ablation.corner_mask_off(model):
        seen = features()
        text = model.text_model(input_ids=input_ids, attention_mask=attention_mask)
    torch.testing.assert_close(features(), masked, atol=1e-6, rtol=0)
    # short and long texts, in evaluation mode, although no one asks for the corner tokens
    assert ((seen - masked).abs().amax(-1) > 1e-4).all()

    # BERT itself, on [CLS], corner tokens, words, with a mask that hides the padding alone
    backbone, words = model.text_model.backbone, model.text_model.get_input_embeddings()(input_ids)
    corners = model.text_model.corner_embeds.expand(3, -1, -1)
    whole = torch.cat([words[:, :1], corners, words[:, 1:]], dim=1)
    states = backbone(
        inputs_embeds=whole, attention_mask=torch.cat([torch.ones(3, 2, dtype=torch.int64), attention_mask], dim=1)
    ).last_hidden_state
    assert torch.allclose(text.last_hidden_state[:, 0], states[:, 0], atol=1e-5)
    assert torch.allclose(text.last_hidden_state[1, 1:6], states[1, 3:8], atol=1e-5)
