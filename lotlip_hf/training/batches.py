"""The batches of a run. The seed and the epoch determine the records of every batch and their order."""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, TypedDict

import numpy as np
import torch
from datasets import Dataset, IterableDataset, iterable_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data import IterableDataset as TorchIterableDataset

from ..data.collator import Batch, LoTLIPCollator, group_key
from ..data.records import without_images
from ..terminal import ignore_signals
from .config import TrainingConfig
from .frozen import KeyedRecords

AHEAD = 1000  # parts of groups among which one is sought that fits into the rest of a batch


def batches_per_epoch(num_records: int, config: TrainingConfig, num_processes: int) -> int:
    """
    Returns the number of batches in an epoch. An incomplete last batch counts, unless `drop_last` is set or the batch
    has fewer records than there are processes. Raises `ValueError` if the records are too few for one batch.
    """
    size = config.batch_size * num_processes
    full, rest = divmod(num_records, size)
    number = full + (not config.drop_last and rest >= num_processes)
    if not number:
        raise ValueError(
            f"{num_records} records are too few for a batch of {num_processes} x {config.batch_size}. Reduce "
            f"`batch_size`{' or set `drop_last` to false' if config.drop_last else ''}."
        )
    return number


def num_steps(records: Dataset | IterableDataset, config: TrainingConfig, num_processes: int) -> int:
    """
    Returns the number of optimiser steps of a run: `max_steps`, or the steps in `num_epochs` epochs.

    Raises:
        `ValueError`: If a stream has no `max_steps`, an epoch has no batch, or the warm-up is longer than the run.
    """
    if config.max_steps is not None:
        return config.max_steps
    if isinstance(records, IterableDataset):
        raise ValueError("The records are a stream of unknown length. Set `max_steps`.")
    batches = batches_per_epoch(len(records), config, num_processes)
    # Round first: in floating point 0.29 x 100 is a little less than 29.
    steps = max(1, int(round(config.num_epochs * batches, 6)) // config.gradient_accumulation_steps)
    if config.warmup_steps > steps:
        raise ValueError(
            f"`warmup_steps` is {config.warmup_steps:g}, but the run has only {steps} steps. Reduce it, or pass a "
            "share of all steps, such as 0.1."
        )
    return steps


class EpochBatches(Sampler[list[int]]):
    """
    The batches of one process in one epoch, as lists of record indices.

    Each global batch is a slice of the shuffled records and is split evenly over the processes. A step therefore uses
    the same records for any number of processes. With `groups`, the groups [num_records] of the records as numbers,
    a global batch holds `group_size` records of a group together ([`hold_together`]).
    """

    def __init__(
        self,
        num_records: int,
        config: TrainingConfig,
        epoch: int,
        start: int,
        rank: int,
        num_processes: int,
        groups: np.ndarray | None = None,
    ) -> None:
        self.order = np.random.default_rng([config.seed, epoch]).permutation(num_records)
        self.numbers = range(start, batches_per_epoch(num_records, config, num_processes))
        self.size = config.batch_size * num_processes
        self.rank, self.num_processes = rank, num_processes
        if groups is not None:
            self.order = hold_together(self.order, groups, config.group_size, self.size)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            whole = self.order[number * self.size : (number + 1) * self.size]
            yield np.array_split(whole, self.num_processes)[self.rank].tolist()


def hold_together(order: np.ndarray, groups: np.ndarray, group_size: int, batch_size: int) -> np.ndarray:
    """
    Rearranges the order of an epoch, so that batches of `batch_size` hold up to `group_size` records of a group
    together. A group is divided into parts of `group_size` and a smaller rest. The parts are in the order of their
    first records; one that does not fit into a batch lets the next one that fits pass, and is cut only if none of the
    next `AHEAD` parts fits.

    Args:
        order (`np.ndarray`): Order of the records, a permutation.
        groups (`np.ndarray`): Numbers of the groups, by record.
        group_size (`int`): Records of a part.
        batch_size (`int`): Records of a batch.
    """
    open_parts: dict[int, list[int]] = {}
    parts: deque[list[int]] = deque()
    for record in order.tolist():
        part = open_parts.get(groups[record])
        if part is None or len(part) == group_size:
            part = open_parts[groups[record]] = []
            parts.append(part)
        part.append(record)
    held: list[int] = []
    while parts:
        room = batch_size - len(held) % batch_size
        fitting = (index for index, part in enumerate(islice(parts, AHEAD)) if len(part) <= room)
        index = next(fitting, None)
        if index is None:
            held += parts[0][:room]
            parts[0] = parts[0][room:]
        else:
            held += parts[index]
            del parts[index]
    return np.array(held)


def groups_of(records: Dataset | KeyedRecords) -> np.ndarray:
    """
    Returns the group of each record as a number, which no other record has if it has no group. Raises a `ValueError`
    if no two records have the same group.
    """
    table = records.records if isinstance(records, KeyedRecords) else records
    groups = np.fromiter(map(group_key, without_images(table)), np.int64, len(table))
    if len(np.unique(groups)) == len(groups):
        raise ValueError(
            f"No two of {len(groups):,} records have the same `group`, which `group_size` holds together. Add this "
            "field to the data."
        )
    return groups


class StreamState(TypedDict, total=False):
    """Where a stream continues: the worker of the last batch, and by worker the state after its last batch."""

    last: int
    workers: dict[str, dict[str, Any]]


class Shuffled:
    """
    Records of a stream in a drawn order: in blocks of `size` records, while the next block is read. After any record,
    `state` is where another object with the same arguments continues. It reads again from the start of the block; the
    shards before are not opened.

    Args:
        records (`IterableDataset`): Stream, without a shuffle buffer of `datasets`.
        size (`int`): Number of records of a block.
        seed (`Sequence[int]`): Seed of the order.
        state (`Mapping`, *optional*): State to continue from.
    """

    def __init__(
        self, records: IterableDataset, size: int, seed: Sequence[int], state: Mapping[str, Any] | None = None
    ) -> None:
        self.records, self.size, self.seed = records, size, seed
        self.state: dict[str, Any] = dict(state or {"start": None, "block": 0, "index": 0})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.state["start"] is not None:
            self.records.load_state_dict(self.state["start"])
        stream = iter(self.records)
        try:
            block: list[dict[str, Any]] = list(islice(stream, self.size))
        except (LookupError, TypeError, ValueError) as error:
            if self.state["start"] is None:
                raise
            raise ValueError(
                f"The state of the stream does not fit the data ({type(error).__name__}: {error}). Resume with the "
                "same files, or start a new run from the weights of the checkpoint with `--model`."
            ) from error
        while block:
            start, number, index = self.records.state_dict(), self.state["block"], self.state["index"]
            order = np.random.default_rng([*self.seed, number]).permutation(len(block)).tolist()
            following: list[dict[str, Any]] = []
            for position, chosen in enumerate(order, 1):
                record, block[chosen] = block[chosen], {}  # frees its memory
                following += islice(stream, 1)
                if position > index:
                    self.state = {**self.state, "index": position}
                    yield record
            block, self.state = following, {"start": start, "block": number + 1, "index": 0}


class _Stream(TorchIterableDataset):
    """
    The batches of one process from a stream, made in the workers of a `DataLoader`: lists of records with the number
    of the worker and the state that follows, or an error.
    """

    def __init__(
        self, records: IterableDataset, config: TrainingConfig, epoch: int, rank: int, state: StreamState
    ) -> None:
        super().__init__()
        self.records, self.config, self.seed, self.state = records, config, (config.seed, epoch, rank), state

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any]], int, dict[str, Any]] | Exception | None]:
        worker = get_worker_info()
        number, size = 0 if worker is None else worker.id, self.config.batch_size
        if number <= self.state.get("last", -1):
            yield None  # a loader starts with worker 0, whose turn was before
        own = self.state.get("workers", {}).get(str(number))
        shuffled = Shuffled(self.records, self.config.shuffle_buffer, (*self.seed, number), own)
        try:
            stream = iter(shuffled)
            while batch := list(islice(stream, size)):
                if len(batch) == size or not self.config.drop_last:
                    yield batch, number, shuffled.state
        except Exception as error:  # raised here, the loader would wrap it
            yield error


