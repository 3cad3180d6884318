"""`transformers.Trainer` on LoTLIP's objective, for those who use Trainer."""

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
    [`~transformers.Trainer`] on the objective of `lotlip train`: images are compared with the texts of all processes,
    each epoch draws other texts, and the logit scale stays at or below ln 100. Each held-out record is evaluated by
    its short caption and by its first long caption, whole: `eval_loss`, of batches of `per_device_eval_batch_size` on
    every process, and over all records `eval_short_image_to_text_r1`, `eval_long_text_to_image_r10` and so on. The log
    shows each term's share of the loss: `loss_infonce_short` and so on.

    Args:
        model (`LoTLIPModel`, *optional*): the model, in float32 (`bf16=True` is for the activations).
        args (`TrainingArguments`, *optional*): the options; records keep their columns, whatever they say.
        data_collator (`LoTLIPCollator`, *optional*): draws the texts; by default one for the `processing_class`.
        objective (`Objective`, *optional*): by default the paper's, with the weights of the model's configuration.
            Its own parameters are trained too, and saved as `objective.safetensors` beside the model.
        grad_cache_chunk (`int`, *optional*): computes each batch in the memory of so many samples (gradient caching).
        kwargs: further arguments of [`~transformers.Trainer`], such as `train_dataset` and `eval_dataset`.

    Example:

    ```python
    >>> from lotlip_hf import LoTLIPTrainer
    >>> from lotlip_hf.data.collator import LoTLIPCollator
    >>> from lotlip_hf.scenes.dataset import scenes_dataset

    >>> args = TrainingArguments("finetuned", per_device_train_batch_size=64, learning_rate=1e-5, bf16=True)
    >>> collator = LoTLIPCollator(processor, seed=args.seed)
    >>> LoTLIPTrainer(model, args, data_collator=collator, train_dataset=scenes_dataset(512)).train()
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
        args.remove_unused_columns = False  # the collator takes the records' columns, not the model's
        args.accelerator_config.dispatch_batches = False  # each process pads its own batches
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # the logit scale is used outside of the model's forward
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor`: give `objective=Objective({'infonce': InfoNCE(label_smoothing=...)})`."
            )
        if data_collator is None and kwargs.get("processing_class") is None:
            raise ValueError("`data_collator` must be a LoTLIPCollator, or `processing_class` the processor of one.")
        collator = data_collator or LoTLIPCollator(kwargs["processing_class"], seed=args.seed)
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
        self.model_accepts_loss_kwargs = False  # `labels` of a batch do not count as the loss's items
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
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        freeze_unused(self.model, self.objective.needs, getattr(self.data_collator.draw, "num_long_texts", 1) > 0)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            # `from_pretrained` may then have loaded the weights in the first process alone
            raise ValueError("FSDP: set FSDP_CPU_RAM_EFFICIENT_LOADING=false before the model is loaded.")
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
        return (losses["loss"], embeds) if return_outputs else self._noted(losses)

    def _noted(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss, after its shares are added up for the next log."""
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
        # Trainer divides the loss by it, here `accelerator.backward` does
        self.accelerator.gradient_accumulation_steps = self.current_gradient_accumulation_steps
        losses = cached_backward(model, inputs, self.grad_cache_chunk, self.objective, self.accelerator)
        return self._noted(losses) / self.current_gradient_accumulation_steps

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        with torch.no_grad():
            loss, embeds = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        # the texts are the predictions, the images the labels
        return (loss, None, None) if prediction_loss_only else (loss, embeds["text_embeds"], embeds["image_embeds"])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._with_objective(model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # under FSDP the model holds the objective's parameters too
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
            raise ValueError(f"{path} holds the weights of another `objective`: {', '.join(state) or 'none'}.")
        self.objective.load_state_dict(state)

    def _with_objective(self, model: nn.Module) -> nn.Module:
        """Both as one module, for what Trainer does with all parameters."""
        return nn.ModuleList([model, self.objective])


class _StepCallback(TrainerCallback):
    """Draws other texts in each epoch; after each step of the optimiser, limits the logit scale."""

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
        self.trainer.objective.zero_grad()  # Trainer clears the model's gradients alone


def _retrieval(prediction: EvalPrediction) -> dict[str, float]:
    return short_and_long_recalls(torch.as_tensor(prediction.label_ids), torch.as_tensor(prediction.predictions))
