"""What is checked when a LoTLIP is loaded from a Hub: files in the cache, code that differs, fields and versions."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

import tiny
import tiny_clip
import tiny_families
from hub_server import WRITE_TOKEN, Answer, Fault, Hub, hub_server, use_in_process
from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
)
from lotlip_hf.conversion.clip import convert as convert_clip
from lotlip_hf.conversion.common import load_checkpoint, local_folder
from lotlip_hf.loading import check_config, checkpoint_name, load_model

REPO = "lotlip/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official_checkpoint: Path) -> Iterator[Hub]:
    """A Hub with the tiny checkpoint."""
    with hub_server(tmp_path / "hub") as server:
        use_in_process(monkeypatch, server, tmp_path / "cache", token=WRITE_TOKEN)
        server.add(REPO, {file.name: file.read_bytes() for file in official_checkpoint.iterdir()})
        yield server


def test_a_clip_tokenizer_without_words(hub: Hub, tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path / "clip")
    folder = convert_clip(tmp_path / "clip", tmp_path / "lotlip")
    hub.add("lotlip/clip", {file.name: file.read_bytes() for file in folder.iterdir()})
    hub.faults.append(Fault("HEAD", r"/tokenizer.json", Answer(503), times=99))
    with pytest.raises(OSError, match="tokenizer.json"):
        AutoProcessor.from_pretrained("lotlip/clip")


@pytest.mark.parametrize("given", [{}, {"use_safetensors": None}, {"use_safetensors": True}])
def test_pickles_are_read_only_where_that_is_said(
    official_checkpoint: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    shutil.copytree(official_checkpoint, tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path / "pickled", **given)
    with pytest.raises(OSError, match=r"model\.fp16\.safetensors"):
        AutoModel.from_pretrained(official_checkpoint, variant="fp16")
    assert type(AutoModel.from_pretrained(tmp_path / "pickled", use_safetensors=False)) is LoTLIPModel


def test_fields_from_elsewhere(official_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((official_checkpoint / "config.json").read_text())
    newer = {**config, "format_version": 2, "text_config": {"backbone_config": {"model_type": "modernbert"}}}
    with pytest.raises(ValueError, match="format_version"):
        LoTLIPConfig.from_dict(newer)
    newer = {**config, "text_config": {"format_version": 2, "backbone_config": {"model_type": "modernbert"}}}
    with pytest.raises(ValueError, match="LoTLIPTextConfig"):
        LoTLIPConfig.from_dict(newer)
    own = {"AutoModel": None, "AutoTokenizer": ["x/evil--t.T", None], "AutoModelForCausalLM": "x/evil--m.M"}
    assert LoTLIPConfig.from_dict({**config, "auto_map": own}).auto_map == config["auto_map"]
    shutil.copytree(official_checkpoint, tmp_path / "typed")
    (tmp_path / "typed" / "config.json").write_text(json.dumps({**config, "projection_dim": "big"}))
    with pytest.raises(ValueError, match="projection_dim"):
        load_model(tmp_path / "typed")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("modernbert", {"projection": "residual_mlp", "projection_layers": 2}),
        ("llama", {"attention": "bidirectional", "pooling": "mean"}),
        ("t5", {}),
    ],
)
def test_a_tower_of_a_whole_model_and_back(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    backbone = tiny_families.FAMILIES[name].stock_config()
    text_config = LoTLIPTextConfig(backbone_config=backbone, projection_dim=24, **fields)
    config = LoTLIPConfig(text_config=text_config, vision_config=tiny.vision_config(), projection_dim=24)
    model = tiny_families.spread(LoTLIPModel(config))
    model.save_pretrained(tmp_path / "whole")
    ids, mask = tiny_families.texts(7, 4)
    with torch.no_grad():
        pooled = model.text_model(ids, mask).pooler_output
        features = model.get_text_features(ids, mask).pooler_output
        for folder in ("whole", "tower"):
            tower, info = LoTLIPTextModelWithProjection.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not any(info.values())
            assert tower.config.to_diff_dict().keys() >= fields.keys()
            assert torch.equal(tower(ids, mask).text_embeds, features)
            tower.save_pretrained(tmp_path / "tower")
            bare, info = LoTLIPTextModel.from_pretrained(tmp_path / folder, output_loading_info=True)
            assert not any(info.values())
            assert torch.equal(bare(ids, mask).pooler_output, pooled)
        again, info = LoTLIPModel.from_pretrained(tmp_path / "tower", config=config, output_loading_info=True)
        assert torch.equal(again.get_text_features(ids, mask).pooler_output, features)
    new = {name.split(".")[0] for name in info["missing_keys"]}
    assert new == {"vision_model", "visual_projection", "logit_scale"}


def test_nothing_is_said_of_what_is_in_order(
    official_checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        AutoModel.from_pretrained(official_checkpoint)
        AutoConfig.from_pretrained(official_checkpoint)
    assert not caplog.records


def test_converters_take_hub_ids(hub: Hub, tmp_path: Path, official_checkpoint: Path) -> None:
    assert load_checkpoint(local_folder(REPO)).config.to_dict().keys() >= {"text_config", "vision_config"}
    assert local_folder(official_checkpoint) == official_checkpoint
    for name in (tmp_path / "a", "lotlip/nothing"):
        with pytest.raises(OSError, match=str(name)):
            local_folder(name)


@pytest.mark.parametrize("folder", ["run", "run/towers"])
def test_the_folder_of_a_run_names_its_checkpoints(folder: str, tmp_path: Path) -> None:
    for step in (9, 100):
        checkpoint = tmp_path / "run" / "towers" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="folder of a run.*towers/checkpoint-9 or .*towers/checkpoint-100"):
        checkpoint_name(tmp_path / folder)


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ({"model_type": "distilbert", "n_layers": 10**7}, {}),
        ({"model_type": "gpt2", "n_layer": 10**7}, {}),
        ({"model_type": "albert", "num_hidden_groups": 10**7}, {}),
        ({"model_type": "albert", "inner_group_num": 10**7}, {}),
        ({}, {"projection": "residual_mlp", "projection_layers": 10**7}),
    ],
)
def test_too_many_layers_are_refused_before_they_are_built(backbone: dict[str, Any], settings: dict[str, Any]) -> None:
    config = LoTLIPTextConfig(backbone_config=backbone or None, **settings)
    with pytest.raises(ValueError, match=[*backbone, *settings][-1]):
        check_config(config, "theirs")
