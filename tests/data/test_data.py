"""Collating records, and reading data sets as records: every layout in small, and what is broken in each."""

import csv
import dataclasses
import io
import json
import logging
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch.utils.data import DataLoader

from lotlip_hf import LoTLIPProcessor
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.record import RecordError, ShardError, check_record, record_rng
from lotlip_hf.data.records import (
    MAPPINGS,
    ColumnMapping,
    MissingColumn,
    SplitError,
    find_files,
    load_records,
    to_record,
)
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
from lotlip_hf.images import ImageError, PlainImageProcessor, load_image
from lotlip_hf.relabel.captioners.base import CaptionerConfig
from lotlip_hf.relabel.config import RelabelConfig
from lotlip_hf.relabel.run import _open_records
from lotlip_hf.scenes.dataset import long_captions, render, scene, short_caption

NOTHING_BROKEN = {"broken_images": 0, "broken_records": 0, "broken_shards": 0, "stand_ins": 0}


def some_records(number: int = 6) -> list[dict[str, Any]]:
    scenes = [scene(index) for index in range(number)]
    return [
        {
            "image": render(one, image_size=32),
            "short_caption": short_caption(one),
            "long_captions": long_captions(one),
            "id": one.id,
        }
        for one in scenes
    ]


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def same(batch: dict[str, Any], other: dict[str, Any]) -> bool:
    return batch.keys() == other.keys() and all(
        torch.equal(batch[name], other[name]) if isinstance(batch[name], torch.Tensor) else batch[name] == other[name]
        for name in batch
    )


def test_a_batch_holds_what_the_model_takes(processor: LoTLIPProcessor) -> None:
    records = some_records()
    collator = LoTLIPCollator(processor, SubCaptions(num_long_texts=2), seed=4, return_ids=True)
    collator.set_epoch(3)
    batch = collator(records)
    assert batch["return_loss"] is True
    assert batch["ids"] == [record["id"] for record in records]
    expected = processor(images=[record["image"] for record in records], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["pixel_values"].shape == (6, 3, 32, 32)

    rngs = [record_rng(4, 3, record["id"]) for record in records]
    texts = SubCaptions(num_long_texts=2)(records, rngs)  # pyright: ignore[reportArgumentType]
    short = processor(text=[text.short for text in texts], return_tensors="pt")
    long = processor(text=[text.long for text in texts], return_tensors="pt")
    assert torch.equal(batch["input_ids"], short["input_ids"])
    assert torch.equal(batch["attention_mask"], short["attention_mask"])
    assert torch.equal(batch["long_input_ids"], long["input_ids"])
    assert torch.equal(batch["long_attention_mask"], long["attention_mask"])
    # Each is as long as its own longest text.
    assert batch["long_input_ids"].shape[:2] == (6, 2)
    assert batch["input_ids"].shape[1] < batch["long_input_ids"].shape[2] <= 64
    for mask in (batch["attention_mask"], batch["long_attention_mask"]):
        assert mask.flatten(0, -2).sum(-1).max() == mask.shape[-1]
    assert batch["counts"] == {"records": 6, **NOTHING_BROKEN}
    batch = LoTLIPCollator(processor, SubCaptions(num_long_texts=0))(records)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "return_loss"}


def test_text_keys_tell_which_captions_are_equal(processor: LoTLIPProcessor) -> None:
    captions = ["A red cat.", " a  RED\tcat.\n", "A red cat", "Straße \ud800", "STRASSE \ud800", "猫"]
    records = some_records(8)
    for record, caption in zip(records, captions, strict=False):
        record |= {"short_caption": caption, "long_captions": [f"{caption} It sleeps. It dreams.", None]}
    records[6] |= {"short_caption": "A dog.", "long_captions": []}  # the short caption is its long text
    records[7] |= {"short_caption": "a dog.", "long_captions": [""]}
    collator = LoTLIPCollator(processor, SubCaptions(2, 1), return_text_keys=True, frozen=("text",))
    keys = collator(records)["text_keys"]
    assert keys.dtype == torch.int64
    assert torch.equal(keys[:, 1], keys[:, 2])  # whatever sentences are drawn
    for column in keys.unbind(1):
        groups = column.unique(return_inverse=True)[1].tolist()
        assert [groups.index(group) for group in groups] == [0, 0, 2, 3, 3, 5, 6, 6]
    assert torch.equal(collator(records[1:])["text_keys"], keys[1:])
    assert "text_keys" not in LoTLIPCollator(processor)(records)


