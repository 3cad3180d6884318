"""Benchmarks: each publisher's layout in small, with its oddities, and what each reader says of one that is broken."""

import csv
import dataclasses
import io
import json
import logging
import os
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from huggingface_hub import constants
from PIL import Image

from hub_server import Answer, Fault, Hub, hub_server, use_in_process
from lotlip_hf.data import readers
from lotlip_hf.evaluation import zero_shot
from lotlip_hf.evaluation.benchmarks import registry as benchmarks
from lotlip_hf.evaluation.benchmarks.registry import TASKS, describe_tasks, load_benchmark
from lotlip_hf.evaluation.benchmarks.sources import NORMALIZATION, Options, normalize_caption
from lotlip_hf.evaluation.tasks import ClassificationData, IncompleteDataError, RetrievalData
from lotlip_hf.images import load_image
from lotlip_hf.scenes.dataset import long_captions, scene, scenes_dataset, short_caption


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def encoded(red: int = 0, mode: str = "RGB", format: str = "JPEG") -> bytes:
    """An image file, in one colour that `red` tells."""
    buffer = io.BytesIO()
    colour = {"RGB": (red, 0, 0), "L": red, "CMYK": (0, 255, 255, 255 - red)}[mode]
    Image.new(mode, (8, 8), colour).save(buffer, format=format, **({"quality": 100} if format == "JPEG" else {}))
    return buffer.getvalue()


def red(image: Any) -> int:
    """What [`encoded`] was given, about."""
    picture = load_image(image)
    assert picture.mode == "RGB"
    return int(np.asarray(picture)[0, 0, 0])


