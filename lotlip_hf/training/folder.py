"""A run's folder before the first step: another run's, one to go on with, and whether a checkpoint fits."""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ..files import inside, printable
from .checkpoint import CheckpointError, list_checkpoints, remove_partial
from .config import CONFIG_NAME, TrainingConfig, check_resumed


def prepare_folder(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """
    Makes `config.output` and writes the options to it, or checks that they are those of the run to go on with.

    Args:
        config: The options.
        accelerator: Of the run; its first process writes.

    Returns:
        The checkpoint to go on from, if any.

    Raises:
        FileExistsError: if there are checkpoints of another run.
        ValueError: if an entry leads out of the folder or is no file, or if options differ from those of the run.
    """
    output = Path(config.output)
    for name in os.listdir(output) if output.is_dir() else ():
        path = inside(output, name)
        with suppress(FileNotFoundError):  # another process of the run has removed it
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
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
        remove_partial(output)
        if not is_resumed:
            config.save(output)
    accelerator.wait_for_everyone()
    if config.resume and not checkpoints:
        accelerator.print(f"{output} holds no checkpoint to go on from: starting anew.")
    return checkpoints[-1] if checkpoints else None


def check_room(output: Path, model: nn.Module, has_average: bool) -> None:
    """
    Checks that a checkpoint fits on the disk: the weights twice, AdamW's two moments, and the averaged weights.

    Raises:
        CheckpointError: if it does not.
    """
    parameters = list(model.parameters())
    size = sum(parameter.nbytes for parameter in parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    needed = size * (3 if has_average else 2) + 2 * trained
    free = shutil.disk_usage(output).free
    if needed > free:
        raise CheckpointError(
            f"{output}: a checkpoint takes about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free."
        )
