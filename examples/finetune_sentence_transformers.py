"""Fine-tune a checkpoint with the trainer, the losses and the evaluators of sentence-transformers.

    python examples/finetune_sentence_transformers.py --model checkpoint --data pictures --output_dir tuned \\
        --per_device_train_batch_size 64 --learning_rate 1e-5 --num_train_epochs 1 --bf16

Each image is paired with its short caption and with sub-captions of its long captions. Each batch has one kind of
pair. The loss is that of CLIP, with the logit scale of the checkpoint. Logit scale and corner tokens are not trained,
because sentence-transformers supports one embedding per text. `train.py` and the other examples train all parameters.

`tuned` is both a `SentenceTransformer` and a LoTLIP checkpoint. The example has all options of
`SentenceTransformerTrainingArguments`. `pictures` is a folder of images with `metadata.jsonl`, or any other source of
`lotlip_hf.data.records.load_records` that is not a stream. To try the example without data, pass `--data scenes`.
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
    """The options of this example, in addition to `SentenceTransformerTrainingArguments`."""

    model: str = field(metadata={"help": "checkpoint to fine-tune: a folder or a Hub id"})
    data: str = field(metadata={"help": "training records: a folder, files, a Hub id, or 'scenes'"})
    eval_data: str | None = field(
        default=None, metadata={"help": "records for measuring text-to-image retrieval, before and after"}
    )
    mapping: str = field(
        default="records", metadata={"help": f"names of the columns in the data set, one of {', '.join(MAPPINGS)}"}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "folder that must contain the images; by default the folder of the data"}
    )
    num_scenes: int = field(
        default=5000, metadata={"help": "pictures for '--data scenes'; '--eval_data scenes' draws a tenth of them"}
    )
    num_long_texts: int = field(default=3, metadata={"help": "long texts per image"})
    num_sentences: int = field(default=3, metadata={"help": "sentences per long text; 0: the whole caption"})
    text_pairs: bool = field(default=False, metadata={"help": "also pair each short caption with a long text"})


def read_records(options: Options, source: str, num_scenes: int, split: str) -> Any:
    """Loads the records of `source`. For Scenes, `num_scenes` and `split` select the pictures."""
    if source == "scenes":
        return scenes_dataset(max(num_scenes, 1), split=split)
    return load_records(source, options.mapping, image_root=options.image_root)


def draw_texts(records: Any, sampling: SubCaptions, seed: int) -> Dataset:
    """Draws the texts of the records once, into a table with the columns `image`, `short`, `long_1` to `long_T`."""
    if not isinstance(records, Dataset):
        raise ValueError("Streams and shards are not supported. Pass a folder of images, or Parquet or JSON files.")
    names = [f"long_{number}" for number in range(1, sampling.num_long_texts + 1)]

    def draw(record: dict[str, Any]) -> dict[str, Any]:
        (texts,) = sampling([check_record(record)], [record_rng(seed, 0, record["id"])])
        return {"image": record["image"], "short": texts.short, **dict(zip(names, texts.long, strict=True))}

    features = Features({"image": Image(), **{name: Value("string") for name in ("short", *names)}})
    # `with_format(None)` removes the transform of `load_records`, which has already been applied.
    return records.map(draw, remove_columns=records.column_names, features=features).with_format(None)


def retrieval(table: Dataset) -> SequentialEvaluator:
    """Creates an evaluator that retrieves the images of a table by short and by whole long captions."""
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
    """Fine-tunes a checkpoint and returns the folder of the result."""
    parser = HfArgumentParser(
        [Options, SentenceTransformerTrainingArguments],
        description=(__doc__ or "").split("\n")[0],
    )
    parser.set_defaults(
        output_dir="tuned",
        # Without `use_cpu`, accelerate does not connect processes that run on CPUs.
        use_cpu=not torch.accelerator.is_available(),
        # The two towers run in separate calls, and each call leaves the parameters of the other tower unused.
        ddp_find_unused_parameters=False,
    )
    options, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if options.text_pairs and args.world_size > 1:
        # A batch of text pairs has no gradients of the image tower, and other processes would wait for them.
        raise ValueError("--text_pairs is not supported in several processes. Run one process or remove the option.")
    if options.text_pairs and not options.num_long_texts:
        raise ValueError("--text_pairs needs long texts, but --num_long_texts is 0. Set it to 1 or more.")
    output = Path(args.output_dir)
    if output.is_dir() and any(output.iterdir()) and not args.resume_from_checkpoint:
        raise ValueError(f"--output_dir {output} is not empty. Pass another folder or --resume_from_checkpoint.")
    sampling = SubCaptions(options.num_long_texts, options.num_sentences)
    records = read_records(options, options.data, options.num_scenes, "train")
    table = draw_texts(records, sampling, args.seed)
    # Each kind of text has its own table, so that no image occurs twice in a batch as its own negative.
    pairs = {name: table.select_columns(["image", name]) for name in table.column_names if name != "image"}
    if options.text_pairs:
        pairs["texts"] = table.select_columns(["short", "long_1"])

    # Train the weights in float32: in 16 bits, small updates are lost. `--bf16` affects only the activations.
    model = SentenceTransformer(options.model, model_kwargs={"dtype": torch.float32}, device=str(args.device))
    if not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())  # so that `encode` returns normalised embeddings
    lotlip = model[0].model
    if not isinstance(lotlip, LoTLIPModel):
        raise ValueError(f"--model {options.model} is a {type(lotlip).__name__}. Pass a LoTLIP checkpoint.")
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
        # The `eval_loss`, by which `--load_best_model_at_end` selects a checkpoint, uses whole long captions.
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
        print(f"Saved the model and its processor in {args.output_dir}")
    return output


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