def write(path: Path, content: bytes | str | list | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def retrieval(task: str, data: Any = None, **options: Any) -> RetrievalData:
    result = load_benchmark(task, data, **options)
    assert isinstance(result, RetrievalData)
    assert len(result.images) == len(result.image_names)
    assert len(result.texts) == len(result.text_to_image)
    assert set(result.text_to_image) == set(range(len(result.images)))
    return result


def classes(task: str, data: Any = None, **options: Any) -> ClassificationData:
    result = load_benchmark(task, data, **options)
    assert isinstance(result, ClassificationData)
    assert len(result.images) == len(result.image_names) == len(result.labels)
    return result


def reds(data: RetrievalData | ClassificationData) -> list[int]:
    return [red(image) for image in data.images]


@pytest.fixture
def _miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of each benchmark is what the tests make of it: no number is expected of it."""
    for key, task in TASKS.items():
        if task.num_images is not None and key != "scenes":
            monkeypatch.setitem(TASKS, key, dataclasses.replace(task, num_images=1, num_texts=1))


# Captions and options.


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("A boat. It is red.", "A boat. It is red"),
        ("In the U.S. it is 3.5 m long.", "In the U. S. it is 3. 5 m long"),
        ("One...  Two.\n\nThree</s>Four</s>", "One. Two. Three. Four"),
        ("  spaces \t inside  stay ", "spaces \t inside  stay"),
        ("Wide 。and Ünïcode. 猫！", "Wide 。and Ünïcode. 猫！"),
        ("What? Yes! So; it", "What? Yes! So; it"),
        ("", ""),
        (" ...\n</s>. ", ""),
        ("\u00a0. A. \u00a0\n", "A"),
    ],
)
def test_captions_are_normalized(text: str, normalized: str) -> None:
    assert normalize_caption(text) == normalized
    assert normalize_caption(normalized) == normalized


def test_tasks() -> None:
    assert list(TASKS) == [
        *("dci", "iiw", "sharegpt4v-1k", "sharegpt4v-10k", "urban1k", "docci", "coco", "flickr30k"),
        *("imagenet-1k", "imagenet-v2", "classification", "retrieval", "scenes"),
    ]
    options = [field.name for field in dataclasses.fields(Options)]
    for key, task in TASKS.items():
        assert task.key == key
        assert set(task.options) <= set(options)
        assert task.description
        assert task.source.endswith(".")
    numbers = {key: (task.num_images, task.num_texts) for key, task in TASKS.items() if task.num_images}
    assert numbers["iiw"] == (612, 612)
    assert numbers["dci"] == (7805, 7805)
    assert numbers["coco"] == (5000, 25_000)
    assert numbers["flickr30k"] == (1000, 5000)
    assert numbers["imagenet-1k"][0] == 50_000
    assert numbers["imagenet-v2"][0] == 10_000


def test_tasks_are_described() -> None:
    described = dict(line.split(maxsplit=1) for line in describe_tasks().splitlines())
    assert list(described) == [*TASKS, "length-study", "sentence-ablation"]
    assert described["urban1k"] == TASKS["urban1k"].description


def test_unknown_tasks_and_options_are_refused(tmp_path: Path) -> None:
    message = (
        r"`task` \(--task\) must be one of dci, iiw, .*scenes, or .*: length-study, sentence-ablation; got 'dcis'"
    )
    with pytest.raises(ValueError, match=message):
        load_benchmark("dcis", tmp_path)
    with pytest.raises(ValueError, match="`label_column` is no option of iiw; it has num_images, normalize"):
        load_benchmark("iiw", tmp_path, label_column="label")
    with pytest.raises(ValueError, match="`num_images` must be at least 1, got 0"):
        load_benchmark("iiw", tmp_path, num_images=0)
    with pytest.raises(ValueError, match='`captions` must be "long", "all" or "short"'):
        load_benchmark("scenes", captions="best")
    with pytest.raises(ValueError, match=r"`revision` is for data sets on the Hub and tables"):
        load_benchmark("docci", tmp_path, revision="main")


@pytest.mark.parametrize("task", ["dci", "iiw", "sharegpt4v-1k", "docci", "retrieval", "classification"])
def test_data_without_a_default_must_be_given(task: str) -> None:
    with pytest.raises(ValueError, match=f"`data`: {task} needs "):
        load_benchmark(task)


@pytest.mark.parametrize("task", ["dci", "iiw", "sharegpt4v-1k", "urban1k", "docci", "coco", "imagenet-1k"])
def test_folders_that_are_not_there_or_empty(tmp_path: Path, task: str) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        load_benchmark(task, tmp_path / "absent")
    with pytest.raises(IncompleteDataError, match=r"holds (no|neither) .* Where to get it"):
        load_benchmark(task, tmp_path)


# DCI.

DCI = {  # file: image, its red, short caption, extra caption
    "sa_1.json": ("sa_1.jpg", 10, "A boat.", "It is 3.5 m long.\nIt is red..."),
    "sa_2.json": ("sa_2.jpg", 60, "Same.", "Words."),
    "sa_3.json": ("Café_3.jpg", 110, "Same", "Words"),
    "sa_4.json": ("sa_4.jpg", 160, "Grey.", ""),
}


def dci(folder: Path) -> Path:
    write(folder / "splits.json", {"train": ["sa_2.json", "sa_1.json"], "valid": ["sa_3.json"], "test": ["sa_4.json"]})
    for file, (image, _, short, extra) in DCI.items():
        annotation = {"image": image, "short_caption": short, "extra_caption": extra, "mask_data": {}}
        write(folder / "annotations" / file, annotation)
    # as a Mac unpacks it, with an extension in capitals, and grey
    write(folder / "photos" / "sa_1.jpg", encoded(10))
    write(folder / "photos" / "sa_2.JPG", encoded(60))
    write(folder / "photos" / unicodedata.normalize("NFD", "Café_3.jpg"), encoded(110, "CMYK"))
    write(folder / "photos" / "sa_4.jpg", encoded(160, "L"))
    write(folder / "photos" / "sa_5.jpg", encoded(210))
    write(folder / "photos" / ".DS_Store", "")
    return folder


@pytest.mark.usefixtures("_miniature")
@pytest.mark.parametrize("inside", ["", "densely_captioned_images"])
def test_dci(tmp_path: Path, caplog: pytest.LogCaptureFixture, inside: str) -> None:
    dci(tmp_path / inside)
    data = retrieval("dci", tmp_path)
    assert data.texts == ["Same. Words", "A boat. It is 3. 5 m long. It is red", "Same. Words", "Grey"]
    assert list(data.text_to_image) == [0, 1, 2, 3]
    assert reds(data) == pytest.approx([60, 10, 110, 160], abs=3)
    assert (data.name, data.split, data.revision) == ("DCI", "all", None)
    assert data.protocol["num_duplicate_texts"] == 1
    assert data.protocol["normalization"] == NORMALIZATION
    assert "1 images are not of the benchmark and left out: sa_5.jpg" in caplog.text


def test_dci_in_part(tmp_path: Path) -> None:
    dci(tmp_path)
    first = retrieval("dci", tmp_path, num_images=2, normalize=False)
    assert first.texts == ["Same.\nWords.", "A boat.\nIt is 3.5 m long.\nIt is red..."]
    assert first.protocol["first_images"] == 2
    assert first.protocol["normalization"] is None
    test = retrieval("dci", tmp_path, split="test")
    assert (test.texts, test.split) == (["Grey"], "test")
    with pytest.raises(ValueError, match="`split` must be all, train or valid or test, got 'val'"):
        load_benchmark("dci", tmp_path, split="val")
    with pytest.raises(IncompleteDataError, match="has 4 images, and `num_images` asks for 5"):
        load_benchmark("dci", tmp_path, num_images=5)
    with pytest.raises(IncompleteDataError, match=r"DCI is not complete: .* has 4 images of 7805.*sa_000138.tar"):
        load_benchmark("dci", tmp_path)


@pytest.mark.usefixtures("_miniature")
def test_broken_dci(tmp_path: Path) -> None:
    dci(tmp_path)
    (tmp_path / "photos" / "sa_1.jpg").unlink()
    (tmp_path / "photos" / "sa_4.jpg").unlink()
    (tmp_path / "annotations" / "sa_3.json").unlink()
    message = (
        r"of 4 images .*, 2 images are missing \(photos/sa_1.jpg, photos/sa_4.jpg\), and "
        r"1 annotation files are missing \(annotations/sa_3.json\)\. Nothing is scored"
    )
    with pytest.raises(IncompleteDataError, match=message):
        load_benchmark("dci", tmp_path)
    assert retrieval("dci", tmp_path, num_images=1).texts == ["Same. Words"]  # what is missing is not among the first

    write(tmp_path / "annotations" / "sa_2.json", '{"image": "sa_2.jpg",\n "short_caption": }')
    with pytest.raises(ValueError, match=r"sa_2.json, line 2: broken JSON"):
        load_benchmark("dci", tmp_path, num_images=1)
    write(tmp_path / "annotations" / "sa_2.json", {"image": "sa_2.jpg", "short_caption": "A"})
    with pytest.raises(
        ValueError, match=r"sa_2.json: there is no 'extra_caption'; there are 'image', 'short_caption'"
    ):
        load_benchmark("dci", tmp_path, num_images=1)
    write(
        tmp_path / "annotations" / "sa_2.json", {"image": "sa_2.jpg", "short_caption": "...", "extra_caption": "</s>"}
    )
    with pytest.raises(IncompleteDataError, match=r"1 captions are missing \(photos/sa_2.jpg: empty\)"):
        load_benchmark("dci", tmp_path, num_images=1)
    for splits in (["sa_1.json"], {"test": [3]}):
        write(tmp_path / "splits.json", splits)
        with pytest.raises(ValueError, match=r"splits.json: expected lists of the names of annotation files by split"):
            load_benchmark("dci", tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extra_caption": None}, IncompleteDataError, r"1 captions are missing \(photos/sa_2.jpg: none\)"),
        ({"short_caption": ["A"]}, ValueError, r"sa_2.json, short_caption: expected a caption, a string, got \['A'\]"),
        ({"extra_caption": {"x": 1}}, ValueError, r"sa_2.json, extra_caption: expected a caption, a string, got {'x'"),
        ({"image": 3}, ValueError, r"sa_2.json: 'image' must be a string, got 3"),
        (None, ValueError, r"sa_2.json: expected a JSON object with 'image', got list"),
    ],
)
def test_dci_with_other_things_for_strings(
    tmp_path: Path, change: dict[str, Any] | None, error: type[Exception], message: str
) -> None:
    dci(tmp_path)
    good = {"image": "sa_2.jpg", "short_caption": "A", "extra_caption": "B"}
    write(tmp_path / "annotations" / "sa_2.json", [] if change is None else good | change)
    with pytest.raises(error, match=message) as raised:
        load_benchmark("dci", tmp_path, num_images=1)
    assert type(raised.value) is error


# ImageInWords.


def iiw(folder: Path, numbers: tuple[int, int, int], images: tuple[str, str, str], aar: str = "test") -> Path:
    """`numbers` of DOCCI_Test, IIW-400 and DCI_Test, with images in the folders `images`."""
    picture = encoded(100)
    rows: list[list[dict[str, Any]]] = [
        [{"image": f"test_{n:05}", "IIW": f"Docci {n}.", "DOCCI": "no"} for n in range(numbers[0])],
        [{"image/key": f"aar_test_{n:05}", "IIW": f"AAR {n}...", "IIW-P5B": "no"} for n in range(numbers[1])],
        [{"image": f"sa_{n}.jpg", "ex_id": "x", "IIW": f"DCI {n}.\n\nU.S."} for n in range(numbers[2])],
    ]
    for part, own, where in zip(("DOCCI_Test", "IIW-400", "DCI_Test"), rows, images, strict=True):
        write(folder / "datasets" / part / "data.jsonl", lines(own) + "\n")
        (folder / where).mkdir(parents=True)
        for row in own:
            name = str(row.get("image", row.get("image/key"))).removesuffix(".jpg")
            (folder / where / f"{name.replace('aar_test', f'aar_{aar}')}.jpg").write_bytes(picture)
    return folder


def test_iiw_is_whole(tmp_path: Path) -> None:
    data = retrieval("iiw", iiw(tmp_path, (100, 400, 112), ("docci", "docci_aar", "dci")))
    assert len(data.texts) == 612
    assert (data.texts[0], data.texts[100], data.texts[500]) == ("Docci 0", "AAR 0", "DCI 0. U. S")
    assert data.image_names[100] == "IIW-400/aar_test_00000.jpg"
    assert data.images[611] == str(tmp_path / "dci" / "sa_111.jpg")
    assert (data.id, data.name, data.protocol["num_duplicate_texts"]) == ("google/imageinwords", "IIW", 0)


def test_iiw_beside_what_its_publishers_ship(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = ("images", "images_aar", "densely_captioned_images/photos")
    data = retrieval("iiw", iiw(tmp_path, (2, 2, 2), places, aar="train"), num_images=6)
    assert data.texts == ["Docci 0", "Docci 1", "AAR 0", "AAR 1", "DCI 0. U. S", "DCI 1. U. S"]
    # LoTLIP's own evaluation takes these for them, too
    assert data.images[2] == str(tmp_path / "images_aar" / "aar_train_00000.jpg")
    assert data.protocol["images_named_train"] == 2
    assert "2 images of IIW-400 are there as train" in caplog.text


def test_broken_iiw(tmp_path: Path) -> None:
    iiw(tmp_path, (2, 1, 1), ("docci", "docci_aar", "dci"))
    with pytest.raises(IncompleteDataError, match="has 4 images of 612"):
        load_benchmark("iiw", tmp_path)
    # an image of DOCCI's training split is none of its test split
    (tmp_path / "docci" / "test_00001.jpg").rename(tmp_path / "docci" / "train_00001.jpg")
    with pytest.raises(IncompleteDataError, match=r"1 images are missing \(docci/test_00001.jpg\)"):
        load_benchmark("iiw", tmp_path, num_images=4)
    file = write(tmp_path / "datasets" / "IIW-400" / "data.jsonl", '{"image/key": "a", "IIW": "b"}\n{"image/key": \n')
    with pytest.raises(ValueError, match=rf"{file}, line 2: .*JSON"):
        load_benchmark("iiw", tmp_path, num_images=1)
    write(file, '["a"]\n')
    with pytest.raises(ValueError, match="line 1: expected an object"):
        load_benchmark("iiw", tmp_path, num_images=1)
    write(file, '{"image/key": "a", "IIW-P5B": "b"}\n')
    with pytest.raises(ValueError, match="data.jsonl, entry 1: there is no 'IIW'"):
        load_benchmark("iiw", tmp_path, num_images=1)
    write(file, '{"image/key": "aar_test_00000", "IIW": null}\n')
    with pytest.raises(IncompleteDataError, match=r"1 captions are missing \(IIW-400/aar_test_00000.jpg: none\)"):
        load_benchmark("iiw", tmp_path, num_images=3)
    write(file, '{"image/key": "aar_test_00000", "IIW": 5}\n')
    with pytest.raises(ValueError, match=r"data.jsonl, entry 1: expected a caption, a string, got 5"):
        load_benchmark("iiw", tmp_path, num_images=1)
    write(file, '{"image/key": null, "IIW": "a"}\n')
    with pytest.raises(ValueError, match=r"data.jsonl, entry 1: 'image/key' must be a string, got None"):
        load_benchmark("iiw", tmp_path, num_images=1)
    file.unlink()
    with pytest.raises(IncompleteDataError, match="holds no IIW-400/data.jsonl"):
        load_benchmark("iiw", tmp_path, num_images=1)


# ShareGPT4V.


def conversation(image: str, text: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": text}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_sharegpt4v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(readers, "JSON_CHUNK", chunk)
    entries = [
        conversation("coco/train2017/000000000009.jpg", "Of COCO."),
        conversation("sam/images/sa_11.jpg", "First “é”. Sea."),
        conversation("llava/llava_pretrain/images/00453/004539375.jpg", "Of LAION."),
        conversation("sam/images/sa_7.jpg", "Second [1, {2}]."),
        conversation("sam/images/sa_5.jpg", "Third"),
    ]
    write(tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(entries, indent=1))
    # as SA-1B is unpacked, and as ShareGPT4V wants it
    write(tmp_path / "sa_000000" / "images" / "sa_11.jpg", encoded(20))
    write(tmp_path / "sa_000001" / "sa_7.jpg", encoded(70, "L"))
    data = retrieval("sharegpt4v-1k", tmp_path, num_images=2)
    assert data.texts == ["First “é”. Sea", "Second [1, {2}]"]
    assert reds(data) == pytest.approx([20, 70], abs=3)
    assert data.name == "ShareGPT4V-1k"
    assert data.protocol["images"].startswith("the first 2 of SAM in share-captioner")
    with pytest.raises(IncompleteDataError, match=r"1 images are missing \(sam/images/sa_5.jpg\)"):
        load_benchmark("sharegpt4v-1k", tmp_path, num_images=3)
    write(tmp_path / "sam" / "images" / "sa_5.jpg", encoded(120))
    assert retrieval("sharegpt4v-10k", tmp_path, num_images=3).texts[2] == "Third"
    with pytest.raises(IncompleteDataError, match=r"the part of SAM\) has 3 images of 10000"):
        load_benchmark("sharegpt4v-10k", tmp_path)


def test_sharegpt4v_as_lotlip_ships_it(tmp_path: Path) -> None:
    entries = [conversation(f"sa_00000{n % 2}/images/sa_{n}.jpg", f"Number {n}.") for n in range(1000)]
    write(tmp_path / "share4v" / "share4v_sam_10k.json", entries)
    for n in range(1000):
        write(tmp_path / entries[n]["image"], b"unread")
    data = retrieval("sharegpt4v-1k", tmp_path)
    assert data.texts == [f"Number {n}" for n in range(1000)]
    assert data.images[3] == str(tmp_path / "sa_000001" / "images" / "sa_3.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"sa_1.jpg"', "share4v_sam_10k.json: .*expected a list"),
        ('[{"image": "a.jpg"}, {"image": "sa_1.jpg", "conv', "broken JSON after 1 entries"),
        ('["sa_1.jpg"]', "entry 1: expected an object"),
        ('[{"image": "sa_1.jpg"}]', "sa_1.jpg: there is no 'conversations'"),
        ('[{"image": "sa_1.jpg", "conversations": [{"value": "Describe."}]}]', r"no conversations\[1\].value"),
        ('[{"image": "sa_1.jpg", "conversations": [0, {"value": null}]}]', r"missing \(sa_1.jpg: none\)"),
        ('[{"image": "sa_1.jpg", "conversations": [0, {"value": 7}]}]', "sa_1.jpg: expected a caption, .* got 7"),
        (
            '[{"image": "sa_1.jpg", "conversations": {"value": "A"}}]',
            r"sa_1.jpg: there is no conversations\[1\].value",
        ),
        ('[{"image": "sa_1.jpg", "conversations": "A boat"}]', r"sa_1.jpg: there is no conversations\[1\].value"),
        ('[{"image": 1, "id": "x"}]', "sam_10k.json, entry x: 'image' must be a string, got 1"),
    ],
)
def test_broken_sharegpt4v(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "share4v_sam_10k.json", content)
    write(tmp_path / "sa_1.jpg", encoded())
    with pytest.raises(ValueError, match=message):
        load_benchmark("sharegpt4v-1k", tmp_path, num_images=1)


# Urban1k.


def urban1k(folder: Path, numbers: range = range(1, 1001)) -> Path:
    for part in ("image", "caption"):
        (folder / part).mkdir(parents=True)
    picture = encoded(100)
    for n in numbers:
        (folder / "image" / f"{n}.jpg").write_bytes(picture)
        (folder / "caption" / f"{n}.txt").write_text(f"Street {n}. A bus.\nA second line.\n", encoding="utf-8")
    return folder


def zipped(folder: Path, root: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{root}/{path.relative_to(folder)}")
        archive.writestr("__MACOSX/._1.jpg", b"junk")
    return buffer.getvalue()


@pytest.mark.parametrize("inside", ["", "Urban1k"])
def test_urban1k_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture, inside: str) -> None:
    folder = urban1k(tmp_path / inside)
    (folder / "image" / "10.jpg").unlink()
    write(folder / "image" / "10.JPEG", encoded(200, "L"))
    write(folder / "image" / "extra.jpg", encoded())
    write(folder / "caption" / "7.txt", "\ufeffStreet 5. A bus.\r\nMore.")
    data = retrieval("urban1k", tmp_path)
    assert data.texts[:3] == ["Street 1. A bus", "Street 2. A bus", "Street 3. A bus"]  # 1, 2, 3; not 1, 10, 100
    assert data.texts[6] == "Street 5. A bus"
    assert len(data.images) == 1000
    assert data.image_names[9] == "image/10.JPEG"
    assert red(data.images[9]) == pytest.approx(200, abs=3)
    assert data.protocol["num_duplicate_texts"] == 1
    assert "1 images are not of the benchmark and left out: extra.jpg" in caplog.text


def test_urban1k_in_its_archive(tmp_path: Path) -> None:
    folder = urban1k(tmp_path / "Urban1k", range(8, 12))
    archive = write(tmp_path / "archive.zip", zipped(folder, "Urban1k"))
    data = retrieval("urban1k", archive, num_images=3)
    assert data.texts == ["Street 8. A bus", "Street 9. A bus", "Street 10. A bus"]
    assert data.images[2] == (folder / "image" / "10.jpg").read_bytes()
    assert data.images[-1] == data.images[2]
    assert len(data.images[1:]) == 2
    with pytest.raises(IndexError):
        data.images[3]


def test_broken_urban1k(tmp_path: Path) -> None:
    folder = urban1k(tmp_path, range(1, 1001))
    (folder / "caption" / "17.txt").unlink()
    with pytest.raises(IncompleteDataError, match=r"of 1000 images .*1 captions are missing \(caption/17.txt\)"):
        load_benchmark("urban1k", tmp_path)
    (folder / "image" / "17.jpg").unlink()
    with pytest.raises(IncompleteDataError, match="has 999 images of 1000"):
        load_benchmark("urban1k", tmp_path)
    for n in (2, 3, 4, 5):
        (folder / "image" / f"{n}.jpg").unlink()
    with pytest.raises(
        IncompleteDataError, match=r"4 images are missing \(image/2.jpg, image/3.jpg, image/4.jpg and 1 more\)"
    ):
        load_benchmark("urban1k", tmp_path, num_images=10)
    write(folder / "caption" / "1.txt", "\nA second line.")
    with pytest.raises(IncompleteDataError, match=r"1 captions are missing \(image/1.jpg: empty\)"):
        load_benchmark("urban1k", tmp_path, num_images=1)
    write(folder / "caption" / "1.txt", b"Caf\xe9.")
    with pytest.raises(ValueError, match=r"1.txt: not UTF-8 \(.* at byte 3\)"):
        load_benchmark("urban1k", tmp_path, num_images=1)


# DOCCI.


def docci(folder: Path) -> Path:
    rows = [
        ("train_00000", "train", 10, "Train."),
        ("test_00000", "test", 60, "A 3.5 m door."),
        ("test_00001", "test", 110, "A 3. 5 m door"),
        ("qual_dev_0", "qual_dev", 160, "Dev."),
    ]
    described = [
        {"example_id": key, "split": split, "image_file": f"{key}.jpg", "description": text}
        for key, split, _, text in rows
    ]
    write(folder / "docci_descriptions.jsonlines", lines(described))
    for key, _, value, _ in rows:
        write(folder / "images" / f"{key}.jpg", encoded(value))
    return folder


@pytest.mark.usefixtures("_miniature")
def test_docci(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    docci(tmp_path)
    data = retrieval("docci", tmp_path)
    assert data.texts == ["A 3. 5 m door"] * 2
    assert reds(data) == pytest.approx([60, 110], abs=3)
    assert (data.split, data.protocol["num_duplicate_texts"]) == ("test", 1)
    assert "left out" not in caplog.text  # the images of other splits are no strangers
    assert retrieval("docci", tmp_path, split="qual_dev").texts == ["Dev"]
    with pytest.raises(ValueError, match="has no 'val'; it has qual_dev, test, train"):
        load_benchmark("docci", tmp_path, split="val")
    write(tmp_path / "images" / "other.png", encoded(format="PNG"))
    (tmp_path / "images" / "test_00001.jpg").unlink()
    with pytest.raises(IncompleteDataError, match=r"of 2 .* 1 images are missing \(images/test_00001.jpg\)"):
        load_benchmark("docci", tmp_path)
    retrieval("docci", tmp_path, num_images=1)
    assert "1 images are not of the benchmark and left out: other.png" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"description": None}, r"1 captions are missing \(test_0.jpg: none\)"),
        ({"description": 4}, "docci_descriptions.jsonlines, entry 1: expected a caption, a string, got 4"),
        ({"image_file": 4}, "docci_descriptions.jsonlines, entry 1: 'image_file' must be a string, got 4"),
        ({"split": None}, "docci_descriptions.jsonlines, entry 1: 'split' must be a string, got None"),
    ],
)
def test_docci_with_other_things_for_strings(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"split": "test", "image_file": "test_0.jpg", "description": "A."}
    write(tmp_path / "docci_descriptions.jsonlines", lines([row | change]))
    write(tmp_path / "images" / "test_0.jpg", encoded())
    with pytest.raises(ValueError, match=message):
        load_benchmark("docci", tmp_path, num_images=1)


def test_docci_has_5000_images(tmp_path: Path) -> None:
    with pytest.raises(IncompleteDataError, match="has 2 images of 5000"):
        load_benchmark("docci", docci(tmp_path))


@pytest.mark.usefixtures("_miniature")
def test_docci_from_parquet(tmp_path: Path) -> None:
    features = Features({"image": ImageFeature(), "example_id": Value("string"), "description": Value("string")})
    rows = [
        {
            "image": {"bytes": encoded(50 * n), "path": f"test_{n}.jpg"},
            "example_id": f"test_{n}",
            "description": f"D.{n}",
        }
        for n in range(3)
    ]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(
        tmp_path / "data" / "test-00000-of-00001-[a].parquet"
    )  # no pattern
    Dataset.from_list(rows[:1], features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    data = retrieval("docci", tmp_path)
    assert data.texts == ["D. 0", "D. 1", "D. 2"]
    assert data.images[1] == encoded(50)
    assert data.protocol["text_column"] == "description"
    assert retrieval("docci", tmp_path, text_column="example_id").texts == ["test_0", "test_1", "test_2"]
    assert retrieval("docci", tmp_path, split="train").texts == ["D. 0"]
    with pytest.raises(ValueError, match=r"has no column 'captions'; it has image, example_id, description"):
        load_benchmark("docci", tmp_path, text_column="captions")
    (tmp_path / "data" / "test-00000-of-00001-[a].parquet").unlink()
    assert len(retrieval("docci", tmp_path).images) == 1  # a mirror may call it so, if it is of that number
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match=r"has 'train' alone, of 3 images, and DOCCI is 'test', of 1\. .*--split train"
    ):
        load_benchmark("docci", tmp_path)


# MSCOCO and Flickr30k.


def karpathy(folder: Path, task: str) -> Path:
    rows = []
    for n, split in enumerate(("train", "test", "val", "test", "restval")):
        texts = [f"Image {n}, caption {k}. " for k in range(7 if n == 1 else 5)]
        row: dict[str, Any] = {
            "split": split,
            "sentences": [{"raw": text, "tokens": []} for text in texts],
            "imgid": n,
        }
        if task == "coco":
            row |= {"filepath": "val2014", "filename": f"COCO_val2014_{n:012}.jpg", "cocoid": n}
        else:
            row |= {"filename": f"{n}.jpg"}
        rows.append(row)
        where = "val2014" if task == "coco" else "flickr30k-images"
        write(folder / where / row["filename"], encoded(50 * n))
    rows[3]["sentences"][4]["raw"] = rows[3]["sentences"][0]["raw"]
    write(folder / f"dataset_{task}.json", {"images": rows, "dataset": task})
    return folder


@pytest.mark.usefixtures("_miniature")
@pytest.mark.parametrize("task", ["coco", "flickr30k"])
def test_five_captions_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture, task: str) -> None:
    karpathy(tmp_path, task)
    images = tmp_path / ("val2014" if task == "coco" else "flickr30k-images")
    write(images / "stranger.jpg", encoded())
    data = retrieval(task, tmp_path)
    assert data.texts[:6] == [*(f"Image 1, caption {k}. " for k in range(5)), "Image 3, caption 0. "]
    assert list(data.text_to_image) == [0] * 5 + [1] * 5
    assert reds(data) == pytest.approx([50, 150], abs=3)
    assert data.protocol["normalization"] is None
    assert data.protocol["num_duplicate_texts"] == 1
    assert "1 images are not of the benchmark and left out: stranger.jpg" in caplog.text
    assert retrieval(task, tmp_path, split="val", normalize=True).texts[0] == "Image 2, caption 0"
    assert len(retrieval(task, tmp_path, num_images=1).texts) == 5


@pytest.mark.parametrize("task", ["coco", "flickr30k"])
def test_broken_captions_of_karpathy(tmp_path: Path, task: str) -> None:
    karpathy(tmp_path, task)
    with pytest.raises(IncompleteDataError, match=f"has 2 images of {TASKS[task].num_images}"):
        load_benchmark(task, tmp_path)
    with pytest.raises(ValueError, match="has no 'dev'; it has restval, test, train, val"):
        load_benchmark(task, tmp_path, split="dev")
    file = tmp_path / f"dataset_{task}.json"
    content = json.loads(file.read_text())
    content["images"][3]["sentences"].pop()
    write(file, content)
    name = content["images"][1]["filename"]
    next(tmp_path.rglob(name)).unlink()
    message = rf"1 images are missing \(\S+{name}\), and 1 captions are missing \(\S+: 4 of 5\)"
    with pytest.raises(IncompleteDataError, match=message):
        load_benchmark(task, tmp_path, num_images=2)
    write(file, '{"images": [\n{"split": "test",}]}')
    with pytest.raises(ValueError, match=rf"dataset_{task}.json, line 2: broken JSON"):
        load_benchmark(task, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": [{"raw": None}] * 5}, r"5 captions are missing \(val2014/a.jpg: none, .* and 2 more\)"),
        ({"sentences": [{"tokens": []}] * 5}, r"5 captions are missing"),
        ({"sentences": None}, r"1 captions are missing \(val2014/a.jpg: 0 of 5\)"),
        ({"sentences": [{"raw": 3}] * 5}, "dataset_coco.json, val2014/a.jpg: expected a caption, a string, got 3"),
        ({"sentences": {"raw": "A"}}, "dataset_coco.json, val2014/a.jpg: expected a list of captions, got dict"),
        ({"filename": 3}, r"dataset_coco.json, images\[0\]: 'filename' must be a string, got 3"),
        ({"filepath": None}, r"dataset_coco.json, images\[0\]: 'filepath' must be a string, got None"),
        (3, r"dataset_coco.json, images\[0\]: expected a JSON object with 'split', got int"),
        (None, "dataset_coco.json: expected a list of images, got dict"),
    ],
)
def test_karpathy_with_other_things_for_strings(tmp_path: Path, change: Any, message: str) -> None:
    row = {"split": "test", "filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": "A"}] * 5}
    rows = {} if change is None else [row | change if isinstance(change, dict) else change]
    write(tmp_path / "dataset_coco.json", {"images": rows})
    write(tmp_path / "val2014" / "a.jpg", encoded())
    with pytest.raises(ValueError, match=message):
        load_benchmark("coco", tmp_path, num_images=1)


@pytest.mark.parametrize("task", ["coco", "flickr30k"])
def test_tables_of_fewer_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    features = Features({"image": ImageFeature(), "caption": List(Value("string"))})

    def save(name: str, numbers: list[int]) -> Path:
        rows = [
            {"image": {"bytes": encoded(n), "path": None}, "caption": [f"{n} {k}" for k in range(number)]}
            for n, number in enumerate(numbers)
        ]
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / name)
        return tmp_path / name

    lacking = save("lacking", [3, 5, 5, 0])
    message = r"of 4 images .*, 2 captions are missing \(row 0: 3 of 5, row 3: 0 of 5\)"
    with pytest.raises(IncompleteDataError, match=message):
        load_benchmark(task, lacking, num_images=4, split="train")
    monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task], num_images=4, num_texts=20))
    for options in ({}, {"split": "train"}):
        with pytest.raises(IncompleteDataError, match=message):
            load_benchmark(task, lacking, **options)
    assert len(retrieval(task, save("whole", [5, 6, 5, 5])).texts) == 20


def test_the_number_of_texts_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reader, the whole has as many texts as are reported on."""
    dci(tmp_path)
    monkeypatch.setitem(TASKS, "dci", dataclasses.replace(TASKS["dci"], num_images=4, num_texts=5))
    with pytest.raises(IncompleteDataError, match="its 4 images have 4 texts, not 5"):
        load_benchmark("dci", tmp_path)
    assert len(retrieval("dci", tmp_path, num_images=4).texts) == 4
    assert len(retrieval("dci", tmp_path, split="test").texts) == 1


def test_tables_with_other_things_for_captions(tmp_path: Path) -> None:
    features = Features({"image": ImageFeature(), "description": Value("int64")})
    rows = [{"image": {"bytes": encoded(), "path": None}, "description": 7}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "numbers")
    with pytest.raises(ValueError, match=r"numbers .*row 0, column 'description': expected a caption, .* got 7"):
        load_benchmark("docci", tmp_path / "numbers", num_images=1)
    features = Features({"image": ImageFeature(), "description": Value("string")})
    rows = [{"image": {"bytes": encoded(), "path": None}, "description": None}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "nulls")
    with pytest.raises(IncompleteDataError, match=r"1 captions are missing \(row 0: none\)"):
        load_benchmark("docci", tmp_path / "nulls", num_images=1)


@pytest.mark.usefixtures("_miniature")
def test_webdataset_of_five_captions(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as shard:
        for n in range(2):
            for name, content in ((f"s{n}.jpg", encoded(100 * n)), (f"s{n}.txt", captions_text(n).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    data = retrieval("coco", tmp_path)
    assert data.texts == [f"{n} {k}" for n in range(2) for k in range(5)]
    assert data.images[1] == encoded(100)


def captions_text(number: int) -> str:
    return "\n".join(f"{number} {k}" for k in range(6)) + "\n"


# ImageNet.

WNIDS = ("n01440764", "n01443537", "n02012849", "n03126707")
SYNSETS = (
    "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02012849 crane\nn03126707 crane, hoist\n"
)
# the class of each validation image in the miniature
ANSWERS = {1: 3, 2: 0, 3: 1, 4: 2, 5: 0}


def imagenet(folder: Path, flat: bool) -> Path:
    rows = [("ImageId", "PredictionString")]
    for number, label in ANSWERS.items():
        name = f"ILSVRC2012_val_{number:08d}"
        content = encoded(40 * number, ("RGB", "L", "CMYK")[number % 3])
        if flat:
            write(folder / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{name}.JPEG", content)
            rows.append((name, f"{WNIDS[label]} 111 108 441 193 {WNIDS[label]} 1 2 3 4 "))
        else:
            write(folder / "val" / WNIDS[label] / f"{name}.JPEG", content)
    if flat:
        buffer = io.StringIO()
        csv.writer(buffer).writerows(reversed(rows[1:]))
        write(folder / "LOC_val_solution.csv", "ImageId,PredictionString\n" + buffer.getvalue())
    write(folder / "LOC_synset_mapping.txt", SYNSETS)
    return folder


@pytest.mark.parametrize("flat", [False, True])
def test_imagenet(tmp_path: Path, caplog: pytest.LogCaptureFixture, flat: bool) -> None:
    data = classes("imagenet-1k", imagenet(tmp_path, flat), num_images=5)
    assert list(data.labels) == [3, 0, 1, 2, 0]
    assert reds(data) == pytest.approx([40, 80, 120, 160, 200], abs=3)
    assert list(data.class_names) == ["tench", "goldfish", "crane", "crane"]
    assert data.protocol == {"class_names": "the first synonyms of LOC_synset_mapping.txt", "first_images": 5}
    assert "1 names stand for several classes, which nothing can tell apart then: crane" in caplog.text
    assert (data.id, data.name, data.split) == ("ILSVRC/imagenet-1k", "ImageNet-1k", "validation")
    assert list(classes("imagenet-1k", tmp_path, num_images=2).labels) == [3, 0]
    if not flat:
        assert list(classes("imagenet-1k", tmp_path / "val", num_images=5).labels) == [3, 0, 1, 2, 0]


def test_imagenet_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet(tmp_path / "data", flat=False)
    (tmp_path / "data" / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(
        ValueError, match=r"its classes have no names.*`class_names` \(--class-names\): openai, .*file"
    ):
        load_benchmark("imagenet-1k", tmp_path / "data", num_images=5)
    names = write(tmp_path / "names.txt", "a tench\nein Goldfisch\n鶴\na crane\n\n")
    data = classes("imagenet-1k", tmp_path / "data", num_images=5, class_names=names)
    assert list(data.class_names) == ["a tench", "ein Goldfisch", "鶴", "a crane"]
    assert data.protocol["class_names"] == "the file names.txt"
    write(names, "a\nb\n")
    with pytest.raises(ValueError, match=r"the file names.txt has 2 names, and .*data 4 classes"):
        load_benchmark("imagenet-1k", tmp_path / "data", num_images=5, class_names=names)
    write(names, "a\n\nb\nc\n")
    with pytest.raises(ValueError, match=r"names.txt, line 2: empty"):
        load_benchmark("imagenet-1k", tmp_path / "data", num_images=5, class_names=names)
    with pytest.raises(FileNotFoundError, match="`class_names`: clip is no file; pass openai, or a file"):
        load_benchmark("imagenet-1k", tmp_path / "data", num_images=5, class_names="clip")

    # open_clip's own file is read, and open_clip, which may not import here, is not
    package = tmp_path / "site" / "open_clip"
    write(package / "__init__.py", "raise ImportError('no torchvision')")
    write(package / "zero_shot_metadata.py", "IMAGENET_CLASSNAMES = ['w', 'x', 'y', 'z']")
    write(tmp_path / "site" / "open_clip_torch-9.9.dist-info" / "METADATA", "Name: open_clip_torch\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    data = classes("imagenet-1k", tmp_path / "data", num_images=5, class_names="openai")
    assert list(data.class_names) == ["w", "x", "y", "z"]
    assert data.protocol["class_names"] == "openai (open_clip 9.9)"
    with pytest.raises(ValueError, match=r"openai \(open_clip 9.9\) has 4 names, and .* 3 classes"):
        (tmp_path / "data" / "val" / WNIDS[3] / "ILSVRC2012_val_00000001.JPEG").unlink()
        (tmp_path / "data" / "val" / WNIDS[3]).rmdir()
        load_benchmark("imagenet-1k", tmp_path / "data", num_images=4, class_names="openai")


def test_openai_class_names_need_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="class names are in open_clip: pip install open_clip_torch"):
        load_benchmark("imagenet-1k", imagenet(tmp_path, flat=False), num_images=5, class_names="openai")


def test_incomplete_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, flat = imagenet(tmp_path / "folders", flat=False), imagenet(tmp_path / "flat", flat=True)
    with pytest.raises(IncompleteDataError, match="has 4 classes of 1000"):
        load_benchmark("imagenet-1k", folders)
    with pytest.raises(IncompleteDataError, match="has 5 images of 50000"):
        load_benchmark("imagenet-1k", flat)
    monkeypatch.setattr(benchmarks, "IMAGENET_CLASSES", 4)
    monkeypatch.setitem(TASKS, "imagenet-1k", dataclasses.replace(TASKS["imagenet-1k"], num_images=5))
    assert len(classes("imagenet-1k", folders).images) == len(classes("imagenet-1k", flat).images) == 5
    (folders / "val" / WNIDS[0] / "ILSVRC2012_val_00000005.JPEG").unlink()
    with pytest.raises(IncompleteDataError, match="lacks 1 of 5 images: ILSVRC2012_val_00000005"):
        load_benchmark("imagenet-1k", folders)
    (folders / "val" / WNIDS[0] / "ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(IncompleteDataError, match="holds no image of 1 of 4 classes: n01440764"):
        load_benchmark("imagenet-1k", folders)
    (flat / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(IncompleteDataError, match=r"1 images are missing \(val/ILSVRC2012_val_00000003.JPEG\)"):
        load_benchmark("imagenet-1k", flat)
    write(flat / "LOC_synset_mapping.txt", SYNSETS.splitlines()[0])
    with pytest.raises(ValueError, match="does not name n03126707"):
        load_benchmark("imagenet-1k", flat, num_images=2)
    write(flat / "LOC_synset_mapping.txt", "n01440764 tench\ntench\n")
    with pytest.raises(ValueError, match="LOC_synset_mapping.txt, line 2: expected a class and its names"):
        load_benchmark("imagenet-1k", flat, num_images=2)
    write(flat / "LOC_synset_mapping.txt", SYNSETS)
    write(flat / "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
    with pytest.raises(ValueError, match=r"LOC_val_solution.csv, line 2: expected ImageId,PredictionString"):
        load_benchmark("imagenet-1k", flat, num_images=2)
    (flat / "LOC_val_solution.csv").unlink()
    with pytest.raises(IncompleteDataError, match="holds no LOC_val_solution.csv"):
        load_benchmark("imagenet-1k", flat, num_images=2)


def test_imagenet_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    for label in range(12):
        for n in range(2):
            write(folder / str(label) / f"{'ab'[n]}é.jpeg", encoded(20 * label))
    names = write(tmp_path / "names.txt", "\n".join(f"class {n}" for n in range(12)))
    data = classes("imagenet-v2", tmp_path, num_images=24, class_names=names)
    assert list(data.labels) == [*range(12), *range(12)]  # 10 and 11 come last
    assert reds(data) == pytest.approx([20 * n for n in (*range(12), *range(12))], abs=3)
    assert (data.image_names[10], data.image_names[22]) == ("10/aé.jpeg", "10/bé.jpeg")
    first = classes("imagenet-v2", tmp_path, num_images=13, class_names=names)
    assert list(first.labels) == [*range(12), 0]
    assert first.image_names[12] == "0/bé.jpeg"
    with pytest.raises(ValueError, match=r"its classes have no names.*--class-names"):
        load_benchmark("imagenet-v2", folder, num_images=24)
    with pytest.raises(IncompleteDataError, match="lacks 988 of the folders 0 to 999: 12, 13, 14 and 985 more"):
        load_benchmark("imagenet-v2", folder, class_names=names)
    monkeypatch.setattr(benchmarks, "IMAGENET_CLASSES", 12)
    monkeypatch.setitem(TASKS, "imagenet-v2", dataclasses.replace(TASKS["imagenet-v2"], num_images=24))
    whole = classes("imagenet-v2", folder, class_names=names)
    assert list(whole.labels) == [n for n in range(12) for _ in range(2)]
    assert whole.image_names[20:22] == ["10/aé.jpeg", "10/bé.jpeg"]
    (folder / "3" / "aé.jpeg").unlink()
    with pytest.raises(IncompleteDataError, match="has 2 images in each folder; of its folders 3 has 1"):
        load_benchmark("imagenet-v2", folder, class_names=names)


# Classes of one's own.


def test_folders_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "red_fox" / "1.png", encoded(30, "L", "PNG"))
    write(tmp_path / "Eule" / "süß" / "2.JPG", encoded(90))
    write(tmp_path / "Eule" / "notes.txt", "no image")
    write(tmp_path / ".hidden" / "3.png", encoded(0, format="PNG"))
    write(tmp_path / "cover.png", encoded(0, format="PNG"))
    data = classes("classification", tmp_path)
    assert (list(data.labels), list(data.class_names)) == ([0, 1], ["Eule", "red fox"])
    assert reds(data) == pytest.approx([90, 30], abs=3)
    assert data.protocol == {"class_names": "folder names, _ as space"}
    assert data.name == data.id == tmp_path.name
    assert "left out: cover.png" in caplog.text
    (tmp_path / "empty class").mkdir()
    with pytest.raises(IncompleteDataError, match="holds no image of 1 of 3 classes: empty class"):
        load_benchmark("classification", tmp_path)


@pytest.mark.parametrize("form", ["{}", "{}-{}", "{}_{}"])
@pytest.mark.parametrize("split", [None, "val"])
def test_folders_named_by_wordnet_ids_are_no_words(tmp_path: Path, form: str, split: str | None) -> None:
    for wnid, name in zip(WNIDS[:2], ("tench", "goldfish"), strict=True):
        write(tmp_path / "data" / (split or "") / form.format(wnid, name) / "1.png", encoded(format="PNG"))
    with pytest.raises(ValueError, match=r"--class-names"):
        load_benchmark("classification", tmp_path / "data", split=split)
    names = write(tmp_path / "names.txt", "tench\ngoldfish\n")
    data = classes("classification", tmp_path / "data", split=split, class_names=names)
    assert (list(data.labels), list(data.class_names)) == ([0, 1], ["tench", "goldfish"])


@pytest.mark.parametrize(
    ("feature", "labels"), [(Value("string"), list(WNIDS[:2])), (ClassLabel(names=list(WNIDS[:2])), [0, 1])]
)
def test_tables_of_wordnet_ids_are_no_words(tmp_path: Path, feature: Any, labels: list[Any]) -> None:
    table(labels, feature).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match=r"--class-names"):
        load_benchmark("classification", tmp_path / "data.parquet")
    names = write(tmp_path / "names.txt", "tench\ngoldfish\n")
    assert list(classes("classification", tmp_path / "data.parquet", class_names=names).labels) == [0, 1]


def test_the_first_images_of_folders_are_of_all_classes(tmp_path: Path) -> None:
    for name, numbers in {"cat": range(4), "dog": range(1), "elk": range(3)}.items():
        for n in numbers:
            write(tmp_path / name / f"{n}.png", encoded(format="PNG"))
    whole = classes("classification", tmp_path)
    assert list(whole.labels) == [0, 0, 0, 0, 1, 2, 2, 2]
    assert "order" not in whole.protocol
    first = classes("classification", tmp_path, num_images=6)
    assert list(first.image_names) == ["cat/0.png", "dog/0.png", "elk/0.png", "cat/1.png", "elk/1.png", "cat/2.png"]
    assert [str(image).split("/")[-2] for image in first.images] == [first.class_names[n] for n in first.labels]
    assert first.protocol["first_images"] == 6
    assert first.protocol["order"] == "the first image of each class, then the second, ..."
    assert list(classes("classification", tmp_path, num_images=2).labels) == [0, 1]
    assert sorted(classes("classification", tmp_path, num_images=8).labels) == list(whole.labels)


def test_archives_beside_images_are_no_tables(tmp_path: Path) -> None:
    write(tmp_path / "classes" / "cat" / "1.png", encoded(format="PNG"))
    write(tmp_path / "classes" / "all.tar", b"")
    assert list(classes("classification", tmp_path / "classes").class_names) == ["cat"]
    write(karpathy(tmp_path / "coco", "coco") / "val2014.tar", b"")
    assert len(retrieval("coco", tmp_path / "coco", num_images=2).images) == 2


def test_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name / "1.png", encoded(format="PNG"))
    with pytest.raises(ValueError, match=r"holds test, train; say which \(--split\)"):
        load_benchmark("classification", tmp_path)
    data = classes("classification", tmp_path, split="test")
    assert (list(data.class_names), data.split) == (["cat", "dog"], "test")
    with pytest.raises(ValueError, match="holds no folder 'val'"):
        load_benchmark("classification", tmp_path, split="val")


def table(labels: list[Any], label: Any, image: bool = True) -> Dataset:
    rows = [
        {"image": {"bytes": encoded(50 * n), "path": None} if image else None, "label": value}
        for n, value in enumerate(labels)
    ]
    return Dataset.from_list(rows, features=Features({"image": ImageFeature(), "label": label}))


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        ([2, 0, 2], ClassLabel(names=["red_fox", "owl", "elk"]), ["red fox", "owl", "elk"]),
        (["owl", "elk", "owl"], Value("string"), ["elk", "owl"]),
    ],
)
def test_tables_of_classes(tmp_path: Path, labels: list[Any], feature: Any, expected: list[str]) -> None:
    table(labels, feature).to_parquet(tmp_path / "data.parquet")
    table(labels, feature).save_to_disk(tmp_path / "saved")
    DatasetDict({"test": table(labels, feature)}).save_to_disk(tmp_path / "dict")
    for source in (tmp_path / "data.parquet", tmp_path / "saved", tmp_path / "dict"):
        data = classes("classification", source)
        assert [data.class_names[place] for place in data.labels] == [
            value if isinstance(value, str) else expected[value] for value in labels
        ]
        assert list(data.class_names) == expected
        assert data.images[1] == encoded(50)
        first = classes("classification", source, num_images=2)
        assert (len(first.images), list(first.class_names)) == (2, expected)


def test_broken_tables_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    table([3, 1], Value("int64")).to_parquet(file)
    with pytest.raises(ValueError, match="its classes have no names"):
        load_benchmark("classification", file)
    names = write(tmp_path / "names.txt", "a\nb\nc\nd\ne")
    assert list(classes("classification", file, class_names=names).labels) == [3, 1]
    write(names, "a\nb\nc")
    with pytest.raises(ValueError, match="class 3, and there are 3 names"):
        load_benchmark("classification", file, class_names=names)
    table([0, None], ClassLabel(names=["a"])).to_parquet(file)
    with pytest.raises(IncompleteDataError, match="1 rows of .* have no class: row 1"):
        load_benchmark("classification", file)
    table([0.5], Value("float64")).to_parquet(file)
    with pytest.raises(ValueError, match="'label' of .* holds neither numbers nor names"):
        load_benchmark("classification", file)
    table(["a"], Value("string")).rename_column("label", "kind").to_parquet(file)
    with pytest.raises(ValueError, match=r"has the columns image, kind, .*`label_column` \(--label-column\)"):
        load_benchmark("classification", file)
    assert list(classes("classification", file, label_column="kind").class_names) == ["a"]
    table(["a", "b"], Value("string"), image=False).to_parquet(file)
    data = classes("classification", file)
    with pytest.raises(IncompleteDataError, match="row 1 of .* has no image in the column 'image'"):
        data.images[1]
    write(file, b"no parquet")
    with pytest.raises(ValueError, match=r"data.parquet: cannot be opened \("):
        load_benchmark("classification", file)
    with pytest.raises(ValueError, match="expected a folder, or a file of one of .csv"):
        load_benchmark("classification", write(tmp_path / "data.xml", "<a/>"))


# Records of one's own.


def records(folder: Path) -> Path:
    rows = [
        {"file_name": f"{n}é.png", "short_caption": f"Short {n}.", "long_captions": [f"Long {n}. A.", f"Other {n}."]}
        for n in range(3)
    ]
    for n in range(3):
        write(folder / f"{n}é.png", encoded(80 * n, format="PNG"))
    write(folder / "metadata.jsonl", lines(rows))
    return folder


def test_records(tmp_path: Path) -> None:
    folder = records(tmp_path / "mine")
    data = retrieval("retrieval", folder)
    assert data.texts == ["Long 0. A", "Long 1. A", "Long 2. A"]
    assert reds(data) == [0, 80, 160]
    assert data.id == data.name == "mine"
    assert data.protocol["captions"] == "long"
    every = retrieval("retrieval", folder, captions="all", num_images=2)
    assert every.texts == ["Long 0. A", "Other 0", "Long 1. A", "Other 1"]
    assert list(every.text_to_image) == [0, 0, 1, 1]
    assert retrieval("retrieval", folder, captions="short").texts == ["Short 0.", "Short 1.", "Short 2."]
    named = retrieval("retrieval", folder, text_column="short_caption", normalize=False)
    assert (named.texts[0], named.protocol["text_column"]) == ("Short 0.", "short_caption")
    with pytest.raises(ValueError, match="there is no column 'caption'"):
        load_benchmark("retrieval", folder, text_column="caption")
    with pytest.raises(ValueError, match="`split`: .*holds no 'test'"):
        load_benchmark("retrieval", folder, split="test")
    (folder / "1é.png").unlink()
    with pytest.raises(IncompleteDataError, match=r"of 3 .*1 images are missing \(1é.png\)"):
        load_benchmark("retrieval", folder)


def test_columns_of_records_are_to_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write(folder / "captions.csv", "picture,alt\na.png,One.\n")
    which = "--image-column.*--text-column.*--captions"
    with pytest.raises(ValueError, match=f"there is no column .* There are: 'picture', 'alt'.*{which}"):
        load_benchmark("retrieval", folder)
    with pytest.raises(ValueError, match=f"there is no column 'image'.*{which}"):
        load_benchmark("retrieval", folder, text_column="alt")
    write(folder / "a.png", encoded(format="PNG"))
    assert retrieval("retrieval", folder, text_column="alt", image_column="picture").texts == ["One"]
    with pytest.raises(IncompleteDataError, match="Where to get it: it is your own. Pass .*--image-column and --text"):
        load_benchmark("retrieval", folder, text_column="alt", image_column="picture", num_images=2)
    write(folder / "captions.csv", "")
    write(folder / "captions.jsonl", lines([{"image": "a.png", "long_captions": [3]}]))
    with pytest.raises(ValueError, match="captions.jsonl, row 1: a caption must be a text, got 3"):
        load_benchmark("retrieval", folder / "captions.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_values_of_tables_are_as_written(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["NA", "None", "2023", "2023-01-01"]
    labels = ["007", "NA", "null", "1e5"]
    rows = [
        {"image": f"{n}.png", "caption": caption, "label": label}
        for n, (caption, label) in enumerate(zip(captions, labels, strict=True))
    ]
    for n in range(4):
        write(tmp_path / f"{n}.png", encoded(90 * n, format="PNG"))
    if suffix in ("csv", "tsv"):
        mark = "," if suffix == "csv" else "\t"
        text = "".join(mark.join(row) + "\n" for row in [rows[0].keys(), *(row.values() for row in rows)])
    else:
        text = lines(rows) if suffix == "jsonl" else json.dumps(rows)
    file = write(tmp_path / f"rows.{suffix}", "\ufeff" + text)
    assert retrieval("retrieval", file, text_column="caption", normalize=False).texts == captions
    data = classes("classification", file)
    assert [data.class_names[label] for label in data.labels] == labels
    monkeypatch.chdir("/")
    assert [str(image) for image in data.images] == [str(tmp_path / f"{n}.png") for n in range(4)]


def test_numbers_of_classes_in_csv(tmp_path: Path) -> None:
    write(tmp_path / "0.png", encoded(format="PNG"))
    file = write(tmp_path / "rows.csv", "image,label\n0.png,1\n0.png,0\n")
    with pytest.raises(ValueError, match="--class-names"):
        load_benchmark("classification", file)
    names = write(tmp_path / "names.txt", "cat\ndog\n")
    assert list(classes("classification", file, class_names=names).labels) == [1, 0]


def test_a_row_for_each_caption(tmp_path: Path) -> None:
    """Rows with the same image are one image with several texts, not several images that tie."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png", encoded(format="PNG"))
    rows = "image,caption\na.png,One.\nb.png,Two.\na.png,Three.\n"
    data = retrieval("retrieval", write(tmp_path / "captions.csv", rows), text_column="caption")
    assert data.texts == ["One", "Three", "Two"]
    assert list(data.text_to_image) == [0, 0, 1]
    assert list(data.images) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert retrieval("retrieval", tmp_path / "captions.csv", text_column="caption", num_images=1).texts == [
        "One",
        "Three",
    ]
    write(tmp_path / "captions.csv", "image,caption\na.png,One.\nb.png,...\n")
    with pytest.raises(IncompleteDataError, match=r"1 captions are missing \(b.png: empty\)"):
        load_benchmark("retrieval", tmp_path / "captions.csv", text_column="caption")
    write(tmp_path / "captions.csv", "image,caption\nhttps://example.org/a.png,One.\n")
    with pytest.raises(ValueError, match="an address, .* Download the images"):
        load_benchmark("retrieval", tmp_path / "captions.csv", text_column="caption")


def test_records_in_parquet_and_in_shards(tmp_path: Path) -> None:
    rows = [
        {
            "image": {"bytes": encoded(90 * n), "path": None},
            "short_caption": "s",
            "long_captions": [f"L {n}."],
            "id": f"r{n}",
        }
        for n in range(3)
    ]
    kinds = {"short_caption": Value("string"), "long_captions": List(Value("string")), "id": Value("string")}
    Dataset.from_list(rows, features=Features({"image": ImageFeature(), **kinds})).to_parquet(tmp_path / "a.parquet")
    data = retrieval("retrieval", tmp_path / "a.parquet", num_images=2)
    assert (data.texts, list(data.image_names)) == (["L 0", "L 1"], ["r0", "r1"])
    assert list(data.images) == [encoded(0), encoded(90)]

    shard = tmp_path / "shards" / "0.tar"
    for texts in (["A.", "B."], ["C.", "D."]):  # other shards under the same name are other data
        shard.parent.mkdir(exist_ok=True)
        with tarfile.open(shard, "w") as tar:
            for n, text in enumerate(texts):
                caption = json.dumps({"long_captions": [text], "short_caption": "s"}).encode()
                for name, content in ((f"x{n}.jpg", encoded(90 * n)), (f"x{n}.json", caption)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        os.utime(shard, (len(texts[0]), ord(texts[0][0])))
        data = retrieval("retrieval", shard.parent)
        assert data.texts == [text[0] for text in texts]
        assert data.images[1] == encoded(90)
        assert data.image_names[1] == "0.tar/x1"
    shard.write_bytes(shard.read_bytes()[:3500])
    with pytest.raises(ValueError, match="0.tar: .*unexpected end"):
        load_benchmark("retrieval", shard.parent)


# Scenes.


def test_scenes() -> None:
    data = retrieval("scenes", num_images=8)
    drawn = scenes_dataset(8, split="test")
    for place, (image, row) in enumerate(zip(data.images, drawn, strict=True)):
        assert np.array_equal(np.asarray(load_image(image)), np.asarray(row["image"]))
        assert data.texts[place] == normalize_caption(row["long_captions"][0])
    assert data.image_names == drawn["id"][:]
    one = scene(1, split="validation")
    short = retrieval("scenes", split="validation", captions="short", num_images=4)
    assert short.texts == [short_caption(one)] * 4  # of one group
    assert short.protocol["num_duplicate_texts"] == 3
    every = retrieval("scenes", split="validation", captions="all", num_images=2, normalize=False)
    assert every.texts[3:] == long_captions(one)
    assert list(every.text_to_image) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="`split` must be validation or test"):
        load_benchmark("scenes", split="train")
    with pytest.raises(ValueError, match="scenes are drawn, not read"):
        load_benchmark("scenes", "folder")


def test_scenes_are_as_many_as_in_the_quickstart() -> None:
    assert len(retrieval("scenes", captions="short").images) == 500


# The Hub, on loopback.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as hub:
        use_in_process(monkeypatch, hub, tmp_path / "hub-cache")
        # `datasets` has copies of its own
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        address = hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield hub


def parquet(dataset: Dataset, folder: Path) -> bytes:
    dataset.to_parquet(folder / "table.parquet")
    return (folder / "table.parquet").read_bytes()


@pytest.mark.usefixtures("_miniature")
def test_captions_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    features = Features({"image": ImageFeature(), "caption": List(Value("string")), "split": Value("string")})
    rows = [
        {
            "image": {"bytes": encoded(60 * n), "path": f"{n}.jpg"},
            "caption": [f"{n} {k}" for k in range(6)],
            "split": ("test", "train", "test")[n],
        }
        for n in range(3)
    ]
    repo_id = "nlphuji/mscoco_2014_5k_test_image_text_retrieval"
    # what is on `main` is a script, which `datasets` does not run; the Hub's robot keeps tables on a ref of its own
    main = hub.add(repo_id, {"mscoco_2014_5k_test_image_text_retrieval.py": b"raise SystemExit"}, kind="dataset")
    converted = parquet(Dataset.from_list(rows, features=features), tmp_path)
    commit = hub.add(repo_id, {"TEST/test/0000.parquet": converted}, kind="dataset")
    repo = hub.repos["dataset", repo_id]
    files = {path: file for path, file in repo.commits[commit].files.items() if not path.endswith(".py")}
    convert = hub.commit(repo, "refs/convert/parquet", files, "Convert").id
    repo.refs["refs/heads/main"] = main

    data = retrieval("coco")
    assert data.texts == [f"{n} {k}" for n in (0, 2) for k in range(5)]
    assert list(data.images) == [encoded(0), encoded(120)]
    assert (data.id, data.name, data.revision, data.split) == (repo_id, "MSCOCO", convert, "test")
    # not what is kept of the other revision either
    with pytest.raises(ValueError, match=r"cannot be opened .*script, which .*revision='refs/convert/parquet'"):
        load_benchmark("coco", repo_id)
    with pytest.raises(ValueError, match="the Hub has no such data set at revision 'v9' or does not show it"):
        load_benchmark("coco", repo_id, revision="v9")


def test_classes_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    names = ClassLabel(names=["tench, Tinca tinca", "goldfish, Carassius auratus"])
    files = {"data/validation-00000-of-00001.parquet": parquet(table([1, 0], names), tmp_path)}
    files["data/train-00000-of-00001.parquet"] = b"not to be read"
    old = hub.add("ILSVRC/imagenet-1k", files, kind="dataset")
    files = {"data/validation-00000-of-00001.parquet": parquet(table([0, 0, 1], names), tmp_path)}
    new = hub.add("ILSVRC/imagenet-1k", files, kind="dataset")
    data = classes("imagenet-1k", num_images=3)
    assert (list(data.labels), data.revision, data.split) == ([0, 0, 1], new, "validation")
    assert list(data.class_names) == ["tench", "goldfish"]
    assert data.protocol["class_names"] == "those of the column 'label', the first synonym of each"
    assert data.images[2] == encoded(100)
    before = classes("imagenet-1k", num_images=2, revision=old)
    assert (list(before.labels), before.revision) == ([1, 0], old)
    assert not hub.matching("GET", "train-00000")  # no other split is downloaded
    with pytest.raises(IncompleteDataError, match="has 3 images of 50000"):
        load_benchmark("imagenet-1k")
    with pytest.raises(ValueError, match="has no 'test'; it has train, validation"):
        load_benchmark("imagenet-1k", split="test")
    own = classes("classification", "ILSVRC/imagenet-1k", split="validation")
    assert list(own.class_names) == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert own.name == "ILSVRC/imagenet-1k"
    with pytest.raises(ValueError, match=r"ILSVRC/imagenet-1k has train, validation; say which \(--split\)"):
        load_benchmark("classification", "ILSVRC/imagenet-1k")


def test_shards_with_class_names_on_the_hub(hub: Hub) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n, label in enumerate((1, 0)):
            for name, content in ((f"s{n}.jpg", encoded(90 * n)), (f"s{n}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    files = {f"test/{n}.tar": buffer.getvalue() for n in range(2)}
    files |= {"test/nshards.txt": b"2", "classnames.txt": b"tench\ngoldfish\n"}
    hub.add("clip-benchmark/wds_imagenetv2", files, kind="dataset")
    data = classes("imagenet-v2", num_images=4)
    assert (list(data.labels), list(data.class_names)) == ([1, 0, 1, 0], ["tench", "goldfish"])
    assert data.protocol["class_names"] == "classnames.txt"
    hub.add("ada/nameless", {path: files[path] for path in ("test/0.tar", "test/1.tar")}, kind="dataset")
    with pytest.raises(ValueError, match=r"ada/nameless \(split test\): its classes have no names"):
        load_benchmark("imagenet-v2", "ada/nameless", num_images=4)
    assert data.images[1] == encoded(90)


def test_urban1k_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    archive = zipped(urban1k(tmp_path / "u", range(1, 4)), "Urban1k")
    commit = hub.add("BeichenZhang/Urban1k", {"Urban1k.zip": archive, "README.md": b"# U"}, kind="dataset")
    data = retrieval("urban1k", num_images=3)
    assert data.texts == ["Street 1. A bus", "Street 2. A bus", "Street 3. A bus"]
    assert (data.id, data.revision, red(data.images[0])) == ("BeichenZhang/Urban1k", commit, pytest.approx(100, abs=3))
    hub.add("ada/empty", {"a.txt": b"a"}, kind="dataset")
    with pytest.raises(ValueError, match="ada/empty: expected one zip archive, found none"):
        load_benchmark("urban1k", "ada/empty")


def test_records_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    features = Features({"image": ImageFeature(), "long_captions": List(Value("string"))})
    rows = [{"image": {"bytes": encoded(n), "path": None}, "long_captions": [f"A {n}.", f"B {n}."]} for n in range(2)]
    content = parquet(Dataset.from_list(rows, features=features), tmp_path)
    commit = hub.add("ada/long", {"data/train-00000-of-00001.parquet": content}, kind="dataset")
    data = retrieval("retrieval", "ada/long", captions="all")
    assert data.texts == ["A 0", "B 0", "A 1", "B 1"]
    assert (data.id, data.name, data.revision, data.split) == ("ada/long", "ada/long", commit, "train")


def test_what_the_hub_does_not_give(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ada/absent: there is no such folder, and the Hub has no such data set"):
        load_benchmark("classification", "ada/absent")
    hub.add("ada/gated", {"Urban1k.zip": zipped(urban1k(tmp_path / "u", range(1, 2)), "Urban1k")}, kind="dataset")
    hub.repos["dataset", "ada/gated"].gated = True
    with pytest.raises(ValueError, match="ada/gated: its owners ask for something first"):
        load_benchmark("urban1k", "ada/gated")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ValueError, match="ada/gated: the Hub cannot be reached"):
            load_benchmark("urban1k", "ada/gated")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="ada/absent: there is no such folder, HF_HUB_OFFLINE is set, and the cache "):
        load_benchmark("classification", "ada/absent")


def go_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 does; and whatever asks the server nevertheless is seen in `hub.requests`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def test_tables_in_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ClassLabel(names=["owl", "elk"])
    files = {
        "data/test-00000-of-00002.parquet": parquet(table([1, 0], names), tmp_path),
        "data/test-00001-of-00002.parquet": parquet(table([0], names), tmp_path),
        "data/train-00000-of-00001.parquet": parquet(table([1, 1, 1, 1], names), tmp_path),
    }
    old = hub.add("ada/pets", files, kind="dataset")
    there = classes("classification", "ada/pets", split="test")
    new = hub.add("ada/pets", {"data/train-00000-of-00001.parquet": b"broken"}, kind="dataset")
    go_offline(hub, monkeypatch)
    for options in ({"split": "test"}, {"split": "test", "revision": old}, {"split": "test", "revision": "main"}):
        kept = classes("classification", "ada/pets", **options)
        assert list(kept.images) == list(there.images)
        assert list(kept.labels) == [1, 0, 0]
        assert (kept.id, kept.revision, kept.split) == ("ada/pets", old, "test")
        assert (kept.class_names, kept.protocol) == (there.class_names, there.protocol)
    assert f"ada/pets: HF_HUB_OFFLINE is set; what the cache has of the commit {old} is scored" in caplog.text
    with pytest.raises(ValueError, match="`split`: ada/pets in the cache has no 'train'; it has test"):
        load_benchmark("classification", "ada/pets", split="train")
    for options, lacking in (({"revision": new}, new), ({"revision": "v2"}, "v2"), ({"config": "large"}, old)):
        with pytest.raises(
            ValueError, match=f"the cache does not have .*{lacking} of it. Run .*HF_HUB_OFFLINE=0 once"
        ):
            load_benchmark("classification", "ada/pets", split="test", **options)
    assert not hub.requests


def test_configurations_in_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ClassLabel(names=["owl", "elk"])
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {one}\n  data_files:\n  - split: test\n    path: {one}.parquet\n"
        for one in ("small", "large")
    )
    files = {
        "README.md": f"{card}---\n".encode(),
        "small.parquet": parquet(table([1], names), tmp_path),
        "large.parquet": parquet(table([0, 1], names), tmp_path),
    }
    hub.add("ada/sizes", files, kind="dataset")
    with pytest.raises(ValueError, match="Config name is missing"):
        load_benchmark("classification", "ada/sizes")
    for one, labels in (("small", [1]), ("large", [0, 1])):
        assert list(classes("classification", "ada/sizes", config=one).labels) == labels
    go_offline(hub, monkeypatch)
    for one, labels in (("large", [0, 1]), ("small", [1])):
        assert list(classes("classification", "ada/sizes", config=one).labels) == labels
    with pytest.raises(ValueError, match="the cache does not have"):
        load_benchmark("classification", "ada/sizes")
    assert not hub.requests


def test_a_download_that_broke_off_is_not_scored(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ClassLabel(names=["owl", "elk"])
    files = {f"data/test-0000{n}-of-00002.parquet": parquet(table([n], names), tmp_path) for n in range(2)}
    hub.add("ada/pets", files, kind="dataset")
    hub.faults.append(Fault("GET", "test-00001-of", Answer(403), times=100))
    with pytest.raises(ValueError, match="ada/pets: cannot be opened"):
        load_benchmark("classification", "ada/pets")
    go_offline(hub, monkeypatch)
    with pytest.raises(ValueError, match="ada/pets: .* the cache does not have the commit"):
        load_benchmark("classification", "ada/pets")


def test_an_archive_and_captions_in_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(urban1k(tmp_path / "u", range(1, 4)), "Urban1k")
    commit = hub.add("BeichenZhang/Urban1k", {"Urban1k.zip": archive, "README.md": b"# U"}, kind="dataset")
    features = Features({"image": ImageFeature(), "caption": List(Value("string"))})
    rows = [{"image": {"bytes": encoded(), "path": None}, "caption": [f"{k}" for k in range(5)]}]
    repo_id = "nlphuji/flickr_1k_test_image_text_retrieval"
    content = parquet(Dataset.from_list(rows, features=features), tmp_path)
    converted = hub.add(repo_id, {"TEST/test/0000.parquet": content}, kind="dataset")
    repo = hub.repos["dataset", repo_id]
    repo.refs["refs/convert/parquet"] = converted
    repo.refs["refs/heads/main"] = next(iter(repo.commits))
    there = retrieval("urban1k", num_images=3), retrieval("flickr30k", num_images=1)
    go_offline(hub, monkeypatch)
    kept = retrieval("urban1k", num_images=3), retrieval("flickr30k", num_images=1)
    for one, other in zip(kept, there, strict=True):
        assert (one.texts, list(one.images), one.revision) == (other.texts, list(other.images), other.revision)
    assert [one.revision for one in kept] == [commit, converted]
    with pytest.raises(ValueError, match="ada/city: .* the cache does not have it"):
        load_benchmark("urban1k", "ada/city")
    with pytest.raises(ValueError, match="the cache does not have v2 of it"):
        load_benchmark("urban1k", revision="v2")
    assert not hub.requests


def test_class_names_in_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = parquet(table([1, 0], Value("int64")), tmp_path)
    hub.add("ada/named", {"test.parquet": content, "classnames.txt": b"owl\nelk\n"}, kind="dataset")
    hub.add("ada/nameless", {"test.parquet": content}, kind="dataset")
    names = write(tmp_path / "names.txt", "a\nb\n")
    assert list(classes("classification", "ada/named").class_names) == ["owl", "elk"]
    assert list(classes("classification", "ada/nameless", class_names=names).class_names) == ["a", "b"]
    go_offline(hub, monkeypatch)
    assert list(classes("classification", "ada/named").class_names) == ["owl", "elk"]
    assert list(classes("classification", "ada/nameless", class_names=names).class_names) == ["a", "b"]
    assert not hub.requests


def test_log_lines_are_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The command line shows no others."""
    caplog.set_level(logging.WARNING)
    write(tmp_path / "a" / "1.png", encoded(format="PNG"))
    write(tmp_path / "stray.png", encoded(format="PNG"))
    classes("classification", tmp_path)
    assert [record.levelno for record in caplog.records if "left out" in record.message] == [logging.WARNING]
