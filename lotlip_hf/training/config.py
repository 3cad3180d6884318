"""Options of a training run, from flags, a YAML file or both."""

import dataclasses
import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_type_hints

import yaml

from .. import options
from ..data.mappings import MAPPINGS, ColumnMapping, alternatives, check_mapping
from ..data.record import Draw
from ..data.sampling import STRATEGIES
from ..files import MAX_BYTES, replacing
from ..options import option

if TYPE_CHECKING:
    from ..data.augment import Augment

CONFIG_NAME = "training_config.yaml"
SCENES = "scenes"
# Options of the strategies in `captions`; a strategy uses those that it has as fields
TEXT_OPTIONS = ("num_long_texts", "num_sentences", "captioners", "sentence_order", "splitter", "short_probability")
# Options that may change when a run is resumed, because they do not change the result; of `keep`, the ids are compared
RESUMABLE = frozenset(
    "output resume cache keep on_error image_root max_image_pixels max_record_bytes num_workers log_steps save_steps "
    "save_total_limit trackers report gradient_checkpointing compile".split()
)
# Options that only a new model of two encoders has
NEW_MODEL = tuple(
    "text_model image_model projection_dim text_pooling image_pooling image_layers text_attention prompt_template "
    "text_projection text_projection_layers text_projection_expansion".split()
)
# Options that all stages share
COMMON = ("output", "resume", "seed", "eval_share", "report", "mixed_precision")
# Stages are folders of the run, beside `checkpoint-N`
STAGE_NAME = re.compile(r"(?!checkpoint-)[A-Za-z0-9_-]+")


