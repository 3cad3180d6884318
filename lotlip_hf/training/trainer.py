"""`transformers.Trainer` with the objective of LoTLIP."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from ..data.collator import LoTLIPCollator
from ..data.sampling import WholeCaptions
from .fsdp import keep_class_name, prepare_sharding
from .grad_cache import cached_backward
from .objective import Objective, clamp_logit_scale, embed, similarity_scale
from .optim import freeze_unused, set_training_mode
from .terms.infonce import InfoNCE
from .validation import short_and_long_recalls

OBJECTIVE_NAME = "objective.safetensors"


class LoTLIPTrainer(Trainer):
    """
    A [`~transformers.Trainer`] with the objective of `lotlip train`. Images are compared with the texts of all
    processes, each epoch draws new texts, and the logit scale is limited to ln 100. The log shows the terms of the
    loss, such as `loss_infonce_short`.

    Evaluation uses the short caption and the first long caption of each record. The metrics are `eval_loss` over
    batches of `per_device_eval_batch_size` per process, and recalls over all records, such as
    `eval_short_image_to_text_r1` and `eval_long_text_to_image_r10`.

    Args:
        model (`LoTLIPModel`, *optional*): The model, in float32 (`bf16=True` affects only the activations).
        args (`TrainingArguments`, *optional*): The options. `remove_unused_columns` is always set to `False`.
        data_collator (`LoTLIPCollator`, *optional*): Draws the texts. Defaults to a `LoTLIPCollator` for
            `processing_class`.
        objective (`Objective`, *optional*): The objective. Defaults to the objective of the paper, with the weights in
            the configuration of the model. Parameters of the objective are trained, and saved as
            `objective.safetensors` in the folder of the model.
        grad_cache_chunk (`int`, *optional*): Computes each batch in chunks of this many samples, which saves memory
            (gradient caching).
        **kwargs (`Any`): Further arguments of [`~transformers.Trainer`], such as `train_dataset` and `eval_dataset`.

    Raises:
        `ValueError`: If there is neither `data_collator` nor `processing_class`, or `label_smoothing_factor` is set.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor, TrainingArguments
    >>> from lotlip_hf import LoTLIPTrainer
    >>> from lotlip_hf.scenes.dataset import scenes_dataset

    >>> model = AutoModel.from_pretrained("checkpoint", dtype="float32")
    >>> processor = AutoProcessor.from_pretrained("checkpoint")
    >>> args = TrainingArguments("finetuned", max_steps=2, report_to="none")
    >>> trainer = LoTLIPTrainer(model, args, processing_class=processor, train_dataset=scenes_dataset(16))
    >>> output = trainer.train()
    >>> output.global_step
    2
    ```
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: LoTLIPCollator | None = None,
        *,
        objective: Objective | None = None,
        grad_cache_chunk: int | None = None,
        **kwargs: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args
        args.remove_unused_columns = False  # the collator reads the columns of records, not the model's arguments
        args.accelerator_config.dispatch_batches = False  # each process pads its own batches
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = (
                False  # otherwise DDP ignores the logit scale, which the model's forward does not use
            )
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is not supported. Pass "
                "`objective=Objective({'infonce': InfoNCE(label_smoothing=...)})`."
            )
        if data_collator is None and kwargs.get("processing_class") is None:
            raise ValueError("`data_collator` is missing. Pass a collator, or a processor as `processing_class`.")
        collator = data_collator or LoTLIPCollator(kwargs["processing_class"], seed=args.seed)
        if objective is not None and "text_keys" in objective.needs:
            collator = copy.copy(collator)
            collator.return_text_keys = True
        super().__init__(
            model,
            args,
            collator,
            **{
                "processing_class": collator.processor,
                "compute_metrics": _retrieval,
                **kwargs,
                "callbacks": [*(kwargs.get("callbacks") or ()), _StepCallback(self)],
            },
        )
        self.model_accepts_loss_kwargs = False  # Trainer must not count `labels` of a batch as items of the loss
        config = self.model.config
        self.objective = objective or Objective(
            {"infonce": InfoNCE(config.short_loss_weight, config.long_loss_weight)}
        )
        self.objective.to(self.args.device)
        self.grad_cache_chunk = grad_cache_chunk
        self._weights = set(self.model.state_dict())
        self._restart_log()

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        collator = self.data_collator
        if not is_training:
            captioners = getattr(collator.draw, "captioners", None)
            whole = WholeCaptions(captioners, getattr(collator.draw, "splitter", "sentences"))
            self.data_collator = copy.copy(collator)
            self.data_collator.draw, self.data_collator.patch_dropout = whole, 0.0
            self.data_collator.augment = self.data_collator.word_scores = None
            self.data_collator.image_views = 1
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        freeze_unused(self.model, self.objective.needs, getattr(self.data_collator.draw, "num_long_texts", 1) > 0)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            # `from_pretrained` may have loaded the weights in the first process only.
            raise ValueError(
                "FSDP_CPU_RAM_EFFICIENT_LOADING is not supported. Set it to `false` before loading the model."
            )
        prepare_sharding(self.model, self.objective, self.accelerator)
        return super().create_optimizer(self._with_objective(self.model if model is None else model))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self.objective.train(model.training)
        if model.training:
            set_training_mode(model)
        embeds = embed(model, inputs, self.objective.needs | {"image_embeds", "text_embeds"})
        losses = self.objective(embeds, similarity_scale(model))
        return (losses["loss"], embeds) if return_outputs else self._record(losses)

    def _record(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Adds the losses to the sums of the next log entry and returns the total loss."""
        self._sums = {name: self._sums.get(name, 0) + value.detach() for name, value in losses.items()}
        self._num_batches += 1
        return losses["loss"]

    def _restart_log(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._num_batches = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            means = self.accelerator.reduce(torch.stack([*self._sums.values()]) / self._num_batches, "mean")
            logs = {**dict(zip(self._sums, means.tolist(), strict=True)), **logs}  # Trainer's own `loss`
            self._restart_log()
        super().log(logs, start_time)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.grad_cache_chunk is None:
            return super().training_step(model, inputs, num_items_in_batch)
        set_training_mode(model)
        self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        # Trainer divides the loss by this number; here `accelerator.backward` does.
        self.accelerator.gradient_accumulation_steps = self.current_gradient_accumulation_steps
        losses = cached_backward(model, inputs, self.grad_cache_chunk, self.objective, self.accelerator)
        return self._record(losses) / self.current_gradient_accumulation_steps

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        with torch.no_grad():
            loss, embeds = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        # The texts are the predictions, the images are the labels.
        return (loss, None, None) if prediction_loss_only else (loss, embeds["text_embeds"], embeds["image_embeds"])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._with_objective(model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # under FSDP the objective is a module of the model
            state_dict = {name: weight for name, weight in state_dict.items() if name in self._weights}
        keep_class_name(self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save and (state := self.objective.state_dict()):
            save_file(state, Path(output_dir or self.args.output_dir or "", OBJECTIVE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_objective(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_objective(self.state.best_model_checkpoint or "")

    def _load_objective(self, folder: str) -> None:
        path = Path(folder, OBJECTIVE_NAME)
        state = load_file(path) if path.exists() else {}
        if state.keys() != self.objective.state_dict().keys():
            raise ValueError(
                f"{path} has the parameters {', '.join(state) or 'none'}, not those of `objective`. Pass the "
                "`objective` of the checkpoint."
            )
        self.objective.load_state_dict(state)

    def _with_objective(self, model: nn.Module) -> nn.Module:
        """Joins the model and the objective in one module, for methods of Trainer that accept a single module."""
        return nn.ModuleList([model, self.objective])


class _StepCallback(TrainerCallback):
    """Sets the epoch of the collator and limits the logit scale after each step of the optimiser."""

    def __init__(self, trainer: LoTLIPTrainer) -> None:
        self.trainer, self.epoch = trainer, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)  # above 0 in a resumed run
        self.trainer._restart_log()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.data_collator.set_epoch(self.epoch)
        self.epoch += 1

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clamp_logit_scale(self.trainer.model)
        self.trainer.objective.zero_grad()  # Trainer clears only the gradients of the model


def _retrieval(prediction: EvalPrediction) -> dict[str, float]:
    return short_and_long_recalls(torch.as_tensor(prediction.label_ids), torch.as_tensor(prediction.predictions))
