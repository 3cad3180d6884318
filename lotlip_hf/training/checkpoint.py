"""A run's folder and its checkpoints: a model for `AutoModel`, and in `state` what a resumed run needs."""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..distributed import any_rank
from ..files import PARTIAL, inside, one_line, parse_json, printable, publish, read_regular
from .config import CONFIG_NAME, TrainingConfig, check_resumed

logger = logging.get_logger(__name__)

STATE = "state"
PROGRESS = "progress.json"
MAX_PROGRESS = 1 << 24  # bytes
RANDOM = "random_digest"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; those that are there are intact."""


class Stateful(Protocol):
    """A module, a scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def checkpoint_step(name: str) -> int | None:
    """The step that the name of a checkpoint's folder says, `checkpoint-N`; `None` for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None


def list_checkpoints(output: str | os.PathLike) -> list[Path]:
    """The whole checkpoints in a run's folder, the oldest first."""
    paths = [path for path in Path(output).glob("checkpoint-*") if checkpoint_step(path.name) is not None]
    return sorted(paths, key=lambda path: checkpoint_step(path.name) or 0)


def prepare_folder(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """
    Makes a run's folder, `config.output`, and writes the options to it.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        FileExistsError: if there are checkpoints of another run.
        ValueError: if an entry leads out of the folder or is no file, or if options differ from the resumed run's.
    """
    output = Path(config.output)
    for name in os.listdir(output) if output.is_dir() else ():
        path = Path(inside(output, name))
        if not (path.is_file() or path.is_dir() or not path.exists()):  # another process may have removed it
            raise ValueError(f"{printable(path)}: neither a file nor a folder; choose another `output`.")
    checkpoints = list_checkpoints(output)
    is_resumed = config.resume and (output / CONFIG_NAME).exists()
    if is_resumed:
        check_resumed(config)
    if checkpoints and not config.resume:
        raise FileExistsError(
            f"{output} holds checkpoints of another run, up to {checkpoints[-1].name}: go on with it (`resume`), or "
            "choose another `output`."
        )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for path in output.glob(f"checkpoint-*{PARTIAL}"):  # what an interrupted save left
            shutil.rmtree(path, ignore_errors=True)
        for path in output.glob(f".*{PARTIAL}"):
            path.unlink()
        if not is_resumed:
            config.save(output)
    accelerator.wait_for_everyone()
    if config.resume and not checkpoints:
        accelerator.print(f"{output} holds no checkpoint to go on from: starting anew.")
    return checkpoints[-1] if checkpoints else None


def check_room(output: Path, model: nn.Module, has_average: bool) -> None:
    """Checks that the disk has room for the weights twice, AdamW's two moments and the averaged weights."""
    parameters = list(model.parameters())
    size = sum(parameter.nbytes for parameter in parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    needed = size * (3 if has_average else 2) + 2 * trained
    free = shutil.disk_usage(output).free
    if needed > free:
        raise CheckpointError(
            f"{output}: a checkpoint takes about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free."
        )


def save_checkpoint(
    output: str | os.PathLike,
    step: int,
    accelerator: Accelerator,
    save_model: Callable[[Path], None],
    progress: dict[str, Any],
    states: Mapping[str, Stateful],
    save_total_limit: int = 0,
) -> Path:
    """
    Writes `checkpoint-{step}` and removes the oldest ones but for `save_total_limit`; 0 keeps all. Every process calls
    it. The folder gets its name when it is whole and on the disk; an existing one is left as it is.

    `save_model` writes the model into a folder, `accelerator` its weights, the optimiser and the random numbers.
    `progress` are numbers of each process, `states` further objects, whose files `accelerator` would unpickle.

    Raises:
        CheckpointError: on all processes, if one of them cannot write.
    """
    final = Path(output, f"checkpoint-{step}")
    if final.exists():
        return final
    partial = Path(output, f"checkpoint-{step}{PARTIAL}")

    def make_folder() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write_state() -> None:
        accelerator.save_state(str(partial / STATE))
        if accelerator.is_main_process:
            for name, state in states.items():
                torch.save(state.state_dict(), _state_file(partial, name))
        progress_file = partial / STATE / f"{accelerator.process_index}-{PROGRESS}"
        progress_file.write_text(json.dumps({**progress, RANDOM: _random_digest()}), encoding="utf-8")

    def name_folder() -> None:
        if accelerator.is_main_process:
            publish(partial, final)

    # after each part all processes know whether it went well on all: in the next one they may wait for each other
    for part in (make_folder, lambda: save_model(partial), write_state, name_folder):
        reason = ""
        try:
            part()
        except Exception as error:  # torch and safetensors raise their own kinds where the disk is full
            reason = one_line(error) or type(error).__name__
        if any_rank(bool(reason), accelerator.device):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(output).free
            raise CheckpointError(
                f"{final} cannot be written: {reason or 'another process failed'} ({free / 1e9:.1f} GB are free)."
            )
    if accelerator.is_main_process and save_total_limit:
        for old in list_checkpoints(output)[:-save_total_limit]:
            remove_checkpoint(old)
    accelerator.wait_for_everyone()
    return final


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; one that is removed in part does not keep its name."""
    partial = checkpoint.with_name(f"{checkpoint.name}{PARTIAL}")
    try:
        checkpoint.rename(partial)
    except OSError as error:
        logger.warning(f"{checkpoint} cannot be removed: {error}.")
    else:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(checkpoint: Path, accelerator: Accelerator, states: Mapping[str, Stateful]) -> dict[str, Any]:
    """
    Loads a checkpoint into `states` and the objects that `accelerator` has prepared, and returns `progress` of this
    process. Only tensors, numbers and texts are read: no code in a checkpoint runs.

    Raises:
        CheckpointError: if it cannot be read, or was written by another number of processes.
    """
    number = len(list((checkpoint / STATE).glob(f"*-{PROGRESS}")))
    if not number:
        raise CheckpointError(
            f"{checkpoint} holds no state of a run to go on from ({STATE}/*-{PROGRESS}). Remove it to go on from the "
            "one before it, or start a new run: `model` takes a checkpoint."
        )
    if number != accelerator.num_processes:
        raise CheckpointError(
            f"{checkpoint} was written by {number} processes, this run has {accelerator.num_processes}: resume it "
            "with as many as before."
        )
    missing = [name for name in states if not _state_file(checkpoint, name).is_file()]
    if missing:
        raise CheckpointError(
            f"{checkpoint} holds no {_state_file(Path(), missing[0])}: an older version of lotlip-hf wrote it. Start "
            f"a new run from its weights: --model {checkpoint}."
        )
    try:
        for file in (checkpoint / STATE).rglob("*"):
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise ValueError(f"{file.name} is a pipe or a device")
        accelerator.load_state(str(checkpoint / STATE))
        for name, state in states.items():
            state.load_state_dict(torch.load(_state_file(checkpoint, name), map_location="cpu", weights_only=True))
        file = checkpoint / STATE / f"{accelerator.process_index}-{PROGRESS}"
        progress = parse_json(read_regular(file, MAX_PROGRESS))
        # accelerate goes on without them where it cannot read them
        if progress.pop(RANDOM) != _random_digest():
            raise ValueError("the random numbers' state is damaged")
        return progress
    except Exception as error:  # torch and safetensors raise their own kinds on a damaged file
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError):  # torch advises to trust the file
            reason = "a file in it is damaged, or holds a pickle of more than tensors, which could run code"
        raise CheckpointError(
            f"{checkpoint} cannot be read ({reason}). Remove it to go on from the one before it."
        ) from error


def _state_file(checkpoint: Path, name: str) -> Path:
    return checkpoint / STATE / f"{name}.pt"


def _random_digest() -> str:
    """A digest of the random numbers to come, those of Python, NumPy and torch."""
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest()
