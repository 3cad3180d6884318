"""A training run as its options describe it: data, model, and the loop, once or for each stage."""

import dataclasses
import gc
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..distributed import rank
from ..files import inside, parse_json, printable, read_regular, write_json
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..options import groups_of
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
    output = Path(config.output)
    stages = config.stage_configs() or {"model": config}
    ended = _ended(output) if config.stages and config.resume else {}

    def keep() -> None:
        if not rank():
            write_json(output / STAGES_NAME, ended)

    data: _Data | None = None
    checkpoints: dict[str, Path] = {}
    start = None
    for name, stage in stages.items():
        if name in ended:
            start = checkpoints[name] = Path(stage.output, ended[name])
            continue
        if config.stages:
            stage.resume = config.resume and Path(stage.output, CONFIG_NAME).exists()
            _processes().print(f"Stage {name}:")
        last, data = data, _load(stage, data)  # fail before models are loaded
        model, processor = _model(stage, start)
        if config.stages and last is None:
            prepare_folder(config, _processes())
            keep()
        check_data = data is not last
        start = train(model, processor, data.records, stage, data.eval_records, check_data=check_data)
        del model, processor
        gc.collect()  # a model on the device is in reference cycles
        checkpoints[name] = start
        if config.stages:
            ended[name] = start.name
            keep()
    assert start is not None
    if config.report:
        results = [
            StageResult(name, checkpoint, {} if rank() else logged_recalls(checkpoint), stages[name])
            for name, checkpoint in checkpoints.items()  # the main process writes the log
        ]
        data = _load(results[-1].config, data)
        assert data.eval_records is not None
        write_outcome(output, results, data.records, data.eval_records)
    return start


class _Data(NamedTuple):
    """The records of a stage, and its options."""

    config: TrainingConfig
    records: Dataset | IterableDataset
    eval_records: Dataset | IterableDataset | None


def _load(config: TrainingConfig, last: _Data | None) -> _Data:
    """Loads the records of a stage, or returns the last ones if no option of the records and their texts differs."""
    groups = groups_of(TrainingConfig)
    names = [field.name for field in (*groups["Data"], *groups["Texts"], *groups["Objective"])]
    names += ["eval_data", "eval_split", "eval_samples", "max_text_length"]
    if last is not None and all(getattr(config, name) == getattr(last.config, name) for name in names):
        return last
    return _Data(config, *load_data(config))


def _model(config: TrainingConfig, start: Path | None) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """Loads the model of a stage, which is the checkpoint `start` of the stage before, if any."""
    if start is not None:
        config = dataclasses.replace(config, **{**dict.fromkeys(NEW_MODEL), "model": str(start)})
    model, processor = load_or_start_model(config)
    if config.text_model is not None and not config.resume:
        _processes().print(f"{printable(config.text_model)}: {describe_text(model, processor)}.")
    return model, processor


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
