"""The store of embeddings: nothing that was added is lost, and nothing is taken from a file that others wrote."""

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import processes
from lotlip_hf.store import FILE, EmbeddingStore


def write(folder: Path, first: int, count: int, ready: Any) -> None:
    with EmbeddingStore(folder, "encoder", 3) as store:
        ready.set()
        for number in range(first, first + count):
            store.add([f"{number}a", f"{number}b"], np.full((2, 3), number, np.float32), ["a", "b"])


def writer(folder: Path, first: int, count: int) -> Any:
    """A process that writes."""
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=write, args=(folder, first, count, ready))
    process.start()
    assert ready.wait(processes.TIME_LIMIT)
    return process


def filled(folder: Path) -> EmbeddingStore:
    store = EmbeddingStore(folder, "encoder", 3)
    with store:
        store.add_error("bad", "no image", "7")
        store.add(["a", "b", "c"], np.arange(9).reshape(3, 3), ["1", "2", "3"])
        store.add(["b"], np.full((1, 3), 9.0))
    return store


def all_of(store: EmbeddingStore) -> dict[str, list[float]]:
    """The embeddings by key; an assertion that they are read the same way block by block."""
    with store:
        locations = store.held(["bad", "a", "b", "c"]).locations
        vectors = store.vectors(list(locations.values()))
        query = np.array([1, 10, 100], np.float32)
        np.testing.assert_allclose(store.similarities(list(locations.values()), query), vectors @ query)
    return dict(zip(locations, vectors.tolist(), strict=True))