@dataclass
class TrainingConfig:
    """
    Options of a training run. `lotlip train --help` describes them.

    Raises:
        `ValueError`: If an option is missing, out of range or in conflict with another. The message names it.

    Example:

    ```python
    >>> from lotlip_hf.training.config import TrainingConfig

    >>> TrainingConfig(model="scenes", data="scenes", max_steps=1000).batch_size
    64
    ```
    """

    output: str = option(
        "Folder of the run: checkpoints, options, log and curve", "run", group="Run", metavar="FOLDER"
    )
    resume: bool = option("Continue the run in --output from its last checkpoint, with its options", False)
    seed: int = option("Seed of new weights, of the order of records, and of the drawn texts", 0, at_least=0)

    model: str | None = option(
        f"Checkpoint folder or Hub id to train further; {SCENES!r} is a new small model for drawn pictures",
        None,
        group="Model",
    )
    text_model: str | None = option("Pretrained text encoder of a new model (with --image-model)", None)
    image_model: str | None = option("Pretrained image encoder of a new model (with --text-model)", None)
    num_corner_tokens: int | None = option("Corner tokens of a new model (default: 2)", None, at_least=0)
    projection_dim: int | None = option(
        "Embedding size of a new model (default: width of the image encoder). With the width of the "
        "text encoder, the text tower has no projection and starts with its encoder's embeddings",
        None,
        at_least=1,
    )
    text_pooling: str | None = option(
        "Pooling of a new model's text tower, such as pooler, cls or mean (default: that of its encoder)", None
    )
    image_pooling: str | None = option(
        "Pooling of a new model's image tower: cls, mean, cls+mean or pooler (default: that of its encoder)", None
    )
    image_layers: int | None = option(
        "Last layers of a new model's image tower whose pooled states are joined, such as 4 for DINOv2 (default: 1)",
        None,
        at_least=1,
    )
    text_attention: Literal["causal", "bidirectional"] | None = option(
        "Attention of a new model's decoder (default: that of its configuration, mostly causal)", None
    )
    prompt_template: str | None = option(
        "Instruction around each text of a new model, which replaces its {}, such as 'Query: {}' (default: none)",
        None,
        metavar="TEXT",
    )
    text_projection: Literal["linear", "residual_mlp"] | None = option(
        "Text projection of a new model; residual_mlp is LLM2CLIP's, for a frozen text encoder (default: linear)", None
    )
    text_projection_layers: int | None = option(
        "Blocks of --text-projection residual_mlp (default: 4)", None, at_least=1
    )
    text_projection_expansion: int | None = option(
        "Inner width of these blocks, as a factor of their width (default: 2)", None, at_least=1
    )
    cleaning: Literal["official", "sentences"] | None = option(
        "How a new model's tokenizer splits sentences: 'official' at each full stop before a space, 'sentences' not "
        "at abbreviations, like --splitter (default: official)",
        None,
    )
    max_text_length: int | None = option(
        "Length in tokens at which texts are cut, [CLS] and [SEP] included (default: for a new model of two encoders "
        "that of a sentence-transformers folder or 126, else unchanged)",
        None,
        at_least=1,
    )
    temperature: float | None = option(
        "Temperature, 1 / logit scale, at the start of the run, such as 0.07 (default: that of the model)",
        None,
        at_least=0.01,
    )
    lock_vision: bool = option(
        "Freeze the image tower, as LiT does; a new model has an image projection, which trains", False
    )
    unlocked_vision_layers: int = option(
        "Last layers of the image tower, and the modules after them, to train with --lock-vision", 0, at_least=0
    )

    lock_text: bool = option("Freeze the text encoder; corner tokens and text projection still train", False)
    unlocked_text_layers: int = option(
        "Last layers of the text encoder, and the modules after them, to train with --lock-text", 0, at_least=0
    )
    lock_corner_tokens: bool = option(
        "Freeze the corner tokens and leave them out of the loss, so that a locked text encoder is computed once",
        False,
    )
    head_start: Literal["random", "ridge"] = option(
        "Start of both projections: as in the model, or 'ridge', linear ones in closed form from the states of two "
        "frozen towers",
        "random",
    )
    state_dropout: float = option(
        "Share of the values of the image states that each step sets to 0 (with --lock-vision)",
        0.0,
        at_least=0,
        below=1,
    )
    text_dtype: Literal["float32", "bfloat16"] = option(
        "Type of a frozen text encoder (with --lock-text); bfloat16 halves its memory", "float32"
    )
    cache: str | None = option(
        "Folder that keeps the states of frozen towers, so that they are computed once (default: $HF_HOME/lotlip)",
        None,
        metavar="FOLDER",
    )
    no_cache: bool = option("Compute frozen towers in every step instead", False)
    cache_dtype: Literal["float32", "bfloat16"] = option(
        "Type of the states in --cache; bfloat16 needs half the space", "float32"
    )

    data: str | None = option(
        f"Folder or file of records, shards such as 'shards/*.tar', a data set on the Hub, or {SCENES!r}",
        None,
        group="Data",
    )
    mapping: str = option(f"Column names, by data set: {', '.join(MAPPINGS)}", "records")
    image_column: str | None = option("Column of the images (default: from --mapping)", None)
    short_column: str | None = option(
        "Column of the short captions; 'none' uses the first sentences of the long captions (default: from --mapping)",
        None,
    )
    long_columns: list[str] | None = option("Columns of the long captions (default: from --mapping)", None)
    id_column: str | None = option("Column of the ids (default: from --mapping)", None)
    image_folder: str | None = option(
        "Folder that relative image paths start from (default: the folder of the file that contains them)",
        None,
        metavar="FOLDER",
    )
    image_root: str | None = option(
        "Folder that images must be in, after links are followed (default: --image-folder)", None, metavar="FOLDER"
    )
    split: str | None = option(
        "Split to read; 'all' reads all (default: train on the Hub; required for a folder with several)", None
    )
    keep: str | None = option(
        "Text file of ids, one a line, as `lotlip curate` writes it: train only on these records of --data",
        None,
        metavar="FILE",
    )
    streaming: bool = option("Read records in order, without a copy on disk; needs --max-steps", False)
    shuffle_buffer: int = option("Records among which a stream is shuffled", 10_000, at_least=1)
    num_scenes: int = option(f"Pictures that --data {SCENES} draws", 5000, at_least=1)
    on_error: Literal["raise", "skip"] = option("Stop at a broken image or record, or count and skip it", "raise")
    max_image_pixels: int | None = option(
        "Treat images with more pixels as broken; a pixel needs up to 12 bytes of memory (default: 178956970)",
        None,
        at_least=1,
    )
    max_record_bytes: int = option("Maximum size of a table line or shard sample, in bytes", MAX_BYTES, at_least=1)
    num_workers: int = option("Processes that prepare batches in advance; 0 uses the main process", 2, at_least=0)

    captions: str = option(f"Strategy of drawing texts: {', '.join(STRATEGIES)}", "sub_captions", group="Texts")
    num_long_texts: int = option(
        "Texts from long captions per image and step; 0 trains on short captions only", 3, at_least=0
    )
    num_sentences: int = option("Consecutive sentences per long text; 0 uses the whole caption", 3, at_least=0)
    captioners: list[int] | None = option("Indices of the long captions to draw from, from 0 (default: all)", None)
    sentence_order: Literal["written", "shuffled"] = option("Order of the drawn sentences", "written")
    splitter: Literal["sentences", "full_stops"] = option(
        "How captions are split into sentences; 'full_stops' as the official code does", "sentences"
    )
    short_probability: float = option(
        "Probability of the short caption as the short text with --captions mixed, else a rewrite of it",
        0.5,
        at_least=0,
        at_most=1,
    )
    num_negatives: int = option(
        "Negatives of a record to draw in each step, if a term uses them, such as negatives", 1, at_least=1
    )
    num_regions: int = option(
        "Regions of a record to draw in each step, if a term uses them, such as region_text", 4, at_least=1
    )
    word_scores: str | None = option(
        "File of scores of words, as examples/score_words.py writes it: words that an image contradicts are masked in "
        "its texts at random, and the term masked_words predicts words that it supports (default: masked_words "
        "predicts any word, and no other text has masked words)",
        None,
        metavar="FILE",
    )
    patch_dropout: float = option("Share of image patches to drop in training", 0.0, at_least=0, below=1)
    patch_choice: Literal["random", "attention"] = option(
        "Which patches --patch-dropout keeps: random ones, or those that --teacher ema or self attends to",
        "random",
    )
    image_views: int = option(
        "Views of each image in a step, 1 or 2, by --augment crop:S; 2 for terms of two views, such as two_views",
        1,
        at_least=1,
        at_most=2,
    )
    augment: list[str] = option(
        "Random changes of images: crop:S, a crop of at least the share S of the area; flip:P and grey:P, a mirror "
        "image and shades of grey with probability P; jitter:C, other colours, of strength C (default: none)",
        default_factory=list,
        metavar="CHANGE",
    )

    terms: list[str] = option(
        "Terms of the loss: infonce, sigmoid, primary_components, soft_labels, distribution, hard_negatives, "
        "masked_words; with columns of the data negatives, tags, region_text, regions, margin, caption_margin, "
        "groups; with --teacher instance, structure, similarities, cosine; and with --image-views 2 two_views, "
        "simclr, byol. Write a weight other than 1 as in infonce:0.5",
        default_factory=lambda: ["infonce"],
        group="Objective",
        metavar="TERM",
    )
    term_options: list[str] = option(
        "Options of the terms, such as infonce.label_smoothing=0.1 or infonce.short_loss_weight=2 (default: from "
        "the model's configuration)",
        default_factory=list,
        metavar="NAME=VALUE",
    )
    teacher: str | None = option(
        "Whose embeddings are the targets of terms such as instance and structure: a checkpoint folder or Hub id of a "
        "dual encoder, such as CLIP; 'self', the model as it started; 'ema', a moving average of the model; or "
        "'columns' of the records (default: none)",
        None,
    )
    teacher_momentum: float = option("Decay of the moving average of --teacher ema", 0.999, at_least=0, below=1)
    teacher_image_column: str | None = option(
        "Column of the teacher's embedding of the image, a list of numbers, for --teacher columns", None
    )
    teacher_text_column: str | None = option(
        "Column of the teacher's embedding of the short caption, for --teacher columns", None
    )

    batch_size: int = option("Images per batch and process", 64, at_least=1, group="Batches")
    group_size: int = option(
        "Records of a group to hold together in a batch, for terms such as groups; 1 draws single records",
        1,
        at_least=1,
    )
    grad_cache_chunk: int | None = option(
        "Embed a batch in chunks of N samples: the same gradient in less memory", None, at_least=1
    )
    gradient_accumulation_steps: int = option(
        "Batches per step, each with a separate loss; for a loss over all, use a larger batch with --grad-cache-chunk",
        1,
        at_least=1,
    )
    drop_last: bool = option("Skip the last batch of an epoch if it is not full", False)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        "Type of the forward pass (default: that of `accelerate launch`, else float32)", None
    )
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: less memory, more time", False)
    compile: bool = option("Compile the model with torch.compile", False)

    num_epochs: float = option("Passes over the records, unless --max-steps is given", 1.0, above=0, group="Optimiser")
    max_steps: int | None = option("Steps of the optimiser (default: from --num-epochs)", None, at_least=1)
    learning_rate: float = option(
        "Highest learning rate of AdamW, for all parameters without an own one", 1e-4, at_least=0
    )
    text_learning_rate: float | None = option(
        "Learning rate of the text encoder (default: --learning-rate)", None, at_least=0
    )
    image_learning_rate: float | None = option(
        "Learning rate of the image encoder (default: --learning-rate)", None, at_least=0
    )
    corner_learning_rate: float | None = option(
        "Learning rate of the corner tokens (default: --learning-rate)", None, at_least=0
    )
    logit_scale_learning_rate: float | None = option(
        "Learning rate of the logit scale (default: --learning-rate)", None, at_least=0
    )
    layer_decay: float = option(
        "Factor of the learning rate of an encoder's layer, for each layer above it", 1.0, above=0, at_most=1
    )
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = option(
        "Schedule of the learning rate after the warmup", "cosine"
    )
    warmup_steps: float = option(
        "Steps in which the learning rate rises from 0; a number below 1 is a share of all steps", 0, at_least=0
    )
    weight_decay: float = option("Weight decay of matrices; biases, norms and logit scale have none", 0.05, at_least=0)
    beta1: float = option("First beta of AdamW", 0.9, at_least=0, below=1)
    beta2: float = option("Second beta of AdamW", 0.999, at_least=0, below=1)
    epsilon: float = option("Epsilon of AdamW", 1e-8, at_least=0)
    max_grad_norm: float = option("Norm at which the gradient is clipped; 0 does not clip", 1.0, at_least=0)
    ema_decay: float | None = option(
        "Decay of a moving average of the weights, which is evaluated and saved instead of the weights",
        None,
        at_least=0,
        below=1,
    )

    eval_data: str | None = option(
        f"Records to measure retrieval on, given as --data; {SCENES!r} draws held-out scenes",
        None,
        group="Evaluation and log",
    )
    eval_split: str | None = option("Split of --eval-data, with the values of --split (default: validation)", None)
    eval_share: float | None = option(
        "Share of --data to hold out and measure retrieval on, the same records for the same seed",
        None,
        above=0,
        below=1,
    )
    eval_samples: int = option("Number of records to evaluate on, from the first", 500, at_least=1)
    eval_steps: int | None = option("Steps between evaluations (default: evaluate at the end)", None, at_least=1)
    patience: int | None = option(
        "Stop after N evaluations in a row without a higher score, the mean of R@1, R@5 and R@10 by long captions, "
        "and keep the best checkpoint, with the start as the first (default: train to the end)",
        None,
        at_least=1,
    )
    report: bool = option(
        "At the end, print the recalls, and write results.json and a page of ranked pictures, report.html", False
    )
    log_steps: int = option("Steps between entries of the log", 10, at_least=1)
    save_steps: int | None = option("Steps between checkpoints (default: save at the end)", None, at_least=1)
    save_total_limit: int = option("Checkpoints to keep; 0 keeps all", 2, at_least=0)
    trackers: list[str] = option(
        "Trackers of accelerate, such as wandb; 'none' for none", default_factory=lambda: ["tensorboard"]
    )

    # Options that replace the others in each stage, by its name. Only a file has them.
    stages: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        options.check(self)
        if self.trackers == ["none"]:
            self.trackers = []
        if self.stages:
            self.stages = {str(name): own for name, own in self.stages.items()}  # YAML reads 1 as a number
            self.stage_configs()  # checks them
            return
        check_mapping(self.mapping)
        for name, lock in (
            ("unlocked_vision_layers", "lock_vision"),
            ("state_dropout", "lock_vision"),
            ("unlocked_text_layers", "lock_text"),
        ):
            if getattr(self, name) and not getattr(self, lock):
                raise ValueError(f"`{name}` needs `{lock}`. Set it too.")
        if self.head_start == "ridge" and not (self.lock_vision and self.lock_text):
            raise ValueError("`head_start` ridge needs `lock_vision` and `lock_text`. Set them too.")
        for name in ("text_projection_layers", "text_projection_expansion"):
            if getattr(self, name) is not None and self.text_projection != "residual_mlp":
                raise ValueError(f"`{name}` needs `text_projection` residual_mlp. Set it too.")
        if self.text_dtype != "float32" and not self.lock_text:
            raise ValueError(f"`text_dtype` {self.text_dtype} needs `lock_text`. Set it too.")
        if self.text_dtype != "float32" and self.unlocked_text_layers:
            raise ValueError("`text_dtype` is for frozen text encoders. Remove it, or `unlocked_text_layers`.")
        if self.no_cache and self.cache is not None:
            raise ValueError("Set either `cache` or `no_cache`.")
        if self.warmup_steps >= 1 and self.warmup_steps % 1:
            raise ValueError(f"`warmup_steps` must be a whole number or below 1, got {self.warmup_steps}.")
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps:g}) must not exceed `max_steps` ({self.max_steps}). Reduce it, "
                "or pass a share of all steps, such as 0.1."
            )
        if self.streaming and self.max_steps is None:
            raise ValueError("`streaming` needs `max_steps`, because the length of a stream is unknown.")
        if self.eval_share is not None and (self.eval_data is not None or self.streaming):
            other = "eval_data" if self.eval_data is not None else "streaming"
            raise ValueError(f"Set either `eval_share` or `{other}`.")
        for name in ("report", "eval_steps"):
            if getattr(self, name) and self.eval_data is None and self.eval_share is None:
                raise ValueError(f"`{name}` needs `eval_data` or `eval_share`. Pass the records to evaluate on.")
        if self.patience is not None and self.eval_steps is None:
            raise ValueError("`patience` needs `eval_steps`. Set the steps between evaluations.")
        if self.group_size > 1 and self.streaming:
            raise ValueError("`group_size` needs the groups of all records, not `streaming`. Leave one of them out.")
        self.draw()
        augment = self.augmentation()
        from .terms import make_terms  # slow: imports torch

        terms, _ = make_terms(self.terms, self.term_options)
        boxed = [name for name, term in terms.items() if "boxes" in cast(Any, term).needs]
        if boxed and augment is not None and augment.moves:
            raise ValueError(
                f"`augment` crop and flip would move the boxes of `terms` {', '.join(boxed)}. Leave one of them out."
            )
        taught = {
            name: needs
            for name, term in terms.items()
            if (needs := {need for need in cast(Any, term).needs if need.startswith("teacher_")})
        }
        if taught and self.teacher is None:
            raise ValueError(f"`terms` {', '.join(taught)} needs `teacher`. Set it, for example to a dual encoder.")
        if "byol" in terms and self.teacher != "ema":  # whose projection follows with the tower
            raise ValueError(f"`terms` byol needs `teacher` ema, got {self.teacher}. Set it.")
        if self.patch_choice == "attention" and (not self.patch_dropout or self.teacher not in ("self", "ema")):
            raise ValueError("`patch_choice` attention needs `patch_dropout` and `teacher` ema or self. Set both.")
        if self.teacher is not None and not taught and self.patch_choice != "attention":
            raise ValueError("`teacher` needs a term that uses it, such as instance. Add one to `terms`.")
        viewed = [name for name, term in terms.items() if "image_embeds_2" in cast(Any, term).needs]
        if viewed and self.image_views == 1:
            raise ValueError(f"`terms` {', '.join(viewed)} needs `image_views` 2. Set it too.")
        if self.image_views == 2 and (not viewed or augment is None or not augment.crop):
            raise ValueError("`image_views` 2 needs `augment` crop:S and a term of two views, such as two_views.")
        if self.teacher_momentum != type(self).teacher_momentum and self.teacher != "ema":
            raise ValueError("`teacher_momentum` needs `teacher` ema. Set it too.")
        for kind in ("image", "text"):
            name = f"teacher_{kind}_column"
            is_read = self.teacher == "columns" and any(f"teacher_{kind}_embeds" in needs for needs in taught.values())
            if is_read and getattr(self, name) is None:
                raise ValueError(f"`teacher` columns needs `{name}` for `terms` {', '.join(taught)}. Set it too.")
            if getattr(self, name) is not None and not is_read:
                raise ValueError(f"`{name}` needs `teacher` columns and a term that uses the {kind} embeddings.")

    @property
    def has_frozen_towers(self) -> bool:
        """Whether no layer of either encoder trains."""
        return self.lock_text and self.lock_vision and not (self.unlocked_text_layers or self.unlocked_vision_layers)

    def stage_configs(self) -> dict[str, "TrainingConfig"]:
        """
        Returns the options of each stage by its name, in their order. Its `output` is a folder in that of the run.

        Raises:
            `ValueError`: If a stage has an unsuitable name, or its options are wrong. The message names the stage.
        """
        configs: dict[str, TrainingConfig] = {}
        for name, own in (self.stages or {}).items():
            if not STAGE_NAME.fullmatch(str(name)):
                raise ValueError(f"`stages` {name!r}: a name must be of letters, digits, - and _, and no checkpoint.")
            known = [field.name for field in dataclasses.fields(self) if field.name not in ("stages", *COMMON)]
            for key in own:
                if key in COMMON:
                    raise ValueError(f"`stages` {name}: `{key}` is for all stages. Move it out of them.")
                if key not in known:
                    raise ValueError(f"`stages` {name}: {options.unknown(key, known)}")
                if configs and key in ("model", *NEW_MODEL):
                    raise ValueError(
                        f"`stages` {name}: `{key}` is only for the first stage, because the others start with the "
                        "model of the stage before."
                    )
            try:
                folder = os.path.join(self.output, str(name))
                configs[str(name)] = dataclasses.replace(self, **{**own, "output": folder, "stages": None})
            except ValueError as error:
                raise ValueError(f"`stages` {name}: {error}") from error
        return configs

    def draw(self) -> Draw:
        """Returns the strategy that draws the texts of a step, with its options."""
        if self.captions not in STRATEGIES:
            raise ValueError(f"`captions` must be one of {', '.join(STRATEGIES)}, got {self.captions!r}.")
        strategy = STRATEGIES[self.captions]
        taken = {field.name for field in dataclasses.fields(strategy)}
        for field in dataclasses.fields(self):
            if field.name in TEXT_OPTIONS and field.name not in taken and getattr(self, field.name) != field.default:
                raise ValueError(f"`{field.name}` has no effect with `captions` {self.captions}. Leave it out.")
        return strategy(**{name: getattr(self, name) for name in TEXT_OPTIONS if name in taken})

    def augmentation(self) -> "Augment | None":
        """Returns the random changes of images, or `None`."""
        from ..data.augment import parse_augment  # slow: imports torch

        return parse_augment(self.augment)

    def column_mapping(self) -> ColumnMapping:
        """Returns the columns of the mapping, or of the options that replace them."""
        mapping = MAPPINGS[self.mapping].with_columns(
            self.short_column,
            image=self.image_column,
            id=self.id_column,
            teacher_image_embeds=self.teacher_image_column,
            teacher_text_embeds=self.teacher_text_column,
        )
        if self.long_columns is not None:
            return mapping.with_columns(long=tuple(self.long_columns))
        if self.num_long_texts or mapping.short is None:
            return mapping
        # `mixed` draws short texts from long captions, if there are any.
        return mapping.with_columns(long=(*alternatives(mapping.long), None) if self.captions == "mixed" else ())

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the options to `training_config.yaml` in a folder, which `--config` and `--resume` read."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "resume"}
        with replacing(Path(folder, CONFIG_NAME)) as file:
            file.write(yaml.safe_dump(values, sort_keys=False).encode())


