"""Data sets of strangers: what they name that is not theirs, and rows that are made to take all memory."""

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lotlip_hf import cli
from lotlip_hf.data.collator import RecordError, read_record
from lotlip_hf.data.readers import parquet_batches, read_rows
from lotlip_hf.data.records import ColumnMapping, MissingColumn, find_files, load_records, read_table
from lotlip_hf.embed import read_texts
from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
from lotlip_hf.relabel.captioners.base import CaptionerConfig
from lotlip_hf.relabel.config import RelabelConfig
from lotlip_hf.relabel.run import _open_records
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data

LIMIT = 1 << 16
CAPTIONS = {"short_caption": "a", "long_captions": ["A."]}


def encoded(color: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder that was given, and one beside it that was not."""
    given, private = tmp_path / "given", tmp_path / "private"
    for folder in (given, given / "sub", private):
        folder.mkdir()
        (folder / "x.png").write_bytes(encoded())
    return given, private


def outside(given: Path, private: Path) -> dict[str, str]:
    """Paths in a data set that lead out of its folder."""
    (given / "link.png").symlink_to(private / "x.png")
    (given / "links").symlink_to(private)
    return {
        "relative": "../private/x.png",
        "through a folder": "sub/../../private/x.png",
        "absolute": str(private / "x.png"),
        "key": "../private/x",
        "link": "link.png",
        "link of a folder": "links/x.png",
        "above a link": "links/../private/x.png",
    }


WAYS = ["relative", "through a folder", "absolute", "key", "link", "link of a folder", "above a link"]


def write_rows(folder: Path, kind: str, paths: list[str]) -> Path:
    rows = [{"image": path, **CAPTIONS} for path in paths]
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "structs.parquet":
        own = [{**row, "image": {"bytes": None, "path": row["image"]}} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(own), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("image,short_caption,long_captions\n" + "".join(f"{one},a,A.\n" for one in paths))
    return path


@pytest.mark.parametrize(
    ("kind", "streaming"),
    [("jsonl", False), ("json", True), ("csv", False), ("parquet", False), ("structs.parquet", True)],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_lies_outside_is_not_read(way: str, kind: str, streaming: bool, folders: tuple[Path, Path]) -> None:
    given, private = folders
    path = outside(given, private)[way]
    file = write_rows(given, kind, [path, "x.png", str(given / "sub" / "x.png")])
    first, second, third = load_records(file, streaming=streaming)
    assert first["image"] is None
    assert "--image-root" in first["error"]
    assert (second["error"], third["error"]) == (None, None)
    with pytest.raises(RecordError, match="--image-root"):
        read_record(first)
    for root in (given.parent, private):
        allowed = next(iter(load_records(file, streaming=streaming, image_root=root)))
        assert allowed["error"] is None
        assert os.path.samefile(allowed["image"], private / "x.png")
    # what the image folder is, the user says
    if way == "absolute":
        assert next(iter(load_records(file, streaming=streaming, image_folder=private)))["error"] is None


def test_a_link_that_is_put_there_later_is_not_read(folders: tuple[Path, Path]) -> None:
    given, private = folders
    records = load_records(write_rows(given, "jsonl", ["x.png"]))
    assert records[0]["error"] is None  # pyright: ignore[reportIndexIssue]
    (given / "x.png").unlink()
    (given / "x.png").symlink_to(private / "x.png")
    assert records[0]["image"] is None  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("way", ["relative", "link"])
def test_commands_do_not_read_it_either(
    way: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, private = folders
    path = outside(given, private)[way]
    file = write_rows(given, "jsonl", ["x.png", path])
    monkeypatch.setattr("lotlip_hf.cli.model.ModelOptions.load", lambda *_: pytest.fail("a model was loaded"))
    arguments = ["evaluate", "--model=m", "--task=retrieval", f"--data={file}"]
    assert cli.main(arguments) == 2
    assert "--image-root" in capsys.readouterr().err
    data = load_benchmark("retrieval", file, image_root=given.parent)
    assert os.path.samefile(data.images[1], private / "x.png")  # pyright: ignore[reportArgumentType]

    config = RelabelConfig(data=str(file), output="out", captioners=[CaptionerConfig("m")])
    skipped = list(_open_records(config))[1]
    assert skipped["image"] is None
    assert "--image-root" in skipped["error"]

    file = write_rows(given, "jsonl", [path, "x.png"])
    with pytest.raises(RecordError, match="--image-root"):
        load_data(TrainingConfig(data=str(file)))
    records, _ = load_data(TrainingConfig(data=str(file), image_root=str(given.parent)))
    assert next(iter(records))["error"] is None


@pytest.mark.parametrize("task", ["docci", "coco", "dci", "iiw", "sharegpt4v-1k", "urban1k"])
def test_benchmarks_do_not_read_it_either(task: str, folders: tuple[Path, Path]) -> None:
    given, private = folders
    (private / "sa_1.jpg").write_bytes(encoded())

    def write(name: str, content: Any) -> None:
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (given / name).write_text(content if isinstance(content, str) else json.dumps(content))

    up = "../../private/sa_1.jpg"
    (given / "images").mkdir()
    (given / "photos").mkdir()
    if task == "docci":
        row = {"example_id": "a", "split": "test", "image_file": up, "description": "A."}
        write("docci_descriptions.jsonlines", json.dumps(row))
    elif task == "coco":
        row = {"split": "test", "filepath": "images", "filename": up, "sentences": [{"raw": "A"}] * 5}
        write("dataset_coco.json", {"images": [row]})
    elif task == "dci":
        write("splits.json", {"test": ["a.json"]})
        write("annotations/a.json", {"image": up, "short_caption": "A", "extra_caption": "B"})
    elif task == "iiw":
        for part in ("DOCCI_Test", "IIW-400", "DCI_Test"):
            write(f"{part}/data.jsonl", json.dumps({"image": up, "IIW": "A."}))
    elif task == "urban1k":
        write("caption/1.txt", "A.")
        (given / "image").mkdir()
        (given / "image" / "1.jpg").symlink_to(private / "sa_1.jpg")
    else:
        turns = [{"value": "Describe."}, {"value": "A."}]
        write("share4v_sam_10k.json", [{"image": "../private/sa_1.jpg", "conversations": turns}])
    with pytest.raises(ValueError, match="--image-root"):
        load_benchmark(task, given, num_images=1)
    data = load_benchmark(task, given, num_images=1, image_root=given.parent)
    assert os.path.samefile(data.images[0], private / "sa_1.jpg")  # pyright: ignore[reportArgumentType]


# Shards.


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard_of(folder: Path, *bad: tuple[tarfile.TarInfo | str, bytes]) -> Path:
    """A good sample, what is given, and another good sample."""
    good = [(f"{name}.{extension}", content) for name in "az" for extension, content in SAMPLE.items()]
    return write_tar(folder / "all.tar", [*good[:2], *bad, *good[2:]])


SAMPLE = {"png": encoded(), "json": json.dumps(CAPTIONS).encode()}


@pytest.mark.parametrize("column", ["image", "file_name", "Image Path"])
def test_a_path_in_a_shard_is_not_opened(column: str, folders: tuple[Path, Path]) -> None:
    given, private = folders
    mapping = ColumnMapping(image=("image", column))
    for path in (str(private / "x.png"), str(given / "x.png"), "../private/x.png", "x.png"):
        shard = write_tar(given / "all.tar", [("a.json", json.dumps({column: path, **CAPTIONS}).encode())])
        if column == "image":
            (row,) = load_records(shard, mapping)
            assert row["image"] is None
            assert "--image-folder" in row["error"]
        else:
            with pytest.raises(MissingColumn, match="`image`"):
                load_records(shard, mapping)
        (row,) = load_records(shard, mapping, image_folder=given)
        assert (row["error"] is None) == ("private" not in path)


def test_links_and_devices_in_a_shard_are_no_members(folders: tuple[Path, Path]) -> None:
    given, private = folders
    bad = []
    for number, kind in enumerate([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]):
        member = tarfile.TarInfo(f"b{number}.png")
        member.type, member.linkname = kind, str(private / "x.png")
        bad.append((member, b""))
    rows = list(load_records(shard_of(given, *bad)))
    assert [row["id"] for row in rows] == ["all.tar/a", "all.tar/z"]


def test_a_path_without_bytes_in_a_data_set_of_the_hub(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, private = folders
    kept = tmp_path / "hub" / "datasets--some--body"
    kept.mkdir(parents=True)
    (kept / "x.png").write_bytes(encoded())
    monkeypatch.setattr("lotlip_hf.data.records.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = write_rows(given, "structs.parquet", [str(private / "x.png"), "x.png", str(kept / "x.png")])
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        "lotlip_hf.data.records.load_dataset",
        lambda name, split, streaming: load_dataset("parquet", data_files=str(file), split=split, streaming=streaming),
    )
    monkeypatch.chdir(given)
    for streaming in (False, True):
        rows = list(load_records("some/body", streaming=streaming))
        assert [row["error"] is None for row in rows] == [False, False, True]
        rows = list(load_records("some/body", image_root=private, streaming=streaming))
        assert [row["error"] is None for row in rows] == [True, True, False]


# Memory.


@pytest.fixture
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def sparse(name: str, size: int) -> tuple[tarfile.TarInfo, bytes]:
    """A sparse member: GNU's PAX format, one byte at its end."""
    member = tarfile.TarInfo(name)
    member.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.size": str(size),
        "GNU.sparse.map": f"{size - 1},1",
    }
    member.size = 1
    return member, b"x"


