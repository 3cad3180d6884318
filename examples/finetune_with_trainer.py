"""Fine-tune a checkpoint on your long captions with `transformers.Trainer`.

    python examples/finetune_with_trainer.py --model checkpoint --data pictures --output_dir finetuned \\
        --per_device_train_batch_size 64 --learning_rate 1e-5 --num_train_epochs 3 --bf16

On several GPUs put `accelerate launch` or `torchrun --nproc_per_node 8` in place of `python`: every image is then
compared with the texts of all of them. The options of `TrainingArguments` are there too; `--resume` goes on from the
last checkpoint in `--output_dir`. `pictures` is a folder with images and `metadata.jsonl`, or whatever else
`lotlip_hf.data.records.load_records` reads; `--data scenes` draws pictures, to try it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoProcessor,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import lotlip_hf  # noqa: F401  (registers LoTLIP with the Auto classes)
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.records import MAPPINGS
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.evaluation.retrieval import recalls
from lotlip_hf.terminal import printable_output
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.objective import Objective, batch_loss, clamp_logit_scale, embed
from lotlip_hf.training.terms.infonce import InfoNCE


@dataclass
class Options:
    """Options beside those of `TrainingArguments`."""

    model: str = field(metadata={"help": "checkpoint to start from: a folder or a Hub id"})
    data: str = field(metadata={"help": "records to train on: a folder, files, shards, a Hub id, or 'scenes'"})
    eval_data: str | None = field(
        default=None,
        metadata={"help": "records to measure loss and retrieval on, at the end and as --eval_strategy says"},
    )
    mapping: str = field(default="records", metadata={"help": f"names of the columns: {', '.join(MAPPINGS)}"})
    short_column: str | None = field(
        default=None,
        metadata={"help": "column of the short captions; 'none': the first sentences of the long ones"},
    )
    long_columns: list[str] | None = field(default=None, metadata={"help": "columns of the long captions"})
    image_column: str | None = field(default=None, metadata={"help": "column of the images"})
    split: str | None = field(default=None, metadata={"help": "split of a data set on the Hub, or of a folder"})
    eval_split: str | None = field(default=None, metadata={"help": "that of `eval_data`"})
    image_root: str | None = field(
        default=None, metadata={"help": "folder that images must lie in; by default that of the data"}
    )
    num_scenes: int = field(
        default=5000, metadata={"help": "pictures of '--data scenes'; '--eval_data scenes' draws a tenth"}
    )
    num_long_texts: int = field(default=3, metadata={"help": "long texts per image and step; 0: short captions alone"})
    num_sentences: int = field(
        default=3, metadata={"help": "consecutive sentences that make up a long text; 0: the whole caption"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in --output_dir"})

    def read_records(self) -> tuple[Any, Any]:
        """The records to train on, and those to evaluate on or `None`."""
        names = ("data", "eval_data", "mapping", "short_column", "long_columns", "image_column", "split", "eval_split")
        config = TrainingConfig(
            **{name: getattr(self, name) for name in (*names, "image_root", "num_scenes", "num_long_texts")},
            eval_samples=max(self.num_scenes // 10, 1),
        )
        records, eval_records = load_data(config)
        if eval_records is None:
            return records, None
        # a stream has no length, and its processes would evaluate some records twice
        return records, eval_records if isinstance(eval_records, Dataset) else list(eval_records)


class LoTLIPTrainer(Trainer):
    """
    Trains on LoTLIP's objective over all processes, and evaluates on short captions and whole long ones: the loss, by
    which `--load_best_model_at_end` chooses, and retrieval (`--metric_for_best_model short_image_to_text_r1`).
    """

    def __init__(self, model: nn.Module, collator: LoTLIPCollator, **kwargs: Any) -> None:
        super().__init__(
            model,
            data_collator=collator,
            processing_class=collator.processor,
            compute_metrics=retrieval,
            callbacks=[LoTLIPCallback(collator)],
            **kwargs,
        )
        whole_captions = SubCaptions(num_long_texts=1, num_sentences=None)
        self.eval_collator = LoTLIPCollator(collator.processor, whole_captions)
        self.objective = Objective({"infonce": InfoNCE(model.config.short_loss_weight, model.config.long_loss_weight)})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss = batch_loss(model, inputs, self.objective)["loss"]
        return (loss, None) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        records = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(
            records,
            self.args.eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(loader)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        # The loss compares a batch with itself: `eval_loss` is of `--per_device_eval_batch_size` on every device.
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            embeds = embed(model, inputs, self.objective.needs)
            loss = self.objective(embeds, self.accelerator.unwrap_model(model).logit_scale.exp())["loss"]
        if prediction_loss_only:
            return loss, None, None
        # the texts are the predictions, the images the labels
        return loss, embeds["text_embeds"], embeds["image_embeds"]


class LoTLIPCallback(TrainerCallback):
    """Draws other texts in each epoch, and keeps the logit scale at or below ln 100."""

    def __init__(self, collator: LoTLIPCollator) -> None:
        self.collator = collator
        self.epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch = int(state.epoch or 0)  # above 0 in a resumed run

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.collator.set_epoch(self.epoch)
        self.epoch += 1

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        clamp_logit_scale(kwargs["model"])


def retrieval(prediction: EvalPrediction) -> dict[str, float]:
    """R@1, R@5 and R@10 over all records, in both directions, by short captions and by whole long ones."""
    texts, images = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {
        f"{kind}_{name}": value
        for number, kind in enumerate(("short", "long"))
        for name, value in recalls(images, texts[:, number]).items()  # [N, dim] of images, [N, 2, dim] of texts
    }


@printable_output()
def main(argv: Sequence[str] | None = None) -> Path:
    """Fine-tunes and saves as the command line says; returns the folder of the checkpoint."""
    parser = HfArgumentParser(
        [Options, TrainingArguments],
        description=(__doc__ or "").split("\n")[0],
    )
    parser.set_defaults(
        output_dir="finetuned",
        # the collator takes the records' columns, not the model's
        remove_unused_columns=False,
        # without a GPU, accelerate ignores torchrun's processes unless it is told so
        use_cpu=not torch.accelerator.is_available(),
    )
    options, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    # Each process reads its own batches: each batch is padded to its own length.
    args.accelerator_config.dispatch_batches = False
    set_seed(args.seed)
    records, eval_records = options.read_records()

    # float32, whatever the checkpoint was saved in: small steps are lost in 16 bits. `--bf16` is for the activations.
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=False)
    sampling = SubCaptions(options.num_long_texts, options.num_sentences)
    trainer = LoTLIPTrainer(
        model,
        LoTLIPCollator(processor, sampling, seed=args.seed),
        args=args,
        train_dataset=records,
        eval_dataset=eval_records,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    if eval_records is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"The model and its processor: {args.output_dir}")
    return Path(args.output_dir)


if __name__ == "__main__":
    main()
