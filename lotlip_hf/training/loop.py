"""The training loop, on accelerate: one process or several, with checkpoints, a log, and evaluation as it goes."""

import math
import os
import shutil
import signal
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, extract_model_from_parallel, send_to_device, set_seed
from datasets import Dataset, IterableDataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.collator import LoTLIPCollator
from ..data.sampling import CaptionSampling
from ..distributed import gather, gather_lists, is_distributed, max_over_ranks
from ..evaluation.retrieval import recalls
from ..files import inside, printable, write_json
from ..images import set_max_image_pixels
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from .batches import batches_per_epoch, iterate_batches
from .checkpoint import (
    CheckpointError,
    Stateful,
    list_checkpoints,
    load_checkpoint,
    remove_partial,
    save_checkpoint,
)
from .config import CONFIG_NAME, TrainingConfig, check_resumed
from .log import CURVE_NAME, LOG_NAME, RECALLS, RunLog, draw_curve, read_log
from .model import freeze, parameter_groups, prepare_sharding, rate_factor, set_training_mode
from .objective import Objective, batch_loss, cached_backward, clamp_logit_scale

logger = logging.get_logger(__name__)

# Record ids that an error names; a file holds all of them.
MAX_IDS = 10
# Signals so close to the first say nothing new.
SAME_SIGNAL_SECONDS = 3.0


class NonFiniteLossError(RuntimeError):
    """The loss, its gradient or the weights are not finite; the checkpoints are from before."""


class OtherProcessError(RuntimeError):
    """Another process of the run has met an error; its own message says which."""


