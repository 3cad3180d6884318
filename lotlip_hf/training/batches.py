"""The batches of a run. The seed and the epoch determine the records of every batch and their order."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler, get_worker_info

from ..data.collator import Batch, LoTLIPCollator
from ..terminal import ignore_signals
from .config import TrainingConfig
from .frozen import KeyedRecords


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
    the same records for any number of processes.
    """

    def __init__(
        self, num_records: int, config: TrainingConfig, epoch: int, start: int, rank: int, num_processes: int
    ) -> None:
        self.order = np.random.default_rng([config.seed, epoch]).permutation(num_records)
        self.numbers = range(start, batches_per_epoch(num_records, config, num_processes))
        self.size = config.batch_size * num_processes
        self.rank, self.num_processes = rank, num_processes

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            whole = self.order[number * self.size : (number + 1) * self.size]
            yield np.array_split(whole, self.num_processes)[self.rank].tolist()


class _Collator:
    """
    Calls the collator in the workers of a `DataLoader`.

    Errors are returned instead of raised, because the loader would wrap them. The first `num_skipped` batches of a
    resumed stream are not decoded. Each worker receives at least `num_skipped // num_workers` of these batches.
    """

    def __init__(self, collator: LoTLIPCollator, num_skipped: int = 0) -> None:
        self.collator = collator
        self.num_skipped = num_skipped
        self.num_made = 0

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> Batch | Exception | None:
        worker = get_worker_info()
        self.num_made += 1
        if self.num_made <= self.num_skipped // (1 if worker is None else worker.num_workers):
            return None
        try:
            return self.collator(records)
        except Exception as error:
            return error


def iterate_batches(
    records: Dataset | IterableDataset | KeyedRecords,
    collator: LoTLIPCollator,
    config: TrainingConfig,
    epoch: int,
    start: int,
    rank: int,
    num_processes: int,
) -> Iterator[tuple[int, int, Batch]]:
    """
    Yields `(epoch, next_batch, batch)` for one process without end, starting at batch `start` of `epoch`. A run that
    stops after `batch` resumes at batch `next_batch` of `epoch`.

    A stream is read from its beginning and shuffled within `shuffle_buffer` records. The processes divide its shards,
    or its records if there are too few shards.
    """
    for number in count(epoch):
        collator.set_epoch(number)
        arguments: dict[str, Any] = {
            "num_workers": config.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": ignore_signals,
            # A loader draws a number: from the global generator, a resumed run would draw one more.
            "generator": torch.Generator(),
        }
        if isinstance(records, IterableDataset):
            shuffled = records.shuffle(config.seed, buffer_size=config.shuffle_buffer)
            part = split_dataset_by_node(shuffled, rank, num_processes)
            part.set_epoch(number)
            loader = DataLoader(
                part,  # pyright: ignore[reportArgumentType]
                config.batch_size,
                drop_last=config.drop_last,
                collate_fn=_Collator(collator, start),
                **arguments,
            )
            first = 0  # a stream is read from its first batch; those up to `start` are skipped below
        else:
            sampler = EpochBatches(len(records), config, number, start, rank, num_processes)
            loader = DataLoader(records, batch_sampler=sampler, collate_fn=_Collator(collator), **arguments)  # pyright: ignore[reportArgumentType]
            first = start
        index = first
        for index, batch in enumerate(loader, first + 1):
            if isinstance(batch, Exception):
                raise batch
            if index > start:
                yield number, index, batch
        if not index:
            raise ValueError(f"The data has no records for process {rank} of {num_processes}. Use fewer processes.")
        start = 0