def make_parser(**settings: str) -> options.Parser:
    """Returns a parser of all options; `settings` are those of `argparse.ArgumentParser`."""
    flags = options.Parser(**settings)
    options.add_options(flags, TrainingConfig)
    flags.add_argument(
        "--recipe", metavar="NAME", help=f"Recipe of this package, like --config: {', '.join(recipes())}"
    )
    return flags


def recipes() -> dict[str, Path]:
    """Returns the files of the packaged recipes by name, without those of `lotlip relabel`."""
    folder = Path(str(importlib.resources.files("lotlip_hf.recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml")) if not file.stem.endswith("-relabel")}


def parse_arguments(argv: Sequence[str] | None = None, **parser: str) -> TrainingConfig:
    """
    Returns the options of a command line: flags (`--batch-size 8` or `--batch_size 8`), a YAML file (`--config FILE`
    or `--recipe NAME`), or both. A flag overrides the file, also in every stage. `--model` takes the place of the two
    encoders of the file, with the options of a new model. `--resume` adds the options of the run in `output`.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments. By default `sys.argv[1:]`.
        **parser: Arguments of `argparse.ArgumentParser`, such as `description`.

    Returns:
        [`TrainingConfig`]: The options.

    Raises:
        `ValueError`: If an option is unknown, of a wrong type or out of range.
        `FileNotFoundError`: If the file does not exist or, with `--resume`, `output` contains no run.
    """
    arguments = make_parser(**parser).parse_args(argv)
    if arguments.recipe is not None:
        if arguments.config is not None:
            raise ValueError("Set either --recipe or --config.")
        if arguments.recipe not in recipes():
            raise ValueError(f"--recipe must be one of {', '.join(recipes())}, got {arguments.recipe!r}.")
        arguments.config = recipes()[arguments.recipe]
    flags = options.flags_of(arguments, TrainingConfig)
    given = options.options_of(arguments, TrainingConfig)
    if not options.convert("resume", given.get("resume", False), bool):
        return TrainingConfig(**_with_flags(given, flags))
    output = given.get("output", TrainingConfig.output)  # the saved `output` is wrong if the run was moved
    config = TrainingConfig(**_with_flags({**_kept(output), **given, "output": output}, flags))
    check_resumed(config)
    return config


