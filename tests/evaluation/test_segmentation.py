"""Zero-shot segmentation: the folder, the counts of pixels, the command."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lotlip_hf.cli import main as lotlip
from lotlip_hf.dense import iterate_patches
from lotlip_hf.encoder import Encoder
from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
from lotlip_hf.evaluation.evaluate import evaluate
from lotlip_hf.evaluation.segmentation import confusion, segmentation_metrics
from lotlip_hf.evaluation.tasks import IncompleteDataError, SegmentationData
from lotlip_hf.images import ImageError, load_mask
from lotlip_hf.scenes.dataset import COLOURS, render, scene, segments, write_segmentation
from lotlip_hf.scenes.small import small_model

WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(*small_model(hidden_size=32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_segmentation(tmp_path / "scenes-masks", 4)
    return tmp_path / "scenes-masks"


def test_scenes_have_masks() -> None:
    one = scene(3)
    picture, mask = np.asarray(render(one)), np.asarray(segments(one))
    colours = [*COLOURS.values()]
    assert set(np.unique(mask)) == {255, *(list(COLOURS).index(item.colour) for item in one.objects)}
    for index in set(np.unique(mask)) - {255}:
        assert np.abs(picture[mask == index].astype(int) - colours[index]).mean() < 30  # edges are smooth


def test_pixels_are_counted_by_class() -> None:
    scores = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])  # [1, 2, 3]: class 0 on the left, class 1 on the right
    mask = torch.tensor([[0, 0, 1, 1], [0, 2, 255, 1]], dtype=torch.uint8)
    assert confusion(scores, mask, WHOLE).tolist() == [[3, 0, 0], [0, 3, 0], [1, 0, 0]]
    assert confusion(scores, mask, (0.5, 0.0, 1.0, 1.0)).tolist() == [[0, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert confusion(scores, mask.repeat(200, 1), WHOLE).sum() == 1400


def test_metrics_are_those_of_the_maps(encoder: Encoder, folder: Path) -> None:
    data = load_benchmark("segmentation", folder)
    assert isinstance(data, SegmentationData)
    assert (len(data.images), list(data.class_names)) == (4, [f"{colour} shape" for colour in COLOURS])
    embeds = torch.nn.functional.normalize(torch.randn(8, 32), dim=-1)
    metrics = segmentation_metrics(encoder, data, embeds, progress=False)
    assert metrics == segmentation_metrics(encoder, data, embeds, progress=False, batch_size=3)
    assert metrics.keys() == {
        f"{kind}{name}" for kind in ("", "calibrated_") for name in ("mean_iou", "pixel_accuracy")
    }
    assert all(0 <= value <= 1 for value in metrics.values())
    one = load_benchmark("segmentation", folder, num_images=1)
    assert isinstance(one, SegmentationData)
    (patches,), mask = iterate_patches(encoder, one.images), load_mask(one.masks[0])
    maps = torch.nn.functional.interpolate((patches @ embeds.T).permute(2, 0, 1)[None], (64, 64), mode="bilinear")
    expected = (maps[0].argmax(0) == mask)[mask != 255].double().mean().item()
    accuracy = segmentation_metrics(encoder, one, embeds, progress=False)["pixel_accuracy"]
    assert accuracy == pytest.approx(expected, abs=0.002)  # pixels between two patches may fall on either side


def test_the_command(encoder: Encoder, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (encoder.engine.model, encoder.engine.processor):
        part.save_pretrained(tmp_path / "model")
    output = tmp_path / "results.json"
    options = ["--data", str(folder), "--output", str(output), "--no-cache"]
    assert lotlip(["evaluate", "--model", str(tmp_path / "model"), "--task", "segmentation", *options]) == 0
    assert "calibrated mIoU" in capsys.readouterr().out
    results = json.loads(output.read_text())
    assert results["task"] == "image-segmentation"
    assert results["protocol"]["num_classes"] == 8
    Image.new("L", (64, 64), 3).save(folder / "masks" / "00001.png")
    changed = evaluate(encoder, load_benchmark("segmentation", folder), progress=False)
    assert changed["data_fingerprint"] != results["data_fingerprint"]
    index = tmp_path / "results.yaml"
    assert lotlip(["report", str(output), "--model-index", str(index), "--plot", str(tmp_path / "plot.png")]) == 0
    assert "mIoU" in capsys.readouterr().out
    assert "calibrated_mean_iou" in index.read_text()


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (Image.new("L", (64, 64), 8), "class 8"),
        (Image.new("L", (32, 64)), "32x64"),
        (Image.new("RGB", (64, 64)), "RGB"),
        (None, "00002"),
    ],
)
def test_masks_that_do_not_fit(encoder: Encoder, folder: Path, mask: Image.Image | None, problem: str) -> None:
    file = folder / "masks" / "00002.png"
    file.unlink()
    if mask is not None:
        mask.save(file)
    with pytest.raises(IncompleteDataError, match=problem):
        evaluate(encoder, load_benchmark("segmentation", folder), progress=False)


def test_a_mask_outside_of_the_folder_is_not_read(encoder: Encoder, folder: Path) -> None:
    mask = folder / "masks" / "00002.png"
    mask.rename(folder.parent / "other.png")
    mask.symlink_to(folder.parent / "other.png")
    with pytest.raises(IncompleteDataError, match="link"):
        load_benchmark("segmentation", folder)


def test_masks_without_a_class(encoder: Encoder, folder: Path) -> None:
    for file in (folder / "masks").iterdir():
        Image.new("L", (64, 64), 255).save(file)
    with pytest.raises(IncompleteDataError, match="255"):
        evaluate(encoder, load_benchmark("segmentation", folder), progress=False)


def test_masks_may_have_a_palette(tmp_path: Path) -> None:
    mask = Image.new("P", (2, 1))
    mask.putpalette([255, 0, 0, 0, 255, 0])
    mask.putpixel((1, 0), 1)
    mask.save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").tolist() == [[0, 1]]
    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)  # gray values of 2 bits
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes([0, 0b00011011]))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(ImageError, match="8 bits"):
        load_mask(tmp_path / "mask.png")
    (tmp_path / "mask.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"mask\.png"):
        load_mask(tmp_path / "mask.png")
