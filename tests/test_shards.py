"""Embedding of data sets into shards: the same rows for any source, number of processes and interruption."""

import datetime
import io
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

import shards
from lotlip_hf import Encoder
from lotlip_hf.cli import main
from lotlip_hf.shards import embed_source, open_source
from processes import TIME_LIMIT, Started, finish

Pair = tuple[Any, Any]


def picture(number: int) -> bytes:
    """A PNG file of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_folder(folder: Path, total: int, broken: tuple[int, ...] = ()) -> Path:
    """A folder of pictures with a table."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(total):
        (folder / f"{number:04}.png").write_bytes(b"no picture" if number in broken else picture(number))
        rows.append({"file_name": f"{number:04}.png", "id": f"id-{number}", "year": 2000 + number, "tags": ["a", "é"]})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def write_tars(folder: Path, sizes: list[int]) -> Path:
    """WebDataset shards; the pictures and ids are those of `write_folder`."""
    folder.mkdir(parents=True)
    numbers = itertools.count()
    for file, size in enumerate(sizes):
        chosen = itertools.islice(numbers, size)
        samples = [(picture(number), {"id": f"id-{number}", "year": 2000 + number}) for number in chosen]
        shards.write_shard(folder / f"{file}.tar", samples)
    return folder


def tables(folder: Path) -> dict[str, pa.Table]:
    return {path.name: pq.read_table(path) for path in sorted(folder.glob("*.parquet"))}


def rows(folder: Path) -> list[tuple[str, list[float]]]:
    """Ids and embeddings in all shards, in order."""
    found = tables(folder).values()
    return [(row["id"], row["embedding"]) for table in found for row in table.to_pylist()]


def skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def encoder(pair: Pair) -> Encoder:
    return Encoder(*pair)


def embed(encoder: Encoder, data: object, output: Path, keep: tuple[str, ...] = (), **options: Any) -> tuple[int, int]:
    return embed_source(encoder, open_source(str(data), keep=keep), output, **{"progress": False} | options)


def test_the_columns_and_metadata_of_a_shard(encoder: Encoder, tmp_path: Path) -> None:
    data, output = write_folder(tmp_path / "data", 5), tmp_path / "out"
    assert embed(encoder, data, output, ("year:int64", "tags"), shard_size=3) == (5, 0)
    found = tables(output)
    assert list(found) == ["part-00000-00000.parquet", "part-00000-00001.parquet"]
    assert [len(table) for table in found.values()] == [3, 2]
    table = pa.concat_tables(found.values())
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), encoder.dim)
    assert table["id"].to_pylist() == [f"id-{number}" for number in range(5)]
    assert table["year"].to_pylist() == [2000, 2001, 2002, 2003, 2004]
    assert set(table["tags"].to_pylist()) == {'["a", "é"]'}
    expected = encoder.encode_images([picture(number) for number in range(5)], progress=False)
    np.testing.assert_allclose(np.stack(table["embedding"].to_pylist()), expected.numpy(), atol=1e-6)
    metadata = pq.read_schema(output / "part-00000-00001.parquet").metadata
    assert metadata[b"model"].decode() == encoder.name
    assert metadata[b"revision"] == b""
    assert metadata[b"fingerprint"].decode() == encoder.fingerprint("image")


