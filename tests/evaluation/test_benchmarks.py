"""Benchmarks: each publisher's layout in small, with its oddities, and what each reader says of one that is broken."""

import dataclasses
import io
import json
import os
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
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
from lotlip_hf.evaluation.benchmarks import imagenet, imagenet_v2
from lotlip_hf.evaluation.benchmarks.collect import NORMALIZATION, Options, normalize_caption
from lotlip_hf.evaluation.benchmarks.registry import TASKS, describe_tasks, load_benchmark
from lotlip_hf.evaluation.tasks import ClassificationData, IncompleteDataError, RetrievalData
from lotlip_hf.images import load_image
from lotlip_hf.scenes.dataset import long_captions, scene, scenes_dataset, short_caption


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def _miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of each benchmark is what the tests make of it."""
    for key, task in TASKS.items():
        if task.num_images is not None and key != "scenes":
            monkeypatch.setitem(TASKS, key, dataclasses.replace(task, num_images=1, num_texts=1))
    monkeypatch.setattr(imagenet, "NUM_CLASSES", 1)
    monkeypatch.setattr(imagenet_v2, "NUM_CLASSES", 1)


def encoded(red: int = 0, mode: str = "RGB", format: str = "JPEG") -> bytes:
    """An image file, in one colour that `red` tells."""
    buffer = io.BytesIO()
    colour = {"RGB": (red, 0, 0), "L": red, "CMYK": (0, 255, 255, 255 - red)}[mode]
    Image.new(mode, (8, 8), colour).save(buffer, format=format, **({"quality": 100} if format == "JPEG" else {}))
    return buffer.getvalue()


def reds(data: RetrievalData | ClassificationData) -> Any:
    """What [`encoded`] was given for each image, about."""
    pictures = [load_image(image) for image in data.images]
    assert {picture.mode for picture in pictures} == {"RGB"}
    return pytest.approx([int(np.asarray(picture)[0, 0, 0]) for picture in pictures], abs=3)


def write(path: Path, content: bytes | str | list | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


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


# Captions and options.


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("A boat. It is red.", "A boat. It is red"),
        ("In the U.S. it is 3.5 m long.", "In the U. S. it is 3. 5 m long"),
        ("One...  Two.\n\nThree</s>Four</s>", "One. Two. Three. Four"),
        ("  spaces \t inside  stay ", "spaces \t inside  stay"),
        ("Wide 。and Ünïcode. 猫！", "Wide 。and Ünïcode. 猫！"),
        (" ...\n</s>. ", ""),
        ("\u00a0. A. \u00a0\n", "A"),
    ],
)
def test_captions_are_normalized(text: str, normalized: str) -> None:
    assert normalize_caption(text) == normalized
    assert normalize_caption(normalized) == normalized


def test_tasks() -> None:
    for task in TASKS.values():
        assert set(task.options) <= {field.name for field in dataclasses.fields(Options)}
        assert task.source.endswith(".")
    described = dict(line.split(maxsplit=1) for line in describe_tasks().splitlines())
    assert list(described) == [*TASKS, "length-study", "sentence-ablation"]
    assert described["urban1k"] == TASKS["urban1k"].description


@pytest.mark.parametrize(
    ("task", "options", "word"),
    [
        ("dcis", {}, "--task"),
        ("iiw", {"label_column": "label"}, "label_column"),
        ("docci", {"revision": "main"}, "revision"),
        ("retrieval", {"config": "a"}, "config"),
        ("retrieval", {"captions": "best"}, "captions"),
        ("scenes", {}, "drawn"),
        *((task, {"split": "dev"}, "split") for task in ("dci", "imagenet-1k")),
    ],
)
def test_options_are_checked(tmp_path: Path, task: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        load_benchmark(task, LAYOUTS.get(task, records)(tmp_path), **options)


@pytest.mark.parametrize("task", ["dci", "retrieval", "classification"])
def test_data_without_a_default_must_be_given(task: str) -> None:
    with pytest.raises(ValueError, match="--data"):
        load_benchmark(task)


@pytest.mark.parametrize("task", ["iiw", "sharegpt4v-1k", "urban1k", "imagenet-1k"])
def test_folders_that_are_not_there_or_empty(tmp_path: Path, task: str) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        load_benchmark(task, tmp_path / "absent")
    with pytest.raises(IncompleteDataError, match="Where to get it"):
        load_benchmark(task, tmp_path)


# Layouts.


def dci(folder: Path) -> Path:
    write(folder / "splits.json", {"train": ["sa_2.json", "sa_1.json"], "valid": ["sa_3.json"], "test": ["sa_4.json"]})
    for file, image, short, extra in (
        ("sa_1", "sa_1.jpg", "A boat.", "It is 3.5 m long.\nIt is red..."),
        ("sa_2", "sa_2.jpg", "Same.", "Words."),
        ("sa_3", "Café_3.jpg", "Same", "Words"),
        ("sa_4", "sa_4.jpg", "Grey.", ""),
    ):
        annotation = {"image": image, "short_caption": short, "extra_caption": extra, "mask_data": {}}
        write(folder / "annotations" / f"{file}.json", annotation)
    # as a Mac unpacks it, with an extension in capitals, and grey
    write(folder / "photos" / "sa_1.jpg", encoded(10))
    write(folder / "photos" / "sa_2.JPG", encoded(60))
    write(folder / "photos" / unicodedata.normalize("NFD", "Café_3.jpg"), encoded(110, "CMYK"))
    write(folder / "photos" / "sa_4.jpg", encoded(160, "L"))
    write(folder / "photos" / "sa_5.jpg", encoded(210))
    write(folder / "photos" / ".DS_Store", "")
    return folder


def iiw(
    folder: Path,
    numbers: tuple[int, int, int] = (2, 1, 1),
    images: tuple[str, str, str] = ("docci", "docci_aar", "dci"),
    aar: str = "test",
) -> Path:
    """`numbers` of DOCCI_Test, IIW-400 and DCI_Test, with images in the folders `images`."""
    picture = encoded(100)
    rows: list[list[dict[str, Any]]] = [
        [{"image": f"test_{n:05}", "IIW": f"Docci {n}.", "DOCCI": "no"} for n in range(numbers[0])],
        [{"image/key": f"aar_test_{n:05}", "IIW": f"AAR {n}...", "IIW-P5B": "no"} for n in range(numbers[1])],
        [{"image": f"sa_{n}.jpg", "ex_id": "x", "IIW": f"DCI {n}.\n\nU.S."} for n in range(numbers[2])],
    ]
    for part, own, where in zip(("DOCCI_Test", "IIW-400", "DCI_Test"), rows, images, strict=True):
        write(folder / "datasets" / part / "data.jsonl", lines(*own) + "\n")
        for row in own:
            name = str(row.get("image", row.get("image/key"))).removesuffix(".jpg")
            write(folder / where / f"{name.replace('aar_test', f'aar_{aar}')}.jpg", picture)
    return folder


def conversation(image: str, text: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": text}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def sharegpt4v(folder: Path) -> Path:
    entries = [
        conversation("coco/train2017/000000000009.jpg", "Of COCO."),
        conversation("sam/images/sa_11.jpg", "First “é”. Sea."),
        conversation("llava/llava_pretrain/images/00453/004539375.jpg", "Of LAION."),
        conversation("sam/images/sa_7.jpg", "Second [1, {2}]."),
    ]
    write(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(entries, indent=1))
    # as SA-1B is unpacked, and as ShareGPT4V wants it
    write(folder / "sa_000000" / "images" / "sa_11.jpg", encoded(20))
    write(folder / "sa_000001" / "sa_7.jpg", encoded(70, "L"))
    return folder


def urban1k(folder: Path, numbers: range = range(8, 12)) -> Path:
    picture = encoded(100)
    for n in numbers:
        write(folder / "image" / f"{n}.jpg", picture)
        write(folder / "caption" / f"{n}.txt", f"Street {n}. A bus.\nA second line.\n")
    return folder


def zipped(folder: Path, root: str = "Urban1k") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{root}/{path.relative_to(folder)}")
        archive.writestr("__MACOSX/._1.jpg", b"junk")
    return buffer.getvalue()


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
    write(folder / "docci_descriptions.jsonlines", lines(*described))
    for key, _, value, _ in rows:
        write(folder / "images" / f"{key}.jpg", encoded(value))
    return folder


def karpathy(folder: Path, task: str) -> Path:
    rows = []
    for n, split in enumerate(("train", "test", "val", "test", "restval")):
        texts = [f"Image {n}, caption {k}. " for k in range(7 if n == 1 else 5)]
        row: dict[str, Any] = {"split": split, "sentences": [{"raw": text, "tokens": []} for text in texts]}
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


WNIDS = ("n01440764", "n01443537", "n02012849", "n03126707")
SYNSETS = (
    "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn02012849 crane\nn03126707 crane, hoist\n"
)
# the class of each validation image in the miniature
ANSWERS = {1: 3, 2: 0, 3: 1, 4: 2, 5: 0}


def imagenet_1k(folder: Path, flat: bool = False) -> Path:
    rows = []
    for number, label in ANSWERS.items():
        name = f"ILSVRC2012_val_{number:08d}"
        content = encoded(40 * number, ("RGB", "L", "CMYK")[number % 3])
        where = "ILSVRC/Data/CLS-LOC/val" if flat else f"val/{WNIDS[label]}"
        write(folder / where / f"{name}.JPEG", content)
        rows.insert(0, f"{name},{WNIDS[label]} 111 108 441 193 {WNIDS[label]} 1 2 3 4 \n")
    if flat:
        write(folder / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(rows))
    write(folder / "LOC_synset_mapping.txt", SYNSETS)
    return folder


def imagenet_matched(folder: Path) -> Path:
    for label in range(12):
        for n in range(2):
            write(folder / f"imagenetv2-matched-frequency-format-val/{label}/{'ab'[n]}é.jpeg", encoded(20 * label))
    write(folder / "classnames.txt", "\n".join(f"class {n}" for n in range(12)))
    return folder


def records(folder: Path) -> Path:
    rows = [
        {"file_name": f"{n}é.png", "short_caption": f"Short {n}.", "long_captions": [f"Long {n}. A.", f"Other {n}."]}
        for n in range(3)
    ]
    for n in range(3):
        write(folder / f"{n}é.png", encoded(80 * n, format="PNG"))
    write(folder / "metadata.jsonl", lines(*rows))
    return folder


def folders(folder: Path) -> Path:
    for name, number in {"cat": 4, "dog": 1, "elk": 3}.items():
        for n in range(number):
            write(folder / name / f"{n}.png", encoded(format="PNG"))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "dci": dci,
    "iiw": iiw,
    "sharegpt4v-1k": sharegpt4v,
    "sharegpt4v-10k": sharegpt4v,
    "urban1k": urban1k,
    "docci": docci,
    "coco": lambda folder: karpathy(folder, "coco"),
    "flickr30k": lambda folder: karpathy(folder, "flickr30k"),
    "imagenet-1k": imagenet_1k,
    "imagenet-v2": imagenet_matched,
    "classification": folders,
    "retrieval": records,
}


@pytest.mark.parametrize("task", [task for task in LAYOUTS if TASKS[task].num_images])
def test_a_part_is_not_the_whole(tmp_path: Path, task: str) -> None:
    """Fewer images than the benchmark has are scored only if they are asked for, and the protocol says so."""
    folder = LAYOUTS[task](tmp_path)
    with pytest.raises(IncompleteDataError, match=r"of (the folders 0 to )?\d+"):
        load_benchmark(task, folder)
    with pytest.raises(IncompleteDataError, match="num_images"):
        load_benchmark(task, folder, num_images=100)
    part = load_benchmark(task, folder, num_images=1)
    assert (len(part.images), part.protocol["first_images"]) == (1, 1)


def test_the_number_of_texts_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dci(tmp_path)
    monkeypatch.setitem(TASKS, "dci", dataclasses.replace(TASKS["dci"], num_images=4, num_texts=5))
    with pytest.raises(IncompleteDataError, match="4 texts"):
        load_benchmark("dci", tmp_path)
    assert len(retrieval("dci", tmp_path, num_images=4).texts) == 4
    assert len(retrieval("dci", tmp_path, split="test").texts) == 1


IIW_400 = "datasets/IIW-400/data.jsonl"
SHARED = "share-captioner_coco_lcs_sam_1246k_1107.json"
DOCCI = "docci_descriptions.jsonlines"
SYNSET_FILE = "LOC_synset_mapping.txt"
DCI_GOOD = {"image": "sa_2.jpg", "short_caption": "A", "extra_caption": "B"}
DOCCI_GOOD = {"split": "test", "image_file": "test_00000.jpg", "description": "A."}
COCO_GOOD = {
    "split": "test",
    "filepath": "val2014",
    "filename": "COCO_val2014_000000000001.jpg",
    "sentences": [{"raw": "A"}] * 5,
}
# task, file in its folder, what is written there (`None`: it is removed), and a word of the error
MISSING: list[tuple[str, str, Any, str]] = [
    ("dci", "photos/sa_1.jpg", None, "photos/sa_1.jpg"),
    ("dci", "annotations/sa_3.json", None, "annotations/sa_3.json"),
    ("dci", "annotations/sa_2.json", DCI_GOOD | {"extra_caption": None}, "sa_2.jpg: none"),
    ("iiw", "docci/test_00001.jpg", None, "docci/test_00001.jpg"),
    ("iiw", IIW_400, None, "IIW-400/data.jsonl"),
    ("sharegpt4v-1k", "sa_000000/images/sa_11.jpg", None, "sa_11.jpg"),
    ("sharegpt4v-1k", SHARED, [{"image": "sa_11.jpg", "conversations": [0, {"value": None}]}], "sa_11.jpg: none"),
    ("urban1k", "image/9.jpg", None, "image/9.jpg"),
    ("urban1k", "caption/8.txt", "\nA second line.", "image/8.jpg: empty"),
    ("docci", "images/test_00001.jpg", None, "images/test_00001.jpg"),
    ("coco", "val2014/COCO_val2014_000000000001.jpg", None, "000000000001.jpg"),
    ("flickr30k", "flickr30k-images/3.jpg", None, "3.jpg"),
    ("coco", "dataset_coco.json", {"images": [COCO_GOOD | {"sentences": [{"raw": "A"}] * 4}]}, "4 of 5"),
    ("imagenet-1k", f"val/{WNIDS[1]}/ILSVRC2012_val_00000003.JPEG", None, WNIDS[1]),
    ("imagenet-1k", f"val/{WNIDS[0]}/ILSVRC2012_val_00000002.JPEG", None, "ILSVRC2012_val_00000002"),
    ("imagenet-v2", "imagenetv2-matched-frequency-format-val/3/aé.jpeg", None, "3 has 1"),
    ("classification", "dog/0.png", None, "dog"),
    ("retrieval", "1é.png", None, "1é.png"),
    ("retrieval", "metadata.jsonl", lines({"file_name": "0é.png", "long_captions": ["..."]}), "0é.png: empty"),
    ("retrieval", "metadata.jsonl", lines({"file_name": "0é.png", "long_captions": [3]}), "metadata.jsonl, row 1"),
]
BROKEN: list[tuple[str, str, Any, str]] = [
    ("dci", "annotations/sa_2.json", '{"image": "sa_2.jpg",\n "short_caption": }', "sa_2.json.*line 2"),
    ("dci", "annotations/sa_2.json", {"image": "sa_2.jpg", "short_caption": "A"}, "extra_caption"),
    ("dci", "annotations/sa_2.json", DCI_GOOD | {"short_caption": ["A"]}, "short_caption"),
    ("iiw", IIW_400, '{"image/key": "a", "IIW": "b"}\n{"image/key": \n', "data.jsonl, line 2"),
    ("iiw", IIW_400, lines({"image/key": "a", "IIW-P5B": "b"}), "'IIW'"),
    ("sharegpt4v-1k", SHARED, '"sa_1.jpg"', SHARED),
    ("sharegpt4v-1k", SHARED, '[{"image": "a.jpg"}, {"image": "sa_1.jpg", "conv', SHARED),
    ("sharegpt4v-1k", SHARED, [{"image": "sa_1.jpg", "conversations": [0, {"value": 7}]}], "sa_1.jpg"),
    ("sharegpt4v-1k", SHARED, [{"image": 1, "id": "x"}], "entry x"),
    ("urban1k", "caption/8.txt", b"Caf\xe9.", "8.txt"),
    ("docci", DOCCI, lines(DOCCI_GOOD | {"description": 4}), "entry 1"),
    ("coco", "dataset_coco.json", '{"images": [\n{"split": "test",}]}', "dataset_coco.json.*line 2"),
    ("coco", "dataset_coco.json", {"images": [COCO_GOOD | {"sentences": [{"raw": 3}] * 5}]}, "000000000001.jpg"),
    ("coco", "dataset_coco.json", {"images": [COCO_GOOD | {"filename": 3}]}, "filename"),
    ("coco", "dataset_coco.json", {"images": [3]}, r"images\[0\]"),
    ("imagenet-1k", SYNSET_FILE, SYNSETS.splitlines()[0], "n03126707"),
    ("imagenet-1k", SYNSET_FILE, "n01440764 tench\ntench\n", f"{SYNSET_FILE}, line 2"),
    ("imagenet-1k", SYNSET_FILE, None, "--class-names"),
    ("imagenet-v2", "classnames.txt", None, "--class-names"),
    ("imagenet-v2", "classnames.txt", "a\n\nb\nc\n", "classnames.txt, line 2"),
    ("imagenet-v2", "classnames.txt", "a\nb\n", "2 names"),
    ("retrieval", "metadata.jsonl", lines({"file_name": "http://a.b/0.png", "long_captions": ["A"]}), "http"),
    ("retrieval", "metadata.jsonl", lines({"file_name": "0é.png", "alt": "A"}), "--text-column"),
    ("retrieval", "metadata.jsonl", lines({"picture": "0é.png", "long_captions": ["A"]}), "--image-column"),
]


@pytest.mark.usefixtures("_miniature")
@pytest.mark.parametrize(
    ("task", "file", "content", "word"),
    [*MISSING, *BROKEN],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_is_missing_or_broken_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, file: str, content: Any, word: str
) -> None:
    folder = LAYOUTS[task](tmp_path)
    sizes = {"imagenet-1k": 5, "imagenet-v2": 24}
    if task in sizes:
        monkeypatch.setitem(TASKS, task, dataclasses.replace(TASKS[task], num_images=sizes[task]))
        monkeypatch.setattr(imagenet_v2, "NUM_CLASSES", 12)
    load_benchmark(task, folder)
    if content is None:
        (folder / file).unlink()
    else:
        write(folder / file, content)
    is_missing = (task, file, content, word) in MISSING
    with pytest.raises(IncompleteDataError if is_missing else ValueError, match=word) as raised:
        load_benchmark(task, folder)
    assert isinstance(raised.value, IncompleteDataError) == is_missing


# Each benchmark.


@pytest.mark.usefixtures("_miniature")
@pytest.mark.parametrize("inside", ["", "densely_captioned_images"])
def test_dci(tmp_path: Path, caplog: pytest.LogCaptureFixture, inside: str) -> None:
    dci(tmp_path / inside)
    data = retrieval("dci", tmp_path)
    assert data.texts == ["Same. Words", "A boat. It is 3. 5 m long. It is red", "Same. Words", "Grey"]
    assert list(data.text_to_image) == [0, 1, 2, 3]
    assert reds(data) == [60, 10, 110, 160]
    assert (data.name, data.split, data.revision) == ("DCI", "all", None)
    assert data.protocol["num_duplicate_texts"] == 1
    assert data.protocol["normalization"] == NORMALIZATION
    assert "sa_5.jpg" in caplog.text
    first = retrieval("dci", tmp_path, num_images=2, normalize=False)
    assert first.texts == ["Same.\nWords.", "A boat.\nIt is 3.5 m long.\nIt is red..."]
    assert (first.protocol["first_images"], first.protocol["normalization"]) == (2, None)
    test = retrieval("dci", tmp_path, split="test")
    assert (test.texts, test.split) == (["Grey"], "test")
    (tmp_path / inside / "photos" / "sa_4.jpg").unlink()
    assert retrieval("dci", tmp_path, num_images=1).texts == ["Same. Words"]  # what is missing is not among the first


def test_iiw(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = retrieval("iiw", iiw(tmp_path / "whole", (100, 400, 112)))
    assert len(data.texts) == 612
    assert (data.texts[0], data.texts[100], data.texts[500]) == ("Docci 0", "AAR 0", "DCI 0. U. S")
    assert data.image_names[100] == "IIW-400/aar_test_00000.jpg"
    assert data.images[611] == str(tmp_path / "whole" / "dci" / "sa_111.jpg")
    assert (data.id, data.name, data.protocol["num_duplicate_texts"]) == ("google/imageinwords", "IIW", 0)
    # beside what its publishers ship
    images = ("images", "images_aar", "densely_captioned_images/photos")
    data = retrieval("iiw", iiw(tmp_path, (2, 2, 2), images, aar="train"), num_images=6)
    assert data.texts == ["Docci 0", "Docci 1", "AAR 0", "AAR 1", "DCI 0. U. S", "DCI 1. U. S"]
    # LoTLIP's own evaluation takes these for them, too
    assert data.images[2] == str(tmp_path / "images_aar" / "aar_train_00000.jpg")
    assert data.protocol["images_named_train"] == 2
    assert "IIW-400" in caplog.text


def test_sharegpt4v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "JSON_CHUNK", 16)
    data = retrieval("sharegpt4v-1k", sharegpt4v(tmp_path), num_images=2)
    assert data.texts == ["First “é”. Sea", "Second [1, {2}]"]
    assert reds(data) == [20, 70]
    assert data.name == "ShareGPT4V-1k"
    assert data.protocol["images"].startswith("the first 2 of SAM in share-captioner")


def test_sharegpt4v_as_lotlip_ships_it(tmp_path: Path) -> None:
    entries = [conversation(f"sa_00000{n % 2}/images/sa_{n}.jpg", f"Number {n}.") for n in range(1001)]
    write(tmp_path / "share4v" / "share4v_sam_10k.json", entries)
    for entry in entries:
        write(tmp_path / entry["image"], b"unread")
    data = retrieval("sharegpt4v-1k", tmp_path)
    assert data.texts == [f"Number {n}" for n in range(1000)]
    assert data.images[3] == str(tmp_path / "sa_000001" / "images" / "sa_3.jpg")


def test_urban1k_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = urban1k(tmp_path / "Urban1k", range(1, 1001))
    (folder / "image" / "10.jpg").unlink()
    write(folder / "image" / "10.JPEG", encoded(200, "L"))
    write(folder / "image" / "extra.jpg", encoded())
    write(folder / "caption" / "7.txt", "\ufeffStreet 5. A bus.\r\nMore.")
    data = retrieval("urban1k", tmp_path)
    assert data.texts[:3] == ["Street 1. A bus", "Street 2. A bus", "Street 3. A bus"]  # 1, 2, 3; not 1, 10, 100
    assert data.texts[6] == "Street 5. A bus"
    assert (len(data.images), data.image_names[9]) == (1000, "image/10.JPEG")
    assert data.protocol["num_duplicate_texts"] == 1
    assert "extra.jpg" in caplog.text
    (folder / "caption" / "17.txt").unlink()
    with pytest.raises(IncompleteDataError, match="17.jpg"):
        load_benchmark("urban1k", tmp_path)


def test_urban1k_in_its_archive(tmp_path: Path) -> None:
    folder = urban1k(tmp_path / "Urban1k")
    data = retrieval("urban1k", write(tmp_path / "archive.zip", zipped(folder)), num_images=3)
    assert data.texts == ["Street 8. A bus", "Street 9. A bus", "Street 10. A bus"]
    assert data.images[2] == data.images[-1] == (folder / "image" / "10.jpg").read_bytes()
    assert len(data.images[1:]) == 2
    with pytest.raises(IndexError):
        data.images[3]


@pytest.mark.usefixtures("_miniature")
def test_docci(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = retrieval("docci", docci(tmp_path))
    assert data.texts == ["A 3. 5 m door"] * 2
    assert reds(data) == [60, 110]
    assert (data.split, data.protocol["num_duplicate_texts"]) == ("test", 1)
    assert retrieval("docci", tmp_path, split="qual_dev").texts == ["Dev"]
    assert "ignored" not in caplog.text  # the images of other splits are no strangers
    write(tmp_path / "images" / "other.png", encoded(format="PNG"))
    retrieval("docci", tmp_path)
    assert "other.png" in caplog.text


@pytest.mark.usefixtures("_miniature")
def test_docci_from_parquet(tmp_path: Path) -> None:
    features = Features({"image": ImageFeature(), "example_id": Value("string"), "description": Value("string")})
    rows = [
        {"image": {"bytes": encoded(50 * n), "path": None}, "example_id": f"test_{n}", "description": f"D.{n}"}
        for n in range(3)
    ]
    test, train = (tmp_path / "data" / f"{one}-00000-of-00001.parquet" for one in ("test", "train"))
    test = test.with_stem(f"{test.stem}-[a]")  # no pattern
    test.parent.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(test)
    Dataset.from_list(rows[:1], features=features).to_parquet(train)
    data = retrieval("docci", tmp_path)
    assert data.texts == ["D. 0", "D. 1", "D. 2"]
    assert data.images[1] == encoded(50)
    assert data.protocol["text_column"] == "description"
    assert retrieval("docci", tmp_path, text_column="example_id").texts == ["test_0", "test_1", "test_2"]
    assert retrieval("docci", tmp_path, split="train").texts == ["D. 0"]
    with pytest.raises(ValueError, match="text_column"):
        load_benchmark("docci", tmp_path, text_column="captions")
    test.unlink()
    assert len(retrieval("docci", tmp_path).images) == 1  # a mirror may call it so, if it is of that number
    Dataset.from_list(rows, features=features).to_parquet(train)
    with pytest.raises(ValueError, match="--split train"):
        load_benchmark("docci", tmp_path)


@pytest.mark.usefixtures("_miniature")
@pytest.mark.parametrize("task", ["coco", "flickr30k"])
def test_five_captions_an_image(tmp_path: Path, caplog: pytest.LogCaptureFixture, task: str) -> None:
    karpathy(tmp_path, task)
    write(tmp_path / ("val2014" if task == "coco" else "flickr30k-images") / "stranger.jpg", encoded())
    data = retrieval(task, tmp_path)
    assert data.texts[:6] == [*(f"Image 1, caption {k}. " for k in range(5)), "Image 3, caption 0. "]
    assert list(data.text_to_image) == [0] * 5 + [1] * 5
    assert reds(data) == [50, 150]
    assert data.protocol["normalization"] is None
    assert data.protocol["num_duplicate_texts"] == 1
    assert "stranger.jpg" in caplog.text
    assert retrieval(task, tmp_path, split="val", normalize=True).texts[0] == "Image 2, caption 0"
    assert len(retrieval(task, tmp_path, num_images=1).texts) == 5


@pytest.mark.usefixtures("_miniature")
def test_tables_of_captions(tmp_path: Path) -> None:
    def save(name: str, numbers: list[int]) -> Path:
        features = Features({"image": ImageFeature(), "caption": List(Value("string"))})
        rows = [
            {"image": {"bytes": encoded(n), "path": None}, "caption": [f"{n} {k}" for k in range(number)]}
            for n, number in enumerate(numbers)
        ]
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / name)
        return tmp_path / name

    for options in ({}, {"split": "train"}, {"split": "train", "num_images": 4}):
        with pytest.raises(IncompleteDataError, match="row 0: 3 of 5, row 3: 0 of 5"):
            load_benchmark("coco", save("lacking", [3, 5, 5, 0]), **options)
    assert len(retrieval("coco", save("whole", [5, 6, 5, 5])).texts) == 20
    with pytest.raises(ValueError, match="row 0"):
        load_benchmark("docci", tmp_path / "whole", text_column="caption")
    members = {}
    for n in range(2):
        captions = "\n".join(f"{n} {k}" for k in range(6)) + "\n"
        members |= {f"s{n}.jpg": encoded(100 * n), f"s{n}.txt": captions.encode()}
    shard(tmp_path / "shards" / "test" / "0.tar", members)
    data = retrieval("coco", tmp_path / "shards")
    assert data.texts == [f"{n} {k}" for n in range(2) for k in range(5)]
    assert data.images[1] == encoded(100)


@pytest.mark.parametrize("flat", [False, True])
def test_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flat: bool) -> None:
    data = classes("imagenet-1k", imagenet_1k(tmp_path, flat), num_images=5)
    assert list(data.labels) == [3, 0, 1, 2, 0]
    assert reds(data) == [40, 80, 120, 160, 200]
    assert list(data.class_names) == ["tench", "goldfish", "crane", "crane"]
    assert data.protocol == {"class_names": "the first synonyms of LOC_synset_mapping.txt", "first_images": 5}
    assert (data.id, data.name, data.split) == ("ILSVRC/imagenet-1k", "ImageNet-1k", "validation")
    assert list(classes("imagenet-1k", tmp_path, num_images=2).labels) == [3, 0]
    with pytest.raises(IncompleteDataError, match="1000"):
        load_benchmark("imagenet-1k", tmp_path)
    monkeypatch.setattr(imagenet, "NUM_CLASSES", 4)
    monkeypatch.setitem(TASKS, "imagenet-1k", dataclasses.replace(TASKS["imagenet-1k"], num_images=5))
    assert len(classes("imagenet-1k", tmp_path).images) == 5
    if not flat:
        assert list(classes("imagenet-1k", tmp_path / "val").labels) == [3, 0, 1, 2, 0]
        return
    (tmp_path / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(IncompleteDataError, match="val/ILSVRC2012_val_00000003.JPEG"):
        load_benchmark("imagenet-1k", tmp_path)
    write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001,\n")
    with pytest.raises(ValueError, match="LOC_val_solution.csv, line 2"):
        load_benchmark("imagenet-1k", tmp_path)
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(IncompleteDataError, match="LOC_val_solution.csv"):
        load_benchmark("imagenet-1k", tmp_path)


def test_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = imagenet_1k(tmp_path / "data")
    names = write(tmp_path / "names.txt", "a tench\nein Goldfisch\n鶴\na crane\n\n")
    data = classes("imagenet-1k", folder, num_images=5, class_names=names)
    assert list(data.class_names) == ["a tench", "ein Goldfisch", "鶴", "a crane"]
    assert data.protocol["class_names"] == "the file names.txt"
    with pytest.raises(FileNotFoundError, match="clip"):
        load_benchmark("imagenet-1k", folder, num_images=5, class_names="clip")
    # open_clip's own file is read, and open_clip, which may not import here, is not
    package = tmp_path / "site" / "open_clip"
    write(package / "__init__.py", "raise ImportError('no torchvision')")
    write(package / "zero_shot_metadata.py", "IMAGENET_CLASSNAMES = ['w', 'x', 'y', 'z']")
    write(tmp_path / "site" / "open_clip_torch-9.9.dist-info" / "METADATA", "Name: open_clip_torch\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    data = classes("imagenet-1k", folder, num_images=5, class_names="openai")
    assert list(data.class_names) == ["w", "x", "y", "z"]
    assert data.protocol["class_names"] == "openai (open_clip 9.9)"


def test_imagenet_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet_matched(tmp_path)
    data = classes("imagenet-v2", tmp_path, num_images=24)
    assert list(data.labels) == [*range(12), *range(12)]  # 10 and 11 come last
    assert reds(data) == [20 * n for n in (*range(12), *range(12))]
    assert (data.image_names[10], data.image_names[22]) == ("10/aé.jpeg", "10/bé.jpeg")
    assert list(classes("imagenet-v2", tmp_path, num_images=13).labels) == [*range(12), 0]
    monkeypatch.setattr(imagenet_v2, "NUM_CLASSES", 12)
    monkeypatch.setitem(TASKS, "imagenet-v2", dataclasses.replace(TASKS["imagenet-v2"], num_images=24))
    whole = classes("imagenet-v2", tmp_path)
    assert list(whole.labels) == [n for n in range(12) for _ in range(2)]
    assert whole.image_names[20:22] == ["10/aé.jpeg", "10/bé.jpeg"]


# Classes of one's own.


def test_folders_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "red_fox" / "1.png", encoded(30, "L", "PNG"))
    write(tmp_path / "Eule" / "süß" / "2.JPG", encoded(90))
    write(tmp_path / "Eule" / "notes.txt", "no image")
    write(tmp_path / ".hidden" / "3.png", encoded(0, format="PNG"))
    write(tmp_path / "cover.png", encoded(0, format="PNG"))
    write(tmp_path / "all.tar", b"")  # beside images it is no table
    data = classes("classification", tmp_path)
    assert (list(data.labels), list(data.class_names)) == ([0, 1], ["Eule", "red fox"])
    assert reds(data) == [90, 30]
    assert data.protocol == {"class_names": "folder names, _ as space"}
    assert data.name == data.id == tmp_path.name
    assert "cover.png" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"  # the command line shows no others
    (tmp_path / "empty class").mkdir()
    with pytest.raises(IncompleteDataError, match="empty class"):
        load_benchmark("classification", tmp_path)


def test_wordnet_ids_are_no_words(tmp_path: Path) -> None:
    names = write(tmp_path / "names.txt", "tench\ngoldfish\n")
    for form in ("{}", "{}-{}", "{}_{}"):
        for wnid, name in zip(WNIDS[:2], ("tench", "goldfish"), strict=True):
            write(tmp_path / form / "val" / form.format(wnid, name) / "1.png", encoded(format="PNG"))
    table(list(WNIDS[:2]), Value("string")).to_parquet(tmp_path / "texts.parquet")
    table([0, 1], ClassLabel(names=list(WNIDS[:2]))).to_parquet(tmp_path / "labels.parquet")
    for data in ("{}/val", "{}-{}/val", "{}_{}/val", "texts.parquet", "labels.parquet"):
        with pytest.raises(ValueError, match="--class-names"):
            load_benchmark("classification", tmp_path / data)
        read = classes("classification", tmp_path / data, class_names=names)
        assert (list(read.labels), list(read.class_names)) == ([0, 1], ["tench", "goldfish"])


def test_the_first_images_of_folders_are_of_all_classes(tmp_path: Path) -> None:
    whole = classes("classification", folders(tmp_path))
    assert list(whole.labels) == [0, 0, 0, 0, 1, 2, 2, 2]
    assert "order" not in whole.protocol
    first = classes("classification", tmp_path, num_images=6)
    assert list(first.image_names) == ["cat/0.png", "dog/0.png", "elk/0.png", "cat/1.png", "elk/1.png", "cat/2.png"]
    assert [str(image).split("/")[-2] for image in first.images] == [first.class_names[n] for n in first.labels]
    assert first.protocol["order"] == "the first image of each class, then the second, ..."
    assert sorted(classes("classification", tmp_path, num_images=8).labels) == list(whole.labels)


def test_folders_of_splits(tmp_path: Path) -> None:
    folders(tmp_path / "train")
    folders(tmp_path / "test")
    with pytest.raises(ValueError, match="--split"):
        load_benchmark("classification", tmp_path)
    data = classes("classification", tmp_path, split="test")
    assert (list(data.class_names), data.split) == (["cat", "dog", "elk"], "test")


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
        assert [data.class_names[label] for label in data.labels] == [
            value if isinstance(value, str) else expected[value] for value in labels
        ]
        assert list(data.class_names) == expected
        assert data.images[1] == encoded(50)


def test_broken_tables_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    table([3, 1], Value("int64")).to_parquet(file)
    names = write(tmp_path / "names.txt", "a\nb\nc\nd\ne")
    assert list(classes("classification", file, class_names=names).labels) == [3, 1]
    rows = write(tmp_path / "rows.csv", "image,label\n0.png,1\n0.png,0\n")
    assert list(classes("classification", rows, class_names=names).labels) == [1, 0]
    with pytest.raises(ValueError, match="--class-names"):
        load_benchmark("classification", rows)
    write(names, "a\nb\nc")
    with pytest.raises(ValueError, match="class 3"):
        load_benchmark("classification", file, class_names=names)
    for content, error, word in (
        (table([3, 1], Value("int64")), ValueError, "--class-names"),
        (table([0, None], ClassLabel(names=["a"])), IncompleteDataError, "row 1"),
        (table([0.5], Value("float64")), ValueError, "label_column"),
        (table(["a"], Value("string")).rename_column("label", "kind"), ValueError, "--label-column"),
    ):
        content.to_parquet(file)
        with pytest.raises(error, match=word):
            load_benchmark("classification", file)
    assert list(classes("classification", file, label_column="kind").class_names) == ["a"]
    table(["a", "b"], Value("string"), image=False).to_parquet(file)
    data = classes("classification", file)
    with pytest.raises(IncompleteDataError, match="row 1"):
        data.images[1]
    with pytest.raises(ValueError, match="data.parquet"):
        load_benchmark("classification", write(file, b"no parquet"))
    with pytest.raises(ValueError, match="data.xml"):
        load_benchmark("classification", write(tmp_path / "data.xml", "<a/>"))


# Records of one's own.


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
    named = retrieval("retrieval", folder, text_column="short_caption", image_column="file_name", normalize=False)
    assert (named.texts[0], named.protocol["text_column"]) == ("Short 0.", "short_caption")
    with pytest.raises(ValueError, match="split"):
        load_benchmark("retrieval", folder, split="test")


def test_values_of_tables_are_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions, labels = ["NA", "None", "2023", "2023-01-01"], ["007", "NA", "null", "1e5"]
    rows = [f"{n}.png,{caption},{label}" for n, (caption, label) in enumerate(zip(captions, labels, strict=True))]
    for n in range(4):
        write(tmp_path / f"{n}.png", encoded(90 * n, format="PNG"))
    file = write(tmp_path / "rows.csv", "\n".join(["\ufeffimage,caption,label", *rows]))
    assert retrieval("retrieval", file, text_column="caption", normalize=False).texts == captions
    data = classes("classification", file)
    assert [data.class_names[label] for label in data.labels] == labels
    monkeypatch.chdir("/")
    assert [str(image) for image in data.images] == [str(tmp_path / f"{n}.png") for n in range(4)]


def test_a_row_for_each_caption(tmp_path: Path) -> None:
    """Rows with the same image are one image with several texts, not several images that tie."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png", encoded(format="PNG"))
    rows = "image,caption\na.png,One.\nb.png,Two.\na.png,Three.\n"
    data = retrieval("retrieval", write(tmp_path / "captions.csv", rows), text_column="caption")
    assert data.texts == ["One", "Three", "Two"]
    assert list(data.text_to_image) == [0, 0, 1]
    assert list(data.images) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    first = retrieval("retrieval", tmp_path / "captions.csv", text_column="caption", num_images=1)
    assert first.texts == ["One", "Three"]


