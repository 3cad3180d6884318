"""The batches of streams: each record once, shuffled, and resumed at any batch without reading what was before."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import IterableDataset, load_dataset

from lotlip_hf.data import records as records_module
from lotlip_hf.data.kept import KeptIds, keep_records
from lotlip_hf.data.records import load_records
from lotlip_hf.training.batches import iterate_batches
from lotlip_hf.training.config import TrainingConfig

SIZES = (7, 3, 11, 6, 2)  # records of the shards
IDS = [f"{shard}-{number}" for shard, size in enumerate(SIZES) for number in range(size)]


class Ids:
    """In place of the collator: the ids of a batch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, records: Sequence[dict[str, Any]]) -> list[str]:
        return [record["id"] for record in records]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "parquet").mkdir()
    for shard, size in enumerate(SIZES):
        rows = [
            {"file_name": "x.png", "short_caption": "a", "long_captions": ["b"], "id": f"{shard}-{number}"}
            for number in range(size)
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / "jsonl" / f"{shard}.jsonl").write_text(lines, encoding="utf-8")
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / f"{shard}.parquet", 2)
    return tmp_path


def local(folder: Path) -> IterableDataset:
    return load_records(folder / "jsonl", streaming=True)  # pyright: ignore[reportReturnType]


def of_hub(folder: Path) -> IterableDataset:
    """As those of the Hub: tables of `datasets`, and records made of their rows."""
    rows = load_dataset("parquet", data_files=str(folder / "parquet" / "*.parquet"), split="train", streaming=True)
    return rows.map(same, remove_columns=["file_name"])


def same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def kept(folder: Path) -> IterableDataset:
    (folder / "ids.txt").write_text("\n".join(IDS[::2]), encoding="utf-8")
    return keep_records(local(folder), KeptIds(folder / "ids.txt"))  # pyright: ignore[reportReturnType]


SOURCES = {"local": local, "of the Hub": of_hub, "kept": kept}


def batches(
    records: IterableDataset,
    config: TrainingConfig,
    rank: int = 0,
    num_processes: int = 1,
    resumed: tuple = (0, 0, {}),
) -> Iterator[tuple[int, int, list[str], Any]]:
    """The batches of two epochs."""
    epoch, start, state = resumed
    made = iterate_batches(records, Ids(), config, epoch, start, rank, num_processes, state)  # pyright: ignore[reportArgumentType]
    return itertools.takewhile(lambda batch: batch[0] < 2, made)  # pyright: ignore[reportReturnType]


def made(**options: Any) -> TrainingConfig:
    return TrainingConfig(**{"streaming": True, "max_steps": 1, "batch_size": 4, "shuffle_buffer": 6, **options})


@pytest.mark.parametrize("num_workers", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3))])
@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_continues_at_any_batch(source: str, num_workers: int, folder: Path) -> None:
    """Also through JSON, in new processes, where workers have shards of different lengths or none."""
    expected, step = sorted(IDS[::2] if source == "kept" else IDS), 4 if num_workers else 1
    for num_processes in (1, 2):
        config = made(num_workers=num_workers)
        whole = [list(batches(SOURCES[source](folder), config, rank, num_processes)) for rank in range(num_processes)]
        for epoch in range(2):
            ids = [one for part in whole for number, _, batch, _ in part if number == epoch for one in batch]
            assert sorted(ids) == expected
            assert ids != expected
        for rank, part in enumerate(whole):
            for number, (epoch, index, _, state) in enumerate(part[::step]):
                position = epoch, index, json.loads(json.dumps(state))
                rest = list(batches(SOURCES[source](folder), config, rank, num_processes, position))
                following = part[step * number + 1 :]
                assert [batch[:3] for batch in rest] == [batch[:3] for batch in following]


def test_shards_before_are_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    read_rows = records_module.read_rows

    def counted(file: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for row in read_rows(file, *args, **kwargs):
            read.append(Path(file).stem)
            yield row

    monkeypatch.setattr(records_module, "read_rows", counted)
    config, records = made(num_workers=0), local(folder)
    read.clear()  # of the rows that are read to find the columns
    whole = [batch for batch in batches(records, config) if batch[0] == 0]
    order = list(dict.fromkeys(read))
    assert sorted(order) == ["0", "1", "2", "3", "4"]
    assert order != sorted(order)
    ends = [*itertools.accumulate(SIZES[int(shard)] for shard in order)]
    for _, index, batch, state in whole[:-1]:
        records = local(folder)
        read.clear()
        next(batches(records, config, resumed=(0, index, state)))
        last = 4 * (index - 1) + len(batch) - 1
        start = last // 6 * 6  # of its block
        before = {shard for shard, end in zip(order, ends, strict=True) if end < start}
        assert not before & set(read)
        assert len(read) <= last + 1 + 4 + 6 - sum(SIZES[int(shard)] for shard in before)


@pytest.mark.parametrize(
    "start", [{"examples_iterable": 5, "epoch": 0}, {"epoch": 0}, {"examples_iterable": {"x": 1}, "epoch": 0}]
)
def test_a_wrong_state_is_an_error(start: dict[str, Any], folder: Path) -> None:
    state = {"last": 0, "workers": {"0": {"start": start, "block": 1, "index": 0}}}
    with pytest.raises(ValueError, match="stream"):
        next(batches(local(folder), made(num_workers=0), resumed=(0, 1, state)))