def train(
    model: LoTLIPModel,
    processor: LoTLIPProcessor,
    records: Dataset | IterableDataset,
    config: TrainingConfig,
    eval_records: Dataset | IterableDataset | None = None,
) -> Path:
    """
    Trains a model with LoTLIP's objective (the paper's section 3.3) and writes a run's folder, `config.output`:

    - `checkpoint-N`: after N steps, what `AutoModel` and `AutoProcessor` load (with `ema_decay` the averaged weights),
      and in `state` what a resumed run needs;
    - `training_config.yaml`: the options;
    - `log.jsonl` and `curve.png`: losses, learning rate, samples per second, and R@1 where it was measured.

    The same call under `accelerate launch` or `torchrun` trains in several processes. An interrupt (Ctrl-C, SIGTERM)
    writes a checkpoint first. With `config.resume` the run goes on from the last checkpoint, in the middle of an
    epoch if need be, and computes what it would have computed undisturbed.

    Args:
        model: The model; it is trained in place.
        processor: Its processor.
        records: Records to train on (`lotlip_hf.data.records.load_records`).
        config: Every option.
        eval_records: Records to measure retrieval on, at the end and every `eval_steps`.

    Returns:
        The folder of the last checkpoint.

    Raises:
        FileExistsError: if `config.output` holds another run's checkpoints.
        NonFiniteLossError: if the loss is not finite; names the step, the records and the last checkpoint.
        CheckpointError: if a checkpoint cannot be read, or the last one cannot be written, or there is no room for
            one from the start.
        ValueError: if options contradict the model or the data.
        ImageError, RecordError: if a record is broken and `on_error` is `"raise"`. What was trained so far is saved
            first, so that the run can be resumed.
        OtherProcessError: if another process has met one of the last two.

    Example:

    ```python
    >>> from lotlip_hf.training.config import TrainingConfig
    >>> from lotlip_hf.training.loop import train
    >>> from lotlip_hf.training.model import load_data, load_or_start_model

    >>> config = TrainingConfig(model="scenes", data="scenes", max_steps=1000, learning_rate=1e-3, output="run")
    >>> checkpoint = train(*load_or_start_model(config), load_data(config)[0], config)
    ```
    """
    if config.max_image_pixels is not None:
        set_max_image_pixels(config.max_image_pixels)
    accelerator = Accelerator(
        # of processes on CPUs accelerate makes one run only if it is told that they are
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.trackers or None,
        project_dir=config.output,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would compute in float32 and say nothing
        raise ValueError("`mixed_precision` fp16 needs a GPU: on a CPU use bf16 or no.")
    missing = [name for name in config.trackers if name not in [*map(str, accelerator.log_with), "all"]]
    if missing:
        raise ValueError(
            f"`trackers`: {', '.join(missing)} is not installed. Install it, or leave it out (none: no one)."
        )
    return _Run(model, processor, records, config, eval_records, accelerator).run()


class _Run:
    """What a run holds: `position` (epoch, number of the next batch), `step`, and what accelerate keeps."""

    def __init__(
        self,
        model: LoTLIPModel,
        processor: LoTLIPProcessor,
        records: Dataset | IterableDataset,
        config: TrainingConfig,
        eval_records: Dataset | IterableDataset | None,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator, self.processor = config, accelerator, processor
        self.records, self.eval_records = records, eval_records
        self.output = Path(config.output)
        self.max_steps = self._max_steps()
        self.epoch, self.next_batch, self.step = 0, 0, 0
        self.ids: list[str] = []  # records of the last step
        self.counts: Counter[str] = Counter()
        self.window = _Window()
        self.log: RunLog | None = None
        self.is_log_broken = False
        self.checkpoint = self._prepare_folder()

        set_seed(config.seed, device_specific=True)
        freeze(model, config)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            # an encoder has none, but transformers would warn, and tracing stop, at every layer
            model.config.text_config.backbone_config.use_cache = False
        if config.compile:
            # Tracing fails where checkpointed layers run twice in one graph, for the short and for the long texts.
            parts = (model.text_model, model.vision_model) if config.gradient_checkpointing else (model,)
            for part in parts:
                part.compile(dynamic=True)  # texts of every length
        elif model.text_model.backbone.config._attn_implementation == "sdpa":
            model.text_model.set_attn_implementation("unpadded")
        weights = model.config
        self.objective = Objective(
            config.loss,
            short_loss_weight=_default(config.short_loss_weight, weights.short_loss_weight),
            long_loss_weight=_default(config.long_loss_weight, weights.long_loss_weight),
            num_primary_components=config.num_primary_components,
        ).to(accelerator.device)
        self.averaged = None
        if config.ema_decay is not None:
            if accelerator.distributed_type == DistributedType.FSDP:
                raise ValueError("`ema_decay` needs all weights in one place, which FSDP does not leave them in.")
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.averaged = AveragedModel(model, accelerator.device, multi_avg_fn=average)
        groups = parameter_groups(model, self.objective, config)
        optimizer = torch.optim.AdamW(
            groups,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),  # one pass over the memory
        )
        # not prepared: accelerate would step it once for each process
        self.scheduler = LambdaLR(optimizer, partial(rate_factor, config=config, max_steps=self.max_steps))
        prepare_sharding(model, self.objective, accelerator)
        prepared = accelerator.prepare(model, optimizer)
        self.model, self.optimizer = cast(tuple[nn.Module, AcceleratedOptimizer], prepared)
        self.states: dict[str, Stateful] = {"scheduler": self.scheduler, "objective": self.objective}
        if self.averaged is not None:
            self.states["averaged"] = self.averaged
        self.collator = LoTLIPCollator(
            processor, config.sampling(), seed=config.seed, on_error=config.on_error, return_ids=True
        )
        if self.checkpoint is not None:
            self._load()

    def _max_steps(self) -> int:
        config = self.config
        if config.max_steps is not None:
            return config.max_steps
        if isinstance(self.records, IterableDataset):
            raise ValueError("The records are a stream, whose length is not known: set `max_steps`.")
        batches = batches_per_epoch(len(self.records), config, self.accelerator.num_processes)
        # 0.29 x 100 is a little less than 29
        max_steps = max(1, int(round(config.num_epochs * batches, 6)) // config.gradient_accumulation_steps)
        if config.warmup_steps > max_steps:
            raise ValueError(f"`warmup_steps` ({config.warmup_steps}) is more than the run's {max_steps} steps.")
        return max_steps

    def _prepare_folder(self) -> Path | None:
        """The checkpoint to go on from, if any. What would fail only after hours is tried before."""
        _check_entries(self.output)
        checkpoints = list_checkpoints(self.output)
        has_options = (self.output / CONFIG_NAME).exists()
        if self.config.resume and has_options:
            check_resumed(self.config)
        if checkpoints and not self.config.resume:
            raise FileExistsError(
                f"{self.output} holds checkpoints of another run, up to {checkpoints[-1].name}: go on with it "
                "(`resume`), or choose another `output`."
            )
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_partial(self.output)
            if not (self.config.resume and has_options):
                self.config.save(self.output)
        self.accelerator.wait_for_everyone()
        if self.config.resume and not checkpoints:
            self.accelerator.print(f"{self.output} holds no checkpoint to go on from: starting anew.")
        return checkpoints[-1] if checkpoints else None

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        self._check_room()
        is_evaluated = False
        if accelerator.is_main_process:
            self.log = RunLog(self.output / LOG_NAME)
            self.log.truncate(self.step)
            lines = read_log(self.log.path) if self.log.path.exists() else []
            is_evaluated = any(line["step"] == self.step and not RECALLS.keys().isdisjoint(line) for line in lines)
        accelerator.init_trackers("lotlip", config={name: _plain(value) for name, value in vars(config).items()})
        batches = iterate_batches(
            self.records,
            self.collator,
            config,
            self.epoch,
            self.next_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        set_training_mode(self.model)
        description = f"Training ({accelerator.num_processes} processes)" if is_distributed() else "Training"
        try:
            with (
                closing(batches),
                _signals() as received,
                tqdm(
                    total=self.max_steps,
                    initial=self.step,
                    desc=description,
                    unit="step",
                    disable=not accelerator.is_main_process,
                ) as bar,
            ):
                if not self._any(is_evaluated):
                    self._evaluate_if_due()  # a run that ended in an evaluation makes up for it when it is resumed
                self.window.restart()
                while self.step < self.max_steps:
                    self._take_step(self._next_batches(batches))
                    bar.update()
                    is_last = self.step == self.max_steps
                    if self.step % config.log_steps == 0 or is_last:
                        values = self._log_values()
                        bar.set_postfix(loss=f"{values['loss']:.3f}", samples=f"{values['samples_per_second']:.0f}/s")
                        self._write(values)
                        self.window = _Window()
                    is_stopped = self._any(bool(received))
                    if is_stopped or is_last or (config.save_steps and self.step % config.save_steps == 0):
                        self._save(required=is_stopped or is_last)
                        self.window.restart()
                    if is_stopped and not is_last:
                        break
                    self._evaluate_if_due()
        finally:
            self._close_log()
        if self.step < self.max_steps:
            logger.warning(
                f"Stopped after step {self.step}, saved in {self.checkpoint}. `--resume` goes on from there."
            )
            # a signal's own action may end the process at once
            sys.stdout.flush()
            # to this process's own handler, or another process's signal in its name
            signal.raise_signal(received[0] if received else signal.SIGTERM)
        assert self.checkpoint is not None
        return self.checkpoint

    def _next_batches(self, batches: Iterator[tuple[int, int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """
        A step's batches, all of them before the first is used: where one cannot be had, on this process or another,
        the state is still that after the last step, and is saved.
        """
        taken, position, error = [], (self.epoch, self.next_batch), None
        try:
            for _ in range(self.config.gradient_accumulation_steps):
                *position, batch = next(batches)
                taken.append(batch)
        except Exception as caught:  # whatever a data set raises
            error = caught
        if self._any(error is not None):
            self._save_before_stop()
            raise error or OtherProcessError("Another process has stopped; its own message says why.")
        self.epoch, self.next_batch = position
        return taken

    def _take_step(self, batches: list[dict[str, Any]]) -> None:
        config, accelerator = self.config, self.accelerator
        self.ids = []
        for batch in batches:
            ids: list[str] = batch.pop("ids")
            self.ids += ids
            self.counts.update(batch.pop("counts"))
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            with accelerator.accumulate(self.model):
                if config.grad_cache_chunk is not None:
                    loss = cached_backward(
                        self.model, batch, config.grad_cache_chunk, self.objective, accelerator=accelerator
                    )
                else:
                    with accelerator.autocast():
                        loss = batch_loss(self.model, batch, self.objective)
                    accelerator.backward(loss.loss)
            losses = accelerator.reduce(torch.stack([*loss]).detach(), "mean")
            values = cast(torch.Tensor, losses).tolist()
            if not math.isfinite(values[0]):
                self._stop_at_nan(self.step + 1, f"the loss is {values[0]}; the step was not taken")
            self.window.add(values, len(ids) * accelerator.num_processes)
        # each once: under FSDP the model holds the objective's parameter, too
        trained = list(dict.fromkeys([*self.model.parameters(), *self.objective.parameters()]))
        norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
        # a scaler skips the step itself, and tries again with a smaller scale
        if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
            self._stop_at_nan(self.step + 1, f"the gradient's norm is {float(norm)}; the step was not taken")
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        clamp_logit_scale(self.model)
        self.step += 1
        if self.averaged is not None:
            self.averaged.update_parameters(extract_model_from_parallel(self.model))

    def _stop_at_nan(self, step: int, what: str) -> None:
        """Every process knows of it: the loss and the norm are those of all."""
        all_ids = gather_lists(self.ids)
        path = self.output / f"not-finite-{step}.json"
        listed = f", listed in {path}"
        if self.accelerator.is_main_process:
            try:
                write_json(path, {"step": step, "reason": what, "ids": all_ids})
            except OSError:
                listed = ""
        named = f"{', '.join(all_ids[:MAX_IDS])}{', ...' if len(all_ids) > MAX_IDS else ''}"
        kept = (
            "There is no checkpoint yet." if self.checkpoint is None else f"The last checkpoint is {self.checkpoint}."
        )
        raise NonFiniteLossError(
            f"Step {step}: {what}. {kept} The step's {len(all_ids)} records{listed}: {named}. A smaller learning "
            "rate, `mixed_precision` bf16 in place of fp16, or leaving out broken records are what helps."
        )

    def _log_values(self) -> dict[str, Any]:
        values = {
            **self.window.means(),
            "logit_scale": extract_model_from_parallel(self.model).logit_scale.exp().item(),
            "learning_rate": max(self.scheduler.get_last_lr()),
            "samples_per_second": self.window.samples_per_second(),
        }
        if self.config.on_error == "skip":
            total: Counter[str] = Counter()
            for counts in gather_lists([dict(self.counts)]):
                total.update(counts)
            values |= total
        return values

    def _write(self, values: Mapping[str, Any]) -> None:
        """A line of the log and of the trackers. Where one cannot be written the run goes on, and says so once."""
        error = None
        try:
            if self.log is not None:
                self.log.write({"step": self.step, "epoch": self.epoch, **values})
        except OSError as caught:
            error = caught
        try:
            self.accelerator.log(dict(values), step=self.step)
        except Exception as caught:  # every tracker raises its own kinds
            error = error or caught
        if error is not None and not self.is_log_broken:
            self.is_log_broken = True
            logger.error(f"The log cannot be written ({error}). The run goes on; lines will be missing.")

    def _close_log(self) -> None:
        """Trackers write what they hold, and the curve is drawn. Neither undoes what was trained."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # every tracker raises its own kinds
                logger.error(f"{tracker.name}: what it still holds cannot be written ({error}).")
        if self.log is not None and self.log.path.exists():
            try:
                draw_curve(self.log.path, self.output / CURVE_NAME)
            except (ImportError, OSError, ValueError) as error:
                logger.warning(f"{CURVE_NAME} was not drawn: {error}")

    def _evaluate_if_due(self) -> None:
        steps = self.config.eval_steps
        is_due = self.step == self.max_steps or (steps is not None and self.step > 0 and self.step % steps == 0)
        if self.eval_records is None or not is_due:
            return
        model = self.model if self.averaged is None else self.averaged
        try:
            values = evaluate(model, self.processor, self.eval_records, self.config, self.accelerator)
        except Exception:  # on all processes
            self._save_before_stop()
            raise
        set_training_mode(self.model)
        self._write(values)
        self.window.restart()

    def _any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return bool(max_over_ranks(torch.tensor(int(flag), device=self.accelerator.device)).item())

    def _save(self, required: bool) -> None:
        """A checkpoint; one that cannot be written stops the run only if it is the last chance."""
        tensors = (*self.model.parameters(), *self.objective.parameters())
        if self._any(not all(bool(tensor.isfinite().all()) for tensor in tensors)):
            self._stop_at_nan(self.step, "the weights are not finite and were not saved")
        progress = {
            "step": self.step,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "counts": dict(self.counts),
            "window": self.window.state(),
            "data": self._data(),
        }
        try:
            self.checkpoint = save_checkpoint(
                self.output,
                self.step,
                self.accelerator,
                self._save_model,
                progress,
                self.states,
                self.config.save_total_limit,
            )
        except CheckpointError as error:
            if required:
                raise
            logger.error(f"{error} The run goes on, and tries again after {self.config.save_steps} steps.")

    def _save_before_stop(self) -> None:
        """Saves the state after the last step, if it is not, for the run cannot go on."""
        if not self.step:
            return
        try:
            self._save(required=True)
            logger.warning(f"What was trained so far is in {self.checkpoint}; `--resume` goes on from there.")
        except (CheckpointError, NonFiniteLossError) as error:
            logger.error(str(error))

    def _data(self) -> dict[str, Any]:
        """What the order of the records follows from, beside the options."""
        if isinstance(self.records, IterableDataset):
            return {"num_workers": self.config.num_workers}  # the workers share the shards
        return {"num_records": len(self.records)}

    def _save_model(self, folder: Path) -> None:
        model = extract_model_from_parallel(self.model)
        if self.averaged is not None:
            model, weights = self.averaged.module, None
        else:
            weights = self.accelerator.get_state_dict(self.model)
            for name, _ in self.objective.named_parameters():
                weights.pop(name, None)  # see `prepare_sharding`
        if self.accelerator.is_main_process:
            cast(LoTLIPModel, model).save_pretrained(folder, state_dict=weights)
            self.processor.save_pretrained(folder)
            self.config.save(folder)

    def _load(self) -> None:
        assert self.checkpoint is not None
        progress = load_checkpoint(self.checkpoint, self.accelerator, self.states)
        if not _is_progress(progress):
            raise CheckpointError(
                f"{self.checkpoint} cannot be read (its progress is damaged). Remove it to go on from the one before."
            )
        self.step, self.epoch, self.next_batch = progress["step"], progress["epoch"], progress["next_batch"]
        self.counts.update(progress["counts"])
        self.window = _Window(**progress["window"])
        for name, number in self._data().items():
            first = progress["data"].get(name)
            if first != number:
                raise ValueError(
                    f"{self.checkpoint} was written with `{name}` = {first}, now it is {number}: the batches would be "
                    "others. Go on with the same records and, of a stream, as many workers."
                )
        self.accelerator.print(f"Going on from {self.checkpoint}.")

    def _check_room(self) -> None:
        """Whether a checkpoint fits on the disk: the weights twice, AdamW's two moments, and the averaged weights."""
        parameters = list(extract_model_from_parallel(self.model).parameters())
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        trained = sum(
            parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad
        )
        needed = size * (2 if self.averaged is None else 3) + 2 * trained
        free = shutil.disk_usage(self.output).free
        if needed > free:
            raise CheckpointError(
                f"{self.output}: a checkpoint takes about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free."
            )


def _check_entries(output: Path) -> None:
    """Refuses entries of a run's folder that are links out of it, pipes or devices."""
    for name in os.listdir(output) if output.is_dir() else ():
        path = inside(output, name)
        with suppress(FileNotFoundError):  # another process of the run has removed it
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ValueError(f"{printable(path)}: neither a file nor a folder; choose another `output`.")


def _is_progress(progress: dict[str, Any]) -> bool:
    """Whether it holds what `_Run._save` writes: a run may be a stranger's."""
    counts, window, data = (progress.get(name) for name in ("counts", "window", "data"))
    if not (isinstance(counts, dict) and isinstance(window, dict) and isinstance(data, dict)):
        return False
    sums = window.get("sums")
    if window.keys() != _Window().state().keys() or not isinstance(sums, list) or len(sums) != 3:
        return False
    whole = [progress.get(name) for name in ("step", "epoch", "next_batch")]
    whole += [*counts.values(), window["batches"], window["samples"]]
    return all(type(one) is int and 0 <= one < 2**63 for one in whole) and all(
        isinstance(one, int | float) for one in (*sums, window["seconds"])
    )


class _Window:
    """Means since the last line of the log."""

    def __init__(
        self, sums: Sequence[float] = (0.0, 0.0, 0.0), batches: int = 0, samples: int = 0, seconds: float = 0.0
    ) -> None:
        self.sums, self.batches, self.samples, self.seconds = list(sums), batches, samples, seconds
        self.start = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Its arguments, to go on with."""
        return {"sums": self.sums, "batches": self.batches, "samples": self.samples, "seconds": self.seconds}

    def add(self, losses: list[float], samples: int) -> None:
        self.sums = [total + loss for total, loss in zip(self.sums, losses, strict=True)]
        self.batches += 1
        self.samples += samples
        self.seconds += time.perf_counter() - self.start
        self.start = time.perf_counter()

    def restart(self) -> None:
        """Leaves out what was no training."""
        self.start = time.perf_counter()

    def means(self) -> dict[str, float]:
        names = ("loss", "loss_short", "loss_long")
        return {name: total / self.batches for name, total in zip(names, self.sums, strict=True)}

    def samples_per_second(self) -> float:
        return self.samples / self.seconds


@torch.no_grad()
def evaluate(
    model: nn.Module,
    processor: LoTLIPProcessor,
    records: Dataset | IterableDataset,
    config: TrainingConfig,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """
    Retrieval over the first `eval_samples` records, with each record's short caption and with its first long caption,
    whole. The model is left in evaluation mode.

    Args:
        model: A [`LoTLIPModel`] or what wraps one.
        processor: Its processor.
        records: Records.
        config: `eval_samples`, `batch_size`, `captioners` (the first is evaluated), `on_error`.
        accelerator: Of the run: the processes share the work, and each gets the answer.

    Returns:
        `long_image_to_text_r1`, `long_text_to_image_r1`, `short_...`, and the same at 5 and 10, from 0 to 1.

    Raises:
        ValueError: if there are fewer records than processes.
        ImageError, RecordError: see [`LoTLIPCollator`].
        OtherProcessError: if another process has met one of these.
    """
    rank, num_processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    if isinstance(records, IterableDataset):
        chosen: Any = list(islice(records, config.eval_samples))
    else:
        chosen = records.select(range(min(config.eval_samples, len(records))))
    if len(chosen) < num_processes:
        raise ValueError(f"{len(chosen)} records to evaluate on are fewer than the {num_processes} processes.")
    captioner = config.captioners[0] if config.captioners else None
    sampling = CaptionSampling(
        num_long_texts=1,
        num_sentences=None,
        captioners=None if captioner is None else (captioner,),
        splitter=config.splitter,
    )
    collator = LoTLIPCollator(processor, sampling, on_error=config.on_error)
    # as many batches on every process, for a wrapper may communicate in each
    part = np.array_split(np.arange(len(chosen)), num_processes)[rank]
    num_batches = min(
        math.ceil(math.ceil(len(chosen) / num_processes) / config.batch_size), len(chosen) // num_processes
    )
    images, texts = [], []
    model.eval()
    for rows in np.array_split(part, num_batches):
        batch, error = {}, None
        try:
            batch = collator([_with_one_caption(chosen[int(row)], captioner) for row in rows])
        except Exception as caught:  # the other processes wait in the forward pass
            error = caught
        if max_over_ranks(torch.tensor(int(error is not None), device=device)).item():
            raise error or OtherProcessError("Another process has stopped; its own message says why.")
        batch = {**send_to_device(batch, device), "return_loss": False}
        with nullcontext() if accelerator is None else accelerator.autocast():
            outputs = model(**batch)
        images.append(outputs.image_embeds.float())
        texts.append(outputs.text_embeds.float())  # [B, 2, dim], the short text first
    image_embeds, text_embeds = gather(torch.cat(images)), gather(torch.cat(texts))
    values = {}
    for number, kind in ((1, "long"), (0, "short")):
        found = recalls(image_embeds, text_embeds[:, number])
        values |= {f"{kind}_{name}": value for name, value in found.items()}
    return values


def _with_one_caption(record: Mapping[str, Any], captioner: int | None) -> Mapping[str, Any]:
    """The record with the first of its long captions, if it has any, unless `captioner` says which to take."""
    captions = record["long_captions"]
    return {**record, "long_captions": captions[:1]} if captioner is None and isinstance(captions, list) else record


@contextmanager
def _signals() -> Iterator[list[int]]:
    """
    The first interrupt or termination is noted, to stop at the end of the step; a later one does what it always did.

    One that follows at once is the same: Ctrl-C reaches the processes from the terminal and from their launcher.
    """
    received: list[int] = []
    before: dict[int, Any] = {}
    first_at = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first_at
        if not received:
            received.append(number)
            first_at = time.monotonic()
            # not by the logger, whose stream may be in the middle of a line
            os.write(2, b"\nStopping after this step; the checkpoint is being written. Once more stops at once.\n")
        elif time.monotonic() - first_at > SAME_SIGNAL_SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # only the main thread receives signals
        pass
    try:
        yield received
    finally:
        restore()


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _plain(value: Any) -> Any:
    """What trackers take."""
    return value if isinstance(value, int | float | str) else str(value)
