"""Encoders that the tests of evaluation share."""

from pathlib import Path

import pytest

import tiny_clip
from lotlip_hf import Encoder, load_encoder


@pytest.fixture(scope="module")
def lotlip(official_checkpoint: Path) -> Encoder:
    return load_encoder(official_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.save_clip(folder)
    return load_encoder(folder, device="cpu")