def _part(records: IterableDataset, seed: int, epoch: int, rank: int, num_processes: int) -> IterableDataset:
    """Returns the part of a process, with its shards in a drawn order. The buffer of `shuffle` would lose records."""
    part = split_dataset_by_node(records, rank, num_processes)
    # `skip` and `take` fix the order; newer versions of `datasets` raise this error
    with contextlib.suppress(getattr(iterable_dataset, "DataSourcesShufflingDisallowed", NotImplementedError)):
        part._ex_iterable = part._ex_iterable.shuffle_data_sources(np.random.default_rng([seed, epoch]))
    part.set_epoch(epoch)
    return part


class _Collator:
    """Calls the collator in the workers of a `DataLoader`. Returns errors, because the loader would wrap them."""

    def __init__(self, collator: LoTLIPCollator) -> None:
        self.collator = collator

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> Batch | Exception:
        try:
            return self.collator(records)
        except Exception as error:
            return error

    def stream(self, item: Any) -> tuple[Batch | Exception, int, dict[str, Any]] | Exception | None:
        """Makes the batch of an item of [`_Stream`]."""
        return (self(item[0]), *item[1:]) if isinstance(item, tuple) else item


def iterate_batches(
    records: Dataset | IterableDataset | KeyedRecords,
    collator: LoTLIPCollator,
    config: TrainingConfig,
    epoch: int,
    start: int,
    rank: int,
    num_processes: int,
    state: StreamState | None = None,
) -> Iterator[tuple[int, int, Batch, StreamState]]:
    """
    Yields `(epoch, next_batch, batch, state)` for one process without end, starting at batch `start` of `epoch`. A run
    that stops after `batch` resumes at batch `next_batch` of `epoch`, and for a stream with `state`, else `{}`.

    The shards of a stream are in a drawn order, and their records are shuffled in blocks of `shuffle_buffer` records.
    The processes divide its shards, or its records if there are too few shards.
    """
    state = state or {}
    groups = groups_of(records) if config.group_size > 1 and not isinstance(records, IterableDataset) else None
    for number in count(epoch):
        collator.set_epoch(number)
        arguments: dict[str, Any] = {
            "num_workers": config.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": ignore_signals,
            # A loader draws a number: from the global generator, a resumed run would draw one more.
            "generator": torch.Generator(),
        }
        index = start
        if isinstance(records, IterableDataset):
            part = _part(records, config.seed, number, rank, num_processes)
            stream = _Stream(part, config, number, rank, state)
            for item in DataLoader(stream, batch_size=None, collate_fn=_Collator(collator).stream, **arguments):
                if item is None:
                    continue
                batch, worker, own = (item, -1, {}) if isinstance(item, Exception) else item
                if isinstance(batch, Exception):
                    raise batch
                index += 1
                state = {"last": worker, "workers": {**state.get("workers", {}), str(worker): own}}
                yield number, index, batch, state
        else:
            sampler = EpochBatches(len(records), config, number, start, rank, num_processes, groups)
            loader = DataLoader(records, batch_sampler=sampler, collate_fn=_Collator(collator), **arguments)  # pyright: ignore[reportArgumentType]
            for index, batch in enumerate(loader, start + 1):
                if isinstance(batch, Exception):
                    raise batch
                yield number, index, batch, {}
        if not index:
            raise ValueError(f"The data has no records for process {rank} of {num_processes}. Use fewer processes.")
        start, state = 0, {}
