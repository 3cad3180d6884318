"""What the tests of data share: a cache of their own, and a small processor."""

from pathlib import Path

import datasets
import pytest

from lotlip_hf import LoTLIPProcessor, LoTLIPTokenizer
from lotlip_hf.images import official_image_processor


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def processor(golden: Path) -> LoTLIPProcessor:
    tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=64)
    return LoTLIPProcessor(official_image_processor(image_size=32), tokenizer)
