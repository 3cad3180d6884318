"""Fine-tune a checkpoint with sentence-transformers: its trainer, its losses, its evaluators.

    python examples/finetune_sentence_transformers.py --model checkpoint --data pictures --output_dir tuned \\
        --per_device_train_batch_size 64 --learning_rate 1e-5 --num_train_epochs 1 --bf16

Each image is paired with its short caption and with parts of its long ones, every kind of pair in batches of its own.
The loss of a batch is CLIP's, at the checkpoint's own logit scale. sentence-transformers knows one feature of a text:
corner tokens and logit scale take no part and stay as they are; `train.py` and the other examples train them too.

Leaves `tuned`, which is a `SentenceTransformer` and a LoTLIP checkpoint like any other. All the options of
`SentenceTransformerTrainingArguments` are there. `pictures` is a folder with images and `metadata.jsonl`, or whatever
else `lotlip_hf.data.records.load_records` reads but streams; `--data scenes` draws pictures, to try it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize
from transformers import HfArgumentParser

import lotlip_hf  # noqa: F401  (registers LoTLIP with the Auto classes)
from lotlip_hf import LoTLIPModel
from lotlip_hf.data.record import check_record, record_rng
from lotlip_hf.data.records import MAPPINGS, load_records
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.terminal import printable_output

WHOLE_CAPTIONS = SubCaptions(num_long_texts=1, num_sentences=None)


@dataclass
class Options:
    """Options beside those of `SentenceTransformerTrainingArguments`."""

    model: str = field(metadata={"help": "checkpoint to start from: a folder or a Hub id"})
    data: str = field(metadata={"help": "records to train on: a folder, files, a Hub id, or 'scenes'"})
    eval_data: str | None = field(
        default=None, metadata={"help": "records to measure text-to-image retrieval on, before and after"}
    )
    mapping: str = field(default="records", metadata={"help": f"names of the columns: {', '.join(MAPPINGS)}"})
    image_root: str | None = field(
        default=None, metadata={"help": "folder that images must lie in; by default that of the data"}
    )
    num_scenes: int = field(
        default=5000, metadata={"help": "pictures of '--data scenes'; '--eval_data scenes' draws a tenth"}
    )
    num_long_texts: int = field(default=3, metadata={"help": "long texts per image"})
    num_sentences: int = field(
        default=3, metadata={"help": "consecutive sentences that make up a long text; 0: the whole caption"}
    )
    text_pairs: bool = field(default=False, metadata={"help": "pair each short caption with a long text, too"})


def read_records(options: Options, source: str, num_scenes: int, split: str) -> Any:
    """The records that `--data` or `--eval_data` names; `split` is which of the scenes to draw."""
    if source == "scenes":
        return scenes_dataset(max(num_scenes, 1), split=split)
    return load_records(source, options.mapping, image_root=options.image_root)


def draw_texts(records: Any, sampling: SubCaptions, seed: int) -> Dataset:
    """Records as a table of images and strings, `image`, `short`, `long_1` to `long_T`: the texts are drawn once."""
    if not isinstance(records, Dataset):
        raise ValueError("The records are a stream, as shards are: give a folder of images, or Parquet or JSON files.")
    names = [f"long_{number}" for number in range(1, sampling.num_long_texts + 1)]

    def draw(record: dict[str, Any]) -> dict[str, Any]:
        (texts,) = sampling([check_record(record)], [record_rng(seed, 0, record["id"])])
        return {"image": record["image"], "short": texts.short, **dict(zip(names, texts.long, strict=True))}

    features = Features({"image": Image(), **{name: Value("string") for name in ("short", *names)}})
    # what is in the table now is what `load_records` makes of a row: it must not do so again
    return records.map(draw, remove_columns=records.column_names, features=features).with_format(None)


def retrieval(table: Dataset) -> SequentialEvaluator:
    """Finds each image of a table by its short caption and by its whole long one."""
    images = {str(row): image for row, image in enumerate(table["image"])}
    evaluators = []
    for name in ("short", "long"):
        texts = {str(row): text for row, text in enumerate(table["short" if name == "short" else "long_1"])}
        evaluators.append(
            InformationRetrievalEvaluator(
                texts,
                cast(Any, images),
                {row: {row} for row in images},
                accuracy_at_k=[1, 5, 10],
                name=name,
                write_csv=False,
            )
        )
    return SequentialEvaluator(evaluators)


@printable_output()
def main(argv: Sequence[str] | None = None) -> Path:
    """Fine-tunes and saves as the command line says; returns the folder of the checkpoint."""
    parser = HfArgumentParser(
        [Options, SentenceTransformerTrainingArguments],
        description=(__doc__ or "").split("\n")[0],
    )
    parser.set_defaults(
        output_dir="tuned",
        # without a GPU, accelerate ignores torchrun's processes unless it is told so
        use_cpu=not torch.accelerator.is_available(),
        # each tower runs by itself: to the other's call its parameters would look unused
        ddp_find_unused_parameters=False,
    )
    options, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if options.text_pairs and args.world_size > 1:
        raise ValueError(
            "--text_pairs trains in one process alone: from batches of two texts the image tower gets no gradients, "
            "and the other processes would wait for them."
        )
    if options.text_pairs and not options.num_long_texts:
        raise ValueError("--text_pairs pairs short captions with long texts: --num_long_texts must be 1 or more.")
    output = Path(args.output_dir)
    if output.is_dir() and any(output.iterdir()) and not args.resume_from_checkpoint:
        raise ValueError(f"--output_dir {output}: not empty; choose another, or give --resume_from_checkpoint.")
    sampling = SubCaptions(options.num_long_texts, options.num_sentences)
    records = read_records(options, options.data, options.num_scenes, "train")
    table = draw_texts(records, sampling, args.seed)
    # One table a kind of text: in a batch no image comes twice, which would make it its own negative.
    pairs = {name: table.select_columns(["image", name]) for name in table.column_names if name != "image"}
    if options.text_pairs:
        pairs["texts"] = table.select_columns(["short", "long_1"])

    # float32, whatever the checkpoint was saved in: small steps are lost in 16 bits. `--bf16` is for the activations.
    model = SentenceTransformer(options.model, model_kwargs={"dtype": torch.float32}, device=str(args.device))
    if not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())  # so that `encode` gives embeddings of length 1
    lotlip = model[0].model
    if not isinstance(lotlip, LoTLIPModel):
        raise ValueError(f"--model {options.model}: a {type(lotlip).__name__}, not a LoTLIPModel.")
    for parameter in (lotlip.logit_scale, lotlip.text_model.corner_embeds):
        if parameter is not None:
            parameter.requires_grad_(False)
    loss = MultipleNegativesRankingLoss(
        model,
        scale=float(lotlip.logit_scale.exp()),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        gather_across_devices=args.world_size > 1,
    )
    evaluator = eval_pairs = None
    if options.eval_data is not None:
        records = read_records(options, options.eval_data, options.num_scenes // 10, "validation")
        held_out = draw_texts(records, WHOLE_CAPTIONS, args.seed)
        evaluator = retrieval(held_out)
        # `eval_loss`, which `--load_best_model_at_end` chooses by, is that of whole long captions
        eval_pairs = held_out.select_columns(["image", "long_1"])
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=DatasetDict(pairs), eval_dataset=eval_pairs, loss=loss, evaluator=evaluator
    )
    before = evaluator(model) if evaluator else {}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        after = evaluator(model) if evaluator else {}
        for name in (name for name in after if "accuracy" in name):
            print(f"{name}: {before[name]:.3f} before, {after[name]:.3f} after")
        print(f"The model and its processor: {args.output_dir}")
    return output


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
