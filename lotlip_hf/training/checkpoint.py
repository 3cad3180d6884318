"""The folder of a run and its checkpoints: a model for `AutoModel`, and the training state in the folder `state`."""

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
from accelerate import Accelerator, PartialState
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
    """A checkpoint cannot be written or read. The other checkpoints of the run are intact."""


class Stateful(Protocol):
    """An object with a `state_dict`, such as a module or a scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def checkpoint_step(name: str) -> int | None:
    """Returns N for the folder name `checkpoint-N`, and `None` for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(match[1]) if match else None


def list_checkpoints(output: str | os.PathLike) -> list[Path]:
    """Returns the complete checkpoints in the folder of a run, the oldest first."""
    paths = [path for path in Path(output).glob("checkpoint-*") if checkpoint_step(path.name) is not None]
    return sorted(paths, key=lambda path: checkpoint_step(path.name) or 0)


def prepare_folder(config: TrainingConfig, accelerator: Accelerator | PartialState) -> Path | None:
    """
    Creates the folder of a run, `config.output`, and writes the options to it.

    Returns:
        `Path` or `None`: The checkpoint to resume from, if any. A run of stages has none in its own folder.

    Raises:
        `FileExistsError`: If the folder contains checkpoints of another run.
        `ValueError`: If the folder contains a link to the outside, a pipe or a device, or if the options differ from
            those of the resumed run.
    """
    output = Path(config.output)
    for name in os.listdir(output) if output.is_dir() else ():
        path = Path(inside(output, name))
        if not (path.is_file() or path.is_dir() or not path.exists()):  # another process may have removed it
            raise ValueError(f"{printable(path)} is neither a file nor a folder. Choose another `output`.")
    checkpoints = list_checkpoints(output)
    for stage in config.stages or ():
        checkpoints += list_checkpoints(output / stage)
    is_resumed = config.resume and (output / CONFIG_NAME).exists()
    if is_resumed:
        check_resumed(config)
    if checkpoints and not config.resume:
        raise FileExistsError(
            f"{output} contains checkpoints of another run, up to {checkpoints[-1].relative_to(output)}. Continue "
            "that run with `--resume`, or choose another `output`."
        )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for path in output.glob(f"checkpoint-*{PARTIAL}"):  # left by an interrupted save
            shutil.rmtree(path, ignore_errors=True)
        for path in output.glob(f".*{PARTIAL}"):
            path.unlink()
        if not is_resumed:
            config.save(output)
    accelerator.wait_for_everyone()
    if config.resume and not checkpoints:
        accelerator.print(f"{output} contains no checkpoint to resume from. Starting a new run.")
    return checkpoints[-1] if checkpoints and not config.stages else None