def declared(name: str, size: int) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = size
    return member, b""


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("extension", ["png", "json", "txt", "input.jpg"])
def test_a_sparse_or_large_member_is_listed_and_skipped(extension: str, tmp_path: Path) -> None:
    together = [(f"b.{number}.png", bytes(LIMIT // 2)) for number in range(40)]
    for bad, word in (
        ([sparse(f"b.{extension}", 5 << 30)], "sparse"),
        ([(f"b.{extension}", bytes(LIMIT + 1))], "--max-record-bytes"),
        (together, "--max-record-bytes"),
    ):
        shard = shard_of(tmp_path, *bad)
        rows = list(load_records(shard, max_record_bytes=LIMIT))
        assert [row["id"] for row in rows if not row["error"]] == ["all.tar/a", "all.tar/z"]
        assert word in rows[1]["error"]
        table = read_table(find_files(shard), ColumnMapping(), max_record_bytes=LIMIT)
        assert [row["id"] for row in table if not row["error"]] == ["all.tar/a", "all.tar/z"]  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("size", [5 << 30, 1 << 60, -512, -(1 << 40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_size_that_is_not_there_ends_the_shard(size: int, kind: bytes, tmp_path: Path) -> None:
    header, _ = declared("b.png", size)
    header.type = kind
    whole = shard_of(tmp_path).read_bytes()
    end = whole.rstrip(b"\0")
    end += bytes(-len(end) % tarfile.BLOCKSIZE)
    (tmp_path / "all.tar").write_bytes(end + header.tobuf(tarfile.GNU_FORMAT) + whole)
    rows = list(load_records(tmp_path / "all.tar"))
    assert rows[0]["id"] == "all.tar/a"
    assert rows[-1]["is_shard"]


def test_a_shard_with_a_broken_header_has_not_ended(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, ("b.png", SAMPLE["png"]), ("b.txt", b"text"))
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[3].offset
    content[offset + 148 : offset + 156] = b"????????"  # the checksum
    shard.write_bytes(content)
    rows = list(load_records(shard))
    assert rows[-1]["is_shard"]


NESTED = "[" * 20_000 + "]" * 20_000
GOOD = {".jsonl": json.dumps({"image": "x.png", **CAPTIONS}), ".csv": "x.png,a,A."}
GOOD[".json"] = GOOD[".jsonl"]
BAD_ROWS: list[tuple[str, str, str]] = [  # the kind of file, a row between two good ones, a word of what is said
    (".jsonl", '{"image": ', "JSON"),
    (".jsonl", "[1]", "object"),
    (".jsonl", '{"image": "a.png", "short_caption": {}, "long_captions": ["x"]}', "text"),
    (".jsonl", '{"image": "\udcff"}', "UTF-8"),
    (".jsonl", '{"image": "x.png", "short_caption": ' + NESTED + "}", "nested"),
    (".jsonl", '{"a":' * 20_000, "--max-record-bytes"),
    (".jsonl", '{"id": ' + "1" * 10_000 + "}", "digits"),
    (".jsonl", '{"image": "' + "x" * LIMIT + '"}', "--max-record-bytes"),
    (".jsonl", '{"image": "' + "x" * (2 << 20), "--max-record-bytes"),
    (".json", "[1]", "object"),
    (".json", '{"image": "\udcff"}', "UTF-8"),
    (".csv", "b.png,two,B, with a comma", "line 3"),
    (".csv", "b.png,b,['a' \"it's\"]", "JSON"),  # as NumPy prints a list
    (".csv", "b.png,b,\"['a', 'b']\"", "JSON"),  # as pandas does
    (".csv", "x" * (2 << 20), "--max-record-bytes"),
    (".csv", "y.png," + "x" * LIMIT, "--max-record-bytes"),
]


def write_bad(folder: Path, suffix: str, bad: str) -> Path:
    """A file with a row between two good ones."""
    good = GOOD[suffix]
    rows = [good, bad, good] if suffix != ".csv" else ["image,short_caption,long_captions", good, bad, good]
    text = f"[{', '.join(rows)}]" if suffix == ".json" else "\n".join(rows)
    (folder / f"rows{suffix}").write_bytes(text.encode(errors="surrogateescape"))
    return folder / f"rows{suffix}"


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("suffix", "bad", "word"), BAD_ROWS, ids=map(str, range(len(BAD_ROWS))))
def test_a_bad_row_is_listed_and_the_next_is_read(
    suffix: str, bad: str, word: str, streaming: bool, tmp_path: Path
) -> None:
    file = write_bad(tmp_path, suffix, bad)
    rows = list(load_records(file, streaming=streaming, max_record_bytes=LIMIT))
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert word in rows[1]["error"]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("bad", ["{", NESTED, '{"id": ' + "1" * 10_000 + "}"])
def test_a_bad_row_ends_commands_that_need_them_all(bad: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2"):
        list(read_texts(write_bad(tmp_path, ".jsonl", bad), "short_caption"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_quotation_without_end(streaming: bool, tmp_path: Path) -> None:
    for bad, word in (('d.png,"four', "quotation"), ('"' + ("x" * 1000 + "\n") * 70, "--max-record-bytes")):
        file = write_bad(tmp_path, ".csv", bad)
        rows = list(load_records(file, streaming=streaming, max_record_bytes=LIMIT))
        assert rows[0]["error"] is None
        assert any(word in (row["error"] or "") for row in rows)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("bad", ['{"a": ' + NESTED + "}", '{"id": ' + "1" * 10_000 + "}", '{"a": "' + "x" * (2 << 20)])
def test_a_hostile_entry_ends_its_file(bad: str, tmp_path: Path) -> None:
    file = write_bad(tmp_path, ".json", bad)
    first, last = load_records(file, streaming=True, max_record_bytes=LIMIT)
    assert (first["error"], last["is_shard"]) == (None, True)
    for read in (load_records, partial(load_benchmark, "classification")):
        with pytest.raises(ValueError, match="rows.json"):
            read(file)


def test_a_pipe_among_the_files_is_not_waited_for(folders: tuple[Path, Path]) -> None:
    given, _ = folders
    os.mkfifo(given / "0.jsonl")
    write_rows(given, "jsonl", ["x.png"])
    assert [Path(file).name for file in find_files(given)] == ["rows.jsonl"]
    with pytest.raises(ValueError, match="regular"):
        list(read_rows(given / "0.jsonl"))


def test_names_in_messages_are_printable(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2Jb"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"image": "../\\u001b[31m.png", "long_captions": ["A."]}\n{"\\u001b\n')
    first, second = load_records(folder)
    for row in (first, second):
        assert row["error"]
        assert row["error"].isprintable()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_parquet_that_is_packed_to_fill_the_memory(rows: int, streaming: bool, tmp_path: Path) -> None:
    size = (4 << 20) // rows
    cells = [b"\0" * size] * rows  # a dictionary holds one of them
    table = pyarrow.table({"image": cells, "short_caption": ["a"] * rows, "long_captions": ["b"] * rows})
    pyarrow.parquet.write_table(
        table, tmp_path / "bomb.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    with pytest.raises(ValueError, match="image"):
        list(load_records(tmp_path / "bomb.parquet", streaming=streaming, max_record_bytes=1 << 20))
    assert len(list(load_records(tmp_path / "bomb.parquet", streaming=streaming))) == rows


def test_parquet_that_repeats_large_cells_is_read_in_small_batches(tmp_path: Path) -> None:
    cells = [np.random.default_rng(0).bytes(1 << 16)] * 100
    pyarrow.parquet.write_table(
        pyarrow.table({"image": cells}), tmp_path / "repeated.parquet", dictionary_pagesize_limit=1 << 30
    )
    metadata = pyarrow.parquet.read_metadata(tmp_path / "repeated.parquet")
    assert parquet_batches(metadata, 1 << 18) == [3]
    assert parquet_batches(metadata) == [64]
    assert [row["image"] for row in read_rows(tmp_path / "repeated.parquet", max_bytes=1 << 18)] == cells


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_caption_without_end_is_a_broken_record(suffix: str, streaming: bool, tmp_path: Path) -> None:
    long = "a" * ((1 << 24) + 1)
    rows = [{"image": "0.png", "short_caption": "a", "long_captions": [text]} for text in ("b", long)]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    file = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    whole, broken = load_records(file, streaming=streaming)
    read_record(whole)
    with pytest.raises(RecordError, match="characters"):
        read_record(broken)