def test_every_kind_of_image_is_read(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    record = some_records(1)[0]
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    picture.paste((200, 0, 0, 255), (8, 8, 24, 24))
    picture.save(tmp_path / "picture.png")
    content = encoded(picture)
    sources = [
        picture,
        str(tmp_path / "picture.png"),
        tmp_path / "picture.png",
        content,
        {"bytes": content, "path": "picture.png"},
        {"bytes": None, "path": str(tmp_path / "picture.png")},
        np.asarray(picture),
    ]
    own = LoTLIPProcessor(processor.image_processor, processor.tokenizer, background=None)
    for used, corner in ((processor, 1.0), (own, -1.0)):
        pixels = LoTLIPCollator(used)([{**record, "image": source} for source in sources])["pixel_values"]
        assert pixels[:, :, 0, 0].tolist() == [[corner] * 3] * len(sources)
        assert all(torch.equal(one, pixels[0]) for one in pixels)


def test_a_picture_that_does_not_fit_in_memory_is_left_out(
    processor: LoTLIPProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = some_records(3)
    records[1]["image"] = Image.new("RGB", (47, 31))
    call = PlainImageProcessor.__call__

    def short_of_memory(self: Any, images: list[Image.Image], **kwargs: Any) -> Any:
        if any(image.size == (47, 31) for image in images):
            raise MemoryError
        return call(self, images, **kwargs)

    monkeypatch.setattr(PlainImageProcessor, "__call__", short_of_memory)
    batch = LoTLIPCollator(processor, on_error="skip", return_ids=True)(records)
    assert len(batch["pixel_values"]) == 2
    assert batch["counts"]["broken_images"] == 1
    with pytest.raises(ImageError, match=f"{records[1]['id']}.*memory"):
        LoTLIPCollator(processor)(records)


def test_texts_differ_between_epochs_and_not_between_runs(processor: LoTLIPProcessor) -> None:
    records = some_records()
    collators = LoTLIPCollator(processor, seed=1), LoTLIPCollator(processor, seed=1), LoTLIPCollator(processor, seed=2)
    before = collators[0](records)
    for collator in collators:
        collator.set_epoch(1)
    first, again, other_seed = (collator(records) for collator in collators)
    assert same(first, again)
    assert not same(first, before)
    assert not same(first, other_seed)
    # neither the order nor the rest of the batch matters
    backwards = collators[0](records[::-1])
    assert torch.equal(backwards["long_input_ids"], first["long_input_ids"].flip(0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_give_the_same_batches(processor: LoTLIPProcessor, num_workers: int) -> None:
    records = some_records(8)
    records[5]["image"] = b"not an image"
    collator = LoTLIPCollator(processor, on_error="skip", return_ids=True)
    loader = DataLoader(
        records,
        batch_size=2,
        collate_fn=collator,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    alone = LoTLIPCollator(processor, on_error="skip", return_ids=True)
    for epoch in range(2):
        collator.set_epoch(epoch)
        alone.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch["ids"]) for batch in batches] == [2, 2, 1, 2]
        for number, batch in enumerate(batches):
            assert same(batch, alone(records[2 * number : 2 * number + 2]))
        counts = sum((Counter(batch["counts"]) for batch in batches), Counter())
        assert counts == {"records": 8, "broken_images": 1}


HALF = encoded(Image.new("RGB", (32, 32)), "JPEG")[:300]
BROKEN: list[tuple[dict[str, Any], type[ValueError], str, str]] = [  # what of a record, the error, a word, its count
    *(
        ({"image": image}, ImageError, word, "broken_images")
        for image, word in [
            ("missing.jpg", "missing.jpg"),
            ("half.jpg", "half.jpg"),
            ("empty.png", "empty.png"),
            (b"no image", "record bad"),
            (HALF, "record bad"),
            ({"bytes": HALF, "path": "000.jpg"}, "000.jpg"),
            ("https://example.com/a.jpg", "img2dataset"),
        ]
    ),
    *(
        (fields, RecordError, word, "broken_records")
        for fields, word in [
            ({"image": None}, "image"),
            ({"image": 3.5}, "float"),
            ({"short_caption": " "}, "short_caption"),
            ({"long_captions": "text"}, "long_captions"),
            ({"long_captions": ["text", 5]}, "long_captions"),
            ({"id": None}, "`id`"),
        ]
    ),
]


@pytest.mark.parametrize(("fields", "error", "word", "counted"), BROKEN)
def test_a_broken_record_stops_the_run_or_is_counted(
    fields: dict[str, Any],
    error: type[ValueError],
    word: str,
    counted: str,
    processor: LoTLIPProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("half.jpg").write_bytes(HALF)
    Path("empty.png").touch()
    first, last, bad = some_records(3)
    records = [first, {**bad, "id": "bad", **fields}, last]
    with pytest.raises(error, match=word) as raised:
        LoTLIPCollator(processor)(records)
    collator = LoTLIPCollator(processor, on_error="skip", return_ids=True)
    with caplog.at_level(logging.WARNING, logger="lotlip_hf"):
        batch = collator(records)
        assert batch.pop("counts") == {"records": 3, **NOTHING_BROKEN, counted: 1}
        assert batch.pop("ids") == [first["id"], last["id"]]
        assert same(batch, LoTLIPCollator(processor)([first, last]))
        assert str(raised.value) in caplog.text
        collator([first, *records[1:2] * 20])
    assert len(caplog.records) == 11  # ten, and that the others are counted only
    with pytest.raises(RecordError, match=word):
        collator(records[1:2])


def test_the_short_caption_stands_in_for_missing_long_ones(processor: LoTLIPProcessor) -> None:
    records = some_records(2)
    records[1]["long_captions"] = [None, ""]
    batch = LoTLIPCollator(processor, return_ids=True)(records)
    assert batch["counts"] == {"records": 2, **NOTHING_BROKEN, "stand_ins": 1}
    width = batch["input_ids"].shape[1]
    short_ids = batch["input_ids"][1][batch["attention_mask"][1].bool()]
    for row, mask in zip(batch["long_input_ids"][1], batch["long_attention_mask"][1], strict=True):
        assert mask.sum() <= width
        assert torch.equal(row[mask.bool()], short_ids)


def test_mistakes_in_the_set_up_are_never_skipped(processor: LoTLIPProcessor) -> None:
    with pytest.raises(ValueError, match="on_error"):
        LoTLIPCollator(processor, on_error="ignore")  # pyright: ignore[reportArgumentType]
    collator = LoTLIPCollator(processor, on_error="skip")
    with pytest.raises(KeyError, match="remove_unused_columns"):
        collator([{name: some_records(1)[0][name] for name in ("image", "short_caption")}])
    collator = LoTLIPCollator(processor, SubCaptions(captioners=(5,)), on_error="skip")
    with pytest.raises(ValueError, match="captioners"):
        collator(some_records(1))


def test_patch_dropout(processor: LoTLIPProcessor) -> None:
    records = some_records(4)
    plain = LoTLIPCollator(processor)(records)
    assert "kept_patches" not in plain
    collator = LoTLIPCollator(processor, patch_dropout=0.7, patch_size=8)
    batch = collator(records)
    kept = batch.pop("kept_patches")
    assert same(batch, plain)  # the texts are drawn before
    assert (kept.shape, kept.dtype) == ((4, 5), torch.int64)  # round(0.3 * 16)
    assert all(row == sorted(set(row)) and 0 <= row[0] and row[-1] < 16 for row in kept.tolist())
    assert len({tuple(row) for row in kept.tolist()}) == 4
    # by record and epoch, wherever the record stands
    assert torch.equal(collator(records[:0:-1])["kept_patches"], kept[1:].flip(0))
    collator.set_epoch(1)
    assert not torch.equal(collator(records)["kept_patches"], kept)
    assert LoTLIPCollator(processor, patch_dropout=0.99, patch_size=8)(records)["kept_patches"].shape == (4, 1)
    for wrong in ({"patch_dropout": 1.0, "patch_size": 8}, {"patch_dropout": 0.5}):
        with pytest.raises(ValueError, match="patch_dropout"):
            LoTLIPCollator(processor, **wrong)


@pytest.mark.slow
def test_a_collator_can_be_pickled(processor: LoTLIPProcessor) -> None:
    collator = LoTLIPCollator(processor, seed=3)
    collator.set_epoch(2)
    records = some_records(2)
    assert same(pickle.loads(pickle.dumps(collator))(records), collator(records))


# Reading: each writer lays six records out in its own way, and returns what to open them with.

LONG = [[f"Long {name} of {index}. Second sentence." for name in "abc"] for index in range(6)]
SHORT = [f"short {index}" for index in range(6)]


def picture(index: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (index * 40, 0, 90))


def write_pictures(folder: Path, pattern: str = "{}.png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [pattern.format(index) for index in range(6)]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / name)
    return names


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_tar(path: Path, indices: range, fields: Callable[[int], dict[str, bytes]]) -> None:
    write_members(path, [(f"{index:05}.{name}", one) for index in indices for name, one in fields(index).items()])


def metadata_lines(folder: Path) -> dict[str, Any]:
    names = write_pictures(folder, "sub/{}.png")
    rows = [
        {"file_name": n, "short_caption": s, "long_captions": g} for n, s, g in zip(names, SHORT, LONG, strict=True)
    ]
    write_lines(folder / "metadata.jsonl", rows)
    return {"source": folder}


def metadata_csv(folder: Path) -> dict[str, Any]:
    names = write_pictures(folder)
    columns = ("file_name", "alt", "one", "two", "three")
    rows = [dict(zip(columns, (n, s, *g), strict=True)) for n, s, g in zip(names, SHORT, LONG, strict=True)]
    write_csv(folder / "metadata.csv", rows)
    return {"source": folder, "mapping": ColumnMapping("file_name", ("one", "two", "three"), "alt")}


def parquet_with_images(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    text = datasets.Value("string")
    features = datasets.Features(
        {"id": text, "image": datasets.Image(), "short_caption": text, "long_captions": datasets.List(text)}
    )
    for part in range(2):
        indices = range(3 * part, 3 * part + 3)
        columns = {
            "id": [f"picture {index}" for index in indices],
            "image": [{"bytes": encoded(picture(index)), "path": None} for index in indices],
            "short_caption": [SHORT[index] for index in indices],
            "long_captions": [LONG[index] for index in indices],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"part-{part}.parquet")
    return {"source": folder}


def parquet_with_bytes(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    columns = {"picture": [encoded(picture(index)) for index in range(6)], "text": SHORT, "captions": LONG}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "all.parquet")
    return {"source": folder / "all.parquet", "mapping": ColumnMapping("picture", "captions", "text")}


def web_dataset(folder: Path) -> dict[str, Any]:
    def fields(index: int) -> dict[str, bytes]:
        captions = {"raw_caption": SHORT[index], "longIB_captions": LONG[index][0], "longSV_captions": LONG[index][1]}
        # A column of the table that the shards were downloaded from.
        captions |= {"longLLA_captions": LONG[index][2], "Image Path": "https://example.com/a.png"}
        return {"png": encoded(picture(index)), "txt": b"other", "json": json.dumps(captions).encode()}

    for part in range(2):
        write_tar(folder / f"{part:03}.tar", range(3 * part, 3 * part + 3), fields)
    return {"source": str(folder / "*.tar"), "mapping": "dreamlip"}


def dreamlip(folder: Path) -> dict[str, Any]:
    names = write_pictures(folder / "pictures")
    columns = (
        "Image Path",
        "raw_caption",
        "longIB_captions",
        "longSV_captions",
        "longLLA_captions",
        "shortIB_captions",
    )
    rows = [dict(zip(columns, (n, s, *g, "a"), strict=True)) for n, s, g in zip(names, SHORT, LONG, strict=True)]
    write_csv(folder / "cc3m.csv", rows)
    return {"source": folder / "cc3m.csv", "mapping": "dreamlip", "image_folder": folder / "pictures"}


def recap_long(folder: Path) -> dict[str, Any]:
    names = write_pictures(folder)
    columns = ("url", "caption", "longA_caption", "longB_caption", "longC_caption")
    rows = [dict(zip(columns, (n, s, *g), strict=True)) for n, s, g in zip(names, SHORT, LONG, strict=True)]
    write_csv(folder / "laion.csv", rows)
    return {"source": folder, "mapping": "recap-long-laion"}


READ_ALL = [metadata_lines, metadata_csv, parquet_with_images, parquet_with_bytes, web_dataset, dreamlip, recap_long]


def sharegpt4v(folder: Path) -> dict[str, Any]:
    names = write_pictures(folder, "sam/images/{}.png")
    rows = [
        {
            "id": "same",
            "image": name,
            "conversations": [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": long[0]}],
        }
        for name, long in zip(names, LONG, strict=True)
    ]
    (folder / "sharegpt4v.json").write_text(json.dumps(rows), encoding="utf-8")
    return {"source": folder / "sharegpt4v.json", "mapping": "sharegpt4v"}


def docci(folder: Path) -> dict[str, Any]:
    names = write_pictures(folder / "images")
    rows = [
        {"example_id": f"example {index}", "image_file": name, "description": LONG[index][0]}
        for index, name in enumerate(names)
    ]
    write_lines(folder / "docci.jsonlines", rows)
    return {"source": folder, "mapping": "docci", "image_folder": folder / "images"}


def image_in_words(folder: Path) -> dict[str, Any]:
    write_pictures(folder / "images", "key-{}.png")
    rows = [{"image/key": f"key-{index}", "IIW": LONG[index][0], "IIW-P5B": "other"} for index in range(6)]
    write_lines(folder / "iiw.jsonl", rows)
    return {"source": [folder / "iiw.jsonl"], "mapping": "iiw", "image_folder": str(folder / "images")}


READ_ONE_LONG = [sharegpt4v, docci, image_in_words]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [*READ_ALL, *READ_ONE_LONG])
def test_every_layout_is_read(
    write: Callable[[Path], dict[str, Any]], streaming: bool, processor: LoTLIPProcessor, tmp_path: Path
) -> None:
    arguments = write(tmp_path / "data")
    records = load_records(**arguments, streaming=streaming)
    assert isinstance(records, IterableDataset if streaming or write is web_dataset else Dataset)
    rows = list(records)
    assert len(rows) == 6
    assert len({row["id"] for row in rows}) == 6
    for index, row in enumerate(rows):
        assert set(row) == {"image", "short_caption", "long_captions", "id", "error"}
        assert row["error"] is None
        assert row["long_captions"] == (LONG[index] if write in READ_ALL else LONG[index][:1])
        assert row["short_caption"] == (SHORT[index] if write in READ_ALL else f"Long a of {index}")
    collator = LoTLIPCollator(processor, return_ids=True)
    (batch,) = DataLoader(records, batch_size=6, collate_fn=collator)  # pyright: ignore[reportArgumentType]
    assert batch["ids"] == [row["id"] for row in rows]
    expected = processor(images=[picture(index) for index in range(6)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    # The ids are the same wherever the data lies, and however they are read.
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = {name: relocated(value, tmp_path) for name, value in arguments.items()}
    again = load_records(**moved, streaming=not streaming)
    assert [row["id"] for row in again] == batch["ids"]


def relocated(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [relocated(one, folder) for one in value]
    if isinstance(value, str | Path):
        return type(value)(str(value).replace(str(folder / "data"), str(folder / "elsewhere")))
    return value


@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_look_like_patterns(streaming: bool, tmp_path: Path) -> None:
    records = load_records(**metadata_lines(tmp_path / "data [a] *?"), streaming=streaming)
    assert [row["short_caption"] for row in records] == SHORT


def test_ids(tmp_path: Path) -> None:
    assert [row["id"] for row in load_records(**docci(tmp_path / "a"))][:2] == ["example 0", "example 1"]
    assert [row["id"] for row in load_records(**sharegpt4v(tmp_path / "b"))][:1] == ["sam/images/0.png"]
    assert [row["id"] for row in load_records(**web_dataset(tmp_path / "c"))][2:4] == [
        "000.tar/00002",
        "001.tar/00003",
    ]


def test_workers_share_the_shards(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    records = load_records(**web_dataset(tmp_path / "data"))
    collator = LoTLIPCollator(processor, return_ids=True)
    batches = list(DataLoader(records, batch_size=2, collate_fn=collator, num_workers=2))  # pyright: ignore[reportArgumentType]
    assert sorted(one for batch in batches for one in batch["ids"]) == sorted(row["id"] for row in records)
    shuffled = records.shuffle(seed=1)
    assert sorted(row["id"] for row in shuffled) == sorted(row["id"] for row in records)


@pytest.mark.parametrize("where", ["in a file", "before a file", "in a header", "before the end mark"])
def test_a_truncated_shard_is_counted_or_stops_the_run(where: str, processor: LoTLIPProcessor, tmp_path: Path) -> None:
    arguments = web_dataset(tmp_path / "data")
    whole = [row["id"] for row in load_records(**arguments)]
    shard = tmp_path / "data" / "000.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    (member,) = [member for member in members if member.name == "00002.txt"]
    end = members[-1].offset_data + members[-1].size
    cuts = {
        "in a file": member.offset_data + 2,
        "before a file": member.offset,
        "in a header": member.offset + 100,
        "before the end mark": end + -end % tarfile.BLOCKSIZE,
    }
    shard.write_bytes(shard.read_bytes()[: cuts[where]])
    rows = list(load_records(**arguments))
    # Two whole samples, the error in place of the third, and the next shard.
    assert [row["id"] for row in rows] == [*whole[:2], "000.tar", *whole[3:]]
    assert "000.tar: damaged or truncated after 2 records" in rows[2]["error"]
    collator = LoTLIPCollator(processor, on_error="skip", return_ids=True)
    batch = collator(rows)
    assert batch["ids"] == [*whole[:2], *whole[3:]]
    assert batch["counts"] == {"records": 6, **NOTHING_BROKEN, "broken_shards": 1}
    with pytest.raises(ShardError, match="000.tar"):
        LoTLIPCollator(processor, on_error="raise")(rows)


def test_samples_of_a_shard_may_differ_in_their_files(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    files = [
        {"jpg": encoded(picture(0), "JPEG"), "txt": b"one", "json": b'{"long": "Long one."}'},
        {"PNG": encoded(picture(1)), "txt": b"two"},
        {"txt": b"three", "json": b'{"long": "Long three."}'},
        {"webp": encoded(picture(3), "WEBP"), "txt": "vier ü".encode(), "json": b'{"long": "Four."}', "npy": b"?"},
    ]
    write_tar(tmp_path / "all.tar", range(4), files.__getitem__)
    rows = list(load_records(tmp_path / "all.tar", ColumnMapping(long="long", short="txt")))
    assert [row["short_caption"] for row in rows] == ["one", "two", "three", "vier ü"]
    assert [row["long_captions"] for row in rows] == [["Long one."], [""], ["Long three."], ["Four."]]
    collator = LoTLIPCollator(processor, on_error="skip", return_ids=True)
    batch = collator(rows)
    assert batch["ids"] == [f"all.tar/{index:05}" for index in (0, 1, 3)]
    assert batch["counts"] == {"records": 4, **NOTHING_BROKEN, "broken_records": 1, "stand_ins": 1}


def test_a_damaged_table_is_one_clear_error(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    arguments = parquet_with_images(tmp_path / "data")
    part = tmp_path / "data" / "part-1.parquet"
    part.write_bytes(part.read_bytes()[:-50])
    with pytest.raises(ValueError, match="part-1.parquet"):
        load_records(**arguments)
    rows = list(load_records(**arguments, streaming=True))
    assert [row["id"] for row in rows] == ["picture 0", "picture 1", "picture 2", "part-1.parquet"]
    assert "part-1.parquet: damaged or truncated after 0 records" in rows[-1]["error"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("mapping", "field", "word"),
    [
        (ColumnMapping("picture", "one", "alt"), "image", "picture"),
        (ColumnMapping("file_name", ("one", "four"), "alt"), "long", "four"),
        (ColumnMapping("file_name", "long*", "alt"), "long", "long[*]"),
        (ColumnMapping("file_name", "one", ("text", "caption")), "short", "caption"),
        (MAPPINGS["dreamlip"], "short", "raw_caption"),
    ],
)
def test_a_missing_column_is_named(
    mapping: ColumnMapping, field: str, word: str, streaming: bool, tmp_path: Path
) -> None:
    source = metadata_csv(tmp_path / "data")["source"]
    with pytest.raises(MissingColumn, match=word) as raised:
        load_records(source, mapping, streaming=streaming)
    assert raised.value.field == field
    assert "'three'" in raised.value.problem  # those that there are


# Optional fields

OWN = {
    "negatives": ["A dog.", "No cat."],
    "rewrites": ["The cat \ud800."],
    "tags": ["cat", None, ""],
    "regions": [{"box": [0, 0.25, 0.5, 1], "text": "an ear"}],
    "group": 7,
}
READ = {**OWN, "rewrites": ["The cat ?."], "tags": ["cat"], "group": "7"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "tar", "tar, own names"])
@pytest.mark.parametrize("streaming", [False, True])
def test_optional_fields_are_carried(kind: str, streaming: bool, tmp_path: Path) -> None:
    own, read, mapping = dict(OWN), dict(READ), "records"
    if kind == "csv":
        own, read = ({name: value for name, value in one.items() if name != "regions"} for one in (OWN, READ))
    if kind == "parquet":
        own["rewrites"] = read["rewrites"]
    texts = {"short_caption": "a", "long_captions": ["A."]}
    rows = [{"image": f"{index}.png", **texts} for index in range(30)]
    rows[25] |= own  # behind those that are looked at for their columns
    data = tmp_path / f"rows.{kind[:3]}"
    if kind == "jsonl":
        write_lines(data := tmp_path / "rows.jsonl", rows)
    elif kind == "csv":
        cells = [{name: json.dumps(one) if isinstance(one, list) else one for name, one in r.items()} for r in rows]
        write_csv(data, [dict.fromkeys(cells[25], "") | row for row in cells])
    elif kind == "parquet":
        table = pyarrow.Table.from_pylist([rows[25], *rows[:25], *rows[26:]])
        pyarrow.parquet.write_table(table.take([*range(1, 26), 0, *range(26, 30)]), data := tmp_path / "rows.parquet")
    else:
        if kind == "tar, own names":
            mapping = ColumnMapping(negatives="mine.negatives", group="mine.group")
            rows[25] = {"image": "25.png", **texts, "mine": own, "tags": ["not asked for"]}
            read = {name: READ[name] for name in ("negatives", "group")}
        fields = [{name: one for name, one in row.items() if name != "image"} for row in rows]
        content = encoded(picture(0))
        write_tar(data, range(30), lambda index: {"png": content, "json": json.dumps(fields[index]).encode()})
    records = list(load_records(data, mapping, streaming=streaming))
    assert {record["error"] for record in records} == {None}
    checked = check_record(records[25])
    assert {name: checked.get(name) for name in OWN if name in checked} == read
    others = [check_record(record) for record in records[:25]]
    assert not any(name in other for other in others for name in OWN)
    assert not any("rewrites" in record for record in load_records(**metadata_lines(tmp_path / "plain")))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("negatives", [5]),
        ("tags", [["cat"]]),
        ("regions", "an ear"),
        ("regions", [{"box": [0, 0, 0.5], "text": "an ear"}]),
        ("regions", [{"box": [0, 0, 10, 20], "text": "an ear"}]),
        ("regions", [{"box": [0.5, 0, 0.4, 1], "text": "an ear"}]),
        ("regions", [{"box": [0, 0, 1, 1], "text": None}]),
        ("regions", [{"box": [0, 0, 1, True], "text": "an ear"}]),
        ("group", ["a"]),
    ],
)
def test_an_optional_field_of_another_type_is_left_out(
    field: str, value: Any, streaming: bool, tmp_path: Path
) -> None:
    row = {"image": "0.png", "short_caption": "a", "long_captions": ["A."]}
    write_lines(tmp_path / "rows.jsonl", [{**row, field: value}, row])
    for record in load_records(tmp_path / "rows.jsonl", streaming=streaming):
        assert record["error"] is None
        assert field not in record
    with pytest.raises(RecordError, match=f"`{field}`"):
        check_record({**row, "id": "x", field: value})


def test_patterns_and_ways_into_columns() -> None:
    row = {"image": {"bytes": b"x", "path": "a.png"}, "c": [{"text": ["one", "two"]}, {}], "a.b": "dotted"}
    record = to_record(row, ColumnMapping("image", ("c[0].text", "c[1].text", "c[7].text", "a.b"), "c[0].text[1]"))
    assert record["short_caption"] == "two"
    assert record["long_captions"] == ["one", "two", "", "", "dotted"]  # the captioners keep their numbers
    assert record["image"] == row["image"]
    other = to_record({**row, "image": {"bytes": b"y", "path": "a.png"}}, ColumnMapping("image", "a.b", "a.b"))
    assert other["id"] != to_record(row, ColumnMapping("image", "a.b", "a.b"))["id"]
    url = to_record({"image": "https://example.com/a.jpg", "t": "x"}, ColumnMapping("image", "t", None), "folder")
    assert url["image"] == url["id"] == "https://example.com/a.jpg"


@pytest.mark.parametrize(
    ("source", "options", "error", "word"),
    [
        ("empty", {}, FileNotFoundError, "metadata.jsonl"),
        ("nowhere", {}, FileNotFoundError, "nowhere"),
        ("empty", {"mapping": "laion"}, ValueError, "laion"),
        ("notes.doc", {}, ValueError, "notes.doc"),
        ("table.json", {"revision": "main"}, ValueError, "revision"),
        ("table.json", {"streaming": True}, MissingColumn, "table.json"),
        ("none.tar", {"mapping": "dreamlip"}, ValueError, "none.tar"),
        ("half.jsonl", {}, ValueError, "half.jsonl"),
    ],
)
def test_what_is_not_there_is_said(
    source: Any,
    options: dict[str, Any],
    error: type[Exception],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name, content in {"notes.doc": "x", "table.json": '{"image": ["a.jpg"]}', "none.tar": ""}.items():
        Path(name).write_text(content)
    Path("half.jsonl").write_text('{"image": "a.jpg", \n')
    with pytest.raises(error, match=word):
        load_records(source, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_on_the_hub(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_with_images(tmp_path / "data")
    asked = []
    load_dataset = datasets.load_dataset

    def from_here(name: str, split: str, streaming: bool, **kwargs: Any) -> Any:
        asked.append((name, split, kwargs))
        return load_dataset("parquet", data_dir=str(tmp_path / "data"), split="train", streaming=streaming)

    monkeypatch.setattr("lotlip_hf.data.records.load_dataset", from_here)
    rows = list(load_records("somebody/pictures", split="test", streaming=streaming, revision="abc"))
    assert asked == [("somebody/pictures", "test", {"revision": "abc"})]
    assert [row["id"] for row in rows] == [f"picture {index}" for index in range(6)]
    assert [row["long_captions"] for row in rows] == LONG
    assert Image.open(io.BytesIO(rows[2]["image"]["bytes"])).getpixel((0, 0)) == (80, 0, 90)
    rows = list(
        load_records("somebody/pictures", ColumnMapping(tags="long_captions", group="no"), streaming=streaming)
    )
    assert [row["tags"] for row in rows] == LONG
    assert "group" not in rows[0]
    with pytest.raises(ValueError, match="image_file"):
        load_records("somebody/pictures", ColumnMapping("image_file", "long_captions"), streaming=streaming)


def test_what_is_hidden_is_no_data(tmp_path: Path) -> None:
    # `lotlip search` keeps its index in the folder that it searched
    (tmp_path / ".lotlip").mkdir()
    (tmp_path / ".lotlip" / "entries.jsonl").write_text('{"file": "cat.png"}\n')
    encoded_image = encoded(render(scene(0), image_size=32))
    (tmp_path / "cat.png").write_bytes(encoded_image)
    row = {"image": "cat.png", "short_caption": "a cat", "long_captions": ["A cat sits."]}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n")
    assert load_records(tmp_path, "records")["short_caption"] == ["a cat"]


# Which picture, which split, which value.


def caption_rows(folder: Path, number: int, color: int, name: str) -> None:
    """Pictures of one colour with captions that name it, in a metadata file of its own."""
    folder.mkdir(parents=True)
    rows = []
    for index in range(number):
        Image.new("RGB", (8, 8), (color, 0, 0)).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "short_caption": f"{color}", "long_captions": [f"{color}."]})
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    elif name.endswith(".jsonl"):
        write_lines(folder / name, rows)
    else:
        write_csv(folder / name, [{**row, "long_captions": json.dumps(row["long_captions"])} for row in rows])


def pairs(records: Any) -> list[tuple[int, str]]:
    """The colour of each record's picture beside the one that its caption names."""
    return [(load_image(one["image"]).getpixel((0, 0))[0], one["short_caption"]) for one in records]  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_path_starts_at_its_own_file(name: str, streaming: bool, tmp_path: Path) -> None:
    for folder, color in (("summer", 50), ("winter", 200)):
        caption_rows(tmp_path / "pictures" / folder, 2, color, name)
    expected = [(50, "50"), (50, "50"), (200, "200"), (200, "200")]
    folders = [tmp_path / "pictures" / folder for folder in ("summer", "winter")]
    pattern = str(tmp_path / "pictures" / "*" / name)
    braces = str(tmp_path / "pictures" / "{summer,winter}")
    for source in (tmp_path / "pictures", folders, pattern, braces):
        assert pairs(load_records(source, streaming=streaming)) == expected
    assert pairs(load_records(folders[::-1], streaming=streaming)) == expected[::-1]
    if name.endswith(".jsonl"):  # the first pictures may be missing, too
        (folders[0] / "0.png").unlink()
        assert not Path(next(iter(load_records(tmp_path / "pictures", streaming=streaming)))["image"]).exists()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", [("train", "test"), ("training", "val"), ("my-train_1", "dev"), ("Train", "Test")])
def test_splits_are_not_merged_unasked(names: tuple[str, str], streaming: bool, tmp_path: Path) -> None:
    for folder, color in zip(names, (50, 200), strict=True):
        caption_rows(tmp_path / "pictures" / folder, 1, color, "metadata.jsonl")
    split = {"test": "test", "val": "validation", "dev": "dev", "Test": "test"}[names[1]]
    for source in (tmp_path / "pictures", str(tmp_path / "*" / "*" / "metadata.jsonl")):
        with pytest.raises(SplitError, match="--split"):
            load_records(source, streaming=streaming)
        for wanted, color in (("train", 50), (split, 200), (names[1], 200)):
            assert pairs(load_records(source, split=wanted, streaming=streaming)) == [(color, str(color))]
        assert len(pairs(load_records(source, split="all", streaming=streaming))) == 2
        with pytest.raises(SplitError, match="other"):
            load_records(source, split="other", streaming=streaming)
    # a list says so itself
    both = [tmp_path / "pictures" / name for name in names]
    assert pairs(load_records(both, streaming=streaming)) == [(50, "50"), (200, "200")]


def test_splits_of_files(tmp_path: Path) -> None:
    for name in ("cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-validation-0000.tar", "latest.tar"):
        write_tar(tmp_path / "shards" / name, range(1), lambda _: {"png": encoded(picture(0)), "txt": b"a"})
    with pytest.raises(SplitError, match="--split"):
        find_files(tmp_path / "shards")
    assert [Path(one).name for one in find_files(tmp_path / "shards", "val")] == ["cc3m-validation-0000.tar"]
    # what are no splits is one
    (tmp_path / "plain").mkdir()
    write_lines(tmp_path / "plain" / "metadata.jsonl", [{"file_name": "a.png"}])
    assert len(find_files(tmp_path / "plain", "train")) == len(find_files(tmp_path / "plain")) == 1
    with pytest.raises(SplitError, match="test"):
        find_files(tmp_path / "plain", "test")


ODD = ["None", "NA", "null", "2023", "2023-01-01", "1e5", "true", "nan", "-", "[a street]", 'It\'s "so", he said']


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_texts_and_ids_are_as_written(suffix: str, mark: str, streaming: bool, tmp_path: Path) -> None:
    rows = [
        {"image": "0.png", "id": f"00{index}", "short_caption": text, "long_captions": text}
        for index, text in enumerate(ODD)
    ]
    buffer = io.StringIO()
    if suffix in (".csv", ".tsv"):
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    elif suffix == ".jsonl":
        buffer.write("".join(json.dumps(row) + "\r\n" for row in rows))
    else:
        json.dump(rows, buffer, indent=1)
    (tmp_path / f"rows{suffix}").write_bytes((mark + buffer.getvalue()).encode())
    records = list(load_records(tmp_path / f"rows{suffix}", streaming=streaming))
    assert [record["short_caption"] for record in records] == ODD
    assert [record["long_captions"] for record in records] == [[text] for text in ODD]
    assert [record["id"] for record in records] == [row["id"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_in_a_cell_is_a_list(streaming: bool, tmp_path: Path) -> None:
    cells = {
        '["a", "b"]': ["a", "b"],
        ' ["a", null] ': ["a", ""],
        "[]": [],
        "[a, b]": ["[a, b]"],
        "plain": ["plain"],
        "A\nb.": ["A\nb."],
    }
    rows = [{"image": "0.png", "short_caption": "s", "long_captions": cell} for cell in cells]
    write_csv(tmp_path / "rows.csv", rows)
    records = list(load_records(tmp_path / "rows.csv", streaming=streaming))
    assert [record["error"] for record in records] == [None] * len(cells)
    assert [[text or "" for text in record["long_captions"]] for record in records] == list(cells.values())


def test_a_broken_row_is_counted_or_stops_the_run(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    (name, *_), row = write_pictures(tmp_path), {"short_caption": "a", "long_captions": ["A."]}
    lines = [json.dumps({"image": name, **row}), "[1]", json.dumps({"image": name, **row, "short_caption": {}})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    records = list(load_records(tmp_path / "rows.jsonl"))
    collator = LoTLIPCollator(processor, on_error="skip", return_ids=True)
    batch = collator(records)
    assert batch["ids"] == [name]
    assert batch["counts"] == {"records": 3, **NOTHING_BROKEN, "broken_records": 2}
    with pytest.raises(RecordError, match="line 2"):
        LoTLIPCollator(processor)(records)


# Shards as other people write them.


def test_fields_under_their_full_extension(tmp_path: Path) -> None:
    members = []
    for index in range(3):
        members += [
            (f"v1.5/set.a/{index}.input.jpg", encoded(picture(index), "JPEG")),
            (f"v1.5/set.a/{index}.outputs.txt", SHORT[index].encode()),
            (f"v1.5/set.a/{index}.long.TXT", LONG[index][0].encode()),
            (f"v1.5/set.a/{index}.meta.json", json.dumps({"caption": {"b": LONG[index][1]}}).encode()),
            (f"v1.5/set.a/{index}.npy", b"unread"),
            (f"v1.5/set.a/._{index}.jpg", b"what macOS adds"),
        ]
    shard = write_members(tmp_path / "all.tar", members)
    for way in ("caption.b", "meta.json.caption.b"):
        rows = list(load_records(shard, ColumnMapping(short="outputs.txt", long=("long.txt", way))))
        assert [row["short_caption"] for row in rows] == SHORT[:3]
        assert [row["long_captions"] for row in rows] == [long[:2] for long in LONG[:3]]
        assert [row["id"] for row in rows] == [f"all.tar/v1.5/set.a/{index}" for index in range(3)]
        assert [row["image"]["bytes"] for row in rows] == [content for name, content in members if ".input." in name]


def test_one_of_several_pictures_is_named(tmp_path: Path) -> None:
    first, second = encoded(picture(1)), encoded(picture(2))
    members = [("0.input.png", first), ("0.output.png", second), ("0.txt", b"a"), ("0.json", b'{"image": "x.png"}')]
    shard = write_members(tmp_path / "pairs.tar", members)
    mapping = ColumnMapping(short="txt", long="txt")
    with pytest.raises(MissingColumn, match="output.png"):
        load_records(shard, mapping)
    for name, content in (("input.png", first), ("output.png", second)):
        (row,) = load_records(shard, dataclasses.replace(mapping, image=name))
        assert row["image"]["bytes"] == content
    # one sample with several among those with one
    write_members(shard, [("a.png", first), ("a.txt", b"a"), *members])
    rows = list(load_records(shard, mapping))
    assert [row["error"] is None for row in rows] == [True, False]
    assert "--image-column" in rows[1]["error"]


def test_members_that_are_not_side_by_side_are_said(tmp_path: Path) -> None:
    images = [(f"{index}.png", encoded(picture(index))) for index in range(3)]
    texts = [(f"{index}.txt", b"a caption") for index in range(3)]
    mapping = ColumnMapping(short="txt", long="txt")
    for members in (images + texts, texts + images):
        with pytest.raises(MissingColumn, match="adjacent"):
            load_records(write_members(tmp_path / "all.tar", members), mapping)
    # a member that was appended later
    write_members(tmp_path / "all.tar", [images[0], texts[0], images[1], images[2], texts[2], texts[1]])
    rows = list(load_records(tmp_path / "all.tar", mapping))
    assert [row["id"] for row in rows if not row["error"]] == [f"all.tar/{index}" for index in range(3)]
    assert "adjacent" in rows[3]["error"]
    write_members(tmp_path / "all.tar", [images[0], texts[0], images[1], texts[1], texts[1]])
    assert "two members" in list(load_records(tmp_path / "all.tar", mapping))[1]["error"]


def test_braces(tmp_path: Path) -> None:
    for number in range(4):
        write_members(tmp_path / f"{number:03}.tar", [("0.png", encoded(picture(number))), ("0.txt", b"a")])

    def found(pattern: str) -> list[str]:
        return [Path(one).stem for one in find_files(str(tmp_path / pattern))]

    assert found("{000..002}.tar") == ["000", "001", "002"]
    assert found("{003..001}.tar") == ["003", "002", "001"]
    assert found("{000..003..2}.tar") == ["000", "002"]
    assert found("00{0,3}.tar") == ["000", "003"]
    assert sorted(found("{00{0..1},003}.tar")) == ["000", "001", "003"]
    with pytest.raises(FileNotFoundError, match="004.tar"):
        found("{000..004}.tar")
    (tmp_path / "{0..1}.tar").write_bytes((tmp_path / "000.tar").read_bytes())
    assert found("{0..1}.tar") == ["{0..1}"]


# One kind of caption alone.


@pytest.mark.parametrize("streaming", [False, True])
def test_long_captions_alone(streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"image": "a.png", "long_captions": ["A cat. It sleeps."]}])
    (row,) = load_records(tmp_path / "rows.jsonl", streaming=streaming)
    assert (row["short_caption"], row["long_captions"]) == ("A cat", ["A cat. It sleeps."])
    assert "--short-column" in caplog.text
    write_lines(tmp_path / "rows.jsonl", [{"image": "a.png", "short_caption": "A cat."}])
    with pytest.raises(MissingColumn) as raised:
        load_records(tmp_path / "rows.jsonl", streaming=streaming)
    assert raised.value.field == "long"
    (row,) = load_records(tmp_path / "rows.jsonl", ColumnMapping(long=()), streaming=streaming)
    assert (row["short_caption"], row["long_captions"]) == ("A cat.", [])


def test_other_commands_read_the_same(tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    for folder, color in (("train", 50), ("test", 200)):
        caption_rows(data / folder, 2, color, "metadata.csv")

    def relabelled(split: str | None) -> list[tuple[int, str]]:
        return pairs(_open_records(RelabelConfig(str(data), "out", [CaptionerConfig("m")], split=split)))

    def evaluated(split: str | None) -> list[tuple[int, str]]:
        found = load_benchmark("retrieval", data, captions="short", split=split)
        images = [found.images[index] for index in found.text_to_image]  # pyright: ignore[reportAttributeAccessIssue]
        return [
            (load_image(image).getpixel((0, 0))[0], text)  # pyright: ignore[reportIndexIssue]
            for image, text in zip(images, found.texts, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
        ]

    for read in (relabelled, evaluated):
        assert read("train") == 2 * [(50, "50")]
        assert sorted(read("all")) == 2 * [(50, "50")] + 2 * [(200, "200")]
        with pytest.raises(SplitError, match="--split"):
            read(None)


def test_a_table_is_read_anew_when_its_file_changes(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_lines(tmp_path / "rows.jsonl", [{"image": "a.png", "short_caption": text, "long_captions": [text]}])
        assert load_records(tmp_path / "rows.jsonl")[0]["short_caption"] == text
