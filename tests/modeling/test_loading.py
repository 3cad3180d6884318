"""What is checked when a LoTLIP is loaded from a Hub: files in the cache, code that differs, fields and versions."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

import tiny_clip
from hub_server import WRITE_TOKEN, Answer, Corrupt, Fault, Hub, environment, hub_server, use_in_process
from lotlip_hf import LoTLIPConfig, LoTLIPModel
from lotlip_hf.conversion.clip import convert as convert_clip
from lotlip_hf.conversion.common import ConversionError, load_checkpoint, local_folder
from lotlip_hf.encoder import load_model
from lotlip_hf.modeling import loading_lotlip

REPO = "lotlip/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official_checkpoint: Path) -> Iterator[Hub]:
    """A Hub with the tiny checkpoint."""
    with hub_server(tmp_path / "hub") as server:
        use_in_process(monkeypatch, server, tmp_path / "cache", token=WRITE_TOKEN)
        server.add(REPO, {file.name: file.read_bytes() for file in official_checkpoint.iterdir()})
        yield server


def flip(file: Path) -> None:
    """Changes the last byte, and nothing that a file system tells of it."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_others_downloaded_is_checked_once(hub: Hub, official_checkpoint: Path) -> None:
    folder = Path(snapshot_download(REPO))
    flip((folder / "model.safetensors").resolve())
    with pytest.raises(OSError, match=r"model.safetensors did not come whole .* has been removed .*: load again"):
        AutoModel.from_pretrained(REPO)
    model = AutoModel.from_pretrained(REPO)
    expected = load_file(official_checkpoint / "model.safetensors")
    assert torch.equal(model.logit_scale, expected["logit_scale"])
    record = folder.parents[1] / loading_lotlip.CHECKED
    lines = record.read_text().splitlines()
    assert len(lines) == len({file.resolve() for file in folder.rglob("*") if file.is_file()})
    flip((folder / "model.safetensors").resolve())  # by whatever has been at the disk: it was whole when it came
    AutoModel.from_pretrained(REPO)
    assert record.read_text().splitlines() == lines
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings


def test_a_damaged_configuration_alone(hub: Hub) -> None:
    place = hub.files(REPO)["config.json"].index(b"2.6")
    hub.faults.append(Fault("GET", r"/resolve/.*/config.json$", Corrupt(place)))
    with pytest.raises(OSError, match=r"config.json did not come whole .* has been removed"):
        AutoConfig.from_pretrained(REPO)
    assert AutoConfig.from_pretrained(REPO).logit_scale_init_value == pytest.approx(2.659, abs=1e-3)


def test_what_cannot_be_removed_is_told_of(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(snapshot_download(REPO))
    flip((folder / "model.safetensors").resolve())

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "read-only", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(OSError, match=r"did not come whole from the Hub and cannot be removed .*read-only"):
            AutoModel.from_pretrained(REPO)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["lotlip_hf"] = None
from transformers import AutoModel
try:
    model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    print(sys.modules[type(model).__module__].__doc__)
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_damaged_code_does_not_run_again(hub: Hub, tmp_path: Path) -> None:
    variables = environment(hub, tmp_path / "home")
    content = hub.files(REPO)["modeling_lotlip.py"]
    place = content.index(b"PyTorch LoTLIP")
    hub.faults.append(Fault("GET", r"/resolve/.*/modeling_lotlip.py$", Corrupt(place)))
    printed = []
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", WITHOUT_THE_PACKAGE, REPO]
        process = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, cwd=tmp_path)
        assert process.returncode == 0, process.stderr[-2000:]
        printed.append(process.stdout)
    assert "modeling_lotlip.py did not come whole from the Hub" in printed[0]
    assert printed[1].startswith("PyTorch LoTLIP")


def test_a_clip_tokenizer_without_words(hub: Hub, tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path / "clip")
    folder = convert_clip(tmp_path / "clip", tmp_path / "lotlip")
    hub.add("lotlip/clip", {file.name: file.read_bytes() for file in folder.iterdir()})
    hub.faults.append(Fault("HEAD", r"/tokenizer.json", Answer(503), times=99))
    with pytest.raises(OSError, match="its tokenizer has no words; its tokenizer.json is missing, or the Hub did not"):
        AutoProcessor.from_pretrained("lotlip/clip")


def test_code_is_compared_with_one_question(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    AutoModel.from_pretrained(REPO)
    assert len(hub.matching("GET", "/tree/")) == 1
    AutoModel.from_pretrained(REPO, local_files_only=True)
    assert len(hub.matching("GET", "/tree/")) == 1
    hub.faults.append(Fault("GET", "/tree/", Answer(503), times=99))
    AutoModel.from_pretrained(REPO)  # which does not depend on the answer
    assert len(hub.matching("GET", "/tree/")) == 2


def test_code_in_a_subfolder_is_compared(
    official_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(official_checkpoint, tmp_path / "all" / "part")
    with (tmp_path / "all" / "part" / "modeling_lotlip.py").open("a") as file:
        file.write("\n")
    said: list[str] = []
    monkeypatch.setattr(loading_lotlip.logger, "warning", said.append)
    AutoModel.from_pretrained(tmp_path / "all", subfolder="part")
    assert len(said) == 1
    assert "has its own code (modeling_lotlip.py)" in said[0]


@pytest.mark.parametrize("given", [{}, {"use_safetensors": None}, {"use_safetensors": True}])
def test_pickles_are_read_only_where_that_is_said(
    official_checkpoint: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    shutil.copytree(official_checkpoint, tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no weights in safetensors there, and others are not read"):
        AutoModel.from_pretrained(tmp_path / "pickled", **given)
    with pytest.raises(OSError, match=r"model\.fp16\.safetensors") as caught:
        AutoModel.from_pretrained(official_checkpoint, variant="fp16")
    assert "pickled" not in str(caught.value)
    assert type(AutoModel.from_pretrained(tmp_path / "pickled", use_safetensors=False)) is LoTLIPModel


def test_fields_from_elsewhere(official_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((official_checkpoint / "config.json").read_text())
    newer = {**config, "format_version": 2, "text_config": {"backbone_config": {"model_type": "modernbert"}}}
    with pytest.raises(ValueError, match="written by a newer lotlip-hf"):
        LoTLIPConfig.from_dict(newer)
    newer = {**config, "text_config": {"format_version": 2, "backbone_config": {"model_type": "modernbert"}}}
    with pytest.raises(ValueError, match="LoTLIPTextConfig: written by a newer lotlip-hf"):
        LoTLIPConfig.from_dict(newer)
    own = {"AutoModel": None, "AutoTokenizer": ["x/evil--t.T", None], "AutoModelForCausalLM": "x/evil--m.M"}
    assert LoTLIPConfig.from_dict({**config, "auto_map": own}).auto_map == config["auto_map"]
    shutil.copytree(official_checkpoint, tmp_path / "typed")
    (tmp_path / "typed" / "config.json").write_text(json.dumps({**config, "projection_dim": "big"}))
    with pytest.raises(ValueError, match="typed: .*projection_dim"):
        load_model(tmp_path / "typed")


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
    for name, message in ((tmp_path / "a", "a: no such folder.$"), ("lotlip/nothing", "not to be had from the Hub")):
        with pytest.raises(ConversionError, match=message):
            local_folder(name)
