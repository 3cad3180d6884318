"""Fine-tune a checkpoint on your own long captions with `LoTLIPTrainer`, a `transformers.Trainer`.

    python examples/finetune_with_trainer.py --model checkpoint --data pictures --output_dir finetuned \\
        --per_device_train_batch_size 64 --learning_rate 1e-5 --num_train_epochs 3 --bf16

`pictures` is a folder of images with `metadata.jsonl`, or any other source of `lotlip_hf.data.records.load_records`.
To try the example on drawn pictures, pass `--data scenes`. On several GPUs, replace `python` by `accelerate launch` or
`torchrun --nproc_per_node 8`. Every image is then compared with the texts of all GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor, HfArgumentParser, TrainingArguments, set_seed

from lotlip_hf import LoTLIPTrainer
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.terminal import printable_output
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data


@dataclass
class Options:
    """The options of this example, in addition to `TrainingArguments`."""

    model: str = field(metadata={"help": "checkpoint to fine-tune: a folder or a Hub id"})
    data: str = field(metadata={"help": "training records: a folder, files, shards, a Hub id, or 'scenes'"})
    eval_data: str | None = field(default=None, metadata={"help": "records for measuring loss and retrieval"})
    num_long_texts: int = field(default=3, metadata={"help": "long texts per image and step; 0: short captions only"})
    num_sentences: int = field(default=3, metadata={"help": "sentences per long text; 0: the whole caption"})
    grad_cache_chunk: int | None = field(
        default=None, metadata={"help": "embed a batch in chunks of this many samples, to save memory"}
    )
    resume: bool = field(default=False, metadata={"help": "continue from the last checkpoint in --output_dir"})


@printable_output()
def main(argv: Sequence[str] | None = None) -> Path:
    """Fine-tunes a checkpoint and returns the folder of the result."""
    parser = HfArgumentParser([Options, TrainingArguments], description=(__doc__ or "").split("\n")[0])
    # Without `use_cpu`, accelerate does not connect processes that run on CPUs.
    parser.set_defaults(output_dir="finetuned", use_cpu=not torch.accelerator.is_available())
    options, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    set_seed(args.seed)

    # `TrainingConfig` also has options for columns and splits.
    records, eval_records = load_data(TrainingConfig(data=options.data, eval_data=options.eval_data))
    if eval_records is not None and not isinstance(eval_records, Dataset):
        eval_records = list(eval_records)  # several processes would evaluate some records of a stream twice

    # Train the weights in float32: in 16 bits, small updates are lost. `--bf16` affects only the activations.
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=False)
    sampling = SubCaptions(options.num_long_texts, options.num_sentences)
    trainer = LoTLIPTrainer(
        model,
        args,
        data_collator=LoTLIPCollator(processor, sampling, seed=args.seed),
        train_dataset=records,
        eval_dataset=eval_records,
        grad_cache_chunk=options.grad_cache_chunk,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    if eval_records is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"Saved the model and its processor in {args.output_dir}")
    return Path(args.output_dir)


if __name__ == "__main__":
    main()
