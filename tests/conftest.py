"""What every test can rely on: no network, one thread, the same seed, the golden files, a converted checkpoint."""

import logging
import os
import tempfile

# Read once, when the libraries are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
if "ATEN_CPU_CAPABILITY" in os.environ:
    # torch.compile takes kernels from its cache that were compiled for this machine's own vectors
    folder = f"torchinductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

import json
import random
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from shifted import ShiftWeights

torch.set_num_threads(1)

MAKES_MODELS = re.compile("Model\\b|official_checkpoint|load_model|encode_(texts|images)|tiny")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shift-weights",
        action="store_true",
        help="let the weights of each model begin at other addresses: the last bits of what it computes change",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out, unread: with `-m "not slow"` files that are slow as a whole, with `--shift-weights` those that name
    nothing that makes a model."""
    if not collection_path.match("test_*.py"):
        return None
    text = collection_path.read_text(encoding="utf-8")
    is_slow = config.option.markexpr == "not slow" and "\npytestmark = pytest.mark.slow" in text
    is_still = config.getoption("--shift-weights") and not MAKES_MODELS.search(text)
    return True if is_slow or is_still else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: what is left at the end for one worker, while the other has nothing to do, is short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse every connection to another machine."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"A test asked for a connection to {address[0]}; tests do without a network.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Give each test the same random numbers, alone or after others."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def alone() -> Iterator[None]:
    """A test as in a process of its own: accelerate keeps its state for all tests of a process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Each test sees the package's warnings, whatever a library did to logging before, and leaves the levels alone."""
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    for handler in logging.root.handlers:  # pytest's, which last as long as the session
        handler.setLevel(logging.NOTSET)
        handler.filters.clear()
    known = logging.root.manager.loggerDict.items()
    own = [one for name, one in known if name.split(".")[0] == "lotlip_hf" and isinstance(one, logging.Logger)]
    for logger in own:
        logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)
    yield
    assert logging.root.level == logging.WARNING
    assert not any(logger.level for logger in own)


@pytest.fixture(autouse=True)
def _shifted_weights(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--shift-weights`, weights are moved before their first use; not in tests marked `same_bits`."""
    if not request.config.getoption("--shift-weights") or request.node.get_closest_marker("same_bits"):
        yield
        return
    hook = register_module_forward_pre_hook(ShiftWeights())
    yield
    hook.remove()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds `setup.py`."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files: what the official code answered."""
    return Path(__file__).resolve().parent / "golden"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three pictures, one of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def pair(official_checkpoint: Path) -> tuple[Any, Any]:
    """The model and the processor of `official_checkpoint`."""
    from lotlip_hf.loading import load_model

    return load_model(official_checkpoint, device="cpu")


@pytest.fixture(scope="session")
def official_checkpoint(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A checkpoint folder, converted from the tiny official model with two corner tokens. Nobody writes to it."""
    from lotlip_hf.conversion.official import convert

    official = golden / "official-corners2"
    output = tmp_path_factory.mktemp("official") / "checkpoint"
    convert(
        checkpoint=official / "model.pt",
        open_clip_config=official / "open_clip_config.json",
        tokenizer=golden / "tokenizer",
        output=output,
    )
    return output


@pytest.fixture(scope="session")
def still_checkpoint(tmp_path_factory: pytest.TempPathFactory, official_checkpoint: Path) -> Path:
    """The same without dropout, so that a loss in training is that of the same weights in evaluation."""
    folder = tmp_path_factory.mktemp("still") / "checkpoint"
    shutil.copytree(official_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        config["text_config"]["backbone_config"][name] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def trained_on_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that finds long captions of Scenes, and in them colours. One of the processes trains it."""
    from lotlip_hf.cli import main
    from lotlip_hf.training.checkpoint import list_checkpoints

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained-on-scenes"
    flags = (
        "--model scenes --data scenes --num-scenes 5000 --num-sentences 0 --num-long-texts 1 --max-text-length 128 "
    )
    flags += (
        "--max-steps 400 --batch-size 64 --learning-rate 1.5e-3 --warmup-steps 100 --num-workers 0 --trackers none"
    )
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            assert main(["train", "--output", str(folder), *flags.split()]) == 0
    return list_checkpoints(folder)[-1]