def test_records_in_parquet_and_in_shards(tmp_path: Path) -> None:
    kinds = {"short_caption": Value("string"), "long_captions": List(Value("string")), "id": Value("string")}
    rows = [
        {"image": {"bytes": encoded(90 * n)}, "short_caption": "s", "long_captions": [f"L {n}."], "id": f"r{n}"}
        for n in range(3)
    ]
    Dataset.from_list(rows, features=Features({"image": ImageFeature(), **kinds})).to_parquet(tmp_path / "a.parquet")
    data = retrieval("retrieval", tmp_path / "a.parquet", num_images=2)
    assert (data.texts, list(data.image_names)) == (["L 0", "L 1"], ["r0", "r1"])
    assert list(data.images) == [encoded(0), encoded(90)]

    file = tmp_path / "shards" / "0.tar"
    for texts in (["A.", "B."], ["C.", "D."]):  # other shards under the same name are other data
        members = {}
        for n, text in enumerate(texts):
            caption = json.dumps({"long_captions": [text], "short_caption": "s"}).encode()
            members |= {f"x{n}.jpg": encoded(90 * n), f"x{n}.json": caption}
        os.utime(shard(file, members), (len(texts[0]), ord(texts[0][0])))
        data = retrieval("retrieval", file.parent)
        assert data.texts == [text[0] for text in texts]
        assert data.images[1] == encoded(90)
        assert data.image_names[1] == "0.tar/x1"
    file.write_bytes(file.read_bytes()[:3500])
    with pytest.raises(ValueError, match="0.tar"):
        load_benchmark("retrieval", file.parent)


