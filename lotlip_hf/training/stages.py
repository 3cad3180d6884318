"""A training run as its options describe it: data, model, and the loop, once or for each stage."""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import PartialState

from ..distributed import rank
from ..files import inside, parse_json, printable, read_regular, write_json
from .checkpoint import MAX_PROGRESS, checkpoint_step, prepare_folder
from .config import CONFIG_NAME, NEW_MODEL, TrainingConfig
from .data import load_data
from .loop import train
from .model import describe_text, load_or_start_model
from .outcome import StageResult, logged_recalls, write_outcome

STAGES_NAME = "stages.json"  # the checkpoint of each stage that has ended


def train_config(config: TrainingConfig) -> Path:
    """
    Loads the data and the model of a run, and trains. With `config.stages` each stage is a run of its own in the
    folder of the run, and starts with the checkpoint of the stage before, with `patience` its best. `stages.json`
    names the checkpoints of the stages that have ended. With `config.resume` the run continues in the interrupted
    stage. With `config.report` the run ends with a table, `results.json` and `report.html`
    ([`~lotlip_hf.training.outcome.write_outcome`]).

    Args:
        config (`TrainingConfig`): Options of the run.

    Returns:
        `Path`: The checkpoint of the run, or of its last stage.

    Raises:
        Errors of [`~lotlip_hf.training.data.load_data`], [`~lotlip_hf.training.model.load_or_start_model`] and
        [`~lotlip_hf.training.loop.train`].
    """
    if not config.stages:
        checkpoint = _train(config)
        if config.report:
            _report(config, {"model": (checkpoint, config)})
        return checkpoint
    state, output = _processes(), Path(config.output)
    ended = _ended(output) if config.resume else {}

    def prepare() -> None:
        prepare_folder(config, state)
        keep()

    def keep() -> None:
        if state.is_main_process:
            write_json(output / STAGES_NAME, ended)

    before: Callable[[], None] | None = prepare
    checkpoint = None
    results: dict[str, tuple[Path, TrainingConfig]] = {}
    for name, stage in config.stage_configs().items():
        if name in ended:
            checkpoint = Path(stage.output, ended[name])
            results[name] = checkpoint, stage
            continue
        stage.resume = config.resume and Path(stage.output, CONFIG_NAME).exists()
        state.print(f"Stage {name}:")
        checkpoint = _train(stage, checkpoint, before)
        results[name] = checkpoint, stage
        ended[name] = checkpoint.name
        before = None
        keep()
        gc.collect()  # a model on the device is in reference cycles
    assert checkpoint is not None
    if config.report:
        _report(config, results)
    return checkpoint


def _report(config: TrainingConfig, results: Mapping[str, tuple[Path, TrainingConfig]]) -> None:
    """Writes the outcome of a run from the checkpoints and options of its stages."""
    stages = [
        StageResult(name, checkpoint, {} if rank() else logged_recalls(checkpoint), stage)  # rank 0 writes the log
        for name, (checkpoint, stage) in results.items()
    ]
    records, eval_records = load_data(stages[-1].config)
    assert eval_records is not None
    write_outcome(config.output, stages, records, eval_records)


def _train(config: TrainingConfig, start: Path | None = None, prepare: Callable[[], None] | None = None) -> Path:
    """Trains once, from the checkpoint `start` of the stage before, if any. Calls `prepare` when all is loaded."""
    records, eval_records = load_data(config)  # fail before models are loaded
    source = config
    if start is not None:
        source = dataclasses.replace(config, **{**dict.fromkeys(NEW_MODEL), "model": str(start)})
    model, processor = load_or_start_model(source)
    if source.text_model is not None and not config.resume:
        _processes().print(f"{printable(source.text_model)}: {describe_text(model, processor)}.")
    if prepare is not None:
        prepare()
    return train(model, processor, records, config, eval_records)


def _ended(output: Path) -> dict[str, str]:
    """Returns the checkpoints of the stages that have ended and still exist, by the name of the stage."""
    path = output / STAGES_NAME
    if not path.exists():
        return {}
    try:
        ended = parse_json(read_regular(path, MAX_PROGRESS))
        if not isinstance(ended, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged. Remove it to continue from the checkpoints of the stages.") from error
    return {
        name: checkpoint
        for name, checkpoint in ended.items()
        if checkpoint_step(str(checkpoint)) is not None and Path(inside(output, name), checkpoint).is_dir()
    }


def _processes() -> PartialState:
    return PartialState(cpu=not torch.accelerator.is_available())  # else, CPUs are not connected
