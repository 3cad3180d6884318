"""Every option of a training run in one typed config, filled by flags, a YAML file, or both."""

import argparse
import copy
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..data.records import MAPPINGS, ColumnMapping
from ..data.sampling import CaptionSampling
from ..files import MAX_BYTES, replacing

CONFIG_NAME = "training_config.yaml"
SCENES = "scenes"
# What may differ from the first run's options when a run is resumed: none changes what is computed.
RESUMABLE = frozenset(
    "output resume on_error image_root max_image_pixels max_record_bytes num_workers log_steps save_steps "
    "save_total_limit trackers gradient_checkpointing compile".split()
)


def _option(help: str, **default: Any) -> Any:
    """A field that `HfArgumentParser` makes a flag of; what its help says in brackets is the default of `None`."""
    return dataclasses.field(metadata={"help": help}, **default)


@dataclass
class TrainingConfig:
    """
    Every option of a training run, `--help` of `examples/train.py` in Python.

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
    output: str = _option(default="run", help="folder of the run: checkpoints, options, log, curve")
    resume: bool = _option(
        default=False, help="go on from the last checkpoint in `output`, with the options kept there"
    )
    seed: int = _option(default=0, help="seed of new weights, of the order of the records, and of the texts drawn")

    # The model
    model: str | None = _option(
        default=None, help=f"checkpoint folder or Hub id to train further, or {SCENES!r}: a new small model for Scenes"
    )
    text_model: str | None = _option(default=None, help="pretrained text encoder of a new model (with `image_model`)")
    image_model: str | None = _option(default=None, help="pretrained image encoder of a new model (with `text_model`)")
    num_corner_tokens: int | None = _option(default=None, help="corner tokens of a new model (2)")
    projection_dim: int | None = _option(
        default=None, help="width of the shared space of a new model (the image encoder's)"
    )
    text_pooling: Literal["pooler", "cls", "mean"] | None = _option(
        default=None, help="how a new model pools its text (pooler; CLIP's text encoder has its own way)"
    )
    cleaning: Literal["official", "sentences"] | None = _option(
        default=None,
        help="where a new model's tokenizer ends sentences (official): 'official', at each full stop with a space; "
        "'sentences', as `splitter` does, not at abbreviations",
    )
    max_text_length: int | None = _option(
        default=None,
        help="tokens of a text, [CLS] and [SEP] included, that it is cut at (126 for a new model of two encoders)",
    )
    lock_vision: bool = _option(default=False, help="keep the image tower as it is, as LiT does")
    unlocked_vision_layers: int = _option(
        default=0, help="with `lock_vision`: train this many of the image tower's last layers, and what follows them"
    )

    # The data
    data: str | None = _option(
        default=None, help=f"a folder or file of records, shards/*.tar, a data set on the Hub, or {SCENES!r}"
    )
    mapping: str = _option(default="records", help=f"names of the columns: {', '.join(MAPPINGS)}")
    image_column: str | None = _option(default=None, help="column of the images, in place of the mapping's")
    short_column: str | None = _option(
        default=None,
        help="column of the short captions, in place of the mapping's; 'none': the first sentences of the long ones",
    )
    long_columns: list[str] | None = _option(
        default=None, help="columns of the long captions, in place of the mapping's"
    )
    id_column: str | None = _option(default=None, help="column of the ids, in place of the mapping's")
    image_folder: str | None = _option(
        default=None, help="what relative paths of images start from (the folder of the file that names them)"
    )
    image_root: str | None = _option(default=None, help="folder that images must lie in (the image folder)")
    max_record_bytes: int = _option(
        default=MAX_BYTES, help="largest line of a table or sample of a shard that is read"
    )
    split: str | None = _option(
        default=None, help="split of a data set on the Hub (train), or of a folder that holds several; 'all': all"
    )
    streaming: bool = _option(default=False, help="read in order, without a copy on disk; needs `max_steps`")
    shuffle_buffer: int = _option(default=10_000, help="records that a stream is shuffled within")
    num_scenes: int = _option(default=5000, help=f"how many pictures `--data {SCENES}` draws")
    on_error: Literal["raise", "skip"] = _option(
        default="raise", help="whether a broken image or record stops the run or is counted and left out"
    )
    max_image_pixels: int | None = _option(
        default=None, help="images of more pixels are broken; each takes up to 12 bytes (178956970)"
    )
    num_workers: int = _option(default=2, help="processes that read and prepare batches ahead; 0: none")

    # The texts of a step
    num_long_texts: int = _option(default=3, help="long texts of an image in a step; 0: short captions alone")
    num_sentences: int = _option(default=3, help="consecutive sentences of a long text; 0: the whole caption")
    captioners: list[int] | None = _option(default=None, help="which long captions of a record to draw from, from 0")
    sentence_order: Literal["written", "shuffled"] = _option(default="written", help="order of the drawn sentences")
    splitter: Literal["sentences", "full_stops"] = _option(
        default="sentences", help="how captions are split; 'full_stops' as the official code does"
    )

    # The objective
    loss: Literal["infonce", "sigmoid"] = _option(default="infonce", help="the paper's, or SigLIP's")
    short_loss_weight: float | None = _option(default=None, help="weight of the short texts' loss (the model's)")
    long_loss_weight: float | None = _option(default=None, help="weight of the long texts' loss (the model's)")
    num_primary_components: int | None = _option(
        default=None, help="match short texts with this many principal components of the images, as Long-CLIP does"
    )

    # The batch
    batch_size: int = _option(default=64, help="images of a process in a batch")
    grad_cache_chunk: int | None = _option(
        default=None, help="embed this many samples at a time: the same gradient in less memory"
    )
    gradient_accumulation_steps: int = _option(
        default=1,
        help="batches of a step, each compared within itself; to compare all, a larger batch with `grad_cache_chunk`",
    )
    drop_last: bool = _option(default=False, help="leave out an epoch's last batch if it is not full")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _option(
        default=None, help="type of the forward pass (float32, or what `accelerate launch` says)"
    )
    gradient_checkpointing: bool = _option(
        default=False, help="compute activations again in the backward pass: less memory, more time"
    )
    compile: bool = _option(default=False, help="torch.compile the model")

    # The optimiser
    num_epochs: float = _option(default=1.0, help="how often to see every record, unless `max_steps` is given")
    max_steps: int | None = _option(default=None, help="steps of the optimiser")
    learning_rate: float = _option(default=1e-4, help="highest learning rate of AdamW")
    text_learning_rate: float | None = _option(default=None, help="that of the text tower (`learning_rate`)")
    image_learning_rate: float | None = _option(default=None, help="that of the image tower (`learning_rate`)")
    weight_decay: float = _option(default=0.05, help="of matrices; biases, norms and the logit scale have none")
    beta1: float = _option(default=0.9, help="of AdamW")
    beta2: float = _option(default=0.999, help="of AdamW")
    epsilon: float = _option(default=1e-8, help="of AdamW")
    warmup_steps: int = _option(default=0, help="steps in which the learning rate rises from 0")
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = _option(
        default="cosine", help="how the learning rate falls"
    )
    max_grad_norm: float = _option(default=1.0, help="norm that the gradient is cut to; 0: not cut")
    ema_decay: float | None = _option(
        default=None,
        help="keep a moving average of the weights with this decay, evaluate it, and save it as the model",
    )

    # Evaluation, log and checkpoints
    eval_data: str | None = _option(
        default=None, help=f"records to measure retrieval on, as `data` ({SCENES!r}: held-out scenes)"
    )
    eval_split: str | None = _option(
        default=None, help="split of `eval_data` on the Hub or of Scenes (validation), or of a folder, as `split`"
    )
    eval_samples: int = _option(default=500, help="how many of them, from the first on")
    eval_steps: int | None = _option(default=None, help="steps between evaluations; by default one at the end")
    log_steps: int = _option(default=10, help="steps between lines of the log")
    save_steps: int | None = _option(default=None, help="steps between checkpoints; by default one at the end")
    save_total_limit: int = _option(default=2, help="checkpoints to keep; older ones are removed; 0: keep all")
    trackers: list[str] = _option(
        default_factory=lambda: ["tensorboard"], help="trackers of accelerate (tensorboard, wandb, ...), or none"
    )

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), _choices(hint)
            if choices and value is not None and value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
        if self.mapping not in MAPPINGS:
            raise ValueError(f"`mapping` must be one of {', '.join(MAPPINGS)}, got {self.mapping!r}.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}.")
        at_least = {
            1: "batch_size grad_cache_chunk gradient_accumulation_steps max_steps max_text_length projection_dim "
            "num_primary_components max_record_bytes eval_samples eval_steps log_steps save_steps shuffle_buffer "
            "num_scenes max_image_pixels",
            0: "num_corner_tokens unlocked_vision_layers num_workers num_long_texts num_sentences warmup_steps "
            "save_total_limit weight_decay max_grad_norm learning_rate text_learning_rate image_learning_rate "
            "epsilon short_loss_weight long_loss_weight seed",
        }
        for least, names in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.num_epochs <= 0:
            raise ValueError(f"`num_epochs` must be above 0, got {self.num_epochs}.")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, got {value}.")
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
        options = {name: value for name, value in dataclasses.asdict(self).items() if name != "resume"}
        with replacing(Path(folder, CONFIG_NAME)) as file:  # half a file would be other options
            file.write(yaml.safe_dump(options, sort_keys=False).encode())


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None) -> TrainingConfig:
    """
    The options of a command line: flags (`--batch-size 8` or `--batch_size 8`), `--config FILE` for a YAML file of
    them, or both; a flag counts more than the file. With `--resume` the file is the one in the folder of the run.

    Args:
        argv: Arguments; by default those of the process.
        description: What `--help` says first.

    Returns:
        [`TrainingConfig`]

    Raises:
        ValueError: on an option that is unknown (with the one that was meant), of a wrong type or out of range.
        FileNotFoundError: if there is no such file, or with `--resume` no run in `output`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--output")
    first.add_argument("--resume", nargs="?", const="true", default="false")
    known, _ = first.parse_known_args(argv)

    parser = _Parser(
        TrainingConfig,  # pyright: ignore[reportArgumentType]
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags count more")
    is_resumed = {"-h", "--help"}.isdisjoint(argv) and parser.parse_known_args(["--resume", known.resume])[0].resume
    from_config = [] if known.config is None else _read_yaml(Path(known.config), parser)
    kept: list[str] = []
    if is_resumed:
        output = known.output or parser.parse_args(from_config).output
        # the folder may have been moved
        kept = [*_read_yaml(_kept_options(output), parser), f"--output={output}"]
    # one after the other, for the last one counts
    namespace, unknown = parser.parse_known_args([*kept, *from_config, *argv])
    if unknown:
        if not unknown[0].startswith("-"):
            raise ValueError(
                f"{unknown[0]} is one value too many. A pattern goes between quotes, or the shell makes names of it."
            )
        raise ValueError(
            _unknown(unknown[0], [option for option in parser._option_string_actions if "_" not in option])
        )
    config = _config(namespace)
    if is_resumed:
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
    parser = _Parser(TrainingConfig, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    first = _config(parser.parse_args(_read_yaml(_kept_options(config.output), parser)))
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


def _kept_options(output: str | os.PathLike) -> Path:
    path = Path(output, CONFIG_NAME)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no run to resume. Start it without `--resume`.")
    return path


def _config(namespace: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(**{name: value for name, value in vars(namespace).items() if name != "config"})


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """
    The description line by line, the defaults (what `None` stands for the help itself says), and of two spellings that
    differ by dashes and underscores alone the first.
    """

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *args: Any, **kwargs: Any) -> None:
        super().add_usage(usage, [_of_one_spelling(action) for action in actions], *args, **kwargs)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(_of_one_spelling(action))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _of_one_spelling(action: argparse.Action) -> argparse.Action:
    action = copy.copy(action)
    spellings = {option.replace("_", "-"): option for option in reversed(action.option_strings)}
    action.option_strings = [option for option in action.option_strings if option in spellings.values()]
    return action


class _Parser(HfArgumentParser):
    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Dashes first: the spelling that `--help` shows."""
        return super().add_argument(*sorted(names, key=lambda name: "_" in name), **options)

    def error(self, message: str) -> NoReturn:
        """One line in place of argparse's two screens of usage."""
        raise ValueError(f"{message.rstrip('.')}. See --help.")


def _read_yaml(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """A file's options as flags, so that they are checked as flags are."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file of options.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a YAML file ({' '.join(str(error).split())}).") from error
    if options is None:
        return []
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected lines of `option: value`, got {type(options).__name__}.")
    defaults = {field.name: field for field in dataclasses.fields(TrainingConfig) if field.name != "resume"}
    lists = [name for name, hint in get_type_hints(TrainingConfig).items() if "list" in str(hint)]
    flags: list[str] = []
    for name, value in options.items():
        if name not in defaults:
            raise ValueError(f"{path}: {_unknown(str(name), list(defaults))}")
        if value is None:
            if defaults[name].default is not None:
                raise ValueError(f"{path}: `{name}` has no value.")
            continue
        if isinstance(value, dict) or isinstance(value, list) and name not in lists:
            expected = "one value or a list" if name in lists else "one value"
            raise ValueError(f"{path}: `{name}` must be {expected}, got {value!r}.")
        if value is False and "no" in _choices(get_type_hints(TrainingConfig)[name]):
            value = "no"  # YAML reads a bare `no` as false
        values = value if isinstance(value, list) else [value]
        if not values and name == "trackers":
            values = ["none"]
        flag = [f"--{name}={_as_text(values[0])}"] if len(values) == 1 else [f"--{name}", *map(_as_text, values)]
        try:
            parser.parse_args(flag)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        flags += flag
    return flags


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(option: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(
        option.split("=")[0].replace("_", "-" if option.startswith("--") else "_"), known, 1
    )
    hint = f" Did you mean {close[0]}?" if close else " See --help."
    return f"unknown option {option}.{hint}"


def choices(option: str) -> tuple[str, ...]:
    """The values of an option of a [`TrainingConfig`] that is one of several words; empty for others."""
    return _choices(get_type_hints(TrainingConfig)[option])


def _choices(hint: Any) -> tuple[str, ...]:
    """What a `Literal`, perhaps optional, allows."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((get_args(option) for option in get_args(hint) if get_origin(option) is Literal), ())