def test_scenes() -> None:
    data = retrieval("scenes", num_images=8)
    drawn = scenes_dataset(8, split="test")
    for text, image, row in zip(data.texts, data.images, drawn, strict=True):
        assert np.array_equal(np.asarray(load_image(image)), np.asarray(row["image"]))
        assert text == normalize_caption(row["long_captions"][0])
    assert data.image_names == drawn["id"][:]
    one = scene(1, split="validation")
    short = retrieval("scenes", split="validation", captions="short", num_images=4)
    assert short.texts == [short_caption(one)] * 4  # of one group
    assert short.protocol["num_duplicate_texts"] == 3
    every = retrieval("scenes", split="validation", captions="all", num_images=2, normalize=False)
    assert every.texts[3:] == long_captions(one)
    assert list(every.text_to_image) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="split"):
        load_benchmark("scenes", split="train")
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


def go_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 does; and whatever asks the server nevertheless is seen in `hub.requests`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def parquet(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.to_parquet(buffer)
    return buffer.getvalue()


def captioned(splits: list[str]) -> bytes:
    features = Features({"image": ImageFeature(), "caption": List(Value("string")), "split": Value("string")})
    rows = [
        {"image": {"bytes": encoded(60 * n)}, "caption": [f"{n} {k}" for k in range(6)], "split": split}
        for n, split in enumerate(splits)
    ]
    return parquet(Dataset.from_list(rows, features=features))


@pytest.mark.usefixtures("_miniature")
def test_captions_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo_id = "nlphuji/mscoco_2014_5k_test_image_text_retrieval"
    # what is on `main` is a script, which `datasets` does not run; the Hub's robot keeps tables on a ref of its own
    main = hub.add(repo_id, {"mscoco_2014_5k_test_image_text_retrieval.py": b"raise SystemExit"}, kind="dataset")
    commit = hub.add(repo_id, {"TEST/test/0000.parquet": captioned(["test", "train", "test"])}, kind="dataset")
    repo = hub.repos["dataset", repo_id]
    files = {path: file for path, file in repo.commits[commit].files.items() if not path.endswith(".py")}
    convert = hub.commit(repo, "refs/convert/parquet", files, "Convert").id
    repo.refs["refs/heads/main"] = main
    data = retrieval("coco")
    assert data.texts == [f"{n} {k}" for n in (0, 2) for k in range(5)]
    assert list(data.images) == [encoded(0), encoded(120)]
    assert (data.id, data.name, data.revision, data.split) == (repo_id, "MSCOCO", convert, "test")
    # not what is kept of the other revision either
    with pytest.raises(ValueError, match="refs/convert/parquet"):
        load_benchmark("coco", repo_id)
    with pytest.raises(ValueError, match="'v9'"):
        load_benchmark("coco", repo_id, revision="v9")
    own = retrieval("retrieval", repo_id, captions="all", text_column="caption", revision="refs/convert/parquet")
    assert (len(own.texts), own.id, own.name, own.revision) == (18, repo_id, repo_id, convert)
    go_offline(hub, monkeypatch)
    kept = retrieval("coco")
    assert (kept.texts, list(kept.images), kept.revision) == (data.texts, list(data.images), convert)
    assert not hub.requests


def test_classes_on_the_hub(hub: Hub) -> None:
    names = ClassLabel(names=["tench, Tinca tinca", "goldfish, Carassius auratus"])
    files = {"data/validation-00000-of-00001.parquet": parquet(table([1, 0], names))}
    files["data/train-00000-of-00001.parquet"] = b"not to be read"
    old = hub.add("ILSVRC/imagenet-1k", files, kind="dataset")
    files = {"data/validation-00000-of-00001.parquet": parquet(table([0, 0, 1], names))}
    new = hub.add("ILSVRC/imagenet-1k", files, kind="dataset")
    data = classes("imagenet-1k", num_images=3)
    assert (list(data.labels), data.revision, data.split) == ([0, 0, 1], new, "validation")
    assert list(data.class_names) == ["tench", "goldfish"]
    assert data.protocol["class_names"] == "those of the column 'label', the first synonym of each"
    assert data.images[2] == encoded(100)
    before = classes("imagenet-1k", num_images=2, revision=old)
    assert (list(before.labels), before.revision) == ([1, 0], old)
    assert not hub.matching("GET", "train-00000")  # no other split is downloaded
    with pytest.raises(IncompleteDataError, match="50000"):
        load_benchmark("imagenet-1k")
    with pytest.raises(ValueError, match="split"):
        load_benchmark("imagenet-1k", split="test")
    own = classes("classification", "ILSVRC/imagenet-1k", split="validation")
    assert list(own.class_names) == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert own.name == "ILSVRC/imagenet-1k"
    with pytest.raises(ValueError, match="--split"):
        load_benchmark("classification", "ILSVRC/imagenet-1k")


def test_shards_with_class_names_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    members = {"s0.jpg": encoded(0), "s0.cls": b"1", "s1.jpg": encoded(90), "s1.cls": b"0"}
    content = shard(tmp_path / "0.tar", members).read_bytes()
    files = {f"test/{n}.tar": content for n in range(2)}
    files |= {"test/nshards.txt": b"2", "classnames.txt": b"tench\ngoldfish\n"}
    hub.add("clip-benchmark/wds_imagenetv2", files, kind="dataset")
    data = classes("imagenet-v2", num_images=4)
    assert (list(data.labels), list(data.class_names)) == ([1, 0, 1, 0], ["tench", "goldfish"])
    assert data.protocol["class_names"] == "classnames.txt"
    assert data.images[1] == encoded(90)


def test_urban1k_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(urban1k(tmp_path / "u"))
    commit = hub.add("BeichenZhang/Urban1k", {"Urban1k.zip": archive, "README.md": b"# U"}, kind="dataset")
    hub.add("ada/empty", {"a.txt": b"a"}, kind="dataset")
    with pytest.raises(ValueError, match="zip"):
        load_benchmark("urban1k", "ada/empty")
    data = retrieval("urban1k", num_images=3)
    assert data.texts == ["Street 8. A bus", "Street 9. A bus", "Street 10. A bus"]
    assert (data.id, data.revision) == ("BeichenZhang/Urban1k", commit)
    go_offline(hub, monkeypatch)
    kept = retrieval("urban1k", num_images=3)
    assert (kept.texts, list(kept.images), kept.revision) == (data.texts, list(data.images), commit)
    for repo_id, revision in (("ada/city", None), (None, "v2")):
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE=0"):
            load_benchmark("urban1k", repo_id, revision=revision)
    assert not hub.requests


def test_what_the_hub_does_not_give(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ada/absent"):
        load_benchmark("classification", "ada/absent")
    hub.add("ada/gated", {"Urban1k.zip": zipped(urban1k(tmp_path / "u"))}, kind="dataset")
    hub.repos["dataset", "ada/gated"].gated = True
    with pytest.raises(ValueError, match="hf auth login"):
        load_benchmark("urban1k", "ada/gated")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1"):
            load_benchmark("urban1k", "ada/gated")
    go_offline(hub, monkeypatch)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=0"):
        load_benchmark("classification", "ada/absent")


def test_tables_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    names = ClassLabel(names=["owl", "elk"])
    files = {
        "data/test-00000-of-00002.parquet": parquet(table([1, 0], names)),
        "data/test-00001-of-00002.parquet": parquet(table([0], names)),
        "data/train-00000-of-00001.parquet": parquet(table([1, 1, 1, 1], names)),
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
    assert old in caplog.text
    with pytest.raises(ValueError, match="split"):
        load_benchmark("classification", "ada/pets", split="train")
    for options, lacking in (({"revision": new}, new), ({"revision": "v2"}, "v2"), ({"config": "large"}, old)):
        with pytest.raises(ValueError, match=lacking):
            load_benchmark("classification", "ada/pets", split="test", **options)
    assert not hub.requests


def test_configurations_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ClassLabel(names=["owl", "elk"])
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {one}\n  data_files:\n  - split: test\n    path: {one}.parquet\n"
        for one in ("small", "large")
    )
    files = {"README.md": f"{card}---\n".encode()}
    files |= {"small.parquet": parquet(table([1], names)), "large.parquet": parquet(table([0, 1], names))}
    hub.add("ada/sizes", files, kind="dataset")
    with pytest.raises(ValueError, match="Config"):
        load_benchmark("classification", "ada/sizes")
    for _ in range(2):
        for one, labels in (("small", [1]), ("large", [0, 1])):
            assert list(classes("classification", "ada/sizes", config=one).labels) == labels
        go_offline(hub, monkeypatch)
    assert not hub.requests


def test_a_download_that_broke_off_is_not_scored(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ClassLabel(names=["owl", "elk"])
    files = {f"data/test-0000{n}-of-00002.parquet": parquet(table([n], names)) for n in range(2)}
    hub.add("ada/pets", files, kind="dataset")
    hub.faults.append(Fault("GET", "test-00001-of", Answer(403), times=100))
    with pytest.raises(ValueError, match="ada/pets"):
        load_benchmark("classification", "ada/pets")
    go_offline(hub, monkeypatch)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        load_benchmark("classification", "ada/pets")


def test_class_names_in_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = parquet(table([1, 0], Value("int64")))
    hub.add("ada/named", {"test.parquet": content, "classnames.txt": b"owl\nelk\n"}, kind="dataset")
    hub.add("ada/nameless", {"test.parquet": content}, kind="dataset")
    names = write(tmp_path / "names.txt", "a\nb\n")
    for _ in range(2):
        assert list(classes("classification", "ada/named").class_names) == ["owl", "elk"]
        assert list(classes("classification", "ada/nameless", class_names=names).class_names) == ["a", "b"]
        with pytest.raises(ValueError, match="--class-names"):
            load_benchmark("classification", "ada/nameless")
        go_offline(hub, monkeypatch)
    assert not hub.requests
