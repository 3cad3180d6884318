"""Every option of a training run in one typed config, filled by flags, a YAML file, or both."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from .. import options
from ..data.records import MAPPINGS, ColumnMapping
from ..data.sampling import CaptionSampling
from ..files import MAX_BYTES, replacing
from ..options import option

CONFIG_NAME = "training_config.yaml"
SCENES = "scenes"
# What may differ from the first run's options when a run is resumed: none changes what is computed.
RESUMABLE = frozenset(
    "output resume on_error image_root max_image_pixels max_record_bytes num_workers log_steps save_steps "
    "save_total_limit trackers gradient_checkpointing compile".split()
)


@dataclass
class TrainingConfig:
    """
    Every option of a training run, `lotlip train --help` in Python.

    Raises:
        ValueError: if an option is missing, out of range, or contradicts another; the message names it.

    Example:

    ```python
    >>> from lotlip_hf.training.config import TrainingConfig

    >>> TrainingConfig(model="scenes", data="scenes", max_steps=1000).batch_size
    64
    ```
    """

    # The run
    output: str = option(default="run", help="folder of the run: checkpoints, options, log, curve")
    resume: bool = option(
        default=False, help="go on from the last checkpoint in `output`, with the options kept there"
    )
    seed: int = option(
        default=0, at_least=0, help="seed of new weights, of the order of the records, and of the texts drawn"
    )

    # The model
    model: str | None = option(
        default=None, help=f"checkpoint folder or Hub id to train further, or {SCENES!r}: a new small model for Scenes"
    )
    text_model: str | None = option(default=None, help="pretrained text encoder of a new model (with `image_model`)")
    image_model: str | None = option(default=None, help="pretrained image encoder of a new model (with `text_model`)")
    num_corner_tokens: int | None = option(default=None, at_least=0, help="corner tokens of a new model (2)")
    projection_dim: int | None = option(
        default=None, at_least=1, help="width of the shared space of a new model (the image encoder's)"
    )
    text_pooling: Literal["pooler", "cls", "mean"] | None = option(
        default=None, help="how a new model pools its text (pooler; CLIP's text encoder has its own way)"
    )
    cleaning: Literal["official", "sentences"] | None = option(
        default=None,
        help="where a new model's tokenizer ends sentences (official): 'official', at each full stop with a space; "
        "'sentences', as `splitter` does, not at abbreviations",
    )
    max_text_length: int | None = option(
        default=None,
        at_least=1,
        help="tokens of a text, [CLS] and [SEP] included, that it is cut at (126 for a new model of two encoders)",
    )
    lock_vision: bool = option(default=False, help="keep the image tower as it is, as LiT does")
    unlocked_vision_layers: int = option(
        default=0,
        at_least=0,
        help="with `lock_vision`: train this many of the image tower's last layers, and what follows them",
    )

    # The data
    data: str | None = option(
        default=None, help=f"a folder or file of records, shards/*.tar, a data set on the Hub, or {SCENES!r}"
    )
    mapping: str = option(default="records", help=f"names of the columns: {', '.join(MAPPINGS)}")
    image_column: str | None = option(default=None, help="column of the images, in place of the mapping's")
    short_column: str | None = option(
        default=None,
        help="column of the short captions, in place of the mapping's; 'none': the first sentences of the long ones",
    )
    long_columns: list[str] | None = option(
        default=None, help="columns of the long captions, in place of the mapping's"
    )
    id_column: str | None = option(default=None, help="column of the ids, in place of the mapping's")
    image_folder: str | None = option(
        default=None, help="what relative paths of images start from (the folder of the file that names them)"
    )
    image_root: str | None = option(default=None, help="folder that images must lie in (the image folder)")
    max_record_bytes: int = option(
        default=MAX_BYTES, at_least=1, help="largest line of a table or sample of a shard that is read"
    )
    split: str | None = option(
        default=None, help="split of a data set on the Hub (train), or of a folder that holds several; 'all': all"
    )
    streaming: bool = option(default=False, help="read in order, without a copy on disk; needs `max_steps`")
    shuffle_buffer: int = option(default=10_000, at_least=1, help="records that a stream is shuffled within")
    num_scenes: int = option(default=5000, at_least=1, help=f"how many pictures `--data {SCENES}` draws")
    on_error: Literal["raise", "skip"] = option(
        default="raise", help="whether a broken image or record stops the run or is counted and left out"
    )
    max_image_pixels: int | None = option(
        default=None, at_least=1, help="images of more pixels are broken; each takes up to 12 bytes (178956970)"
    )
    num_workers: int = option(default=2, at_least=0, help="processes that read and prepare batches ahead; 0: none")

    # The texts of a step
    num_long_texts: int = option(
        default=3, at_least=0, help="long texts of an image in a step; 0: short captions alone"
    )
    num_sentences: int = option(
        default=3, at_least=0, help="consecutive sentences of a long text; 0: the whole caption"
    )
    captioners: list[int] | None = option(default=None, help="which long captions of a record to draw from, from 0")
    sentence_order: Literal["written", "shuffled"] = option(default="written", help="order of the drawn sentences")
    splitter: Literal["sentences", "full_stops"] = option(
        default="sentences", help="how captions are split; 'full_stops' as the official code does"
    )

    # The objective
    loss: Literal["infonce", "sigmoid"] = option(default="infonce", help="the paper's, or SigLIP's")
    short_loss_weight: float | None = option(
        default=None, at_least=0, help="weight of the short texts' loss (the model's)"
    )
    long_loss_weight: float | None = option(
        default=None, at_least=0, help="weight of the long texts' loss (the model's)"
    )
    num_primary_components: int | None = option(
        default=None,
        at_least=1,
        help="match short texts with this many principal components of the images, as Long-CLIP does",
    )

    # The batch
    batch_size: int = option(default=64, at_least=1, help="images of a process in a batch")
    grad_cache_chunk: int | None = option(
        default=None, at_least=1, help="embed this many samples at a time: the same gradient in less memory"
    )
    gradient_accumulation_steps: int = option(
        default=1,
        at_least=1,
        help="batches of a step, each compared within itself; to compare all, a larger batch with `grad_cache_chunk`",
    )
    drop_last: bool = option(default=False, help="leave out an epoch's last batch if it is not full")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        default=None, help="type of the forward pass (float32, or what `accelerate launch` says)"
    )
    gradient_checkpointing: bool = option(
        default=False, help="compute activations again in the backward pass: less memory, more time"
    )
    compile: bool = option(default=False, help="torch.compile the model")

    # The optimiser
    num_epochs: float = option(default=1.0, above=0, help="how often to see every record, unless `max_steps` is given")
    max_steps: int | None = option(default=None, at_least=1, help="steps of the optimiser")
    learning_rate: float = option(default=1e-4, at_least=0, help="highest learning rate of AdamW")
    text_learning_rate: float | None = option(
        default=None, at_least=0, help="that of the text tower (`learning_rate`)"
    )
    image_learning_rate: float | None = option(
        default=None, at_least=0, help="that of the image tower (`learning_rate`)"
    )
    weight_decay: float = option(
        default=0.05, at_least=0, help="of matrices; biases, norms and the logit scale have none"
    )
    beta1: float = option(default=0.9, at_least=0, below=1, help="of AdamW")
    beta2: float = option(default=0.999, at_least=0, below=1, help="of AdamW")
    epsilon: float = option(default=1e-8, at_least=0, help="of AdamW")
    warmup_steps: int = option(default=0, at_least=0, help="steps in which the learning rate rises from 0")
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = option(
        default="cosine", help="how the learning rate falls"
    )
    max_grad_norm: float = option(default=1.0, at_least=0, help="norm that the gradient is cut to; 0: not cut")
    ema_decay: float | None = option(
        default=None,
        at_least=0,
        below=1,
        help="keep a moving average of the weights with this decay, evaluate it, and save it as the model",
    )

    # Evaluation, log and checkpoints
    eval_data: str | None = option(
        default=None, help=f"records to measure retrieval on, as `data` ({SCENES!r}: held-out scenes)"
    )
    eval_split: str | None = option(
        default=None, help="split of `eval_data` on the Hub or of Scenes (validation), or of a folder, as `split`"
    )
    eval_samples: int = option(default=500, at_least=1, help="how many of them, from the first on")
    eval_steps: int | None = option(
        default=None, at_least=1, help="steps between evaluations; by default one at the end"
    )
    log_steps: int = option(default=10, at_least=1, help="steps between lines of the log")
    save_steps: int | None = option(
        default=None, at_least=1, help="steps between checkpoints; by default one at the end"
    )
    save_total_limit: int = option(
        default=2, at_least=0, help="checkpoints to keep; older ones are removed; 0: keep all"
    )
    trackers: list[str] = option(
        default_factory=lambda: ["tensorboard"], help="trackers of accelerate (tensorboard, wandb, ...), or none"
    )

    def __post_init__(self) -> None:
        options.check(self)
        if self.mapping not in MAPPINGS:
            raise ValueError(f"`mapping` must be one of {', '.join(MAPPINGS)}, got {self.mapping!r}.")
        if self.unlocked_vision_layers and not self.lock_vision:
            raise ValueError("`unlocked_vision_layers` unlocks part of a locked image tower: set `lock_vision` too.")
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"`warmup_steps` ({self.warmup_steps}) is more than `max_steps` ({self.max_steps}).")
        if self.streaming and self.max_steps is None:
            raise ValueError("A stream's length is not known: `streaming` needs `max_steps`.")
        if self.eval_steps is not None and self.eval_data is None:
            raise ValueError("`eval_steps` needs `eval_data`, the records to evaluate on.")
        if self.trackers == ["none"]:
            self.trackers = []
        self.sampling()

    def sampling(self) -> CaptionSampling:
        """How the long texts are drawn."""
        return CaptionSampling(
            num_long_texts=self.num_long_texts,
            num_sentences=self.num_sentences or None,
            captioners=None if self.captioners is None else tuple(self.captioners),
            order=self.sentence_order,
            splitter=self.splitter,
        )

    def column_mapping(self) -> ColumnMapping:
        """The mapping's columns, those that options name in their place; without long texts, no long captions."""
        mapping = MAPPINGS[self.mapping]
        if self.short_column is not None:
            mapping = dataclasses.replace(mapping, short=None if self.short_column == "none" else self.short_column)
        if not self.num_long_texts and mapping.short is not None:
            mapping = dataclasses.replace(mapping, long=())
        columns = {
            "image": self.image_column,
            "long": None if self.long_columns is None else tuple(self.long_columns),
            "id": self.id_column,
        }
        return dataclasses.replace(
            mapping, **{field: column for field, column in columns.items() if column is not None}
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the options to `training_config.yaml` in `folder`, which `--config` and `--resume` read."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "resume"}
        with replacing(Path(folder, CONFIG_NAME)) as file:  # half a file would be other options
            file.write(yaml.safe_dump(values, sort_keys=False).encode())


def parse_arguments(argv: Sequence[str] | None = None, **parser: str) -> TrainingConfig:
    """
    The options of a command line: flags (`--batch-size 8` or `--batch_size 8`), `--config FILE` for a YAML file of
    them, or both; a flag counts more than the file. With `--resume` those that the run in `output` keeps are added.

    Args:
        argv: Arguments; by default those of the process.
        **parser: As of `argparse.ArgumentParser`, such as `description`.

    Returns:
        [`TrainingConfig`]

    Raises:
        ValueError: on an option that is unknown (with the one that was meant), of a wrong type or out of range.
        FileNotFoundError: if there is no such file, or with `--resume` no run in `output`.
    """
    flags = options.Parser(**parser)
    options.add_options(flags, TrainingConfig)
    given = options.options_of(flags.parse_args(argv), TrainingConfig)
    if not options.convert("resume", given.get("resume", False), bool):
        return TrainingConfig(**given)
    output = given.get("output", TrainingConfig.output)  # the folder may have been moved
    config = TrainingConfig(**{**_kept(output), **given, "output": output})
    check_resumed(config)
    return config


def check_resumed(config: TrainingConfig) -> None:
    """
    Compares the options with those that the run in `config.output` was started with.

    Args:
        config: The options of the resumed run.

    Raises:
        ValueError: if one differs that changes what is computed; the message names it.
        FileNotFoundError: if there is no run in `config.output`.
    """
    first = TrainingConfig(**_kept(config.output))
    changed = [
        f"`{field.name}` was {getattr(first, field.name)!r} and is {getattr(config, field.name)!r}"
        for field in dataclasses.fields(TrainingConfig)
        if field.name not in RESUMABLE and getattr(first, field.name) != getattr(config, field.name)
    ]
    if changed:
        raise ValueError(
            f"A resumed run goes on with its own options, but {'; '.join(changed)}. Leave them out, or start another "
            "run: `--model` takes a checkpoint of this one."
        )


def _kept(output: str | os.PathLike) -> dict[str, Any]:
    """The options that a run keeps."""
    path = Path(output, CONFIG_NAME)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no run to resume. Start it without `--resume`.")
    return options.read_yaml(path, TrainingConfig)


def choices(option: str) -> tuple[str, ...]:
    """The values of an option of a [`TrainingConfig`] that is one of several words; empty for others."""
    return options.choices(get_type_hints(TrainingConfig)[option])
