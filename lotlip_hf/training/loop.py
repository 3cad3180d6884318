"""The training loop, on accelerate: one or several processes, checkpoints, a log and evaluation during training."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, extract_model_from_parallel, send_to_device, set_seed
from datasets import Dataset, IterableDataset
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.utils import logging

from ..data.collator import Batch, LoTLIPCollator
from ..data.kept import KeptIds
from ..data.masking import Masking, WordScores
from ..distributed import any_rank, gather_lists, max_over_ranks, raise_on_all_ranks
from ..files import write_json
from ..images import set_max_image_pixels
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..terminal import progress_bar
from .batches import StreamState, iterate_batches, num_steps
from .checkpoint import CheckpointError, Stateful, check_room, load_checkpoint, prepare_folder, save_checkpoint
from .config import TrainingConfig
from .data_checks import warn_of_data
from .frozen import KeyedRecords, add_states, fill_images, frozen_states
from .fsdp import OBJECTIVE, keep_class_name, prepare_sharding
from .grad_cache import cached_backward
from .log import is_loss
from .model import prepare_model
from .objective import batch_loss, clamp_logit_scale, make_objective
from .optim import freeze, make_optimizer, set_training_mode
from .ridge import check_projections, start_projections
from .signals import Interrupted, noted_signals
from .teachers import add_teacher, make_teacher
from .tracking import Best, Meter, Tracking
from .validation import validate

logger = logging.get_logger(__name__)

MAX_IDS = 10  # maximum number of record ids in an error message; a file lists all


class NonFiniteLossError(RuntimeError):
    """The loss, the norm of its gradient or a weight is not finite. Earlier checkpoints are intact."""


def train(
    model: LoTLIPModel,
    processor: LoTLIPProcessor,
    records: Dataset | IterableDataset,
    config: TrainingConfig,
    eval_records: Dataset | IterableDataset | None = None,
    *,
    check_data: bool = True,
) -> Path:
    """
    Trains a model with the objective of LoTLIP (section 3.3 of the paper) and writes the folder of the run,
    `config.output`:

    - `checkpoint-N`: the model after N steps, for `AutoModel` and `AutoProcessor` (with `ema_decay` the averaged
      weights), and its training state in the folder `state`;
    - `training_config.yaml`: the options;
    - `log.jsonl` and `curve.png`: losses, learning rate, samples per second, and R@1 if it was measured.

    Under `accelerate launch` or `torchrun` the same call trains in several processes. An interrupt (Ctrl-C, SIGTERM)
    writes a checkpoint and raises [`Interrupted`]. With `config.resume` the run continues from the last checkpoint,
    also within an epoch, and computes the same results as a run without interruption.

    With `config.patience` the run stops when its evaluations no longer rise, and the best checkpoint is kept. The
    start is evaluated first (`checkpoint-0`), and is the best if no later evaluation is higher.

    Args:
        model (`LoTLIPModel`): The model. The weights are trained in place.
        processor (`LoTLIPProcessor`): The processor of the model.
        records (`Dataset` or `IterableDataset`): Training records (`lotlip_hf.data.records.load_records`).
        config (`TrainingConfig`): Options of the run, without `stages`, which
            [`~lotlip_hf.training.stages.train_config`] runs.
        eval_records (`Dataset` or `IterableDataset`, *optional*): Records for measuring retrieval, at the end and
            every `eval_steps`.
        check_data (`bool`, *optional*, defaults to `True`): Whether to check a sample of the records for problems
            ([`~lotlip_hf.training.data_checks.warn_of_data`]).

    Returns:
        `Path`: The folder of the last checkpoint, with `patience` that of the best one.

    Raises:
        `FileExistsError`: If `config.output` contains checkpoints of another run.
        `NonFiniteLossError`: If the loss is not finite. The message names the step, the records and the last
            checkpoint.
        `CheckpointError`: If a checkpoint cannot be read, the last checkpoint cannot be written, or if the disk has no
            room for a checkpoint when the run starts.
        `ValueError`: If options contradict the model or the data.
        `ImageError`, `RecordError`: If a record is broken and `on_error` is `"raise"`. A checkpoint is saved first.
            Other processes raise [`OtherProcessError`].
        `Interrupted`: After SIGINT or SIGTERM, a `KeyboardInterrupt` with the number of the signal.

    Example:

    ```python
    >>> from lotlip_hf.training.config import TrainingConfig
    >>> from lotlip_hf.training.data import load_data
    >>> from lotlip_hf.training.loop import train
    >>> from lotlip_hf.training.model import load_or_start_model

    >>> config = TrainingConfig(model="scenes", data="scenes", max_steps=1000, learning_rate=1e-3, output="run")
    >>> checkpoint = train(*load_or_start_model(config), load_data(config)[0], config)
    ```
    """
    if config.stages:
        raise ValueError("`stages` are several runs. Call `lotlip_hf.training.stages.train_config`.")
    if config.max_image_pixels is not None:
        set_max_image_pixels(config.max_image_pixels)
    return _Run(model, processor, records, config, eval_records, _accelerator(config), check_data).run()


def _accelerator(config: TrainingConfig) -> Accelerator:
    accelerator = Accelerator(
        # Without `cpu=True`, accelerate does not connect processes that run on CPUs.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.trackers or None,
        project_dir=config.output,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would compute in float32 without a warning.
        raise ValueError("`mixed_precision` fp16 needs a GPU. Pass bf16 or no on a CPU.")
    missing = [name for name in config.trackers if name not in [*map(str, accelerator.log_with), "all"]]
    if missing:
        raise ValueError(
            f"Tracker {', '.join(map(repr, missing))} is not installed. Install it or pass `--trackers none`."
        )
    if config.ema_decay is not None and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("`ema_decay` needs unsharded weights, but FSDP shards them. Unset `ema_decay`.")
    if config.teacher in ("self", "ema") and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"`teacher` {config.teacher} needs unsharded weights, but FSDP shards them. Choose another.")
    if config.text_dtype != "float32" and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "`text_dtype` is not supported by FSDP, which shards weights of one type. Unset `text_dtype`."
        )
    return accelerator


class _Run:
    """The state of a run: `step`, `epoch`, `next_batch` (a number within the epoch), and the prepared objects."""

    def __init__(
        self,
        model: LoTLIPModel,
        processor: LoTLIPProcessor,
        records: Dataset | IterableDataset,
        config: TrainingConfig,
        eval_records: Dataset | IterableDataset | None,
        accelerator: Accelerator,
        check_data: bool,
    ) -> None:
        self.config, self.accelerator, self.processor = config, accelerator, processor
        self.records: Dataset | IterableDataset | KeyedRecords = records
        self.eval_records: Dataset | IterableDataset | KeyedRecords | None = eval_records
        self.output = Path(config.output)
        self.max_steps = num_steps(records, config, accelerator.num_processes)
        self.epoch, self.next_batch, self.step = 0, 0, 0
        self.stream: StreamState = {}
        self.kept = None if config.keep is None else KeptIds(config.keep).digest
        self.ids: list[str] = []  # ids of the records in the last step
        self.counts: Counter[str] = Counter()
        self.meter = Meter()
        self.best = Best()
        self.checkpoint = prepare_folder(config, accelerator)

        set_seed(config.seed, device_specific=True)
        self.objective = make_objective(config, model.config).to(accelerator.device)
        word_scores = None if config.word_scores is None else WordScores(config.word_scores)
        if word_scores is not None or "masked_labels" in self.objective.needs:
            Masking(processor.tokenizer)  # an error now, not after the states of frozen towers are computed
        freeze(model, config, self.objective.needs)
        self.teacher = make_teacher(config, model, self.objective.needs, accelerator)
        starts = config.head_start == "ridge" and self.checkpoint is None
        if starts:
            check_projections(model)
        self.frozen = frozen_states(model, processor, records, config, accelerator, self.objective.needs)
        if "image" in self.frozen:
            fill = partial(fill_images, states=self.frozen["image"], config=config, device=accelerator.device)
            self.records = fill(cast(Dataset, records))
            if isinstance(eval_records, Dataset):
                self.eval_records = fill(eval_records, num_records=config.eval_samples)
        if starts:
            start_projections(model, cast(KeyedRecords, self.records), self.frozen, config, accelerator.device)
        prepare_model(model, config)
        self.states: dict[str, Stateful] = {"objective": self.objective}
        if self.teacher is not None:
            self.records = self.teacher.start(model, self.records)
            if self.teacher.averaged is not None:
                self.states["teacher"] = self.teacher.averaged
        self.averaged = None
        if config.ema_decay is not None:
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.averaged = self.states["averaged"] = AveragedModel(model, accelerator.device, multi_avg_fn=average)
        optimizer, self.scheduler = make_optimizer(model, self.objective, config, self.max_steps, accelerator.device)
        self.states["scheduler"] = self.scheduler  # not passed to `prepare`: accelerate would step it once per process
        prepare_sharding(model, self.objective, accelerator)
        prepared = accelerator.prepare(model, optimizer)
        self.model, self.optimizer = cast(tuple[nn.Module, AcceleratedOptimizer], prepared)
        self.collator = LoTLIPCollator(
            processor,
            config.draw(),
            seed=config.seed,
            on_error=config.on_error,
            return_ids=True,
            patch_dropout=config.patch_dropout if config.patch_choice == "random" else 0.0,
            patch_size=getattr(model.config.vision_config, "patch_size", None),
            augment=config.augmentation(),
            image_views=config.image_views,
            view_for_teacher=config.teacher in ("self", "ema"),
            frozen=self.frozen,
            return_texts=self.teacher is not None and self.teacher.reads_texts,
            read_for_teacher=None if self.teacher is None else self.teacher.read,
            return_text_keys="text_keys" in self.objective.needs,
            num_negatives=config.num_negatives if "negative_embeds" in self.objective.needs else 0,
            num_regions=config.num_regions if "region_embeds" in self.objective.needs else 0,
            return_tags="tags" in self.objective.needs,
            return_groups="groups" in self.objective.needs,
            mask_words="masked_labels" in self.objective.needs,
            word_scores=word_scores,
        )
        if self.checkpoint is not None:
            self._load(self.checkpoint)
        else:
            is_counted = isinstance(eval_records, Dataset)
            num_held_out = min(config.eval_samples, len(eval_records)) if is_counted else None
            terms = dict(self.objective.terms) if check_data else None
            options = {"terms": terms, "word_scores": word_scores}
            warn_of_data(model, processor, records, config, self.max_steps, num_held_out, **options)

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        num_copies = sum(isinstance(state, AveragedModel) for state in self.states.values())
        check_room(self.output, extract_model_from_parallel(self.model), num_copies)
        # -1 removes every line of the log: a run without a checkpoint evaluates its start again.
        tracking = self.tracking = Tracking(config, accelerator, self.step if self.checkpoint is not None else -1)
        evaluations = gather_lists(tracking.evaluations())
        if config.patience is not None:
            for line in evaluations:
                self.best.add(line["step"], line)
            if self.best.step is not None and not (best := self._folder(self.best.step)).is_dir():
                raise CheckpointError(
                    f"{best}, the best checkpoint of the run, is missing. Remove {self.output} to train it again."
                )
        batches = iterate_batches(
            self.records,
            self.collator,
            config,
            self.epoch,
            self.next_batch,
            accelerator.process_index,
            accelerator.num_processes,
            self.stream,
        )
        set_training_mode(self.model)
        signum = 0
        try:
            with (
                closing(batches),
                noted_signals() as received,
                progress_bar(
                    total=self.max_steps,
                    initial=self.step,
                    desc="Training",
                    unit="step",
                    shown=accelerator.is_main_process,
                ) as bar,
            ):
                if all(line["step"] != self.step for line in evaluations):
                    self._evaluate_if_due()  # a resumed run may have been stopped during this evaluation
                self.meter.restart()
                while self.step < self.max_steps and not signum and not self._is_out_of_patience():
                    self._take_step(self._next_batches(batches))
                    bar.update()
                    is_last = self.step == self.max_steps
                    if self.step % config.log_steps == 0 or is_last:
                        values = self._log_values()
                        bar.set_postfix(loss=f"{values['loss']:.3f}", samples=f"{values['samples_per_second']:.1f}/s")
                        tracking.write(self.step, self.epoch, values)
                        self.meter = Meter()
                    # A signal to one process stops all processes.
                    signum = int(max_over_ranks(torch.tensor(max(received, default=0), device=accelerator.device)))
                    if signum or is_last or (config.save_steps and self.step % config.save_steps == 0):
                        self._save(required=bool(signum) or is_last)
                        self.meter.restart()
                    if is_last or not signum:
                        self._evaluate_if_due()
        finally:
            tracking.close()
        if self._is_out_of_patience():
            accelerator.print(
                f"Stopped at step {self.step}: {self.best.since} evaluations were not above that of step "
                f"{self.best.step}."
            )
        # A signal during the last evaluation stops too: another stage may follow.
        if signum := int(max_over_ranks(torch.tensor(max(received, default=0), device=accelerator.device))):
            logger.warning(f"Stopped after step {self.step}, saved in {self.checkpoint}. Continue with `--resume`.")
            raise Interrupted(signum, f"Stopped after step {self.step}, saved in {self.checkpoint}.")
        assert self.checkpoint is not None
        return self.checkpoint if self.best.step is None else self._folder(self.best.step)

    def _folder(self, step: int) -> Path:
        return self.output / f"checkpoint-{step}"

    def _is_out_of_patience(self) -> bool:
        return self.config.patience is not None and self.best.since >= self.config.patience

    def _next_batches(self, batches: Iterator[tuple[int, int, Batch, StreamState]]) -> list[Batch]:
        """
        Reads all batches of a step before the first is used. If a batch fails on any process, the state is still that
        of the last step and can be saved.
        """
        taken, error = [], None
        epoch, next_batch, stream = self.epoch, self.next_batch, self.stream
        try:
            for _ in range(self.config.gradient_accumulation_steps):
                epoch, next_batch, batch, stream = next(batches)
                taken.append(add_teacher(add_states(batch, self.frozen), self.teacher))
        except Exception as caught:  # a data set may raise an exception of any class
            error = caught
        try:
            raise_on_all_ranks(error, self.accelerator.device)
        except Exception:
            self._save_before_stop()
            raise
        self.epoch, self.next_batch, self.stream = epoch, next_batch, stream
        return taken

    def _take_step(self, batches: list[Batch]) -> None:
        config, accelerator = self.config, self.accelerator
        self.ids = []
        for batch in batches:
            ids = batch["ids"]
            self.ids += ids
            self.counts.update(batch["counts"])
            batch = cast(dict[str, Any], send_to_device(batch, accelerator.device, non_blocking=True))
            if config.state_dropout:  # once, because gradient caching embeds a batch twice
                batch["image_states"] = nn.functional.dropout(batch["image_states"], config.state_dropout)
            with accelerator.accumulate(self.model):
                if config.grad_cache_chunk is not None:
                    losses = cached_backward(
                        self.model, batch, config.grad_cache_chunk, self.objective, accelerator=accelerator
                    )
                else:
                    with accelerator.autocast():
                        losses = batch_loss(self.model, batch, self.objective)
                    accelerator.backward(losses["loss"])
            means = accelerator.reduce(torch.stack([*losses.values()]).detach(), "mean")
            values = dict(zip(losses, cast(torch.Tensor, means).tolist(), strict=True))
            if not math.isfinite(values["loss"]):
                self._stop_at_nan(self.step + 1, f"the loss is {values['loss']}, the weights were not changed")
            self.meter.add(values, len(ids) * accelerator.num_processes)
        # Under FSDP the parameters of the objective are in both lists.
        trained = list(dict.fromkeys([*self.model.parameters(), *self.objective.parameters()]))
        norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
        # A gradient scaler itself skips this step and reduces the scale.
        if accelerator.scaler is None and norm is not None and not torch.isfinite(norm):
            self._stop_at_nan(self.step + 1, f"the gradient norm is {float(norm)}, the weights were not changed")
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        clamp_logit_scale(self.model)
        self.step += 1
        if self.averaged is not None:
            self.averaged.update_parameters(extract_model_from_parallel(self.model))
        if self.teacher is not None:
            self.teacher.update(cast(LoTLIPModel, extract_model_from_parallel(self.model)), self.objective)

    def _stop_at_nan(self, step: int, reason: str) -> None:
        """Raises `NonFiniteLossError`, on all processes together, because they have the same loss and norm."""
        ids = gather_lists(self.ids)
        path = self.output / f"not-finite-{step}.json"
        if self.accelerator.is_main_process:
            with suppress(OSError):
                write_json(path, {"step": step, "reason": reason, "ids": ids})
        last = f"The last checkpoint is {self.checkpoint}" if self.checkpoint else "There is no checkpoint yet"
        raise NonFiniteLossError(
            f"Step {step}: {reason}. {last}. {path.name} lists the {len(ids)} records of the step: "
            f"{', '.join(ids[:MAX_IDS])}{', ...' if len(ids) > MAX_IDS else ''}. Try a smaller `learning_rate`, "
            "`mixed_precision` bf16 instead of fp16, or remove broken records."
        )

    def _log_values(self) -> dict[str, Any]:
        values = {
            **self.meter.values(),
            "logit_scale": extract_model_from_parallel(self.model).logit_scale.exp().item(),
            "learning_rate": max(self.scheduler.get_last_lr()),
        }
        if self.config.on_error == "skip":
            total: Counter[str] = Counter()
            for counts in gather_lists([dict(self.counts)]):
                total.update(counts)
            values |= total
        return values

    def _evaluate_if_due(self) -> None:
        steps = self.config.eval_steps
        is_due = self.step == self.max_steps or (steps is not None and self.step % steps == 0)
        if self.step == 0:
            is_due = self.config.patience is not None
        if self.eval_records is None or not is_due:
            return
        model = self.model if self.averaged is None else self.averaged
        try:
            values = validate(model, self.processor, self.eval_records, self.config, self.accelerator, self.frozen)
        except Exception:  # on all processes
            self._save_before_stop()
            raise
        set_training_mode(self.model)
        self.tracking.write(self.step, self.epoch, values)
        # The last step of a run is saved too, so that a resumed run has nothing left to do.
        if self.config.patience is not None and (
            self.best.add(self.step, gather_lists([values])[0]) or self._is_out_of_patience()
        ):
            self._save(required=True)
        self.meter.restart()

    def _save(self, required: bool) -> None:
        """Writes a checkpoint. If writing fails, the run stops only if the checkpoint is `required`."""
        tensors = (*self.model.parameters(), *self.objective.parameters())
        if any_rank(not all(bool(tensor.isfinite().all()) for tensor in tensors), self.accelerator.device):
            self._stop_at_nan(self.step, "the weights are not finite and were not saved")
        progress = {
            "step": self.step,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "stream": self.stream,
            "counts": dict(self.counts),
            "window": asdict(self.meter),
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
                self.best.step,
            )
        except CheckpointError as error:
            if required:
                raise
            logger.error(f"{error} The run continues and tries again after {self.config.save_steps} steps.")
        self._clear_first_state()

    def _clear_first_state(self) -> None:
        """Clears the optimiser before the first step: to save or load it under FSDP, torch makes a step of zeros."""
        if self.step == 0:
            self.optimizer.state.clear()

    def _save_before_stop(self) -> None:
        """Saves the state after the last step, because the run cannot continue."""
        if not self.step:
            return
        try:
            self._save(required=True)
            logger.warning(f"Saved step {self.step} in {self.checkpoint}. Continue with `--resume`.")
        except (CheckpointError, NonFiniteLossError) as error:
            logger.error(str(error))

    def _data(self) -> dict[str, Any]:
        """Returns the values that determine the order of the records together with the options."""
        if isinstance(self.records, IterableDataset):
            return {"keep": self.kept, "num_workers": self.config.num_workers}  # the workers divide the shards
        return {"keep": self.kept, "num_records": len(self.records)}

    def _save_model(self, folder: Path) -> None:
        model = extract_model_from_parallel(self.model)
        if self.averaged is not None:
            model, weights = self.averaged.module, None
        else:
            weights = self.accelerator.get_state_dict(self.model)
            # `prepare_sharding` puts the objective into the model.
            weights = {name: weight for name, weight in weights.items() if not name.startswith(f"{OBJECTIVE}.")}
        if self.accelerator.is_main_process:
            keep_class_name(model)
            cast(LoTLIPModel, model).save_pretrained(folder, state_dict=weights)
            self.processor.save_pretrained(folder)
            self.config.save(folder)

    def _load(self, checkpoint: Path) -> None:
        progress = load_checkpoint(checkpoint, self.accelerator, self.states)
        if not _is_progress(progress):
            raise CheckpointError(
                f"{checkpoint} cannot be read (its progress is damaged). Remove it to resume from the previous "
                "checkpoint."
            )
        self.step, self.epoch, self.next_batch = progress["step"], progress["epoch"], progress["next_batch"]
        self.stream = progress.get("stream", {})
        if isinstance(self.records, IterableDataset) and self.next_batch and not self.stream:
            raise CheckpointError(
                f"{checkpoint} has no state of the stream, because an older version of lotlip-hf wrote it. Start a "
                f"new run from its weights with `--model {checkpoint}`."
            )
        self.counts.update(progress["counts"])
        self.meter = Meter(**progress["window"])
        self._clear_first_state()
        for name, number in self._data().items():
            first = progress["data"].get(name)
            if first != number:
                how = "has other ids than" if name == "keep" else f"is {number}, but was {first}"
                raise ValueError(
                    f"`{name}` {how} in {checkpoint}, which would change the batches. "
                    "Resume with the same records and, for a stream, the same `num_workers`."
                )
        self.accelerator.print(f"Resuming from {checkpoint}.")


def _is_progress(progress: Any) -> bool:
    """Returns whether `progress` has the form that `_Run._save` writes. The file may come from an untrusted source."""
    match progress:
        case {
            "step": int(),
            "epoch": int(),
            "next_batch": int(),
            "counts": dict(counts),
            "window": {
                "sums": dict(sums),
                "batches": int(batches),
                "samples": int(samples),
                "seconds": int() | float(),
                **others,
            },
            "data": dict(),
        }:
            numbers = [progress["step"], progress["epoch"], progress["next_batch"], batches, samples, *counts.values()]
            return (
                not others
                and _is_stream(progress.get("stream", {}))
                and all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers)
                and all(is_loss(name) and isinstance(total, int | float) for name, total in sums.items())
            )
    return False


def _is_stream(stream: Any) -> bool:
    """Returns whether `stream` has the form of a [`StreamState`]."""
    match stream:
        case {"last": int(last), "workers": dict(workers), **others}:
            return not others and last >= 0 and all(map(_is_worker, workers.values()))
    return stream == {}


def _is_worker(state: Any) -> bool:
    match state:
        case {"start": dict() | None, "block": int(block), "index": int(index), **others}:
            return not others and block >= 0 and index >= 0
    return False