def test_all_kinds_of_sources_have_the_same_rows(encoder: Encoder, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", 6)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.glob("*.png"):
        (bare / file.name).write_bytes(file.read_bytes())
    images = [{"bytes": picture(number), "path": None} for number in range(6)]
    (tmp_path / "tables").mkdir()
    for file in range(2):
        part = slice(3 * file, 3 * file + 3)
        table = pa.table({"image": images[part], "id": [f"id-{number}" for number in range(6)][part]})
        pq.write_table(table, tmp_path / "tables" / f"{file}.parquet")
    sources = [folder, bare, write_tars(tmp_path / "tars", [4, 2]), tmp_path / "tables", tmp_path / "tars" / "*.tar"]
    found = []
    for number, source in enumerate(sources):
        assert embed(encoder, source, tmp_path / f"out-{number}") == (6, 0)
        found.append(rows(tmp_path / f"out-{number}"))
    assert [name for name, _ in found[1]] == [f"{number:04}.png" for number in range(6)]
    assert [name for name, _ in found[2]] == [f"id-{number}" for number in range(6)]
    for other in found[1:]:
        np.testing.assert_allclose([row for _, row in other], [row for _, row in found[0]], atol=1e-6)


def test_a_data_set_on_the_hub(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for file in range(2):
        numbers = range(4 * file, 4 * file + 4)
        images = [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers]
        images[1] = None if file else images[1]
        table = pa.table({"image": images, "year": [2000 + number for number in numbers]})
        pq.write_table(table, tmp_path / "data" / f"{file}.parquet")

    def from_here(name: str, split: str, streaming: bool) -> Any:
        return load_dataset("parquet", data_dir=str(tmp_path / "data"), split=split, streaming=streaming)

    monkeypatch.setattr("lotlip_hf.data.records.load_dataset", from_here)
    counts = [
        embed(encoder, "somebody/pictures", tmp_path / "out", ("year:int16",), rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert counts == [(4, 0), (3, 1)]
    assert [(one["index"], "image" in one["reason"]) for one in skipped(tmp_path / "out")] == [(1, True)]
    found = pa.concat_tables(tables(tmp_path / "out").values())
    numbers = [0, 1, 2, 3, 4, 6, 7]
    assert found["year"].to_pylist() == [2000 + number for number in numbers]
    expected = encoder.encode_images([picture(number) for number in numbers], progress=False)
    np.testing.assert_allclose(np.stack(found["embedding"].to_pylist()), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("sizes", [[11], [4, 0, 3, 5, 1]])
def test_any_number_of_processes_writes_the_same_rows(encoder: Encoder, sizes: list[int], tmp_path: Path) -> None:
    data = write_tars(tmp_path / "data", sizes)
    embed(encoder, data, tmp_path / "alone", shard_size=2)
    expected = tables(tmp_path / "alone")
    for world_size in (2, 3, 7):
        output = tmp_path / f"{world_size}"
        counts = [
            embed(encoder, data, output, shard_size=2, rank=rank, world_size=world_size)
            for rank in reversed(range(world_size))
        ]
        assert sum(written for written, _ in counts) == sum(sizes)
        assert tables(output) == expected


def test_broken_records_are_listed_and_only_missing_shards_are_written(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write_folder(tmp_path / "data", 9, broken=(1, 4)), tmp_path / "out"
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[5] = "{"
    lines[6] = lines[6].replace("2006", '"unknown"')
    lines[7] = lines[7].replace('"year": 2007, ', "")
    (data / "metadata.jsonl").write_text("\n".join(lines))
    assert embed(encoder, data, output, ("year:int64",), shard_size=2) == (5, 4)
    assert [(one["index"], one["id"]) for one in skipped(output)] == [
        (1, "id-1"),
        (4, "id-4"),
        (5, "metadata.jsonl, row 6"),
        (6, "id-6"),
    ]
    assert "not an image" in skipped(output)[0]["reason"]
    assert "int64" in skipped(output)[3]["reason"]
    assert pq.read_table(output).num_rows == 5  # the lists are no tables
    found = tables(output)
    assert found["part-00000-00003.parquet"]["year"].to_pylist() == [None]

    encoded = []
    iterate = Encoder.image_rows

    def spy(encoder: Encoder, images: Any, **options: Any) -> Any:
        return iterate(encoder, (encoded.append(image) or image for image in images), **options)

    monkeypatch.setattr(Encoder, "image_rows", spy)
    assert embed(encoder, data, output, ("year:int64",), shard_size=2) == (5, 4)
    (output / "part-00000-00001.parquet").unlink()
    (output / "part-00000-00004.parquet").unlink()
    assert embed(encoder, data, output, ("year:int64",), shard_size=2) == (5, 4)
    named = [os.path.basename(one) for one in encoded if isinstance(one, str)]
    assert named == ["0002.png", "0003.png", "0008.png"]
    assert tables(output) == found


def test_shards_of_another_run_are_refused(
    encoder: Encoder, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write_folder(tmp_path / "data", 4), tmp_path / "out"
    embed(encoder, data, output, shard_size=2)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    for options in ({"shard_size": 3}, {"shard_size": 2, "keep": ("year",)}):
        with pytest.raises(ValueError, match="--output"):
            embed(encoder, data, output, **options)
    with pytest.raises(ValueError, match="parts"):
        os.rename(output / "part-00000-00001.parquet", output / "part-00001-00000.parquet")
        embed(encoder, data, output, shard_size=2)
    os.rename(output / "part-00001-00000.parquet", output / "part-00000-00001.parquet")
    with monkeypatch.context() as context:
        context.setattr(Encoder, "fingerprint", lambda *_: "other")
        with pytest.raises(ValueError, match="model"):
            embed(encoder, data, output, shard_size=2)
    with open(data / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0000.png"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        embed(encoder, data, output, shard_size=2)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (output / "part-00000-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged"):
        embed(encoder, data, output, shard_size=2)


@pytest.mark.parametrize("kind", ["timestamp[s]", "date64", "time32[s]", "float16", "large_string", "duration[ns]"])
def test_a_run_with_columns_of_any_type_continues(encoder: Encoder, kind: str, tmp_path: Path) -> None:
    day = datetime.datetime(2020, 2, 3, 4, 5, 6)
    values = {"timestamp[s]": day, "date64": day.date(), "time32[s]": day.time(), "duration[ns]": day - day}
    value = values.get(kind, 7)
    images = [{"bytes": picture(number), "path": None} for number in range(4)]
    pq.write_table(pa.table({"image": images, "value": [value] * 4}), tmp_path / "data.parquet")
    for _ in range(2):
        keep = (f"value:{kind}",)
        assert embed(encoder, tmp_path / "data.parquet", tmp_path / "out", keep, shard_size=2) == (4, 0)
        (tmp_path / "out" / "part-00000-00001.parquet").unlink()


def test_new_files_are_added(encoder: Encoder, tmp_path: Path) -> None:
    data, output = write_tars(tmp_path / "data", [3, 2]), tmp_path / "out"
    assert embed(encoder, data, output) == (5, 0)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    shards.write_shard(data / "2.tar", [(picture(5), {"id": "id-5"})])
    assert embed(encoder, data, output) == (6, 0)
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()}.items() > before.items()
    assert [name for name, _ in rows(output)] == [f"id-{number}" for number in range(6)]


def test_a_damaged_shard_of_the_data_is_listed(encoder: Encoder, tmp_path: Path) -> None:
    data, output = write_tars(tmp_path / "data", [3, 2]), tmp_path / "out"
    content = (data / "0.tar").read_bytes()
    (data / "0.tar").write_bytes(content[: len(content) // 2])
    written, broken = embed(encoder, data, output)
    assert (written, broken) == (3, 1)
    assert "0.tar" in skipped(output)[0]["reason"]
    assert [name for name, _ in rows(output)] == ["id-0", "id-3", "id-4"]


def test_a_shard_without_a_readable_image_stops_the_run(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("file_name\n" + "".join(f"{number}.png\n" for number in range(100)))
    with pytest.raises(ValueError, match="--image-folder"):
        embed(encoder, tmp_path / "data.csv", tmp_path / "out", shard_size=100)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("keep", "word"),
    [
        ("id", "id"),
        ("year:number", "number"),
        ("year:month_day_nano_interval", "month_day_nano_interval"),  # Arrow has it, Parquet has not
        ("yaer", "yaer"),
        ("embedding:string", "embedding"),
    ],
)
def test_wrong_columns_are_named(keep: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word):
        open_source(write_folder(tmp_path / "data", 1), keep=[keep])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("--data x --images x --output y", "--data"),
        ("--data x --output y --overwrite", "--overwrite"),
        ("--images x --output y --keep z", "--keep"),
        ("--data x", "--output"),
        ("--data . --output ./inside", "--output"),
        ("--data missing --output y", "missing"),
    ],
)
def test_wrong_options_are_named(
    options: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "--model", "missing-model", *options.split()]) == 2
    assert word in capsys.readouterr().err


def command(model: Path, data: object, output: Path) -> list[str]:
    return [
        *("embed", "--model", str(model), "--data", str(data), "--output", str(output)),
        *("--shard-size", "4", "--batch-size", "2", "--device", "cpu"),
    ]


def test_the_command_embeds_a_data_set(
    official_checkpoint: Path, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_folder(tmp_path / "data", 6, broken=(2,)), tmp_path / "out"
    for _ in range(2):
        assert main([*command(official_checkpoint, data, output), "--keep", "year:int32"]) == 0
        out, err = capsys.readouterr()
        assert out == f"5 embeddings in {output}.\n"
        assert "6/6" in err
        assert "1 record was skipped" in err
    assert [table["year"].type for table in tables(output).values()] == [pa.int32()] * 2
    assert [name for name, _ in rows(output)] == [f"id-{number}" for number in (0, 1, 3, 4, 5)]


@pytest.mark.slow
def test_processes_share_the_work(official_checkpoint: Path, tmp_path: Path) -> None:
    data = write_tars(tmp_path / "data", [9, 5, 6])
    found = []
    for number in (1, 2, 3):
        output = tmp_path / f"out-{number}"
        ended = finish("lotlip_hf.cli", command(official_checkpoint, data, output), tmp_path, number)
        assert sum(int(line.split()[0]) for line in ended.stdout.splitlines()) == 20
        found.append(tables(output))
    assert found[0] == found[1] == found[2]


def slow_down() -> None:
    """Makes each image take longer."""
    iterate: Callable[..., Any] = Encoder.image_rows

    def slow(*arguments: Any, **options: Any) -> Iterator[Any]:
        for result in iterate(*arguments, **options):
            time.sleep(0.05)
            yield result

    Encoder.image_rows = slow


@pytest.mark.slow
def test_a_stopped_run_continues_with_another_number_of_processes(official_checkpoint: Path, tmp_path: Path) -> None:
    data, output = write_folder(tmp_path / "data", 40, broken=(7,)), tmp_path / "out"
    arguments = command(official_checkpoint, data, output)
    started = Started("lotlip_hf.cli", arguments, tmp_path, 2, slow_down)
    end = time.monotonic() + TIME_LIMIT
    while not (output / "part-00000-00002.parquet").exists():  # by the first process, which alone is slow
        assert time.monotonic() < end, started.written().text
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    ended = started.wait()
    assert ended.codes[0] == 130
    assert "Traceback" not in ended.text
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert len(tables(output)) < 10
    finish("lotlip_hf.cli", arguments, tmp_path, 3)
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}.items() >= kept.items()
    finish("lotlip_hf.cli", command(official_checkpoint, data, tmp_path / "whole"), tmp_path)
    assert tables(output) == tables(tmp_path / "whole")
    assert [one["id"] for one in skipped(output)] == ["id-7"]