def _with_flags(given: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """
    Removes the options that flags set from the stages, and the options of a file that flags replace: `eval_share` by
    `eval_data`, the two encoders and the options of a new model by `model`, and `model` by an encoder.
    """
    replaced: set[str] = set()
    if "eval_data" in flags:
        replaced.add("eval_share")
    if "model" in flags:
        replaced |= set(NEW_MODEL)
        if given.get("text_model") is not None and flags["model"] != SCENES:  # Scenes start a new model
            replaced |= {"num_corner_tokens", "cleaning"}
    if "text_model" in flags or "image_model" in flags:
        replaced.add("model")
    replaced -= flags.keys()
    stages = {
        stage: {name: own[name] for name in own if name not in flags.keys() | replaced}
        for stage, own in (given.get("stages") or {}).items()
    }
    return {**{name: value for name, value in given.items() if name not in replaced}, "stages": stages or None}


def check_resumed(config: TrainingConfig) -> None:
    """Raises a `ValueError` if an option that changes the result differs from the run in `config.output`."""
    first = TrainingConfig(**_kept(config.output))
    before, now = (one.stage_configs() or {"": one} for one in (first, config))
    changed = [
        f"{stage and f'in stage {stage} '}`{field.name}` was {getattr(before[stage], field.name)!r} and is "
        f"{getattr(now[stage], field.name)!r}"
        for stage in before.keys() & now.keys()
        for field in dataclasses.fields(TrainingConfig)
        if field.name not in RESUMABLE and getattr(before[stage], field.name) != getattr(now[stage], field.name)
    ]
    if list(before) != list(now):
        changed = [f"`stages` were {', '.join(before) or 'none'} and are {', '.join(now) or 'none'}"]
    if changed:
        raise ValueError(
            f"A resumed run keeps its options, but {'; '.join(changed)}. Leave them out, or start a new run from a "
            "checkpoint with `--model`."
        )


def _kept(output: str | os.PathLike) -> dict[str, Any]:
    """Returns the options that a run saved."""
    path = Path(output, CONFIG_NAME)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, so there is no run to resume. Leave out `--resume` to start a run."
        )
    return options.read_yaml(path, TrainingConfig)


def choices(option: str) -> tuple[str, ...]:
    """Returns the choices of an option of [`TrainingConfig`], or an empty tuple if it has no fixed choices."""
    return options.choices(get_type_hints(TrainingConfig)[option])