def test_the_latest_entry_of_each_key(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert all_of(store) == {"a": [0, 1, 2], "b": [9, 9, 9], "c": [6, 7, 8]}
    with store:
        held = store.held({"bad", "a", "b", "nothing"})
        assert held.errors == {"bad": "no image"}
        assert held.stamps == {"bad": "7", "a": "1", "b": ""}
        assert held.locations.keys() == {"a", "b"}
        with pytest.raises(ValueError, match="vectors"):
            store.add(["wide"], np.zeros((1, 4)))


def test_several_encoders_in_one_file(tmp_path: Path) -> None:
    filled(tmp_path)
    with EmbeddingStore(tmp_path, "another", 2) as store:
        assert store.held(["a"]) == ({}, {}, {})
        store.add(["a"], np.ones((1, 2)))
        assert store.contents() == [("encoder", 3, 3, 1), ("another", 2, 1, 0)]
    assert all_of(EmbeddingStore(tmp_path, "encoder", 3))["a"] == [0, 1, 2]


def test_what_is_not_kept_goes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store:
        store.keep(["b"])
        assert list(store.held(["bad", "a", "b", "c"]).stamps) == ["b"]
        assert len(list(store.blocks())) == 1
    assert all_of(store) == {"b": [9, 9, 9]}


def test_any_name_is_a_key(tmp_path: Path) -> None:
    names = [os.fsdecode(b"no text \xff.png"), "two\nlines", "猫", ""]
    with EmbeddingStore(tmp_path, "encoder", 1) as store:
        store.add(names, np.arange(4).reshape(4, 1))
        locations = store.held(names).locations
        assert store.vectors([locations[name] for name in names])[:, 0].tolist() == [0, 1, 2, 3]


def test_an_error_keeps_what_came_before(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "encoder", 2)
    with pytest.raises(KeyboardInterrupt), store, store.adding(2) as add:
        for number in range(3):
            add(str(number), np.full(2, number), "")
        raise KeyboardInterrupt
    with store:
        assert len(store.held("012").locations) == 3


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_batches(tmp_path: Path) -> None:
    generator = random.Random(0)
    for attempt in range(5):
        process = writer(tmp_path, 10_000 * attempt, 10_000)  # more than 0.1 s of writing
        time.sleep(generator.uniform(0.01, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    numbers = range(50_000)
    with EmbeddingStore(tmp_path, "encoder", 3) as store:
        locations = store.held({f"{number}{end}" for number in numbers for end in "ab"}).locations
        found = [number for number in numbers if f"{number}a" in locations]
        assert found == [number for number in numbers if f"{number}b" in locations]
        assert len(found) > 5
        vectors = store.vectors([locations[f"{number}b"] for number in found])
    assert vectors.tolist() == [[number] * 3 for number in found]


@pytest.mark.slow
def test_two_processes_add_at_once(tmp_path: Path) -> None:
    writers = [writer(tmp_path, first, 200) for first in (0, 200)]
    for process in writers:
        process.join(60)
    assert [process.exitcode for process in writers] == [0, 0]
    with EmbeddingStore(tmp_path, "encoder", 3) as store:
        keys = [f"{number}a" for number in range(400)]
        locations = store.held(keys).locations
        assert store.vectors([locations[key] for key in keys])[:, 0].tolist() == list(range(400))


def test_several_open_a_new_file_at_once(tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def open_all(_: int) -> None:
        for number in range(20):
            start.wait()
            with EmbeddingStore(tmp_path / str(number), "encoder", 3):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_all, range(4)))


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store:
        store._connection.execute("PRAGMA max_page_count = 5")
        with pytest.raises(OSError, match="full"):
            store.add([str(number) for number in range(10_000)], np.zeros((10_000, 3)))
    assert all_of(store)["a"] == [0, 1, 2]


def test_indexes_of_before_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "0123").mkdir()
    (tmp_path / "0123" / "entries.jsonl").touch()
    filled(tmp_path)
    assert "0123" in caplog.text


# What others wrote


def statement(sql: str) -> Callable[[Path], None]:
    def run(file: Path) -> None:
        connection = sqlite3.connect(file)
        connection.execute(sql)
        connection.commit()
        connection.close()

    return run


def linked(file: Path) -> None:
    shutil.move(file, file.with_name("secret"))
    file.symlink_to("secret")


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"no database" * 100),
        lambda file: file.write_bytes(file.read_bytes()[:20_000]),
        lambda file: file.write_bytes(file.read_bytes()[:100] + b"\xff" * 20_000),
        linked,
        statement("CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END"),
        statement("ALTER TABLE entries ADD COLUMN more"),
        statement("UPDATE encoders SET dim = 4"),
        statement("UPDATE encoders SET dim = 'wide'"),
    ],
)
def test_other_files_are_set_aside(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    damage(tmp_path / FILE)
    assert all_of(EmbeddingStore(tmp_path, "encoder", 3)) == {}
    assert "renamed" in caplog.text
    assert all_of(filled(tmp_path))["b"] == [9, 9, 9]


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE blocks SET vectors = zeroblob(7)",
        "UPDATE blocks SET vectors = 'text'",
        "UPDATE blocks SET vectors = x'0000c07f0000c07f0000c07f'",  # not a number
        "UPDATE entries SET row = 3 WHERE block = 1",
        "UPDATE entries SET row = -1 WHERE block = 1",
        "UPDATE entries SET stamp = x'ff31'",
        "UPDATE entries SET block = 77 WHERE block = 1",
    ],
)
def test_wrong_values_are_not_taken(sql: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path)
    statement(sql)(tmp_path / FILE)
    with pytest.raises(OSError, match="damaged"):
        all_of(store)
    assert all_of(store) == {}


def test_bfloat16_is_half_the_size_and_apart_from_float32(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    exact = EmbeddingStore(tmp_path, "encoder", 3)
    with exact:
        exact.add(list("abcd"), vectors)
    with EmbeddingStore(tmp_path, "encoder", 3, dtype="bfloat16") as half:
        assert not half.held("abcd").locations
        half.add(list("abcd"), vectors)
        read = half.vectors([half.held("abcd").locations[key] for key in "abcd"])
    np.testing.assert_array_equal(read, torch.from_numpy(vectors).bfloat16().float().numpy())
    with sqlite3.connect(tmp_path / FILE) as connection:
        assert connection.execute("SELECT length(vectors) FROM blocks").fetchall() == [(48,), (24,)]
    np.testing.assert_array_equal([all_of(exact)[key] for key in "abc"], vectors[:3])
