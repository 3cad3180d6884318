"""The model card of a checkpoint: rendered from `MODEL_CARD.md`, or a user's own with updated metadata."""

import copy
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ..encoder import Encoder
from ..evaluation.results import Results, load_results
from ..files import markdown_text, one_line
from ..images import processed_size
from ..modeling.modeling_lotlip import LoTLIPModel
from ..training.checkpoint import checkpoint_step
from ..training.config import CONFIG_NAME, RESUMABLE, SCENES, TrainingConfig, choices

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).parent.parent / "MODEL_CARD.md"
TAGS = ["lotlip", "long-captions", "image-text-retrieval", "zero-shot-image-classification", "sentence-transformers"]
LANGUAGES = {
    **{"en": "English", "zh": "Chinese", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian"},
    **{"ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "ru": "Russian", "multilingual": "many languages"},
}
# Options of a training that a card leaves out, beside those that change nothing that is computed
HOUSEKEEPING = {"image_folder", "streaming", "shuffle_buffer", "eval_data", "eval_split", "eval_samples", "eval_steps"}
# Options that count only if this is true of the others
NEEDS = {
    "num_scenes": lambda options: options.get("data") == SCENES,
    "num_epochs": lambda options: not options.get("max_steps"),
    "unlocked_vision_layers": lambda options: options.get("lock_vision"),
}
# In the cards that transformers' Trainer and sentence-transformers write beside each checkpoint
GENERATED = [
    *("has been generated automatically", "has been automatically generated"),
    "This is a [sentence-transformers](https://www.SBERT.net) model",
]
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|txt|tar|parquet|ya?ml|zip|pt)$")


@dataclass(frozen=True)
class CardFields:
    """
    What a model card says that cannot be read off the model; see https://huggingface.co/docs/hub/model-cards.

    Args:
        license (`str`, *optional*): The weights' licence, such as `"apache-2.0"`; without one others may not use them.
        base_model (`Sequence[str]`, *optional*):
            Hub ids of the models that it was made from. By default those that the training was given.
        datasets (`Sequence[str]`, *optional*):
            Hub ids of the data sets that it was trained on. By default the one that the training was given.
        language (`Sequence[str]`, *optional*): Languages that it reads, as ISO 639 codes; by default `"en"`.
        tags (`Sequence[str]`, *optional*): More tags.
        results (`Sequence[str | os.PathLike]`, *optional*):
            Files of results, as [`~lotlip_hf.evaluation.results.load_results`] takes them.
        origin (`str`, *optional*):
            A sentence or two on where the weights come from. By default what the training's options say.

    A single string stands for a list of one.
    """

    license: str | None = None
    base_model: Sequence[str] = ()
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    results: Sequence[str | os.PathLike] = ()
    origin: str | None = None

    def __post_init__(self) -> None:
        for name in ("base_model", "datasets", "language", "tags", "results"):
            value = getattr(self, name)
            if isinstance(value, (str, os.PathLike)):
                object.__setattr__(self, name, (value,))


def card_bytes(
    model: LoTLIPModel,
    processor: Any,
    source: Path | None,
    repo_id: str,
    fields: CardFields,
    results: Sequence[Results] = (),
    there: Path | None = None,
) -> bytes:
    """
    The card to publish: the one beside the checkpoint; else the one in the repository, if a user wrote it; else ours.

    Args:
        model ([`LoTLIPModel`]): The model.
        processor ([`LoTLIPProcessor`]): Its processor.
        source (`Path`, *optional*): The folder that the model comes from.
        repo_id (`str`): The id that the card's examples load.
        fields ([`CardFields`]): What cannot be read off the model; its `results` are not read.
        results (`Sequence[Results]`): The files of results.
        there (`Path`, *optional*): The card in the repository.

    Returns:
        `bytes`: the card; a user's keeps its line endings.

    Raises:
        ValueError: if a card or the options of the training cannot be read; the message names the file.
    """
    options = _training_options(source)
    trained = _with_training(fields, options)
    beside = source / "README.md" if source is not None else None
    for file, name in ((beside, str(beside)), (there, f"README.md of {repo_id}")):
        if file is None or not file.is_file():
            continue
        content = file.read_bytes()
        try:
            card = ModelCard(content.decode("utf-8-sig"))
        except (yaml.YAMLError, ValueError, TypeError) as error:
            reason = one_line(error)
            raise ValueError(f"{name}: its metadata, the YAML at its top, cannot be read ({reason}).") from error
        if not (_is_generated(card) or (file is there and _is_ours(card))):
            if file is there:
                logger.warning(f"{repo_id}: its README.md was written by a user; its text is kept.")
            return _updated(content, card, repo_id, fields, results)
        trained = _with_metadata(trained, card)
    step = checkpoint_step(source.name) if source is not None else None
    return str(model_card(model, processor, repo_id, trained, results, options, step)).encode()


def checked_results(model: LoTLIPModel, processor: Any, files: Sequence[str | os.PathLike]) -> list[Results]:
    """Reads files of results, and refuses those of another model, if they say of which."""
    results = [load_results(file) for file in files]
    for one in results:
        fingerprints = one.content.get("model_fingerprint")
        if not isinstance(fingerprints, dict):
            continue
        dtype = getattr(torch, str(one.content.get("dtype")), model.dtype)
        evaluated = model if dtype == model.dtype else copy.deepcopy(model).to(dtype)
        if any(
            Encoder(evaluated, processor).fingerprint(modality) != digest for modality, digest in fingerprints.items()
        ):
            raise ValueError(
                f"{one.file}: these are results of {one.content.get('model')}, whose weights or preparation of images "
                "and texts differ from those to be published. Evaluate these, or leave the file out."
            )
    return results


def model_card(
    model: LoTLIPModel,
    processor: Any,
    repo_id: str,
    fields: CardFields | None = None,
    results: Sequence[Results] = (),
    options: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> ModelCard:
    """
    The card of a model, rendered from `MODEL_CARD.md`.

    Args:
        model ([`LoTLIPModel`]): The model.
        processor ([`LoTLIPProcessor`]): Its processor.
        repo_id (`str`): The id that the card's examples load.
        fields ([`CardFields`], *optional*): What cannot be read off the model; its `results` are not read.
        results (`Sequence[Results]`): The files of results.
        options (`Mapping[str, Any]`, *optional*):
            The options of the training, by name. Paths, and names that are no option of a [`TrainingConfig`], are left
            out.
        step (`int`, *optional*): How many steps of the training the checkpoint was saved after.
    """
    fields = fields or CardFields()
    entries = [entry for file in results for entry in file.entries]
    name = repo_id.split("/")[-1]
    languages = list(fields.language) or ["en"]
    data = ModelCardData(
        language=languages,
        license=fields.license,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[*TAGS, *(tag for tag in fields.tags if tag not in TAGS)],
        base_model=list(fields.base_model) or None,
        datasets=list(fields.datasets) or None,
        model_name=name if entries else None,
        eval_results=entries or None,
    )
    text, vision = model.config.text_config, model.config.vision_config
    card = ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        model_id=repo_id,
        model_name=name,
        origin=fields.origin or "",
        text_backbone=_backbone(text),
        vision_backbone=f"{_backbone(vision)}, patches of {vision.patch_size}",
        num_corner_tokens=text.num_corner_tokens,
        max_text_tokens=min(processor.tokenizer.model_max_length, text.max_position_embeddings),
        image_size=" x ".join(map(str, processed_size(processor.image_processor))),
        projection_dim=model.config.projection_dim,
        num_parameters=f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million",
        results=[row for file in results for row in file.rows()],
        has_intervals=any(entry.metric_type.endswith("_low") for entry in entries),
        options=_told_options(options or {}),
        step=step,
        languages=" and ".join(markdown_text(LANGUAGES.get(language, language)) for language in languages),
    )
    card.text = f"{card.text.rstrip()}\n\n{_signature(card.text)}\n"
    return card


def _backbone(config: Any) -> str:
    name = config.backbone_config.model_type.removesuffix("_text_model").removesuffix("_vision_model")
    return f"{name}, {config.num_hidden_layers} layers, width {config.hidden_size}"


def _signature(text: str) -> str:
    """A last line that tells our text from one that a user has changed since."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"<!-- Written by lotlip-hf ({digest}). Publishing writes it anew, but keeps a text that was changed. -->"


def _is_ours(card: ModelCard) -> bool:
    text, _, last = card.text.replace("\r\n", "\n").rstrip().rpartition("\n")
    return last == _signature(text)


def _is_generated(card: ModelCard) -> bool:
    """Whether the text is a trainer's, or there is none."""
    return not card.text.strip() or any(marker in card.text for marker in GENERATED)


def _with_metadata(fields: CardFields, card: ModelCard) -> CardFields:
    """The fields, and where they are empty the metadata of a card whose text is not kept."""
    names = ["license", *(("base_model", "datasets", "language", "tags") if _is_ours(card) else ())]
    found = {name: value for name in names if not getattr(fields, name) and (value := getattr(card.data, name))}
    return replace(fields, **found)


def _updated(content: bytes, card: ModelCard, repo_id: str, fields: CardFields, results: Sequence[Results]) -> bytes:
    """A user's card with the metadata that is given; without any, as it was."""
    tags = list(card.data.tags or [])
    entries = [entry for file in results for entry in file.entries]
    given = {
        "license": fields.license,
        "base_model": list(fields.base_model),
        "datasets": list(fields.datasets),
        "language": list(fields.language),
        "tags": [*tags, *(tag for tag in fields.tags if tag not in tags)] if fields.tags else None,
        "model_name": (card.data.model_name or repo_id.split("/")[-1]) if entries else None,
        "eval_results": entries,
    }
    given = {name: value for name, value in given.items() if value}
    for name, value in given.items():
        setattr(card.data, name, value)
    return card.content.encode() if given else content


def _training_options(source: Path | None) -> dict[str, Any]:
    """The options of the training by name, beside the checkpoint or in the run's folder that it is in."""
    if source is None:
        return {}
    folders = [source] if checkpoint_step(source.name) is None else [source, source.parent]
    path = next((folder / CONFIG_NAME for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    if path is None:
        return {}
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected the options of a training by name, got a {type(options).__name__}.")
    return options


def _told_options(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options of a training that are set and change weights, with their values; no paths."""
    told = []
    for name in TrainingConfig.__dataclass_fields__:
        value = options.get(name)
        if name in RESUMABLE | HOUSEKEEPING or not NEEDS.get(name, bool)(options):
            continue
        if isinstance(value, bool):
            shown = "yes" if value else ""
        elif isinstance(value, int | float):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
        elif isinstance(value, list):
            words = name in ("terms", "term_options") and re.fullmatch(r"[\w.:=+-]+", "".join(map(str, value)))
            shown = ", ".join(map(str, value)) if words or all(isinstance(one, int) for one in value) else ""
        else:
            shown = value if value in (SCENES, *choices(name)) or _is_hub_id(value) else ""
        if shown:
            told.append((name, f"{shown}, of each process" if name == "batch_size" else shown))
    return told


def _with_training(fields: CardFields, options: Mapping[str, Any]) -> CardFields:
    """The fields, and where they are empty what the options of the training say."""
    if not options:
        return fields
    base_model = [name for key in ("model", "text_model", "image_model") if _is_hub_id(name := options.get(key))]
    datasets = [name] if _is_hub_id(name := options.get("data")) else []
    origin = "Trained with lotlip-hf"
    origin += f" from {' and '.join(base_model)}" if base_model else ""
    origin += f" on {datasets[0]}" if datasets else " on drawn scenes" if options.get("data") == SCENES else ""
    return replace(
        fields,
        base_model=fields.base_model or base_model,
        datasets=fields.datasets or datasets,
        origin=fields.origin or f"{origin}.",
    )


def _is_hub_id(name: Any) -> bool:
    """Whether a training's option is a Hub id; a path on a disk is not published."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    if not name or name.count("/") != 1 or os.path.exists(name):
        return False
    return checkpoint_step(name.split("/")[1]) is None and DATA_FILE.search(name) is None
