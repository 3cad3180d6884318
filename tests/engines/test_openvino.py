"""Exports to OpenVINO behind an [`Encoder`]."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from filelock import FileLock
from PIL import Image

import lotlip_hf.engines.exported
import lotlip_hf.engines.openvino
from lotlip_hf import Encoder, LoTLIPModel, load_encoder
from lotlip_hf.cli import main as lotlip
from lotlip_hf.conversion.openvino import convert

pytestmark = pytest.mark.slow

TOLERANCE = {"atol": 1e-5, "rtol": 0}
TEXTS = [
    "",
    "A cat.",
    "The red car stands in front of a house. A dog looks at it &amp; barks. Nobody is there.",
    "a photo of the house " * 60,
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, official_checkpoint: Path) -> Path:
    """BERT and ViT in OpenVINO. One of the processes exports them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "openvino-official"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            convert(official_checkpoint, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for the cache of compiled graphs."""
    monkeypatch.setattr(lotlip_hf.engines.openvino, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "lotlip" / "openvino"


def embeddings(encoder: Encoder, pictures: list[Path], batch_size: int = 3) -> torch.Tensor:
    texts = encoder.encode_texts(TEXTS, batch_size=batch_size, progress=False)
    return torch.cat([texts, encoder.encode_images(pictures, batch_size=batch_size, progress=False)])


def test_texts_and_images_are_encoded_as_in_pytorch(exported: Path, official_checkpoint: Path, golden: Path) -> None:
    pictures = sorted((golden / "images").glob("*.png"))
    encoder, own = load_encoder(exported), load_encoder(official_checkpoint, device="cpu")
    for batch_size in (1, 3):
        given, expected = (embeddings(one, pictures, batch_size) for one in (encoder, own))
        torch.testing.assert_close(given, expected, **TOLERANCE)
    in_bfloat16 = embeddings(load_encoder(exported, dtype=torch.bfloat16), pictures)
    assert (in_bfloat16 * expected).sum(1).min() > 0.99
    assert encoder.versions == {"openvino": openvino.__version__}
    names = [one.fingerprint(kind) for one in (encoder, own) for kind in ("text", "image")]
    assert len(set(names)) == 4


def test_a_compiled_graph_is_kept_and_knows_other_weights(
    tmp_path: Path, exported: Path, official_checkpoint: Path, cache: Path
) -> None:
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    folder = shutil.copytree(exported, tmp_path / "copy")
    first = load_encoder(folder).encode_images(pictures, progress=False)
    kept = sorted(cache.iterdir())
    assert kept
    assert torch.equal(load_encoder(folder).encode_images(pictures, progress=False), first)
    assert sorted(cache.iterdir()) == kept
    # the same graph with other weights under the same name, as old as those before
    model = LoTLIPModel.from_pretrained(official_checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(0.01)
    model.save_pretrained(tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "new", towers=("vision",))
    for name in ("vision_model.xml", "vision_model.bin"):
        status = (folder / name).stat()
        shutil.copy(tmp_path / "new" / name, folder / name)
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    given = load_encoder(folder).encode_images(pictures, progress=False)
    assert not torch.allclose(given, first, **TOLERANCE)
    shutil.rmtree(cache)
    assert torch.equal(given, load_encoder(folder).encode_images(pictures, progress=False))


def test_a_cache_that_cannot_be_written(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    assert load_encoder(exported).encode_texts(TEXTS, progress=False).isfinite().all()


def test_the_prompt_needs_no_pytorch(exported: Path, golden: Path, cache: Path) -> None:
    code = (
        "import os, sys; sys.argv[0] = os.path.join(os.path.dirname(sys.executable), 'lotlip'); "
        "from lotlip_hf.cli import main; status = main(sys.argv[1:]); "
        "print(*{'torch', 'transformers'} & set(sys.modules), status)"
    )
    command = [sys.executable, "-c", code, "search", "--model", str(exported), "--images", str(golden / "images")]
    environment = {**os.environ, "HF_HOME": str(cache.parent.parent)}
    for _ in range(2):
        done = subprocess.run(
            [*command, "--index", str(cache.parent / "index"), "a cat"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert done.stdout.splitlines()[-1] == "0"


def test_signals_arrive_after_encoders_are_deleted(exported: Path) -> None:
    """In the order of their creation, after which OpenVINO's own `Core` objects leave no stack for signals."""
    code = (
        "import gc, signal, subprocess, sys; from lotlip_hf import load_encoder\n"
        "encoders = [load_encoder(sys.argv[1], dtype=dtype) for dtype in ('float32', 'bfloat16')]\n"
        "[encoder.encode_texts(['a'], progress=False) for encoder in encoders]\n"
        "while encoders: del encoders[0]; gc.collect()\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None); subprocess.run([sys.executable, '-c', ''], check=True)"
    )
    subprocess.run([sys.executable, "-X", "faulthandler", "-c", code, str(exported)], check=True)


def test_folders_that_cannot_be_opened(tmp_path: Path, exported: Path) -> None:
    for file, content in (
        ("text_model.xml", b"<net"),
        ("text_model.xml", b""),
        ("text_model.bin", (exported / "text_model.bin").read_bytes()[:100]),
        ("text_model.bin", None),
    ):
        broken = shutil.copytree(exported, tmp_path / "broken", dirs_exist_ok=True)
        (broken / file).unlink() if content is None else (broken / file).write_bytes(content)
        encoder = load_encoder(broken)
        with pytest.raises(ValueError, match=r"text_model\.xml"):
            encoder.encode_texts(TEXTS, progress=False)
        assert encoder.encode_images([Image.new("RGB", (40, 40))], progress=False).isfinite().all()
        shutil.rmtree(broken)


def test_types_and_devices(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="float16"):
        load_encoder(exported, dtype="float16")
    with pytest.raises(ValueError, match="`device`"):
        load_encoder(exported, device="cuda")


def test_missing_packages_are_named(
    tmp_path: Path, official_checkpoint: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def find(name: str) -> Any:
        return None if name == "openvino" else find_spec(name)

    monkeypatch.setattr(lotlip_hf.engines.exported, "find_spec", find)
    monkeypatch.setattr("lotlip_hf.conversion.towers.find_spec", find)
    arguments = ["convert", "openvino", "--model", str(official_checkpoint), "--output", str(tmp_path / "new")]
    assert lotlip(arguments) == 2
    assert "lotlip-hf[openvino]" in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"lotlip-hf\[openvino\]"):
        load_encoder(exported)
