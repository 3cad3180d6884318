"""The batches of a run: which records, in which order, on which process. All of it follows from (seed, epoch)."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler, get_worker_info

from ..data.collator import Batch, LoTLIPCollator
from .config import TrainingConfig


def batches_per_epoch(num_records: int, config: TrainingConfig, num_processes: int) -> int:
    """
    The full batches of an epoch, and the last one that is not full, unless `drop_last` says otherwise or it holds
    fewer records than there are processes; `ValueError` if there is none.
    """
    size = config.batch_size * num_processes
    full, rest = divmod(num_records, size)
    number = full + (not config.drop_last and rest >= num_processes)
    if not number:
        raise ValueError(
            f"{num_records} records do not make a batch of {num_processes} x {config.batch_size}: reduce `batch_size`"
            f"{' or set `drop_last` to false' if config.drop_last else ''}."
        )
    return number


def num_steps(records: Dataset | IterableDataset, config: TrainingConfig, num_processes: int) -> int:
    """
    Steps of the optimiser: `max_steps`, or as many as `num_epochs` make.

    Raises:
        ValueError: if a stream has no `max_steps`, an epoch no batch, or the warm-up more steps than the run.
    """
    if config.max_steps is not None:
        return config.max_steps
    if isinstance(records, IterableDataset):
        raise ValueError("The records are a stream, whose length is not known: set `max_steps`.")
    batches = batches_per_epoch(len(records), config, num_processes)
    # 0.29 x 100 is a little less than 29
    steps = max(1, int(round(config.num_epochs * batches, 6)) // config.gradient_accumulation_steps)
    if config.warmup_steps > steps:
        raise ValueError(f"`warmup_steps` ({config.warmup_steps}) is more than the run's {steps} steps.")
    return steps


class EpochBatches(Sampler[list[int]]):
    """
    One process's batches of one epoch: of each global batch, a run of the shuffled records, an even part. So what a
    step sees does not depend on the number of processes.
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
    The collator as a `DataLoader`'s workers call it. Errors are returned, for the loader would wrap them. The first
    `num_skipped` batches of a resumed stream are not decoded: each worker makes `num_skipped // num_workers` or more.
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


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the workers too, but the process that they work for decides when it is done with them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def iterate_batches(
    records: Dataset | IterableDataset,
    collator: LoTLIPCollator,
    config: TrainingConfig,
    epoch: int,
    start: int,
    rank: int,
    num_processes: int,
) -> Iterator[tuple[int, int, Batch]]:
    """
    A process's batches from a position on, epoch after epoch, without end, each behind the position after it: epoch
    and number of the next batch. A stream is read from its beginning and shuffled within `shuffle_buffer` records; its
    shards (or, if there are too few, its records) are divided between the processes.
    """
    for number in count(epoch):
        collator.set_epoch(number)
        arguments: dict[str, Any] = {
            "num_workers": config.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": _ignore_signals,
            # its own, for a loader draws a number: a resumed run makes one loader more
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
            first = 0  # read and thrown away up to `start`
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
            raise ValueError(f"The data set has no records for process {rank} of {num_processes}.")
        start = 0