def check_room(output: Path, model: nn.Module, num_copies: int) -> None:
    """
    Raises [`CheckpointError`] if the disk has no room for two copies of the weights, the optimiser's state, and
    `num_copies` further copies, such as a moving average.
    """
    parameters = list(model.parameters())
    size = sum(parameter.nbytes for parameter in parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    needed = size * (2 + num_copies) + 2 * trained
    free = shutil.disk_usage(output).free
    if needed > free:
        raise CheckpointError(
            f"{output} has {free / 1e9:.1f} GB of free space, but a checkpoint needs about {needed / 1e9:.1f} GB. "
            "Free some space or choose another `output`."
        )


def save_checkpoint(
    output: str | os.PathLike,
    step: int,
    accelerator: Accelerator,
    save_model: Callable[[Path], None],
    progress: dict[str, Any],
    states: Mapping[str, Stateful],
    save_total_limit: int = 0,
    best_step: int | None = None,
) -> Path:
    """
    Writes `checkpoint-{step}` and removes all but the last `save_total_limit` checkpoints (0 keeps all) and that of
    `best_step`. Every process must call it. The folder gets its name when all files are written. An existing
    checkpoint is not written again.

    `save_model` writes the model into a folder. `accelerator` saves the weights, the optimiser and the states of the
    random generators. `progress` has the counters of this process, and `states` has further objects to save.

    Raises:
        `CheckpointError`: On all processes, if one of them cannot write.
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

    # If a part fails on one process, all must stop, because they may wait for each other in the next part.
    for part in (make_folder, lambda: save_model(partial), write_state, name_folder):
        reason = ""
        try:
            part()
        except Exception as error:  # torch and safetensors raise their own exception classes when the disk is full
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
            if checkpoint_step(old.name) != best_step:
                remove_checkpoint(old)
    accelerator.wait_for_everyone()
    return final


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint. Renaming it first ensures that an interrupted removal leaves no incomplete checkpoint."""
    partial = checkpoint.with_name(f"{checkpoint.name}{PARTIAL}")
    try:
        checkpoint.rename(partial)
    except OSError as error:
        logger.warning(f"{checkpoint} cannot be removed: {error}.")
    else:
        shutil.rmtree(partial, ignore_errors=True)


def load_checkpoint(checkpoint: Path, accelerator: Accelerator, states: Mapping[str, Stateful]) -> dict[str, Any]:
    """
    Loads a checkpoint into `states` and the objects prepared by `accelerator`. Returns the `progress` of this process.
    Only tensors, numbers and strings are loaded, so that a checkpoint cannot run code.

    Raises:
        `CheckpointError`: If the checkpoint cannot be read, was written by a different number of processes, or has
            tensors of other shapes than `states`.
    """
    number = len(list((checkpoint / STATE).glob(f"*-{PROGRESS}")))
    if not number:
        raise CheckpointError(
            f"{checkpoint} has no training state ({STATE}/*-{PROGRESS}). Remove it to resume from the previous "
            f"checkpoint, or start a new run from its weights with `--model {checkpoint}`."
        )
    if number != accelerator.num_processes:
        raise CheckpointError(
            f"{checkpoint} was written by {number} processes, but this run has {accelerator.num_processes}. Resume it "
            f"with {number} processes."
        )
    missing = [name for name in states if not _state_file(checkpoint, name).is_file()]
    if missing:
        raise CheckpointError(
            f"{checkpoint} has no {_state_file(Path(), missing[0])}, because an older version of lotlip-hf wrote it. "
            f"Start a new run from its weights with `--model {checkpoint}`."
        )
    try:
        for file in (checkpoint / STATE).rglob("*"):
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise ValueError(f"{file.name} is a pipe or a device")
        accelerator.load_state(str(checkpoint / STATE))
        for name, state in states.items():
            saved = torch.load(_state_file(checkpoint, name), map_location="cpu", weights_only=True)
            _check_shapes(checkpoint, saved, state.state_dict())
            state.load_state_dict(saved)
        file = checkpoint / STATE / f"{accelerator.process_index}-{PROGRESS}"
        progress = parse_json(read_regular(file, MAX_PROGRESS))
        # accelerate ignores the states of the random generators if it cannot read them.
        if progress.pop(RANDOM) != _random_digest():
            raise ValueError("the states of the random generators are damaged")
        return progress
    except CheckpointError:
        raise
    except Exception as error:  # torch and safetensors raise their own exception classes on a damaged file
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError):  # torch's own message advises to trust the file
            reason = "a file in it is damaged, or is a pickle that could run code"
        raise CheckpointError(
            f"{checkpoint} cannot be read ({reason}). Remove it to resume from the previous checkpoint."
        ) from error


def _check_shapes(checkpoint: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises an error if tensors have other shapes than in a checkpoint, because a file of an option has changed."""
    for name, tensor in own.items():
        first = saved.get(name)
        if isinstance(tensor, torch.Tensor) and isinstance(first, torch.Tensor) and tensor.shape != first.shape:
            raise CheckpointError(
                f"`{name}` has the shape {tuple(first.shape)} in {checkpoint}, but {tuple(tensor.shape)} with the "
                "options of this run. Resume with the files of the first run, such as the `vocabulary` of tags."
            )


def _state_file(checkpoint: Path, name: str) -> Path:
    return checkpoint / STATE / f"{name}.pt"


def _random_digest() -> str:
    """Returns a digest of the states of the random generators of Python, NumPy and torch."""
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest()
