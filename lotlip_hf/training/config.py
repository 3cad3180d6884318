"""Every option of a training run in one typed config, filled by flags, a YAML file, or both."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from .. import options
from ..data.record import Draw
from ..data.records import MAPPINGS, ColumnMapping
from ..data.sampling import STRATEGIES
from ..files import MAX_BYTES, replacing
from ..options import option
from .terms import TERMS, make_terms

CONFIG_NAME = "training_config.yaml"
SCENES = "scenes"
# Options of strategies of `captions`: each takes those that are its fields.
TEXT_OPTIONS = ("num_long_texts", "num_sentences", "captioners", "sentence_order", "splitter")
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
    output: str = option("folder of the run: checkpoints, options, log, curve", "run")
    resume: bool = option("go on from the last checkpoint in `output`, with the options kept there", False)
    seed: int = option("seed of new weights, of the order of the records, and of the texts drawn", 0, at_least=0)

    # The model
    model: str | None = option(
        f"checkpoint folder or Hub id to train further, or {SCENES!r}: a new small model for Scenes", None
    )
    text_model: str | None = option("pretrained text encoder of a new model (with `image_model`)", None)
    image_model: str | None = option("pretrained image encoder of a new model (with `text_model`)", None)
    num_corner_tokens: int | None = option("corner tokens of a new model (2)", None, at_least=0)
    projection_dim: int | None = option(
        "width of the shared space of a new model (the image encoder's)", None, at_least=1
    )
    text_pooling: str | None = option(
        "how a new model pools its text, such as pooler, cls or mean (by default as its encoder does)", None
    )
    cleaning: Literal["official", "sentences"] | None = option(
        "where a new model's tokenizer ends sentences (official): 'official', at each full stop with a space; "
        "'sentences', as `splitter` does, not at abbreviations",
        None,
    )
    max_text_length: int | None = option(
        "tokens of a text, [CLS] and [SEP] included, that it is cut at (126 for a new model of two encoders)",
        None,
        at_least=1,
    )
    lock_vision: bool = option("keep the image tower as it is, as LiT does", False)
    unlocked_vision_layers: int = option(
        "with `lock_vision`: train this many of the image tower's last layers, and what follows them", 0, at_least=0
    )

    # The data
    data: str | None = option(f"a folder or file of records, shards/*.tar, a data set on the Hub, or {SCENES!r}", None)
    mapping: str = option(f"names of the columns: {', '.join(MAPPINGS)}", "records")
    image_column: str | None = option("column of the images, in place of the mapping's", None)
    short_column: str | None = option(
        "column of the short captions, in place of the mapping's; 'none': the first sentences of the long ones", None
    )
    long_columns: list[str] | None = option("columns of the long captions, in place of the mapping's", None)
    id_column: str | None = option("column of the ids, in place of the mapping's", None)
    image_folder: str | None = option(
        "what relative paths of images start from (the folder of the file that names them)", None
    )
    image_root: str | None = option("folder that images must lie in (the image folder)", None)
    max_record_bytes: int = option("largest line of a table or sample of a shard that is read", MAX_BYTES, at_least=1)
    split: str | None = option(
        "split of a data set on the Hub (train), or of a folder that holds several; 'all': all", None
    )
    streaming: bool = option("read in order, without a copy on disk; needs `max_steps`", False)
    shuffle_buffer: int = option("records that a stream is shuffled within", 10_000, at_least=1)
    num_scenes: int = option(f"how many pictures `--data {SCENES}` draws", 5000, at_least=1)
    on_error: Literal["raise", "skip"] = option(
        "whether a broken image or record stops the run or is counted and left out", "raise"
    )
    max_image_pixels: int | None = option(
        "images of more pixels are broken; each takes up to 12 bytes (178956970)", None, at_least=1
    )
    num_workers: int = option("processes that read and prepare batches ahead; 0: none", 2, at_least=0)

    # The texts and the patches of a step
    captions: str = option(f"strategy that draws the texts: {', '.join(STRATEGIES)}", "sub_captions")
    num_long_texts: int = option("long texts of an image in a step; 0: short captions alone", 3, at_least=0)
    num_sentences: int = option("consecutive sentences of a long text; 0: the whole caption", 3, at_least=0)
    captioners: list[int] | None = option("which long captions of a record to draw from, from 0", None)
    sentence_order: Literal["written", "shuffled"] = option("order of the drawn sentences", "written")
    splitter: Literal["sentences", "full_stops"] = option(
        "how captions are split; 'full_stops' as the official code does", "sentences"
    )
    patch_dropout: float = option(
        "share of an image's patches to leave out, drawn at random", 0.0, at_least=0, below=1
    )

    # The objective
    terms: list[str] = option(
        f"terms of the loss, each with a weight if it is not 1, as in infonce:0.5 (infonce): {', '.join(TERMS)}",
        default_factory=lambda: ["infonce"],
    )
    term_options: list[str] = option(
        "options of the terms, such as infonce.label_smoothing=0.1 or infonce.short_loss_weight=2 (the model's)",
        default_factory=list,
    )

    # The batch
    batch_size: int = option("images of a process in a batch", 64, at_least=1)
    grad_cache_chunk: int | None = option(
        "embed this many samples at a time: the same gradient in less memory", None, at_least=1
    )
    gradient_accumulation_steps: int = option(
        "batches of a step, each compared within itself; to compare all, a larger batch with `grad_cache_chunk`",
        1,
        at_least=1,
    )
    drop_last: bool = option("leave out an epoch's last batch if it is not full", False)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        "type of the forward pass (float32, or what `accelerate launch` says)", None
    )
    gradient_checkpointing: bool = option(
        "compute activations again in the backward pass: less memory, more time", False
    )
    compile: bool = option("torch.compile the model", False)

    # The optimiser
    num_epochs: float = option("how often to see every record, unless `max_steps` is given", 1.0, above=0)
    max_steps: int | None = option("steps of the optimiser", None, at_least=1)
    learning_rate: float = option("highest learning rate of AdamW", 1e-4, at_least=0)
    text_learning_rate: float | None = option("that of the text tower (`learning_rate`)", None, at_least=0)
    image_learning_rate: float | None = option("that of the image tower (`learning_rate`)", None, at_least=0)
    weight_decay: float = option("of matrices; biases, norms and the logit scale have none", 0.05, at_least=0)
    beta1: float = option("of AdamW", 0.9, at_least=0, below=1)
    beta2: float = option("of AdamW", 0.999, at_least=0, below=1)
    epsilon: float = option("of AdamW", 1e-8, at_least=0)
    warmup_steps: int = option("steps in which the learning rate rises from 0", 0, at_least=0)
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = option("how the learning rate falls", "cosine")
    max_grad_norm: float = option("norm that the gradient is cut to; 0: not cut", 1.0, at_least=0)
    ema_decay: float | None = option(
        "keep a moving average of the weights with this decay, evaluate it, and save it as the model",
        None,
        at_least=0,
        below=1,
    )

    # Evaluation, log and checkpoints
    eval_data: str | None = option(f"records to measure retrieval on, as `data` ({SCENES!r}: held-out scenes)", None)
    eval_split: str | None = option(
        "split of `eval_data` on the Hub or of Scenes (validation), or of a folder, as `split`", None
    )
    eval_samples: int = option("how many of them, from the first on", 500, at_least=1)
    eval_steps: int | None = option("steps between evaluations; by default one at the end", None, at_least=1)
    log_steps: int = option("steps between lines of the log", 10, at_least=1)
    save_steps: int | None = option("steps between checkpoints; by default one at the end", None, at_least=1)
    save_total_limit: int = option("checkpoints to keep; older ones are removed; 0: keep all", 2, at_least=0)
    trackers: list[str] = option(
        "trackers of accelerate, such as wandb, or none (tensorboard)", default_factory=lambda: ["tensorboard"]
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
        self.draw()
        make_terms(self.terms, self.term_options)

    def draw(self) -> Draw:
        """The strategy that draws the texts of a step, with those of the options that it has."""
        if self.captions not in STRATEGIES:
            raise ValueError(f"`captions` must be one of {', '.join(STRATEGIES)}, got {self.captions!r}.")
        strategy = STRATEGIES[self.captions]
        taken = {field.name for field in dataclasses.fields(strategy)}
        for field in dataclasses.fields(self):
            if field.name in TEXT_OPTIONS and field.name not in taken and getattr(self, field.name) != field.default:
                raise ValueError(f"`{field.name}` is not an option of `captions` {self.captions}.")
        return strategy(**{name: getattr(self, name) for name in TEXT_OPTIONS if name in taken})

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


def make_parser(**settings: str) -> options.Parser:
    """Returns a parser of all options; `settings` are those of `argparse.ArgumentParser`."""
    flags = options.Parser(**settings)
    options.add_options(flags, TrainingConfig)
    return flags


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
    given = options.options_of(make_parser(**parser).parse_args(argv), TrainingConfig)
    if not options.convert("resume", given.get("resume", False), bool):
        return TrainingConfig(**given)
    output = given.get("output", TrainingConfig.output)  # the folder may have been moved
    config = TrainingConfig(**{**_kept(output), **given, "output": output})
    check_resumed(config)
    return config


def check_resumed(config: TrainingConfig) -> None:
    """A `ValueError` if an option that changes what is computed is not that of the run in `config.output`."""
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
