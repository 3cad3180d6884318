"""Model cards. A card is rendered from `MODEL_CARD.md`, or is a user's own card with updated metadata."""

import copy
import hashlib
import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..encoder import Encoder
from ..evaluation.results import CAPTIONS, SHARE, Results, load_results
from ..evaluation.tables import RETRIEVAL, RETRIEVAL_HEAD, metric_table, table
from ..files import is_inside, markdown_text, one_line, read_regular
from ..grid import DESCRIPTION
from ..images import load_image, processed_size
from ..modeling.backbones_lotlip import pair
from ..modeling.modeling_lotlip import LoTLIPModel
from ..training.config import SCENES
from .run import (
    Run,
    is_hub_id,
    load_run,
    pretrained_models,
    stated_options,
    training_rows,
    validation_texts,
)

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).parent.parent / "MODEL_CARD.md"
TAGS = ["lotlip", "long-captions", "image-text-retrieval", "zero-shot-image-classification", "sentence-transformers"]
LANGUAGES = {
    **{"en": "English", "zh": "Chinese", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian"},
    **{"ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "ru": "Russian", "multilingual": "many languages"},
}
# Phrases in the cards that transformers' Trainer and sentence-transformers write beside each checkpoint
GENERATED = [
    *("has been generated automatically", "has been automatically generated"),
    "This is a [sentence-transformers](https://www.SBERT.net) model",
]
# Facts that a card may lack, by the option of `lotlip push` that states them
REQUESTS = {
    "--license": "the license",
    "--dataset": "the training data",
    "--results": "results of evaluations",
    "--picture": "a picture of ranked examples",
}
PICTURE = "ranked_examples"  # file name without extension
PICTURE_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
PICTURE_LINE = re.compile(rf"^!\[.*\]\({PICTURE}\.\w+\)$", re.MULTILINE)
MAX_PICTURE_BYTES = 10 << 20
MAX_DESCRIPTION = 2000  # characters


@dataclass(frozen=True)
class CardFields:
    """
    Facts for a model card that the model and its training run do not contain; see
    https://huggingface.co/docs/hub/model-cards. A single string is accepted instead of a list.

    Args:
        license (`str`, *optional*): License of the weights, such as `"apache-2.0"`. Without a license, other people
            have no right to use the weights.
        base_model (`Sequence[str]`, *optional*): Hub ids of the models that the weights were trained from. Defaults to
            the models of the training run.
        datasets (`Sequence[str]`, *optional*): Hub ids of the training data sets. Defaults to the data set of the
            training run.
        language (`Sequence[str]`, *optional*, defaults to `"en"`): Languages of the texts, as ISO 639 codes.
        tags (`Sequence[str]`, *optional*): Tags in addition to the usual ones.
        results (`Sequence[str | os.PathLike]`, *optional*): Files of results; see
            [`~lotlip_hf.evaluation.results.load_results`].
        origin (`str`, *optional*): One or two sentences on the origin of the weights. Defaults to a sentence about the
            training run.
        picture (`str` or `os.PathLike`, *optional*): A PNG, JPEG or WebP picture of ranked examples, such as
            `lotlip search --save-grid` draws. Defaults to the picture `ranked_examples.*` beside the checkpoint.
    """

    license: str | None = None
    base_model: Sequence[str] = ()
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    results: Sequence[str | os.PathLike] = ()
    origin: str | None = None
    picture: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        for name in ("base_model", "datasets", "language", "tags", "results"):
            value = getattr(self, name)
            if isinstance(value, (str, os.PathLike)):
                object.__setattr__(self, name, (value,))


@dataclass(frozen=True)
class Picture:
    """
    A picture of ranked examples.

    Args:
        name (`str`): File name in the repository.
        description (`str`): Query of the ranking, in Markdown; empty if the file does not contain it.
        content (`bytes`): The image file.
    """

    name: str
    description: str
    content: bytes


def load_picture(source: Path | None, fields: CardFields) -> Picture | None:
    """
    Reads the picture of ranked examples.

    Args:
        source (`Path`, *optional*): The checkpoint's folder.
        fields (`CardFields`): `fields.picture` takes precedence over a picture in the folder.

    Returns:
        `Picture`: The picture, or `None` if there is none.

    Raises:
        `ValueError`: If the file is not an image, has another format, or is too large. The message names the file.
        `OSError`: If the file cannot be read.
    """
    names = [f"{PICTURE}{extension}" for extension in PICTURE_FORMATS.values()] if source is not None else []
    beside = next((file for name in names if source is not None and (file := _beside(source, name)) is not None), None)
    file = fields.picture or beside
    if file is None:
        return None
    content = read_regular(file, MAX_PICTURE_BYTES)
    load_image(content, os.fspath(file))
    with Image.open(io.BytesIO(content)) as image:
        if image.format not in PICTURE_FORMATS:
            raise ValueError(f"{file} is a {image.format} file. Convert it to {', '.join(PICTURE_FORMATS)}.")
        description = " ".join(str(image.info.get(DESCRIPTION, "")).split())[:MAX_DESCRIPTION]
        return Picture(f"{PICTURE}{PICTURE_FORMATS[image.format]}", markdown_text(description), content)


def _beside(source: Path, name: str) -> Path | None:
    """Returns a file of a checkpoint's folder. A link may lead only into that folder or into the cache of the Hub."""
    file = source / name
    if not file.is_file():
        return None
    if not is_inside((source, source.resolve().parent.parent / "blobs"), file):
        raise ValueError(f"{file} is a link out of the checkpoint's folder. Replace it by the file.")
    return file


def card_bytes(
    model: LoTLIPModel,
    processor: Any,
    source: Path | None,
    repo_id: str,
    fields: CardFields,
    results: Sequence[Results] = (),
    picture: Picture | None = None,
    there: Path | None = None,
) -> bytes:
    """
    Returns the model card to publish: the user's card beside the checkpoint, or else the user's card in the
    repository, or else a card rendered from `MODEL_CARD.md`.

    Args:
        model (`LoTLIPModel`): The model.
        processor (`LoTLIPProcessor`): The processor.
        source (`Path`, *optional*): The checkpoint's folder.
        repo_id (`str`): Repository id for the card's examples.
        fields (`CardFields`): Facts to state. `fields.results` and `fields.picture` are not read.
        results (`Sequence[Results]`, *optional*): Results to show.
        picture (`Picture`, *optional*): Picture to show. Defaults to the picture in the repository's card.
        there (`Path`, *optional*): The card in the repository.

    Returns:
        `bytes`: The card. A user's card keeps its line endings.

    Raises:
        `ValueError`: If a card, or a file of the training run, cannot be read. The message names the file.
    """
    run = load_run(source)
    fields_of_run = _with_run(fields, run)
    shown = "" if picture is None else f"![{picture.description or 'Ranked examples'}]({picture.name})"
    beside = None if source is None else _beside(source, "README.md")
    for file, name in ((beside, str(beside)), (there, f"README.md of {repo_id}")):
        if file is None or not file.is_file():
            continue
        content = file.read_bytes()
        try:
            card = ModelCard(content.decode("utf-8-sig"))
        except (yaml.YAMLError, ValueError, TypeError) as error:
            reason = one_line(error)
            raise ValueError(f"{name}: the YAML metadata cannot be read ({reason}).") from error
        if not (_is_generated(card) or (file is there and _is_ours(card))):
            if file is there:
                logger.warning(f"{repo_id}: a user wrote its README.md. Only the metadata is updated.")
            return _updated(content, card, repo_id, fields, results)
        fields_of_run = _with_metadata(fields_of_run, card)
        if file is there and not shown and (match := PICTURE_LINE.search(card.text)):
            shown = match[0]
    return str(model_card(model, processor, repo_id, fields_of_run, results, run, shown)).encode()


def checked_results(model: LoTLIPModel, processor: Any, files: Sequence[str | os.PathLike]) -> list[Results]:
    """
    Reads files of results.

    Args:
        model (`LoTLIPModel`): The model.
        processor (`LoTLIPProcessor`): The processor.
        files (`Sequence[str | os.PathLike]`): Files of results.

    Returns:
        `list[Results]`: The results.

    Raises:
        `ValueError`: If a file does not contain results, or contains those of another model.
        `OSError`: If a file cannot be read.
    """
    results = [load_results(file) for file in files]
    for one in results:
        fingerprints = one.content.get("model_fingerprint")
        if not isinstance(fingerprints, dict):
            continue
        dtype = getattr(torch, str(one.content.get("dtype")), None)
        is_other = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype != model.dtype
        encoder = Encoder(copy.deepcopy(model).to(dtype) if is_other else model, processor)
        given = [modality for modality in ("image", "text") if modality in fingerprints]
        if any(encoder.fingerprint(modality) != fingerprints[modality] for modality in given):
            raise ValueError(
                f"{one.file} contains results of {one.content.get('model')}, whose weights or preprocessing differ "
                "from this checkpoint's. Evaluate this checkpoint, or leave the file out."
            )
    return results


def model_card(
    model: LoTLIPModel,
    processor: Any,
    repo_id: str,
    fields: CardFields | None = None,
    results: Sequence[Results] = (),
    run: Run | None = None,
    picture: str = "",
) -> ModelCard:
    """
    Renders `MODEL_CARD.md` for a model.

    Args:
        model (`LoTLIPModel`): The model.
        processor (`LoTLIPProcessor`): The processor.
        repo_id (`str`): Repository id for the card's examples.
        fields (`CardFields`, *optional*): Facts to state. `fields.results` and `fields.picture` are not read.
        results (`Sequence[Results]`, *optional*): Results to show.
        run (`Run`, *optional*): The training run. The card leaves out options that are paths.
        picture (`str`, *optional*): Picture to show, in Markdown.

    Returns:
        `ModelCard`: The card.
    """
    fields, run = fields or CardFields(), run or Run()
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
        picture=picture,
        text_backbone=_backbone(text),
        vision_backbone=_backbone(vision),
        num_corner_tokens=text.num_corner_tokens,
        max_text_tokens=min(processor.tokenizer.model_max_length, text.max_position_embeddings),
        image_size=_image_size(processor.image_processor),
        projection_dim=model.config.projection_dim,
        num_parameters=f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million",
        languages=" and ".join(markdown_text(LANGUAGES.get(language, language)) for language in languages),
        license=markdown_text(fields.license) if fields.license else _request("--license"),
        data=_data(fields, run),
        base_models=_links(fields.base_model, "") or ("random" if run.options.get("model") == SCENES else ""),
        training=training_rows(run),
        options=list(stated_options(run.options).items()),
        step=run.step,
        results=[_shown(one) for one in results],
        validation=_validation(run.recalls),
        validation_texts=validation_texts(run.options),
        request=_request,
    )
    card.text = f"{card.text.rstrip()}\n\n{_signature(card.text)}\n"
    return card


def warn_unstated(card: bytes) -> None:
    """
    Logs the facts that a card does not state, each with the option of `lotlip push` that states it.

    Args:
        card (`bytes`): The card. Nothing is logged for a card that a user wrote.
    """
    own = ModelCard(card.decode("utf-8-sig"), ignore_metadata_errors=True)
    missing = [f"{fact} ({option})" for option, fact in REQUESTS.items() if _request(option) in own.text]
    if missing and _is_ours(own):
        logger.warning(f"The model card does not state {', '.join(missing)}.")


def _request(option: str) -> str:
    return f"*Not stated. Pass `{option}` to `lotlip push`, or edit this line.*"


def _data(fields: CardFields, run: Run) -> str:
    if fields.datasets:
        return _links(fields.datasets, "datasets/")
    number = run.options.get("num_scenes")
    if run.options.get("data") != SCENES:
        return _request("--dataset")
    return (
        "Scenes, drawn pictures with captions" if not isinstance(number, int) else f"Scenes, {number:,} drawn pictures"
    )


def _links(names: Sequence[str], kind: str) -> str:
    """Joins names. Hub ids become links."""
    return ", ".join(
        f"[{markdown_text(name)}](https://huggingface.co/{kind}{name})" if is_hub_id(name) else markdown_text(name)
        for name in names
    )


def _shown(results: Results) -> dict[str, str]:
    """Formats results in Markdown: title, description and table. Metrics that the table lacks are metadata only."""
    task = results.content["task"]
    metrics = {entry.metric_type: entry.metric_value for entry in results.entries}
    if any(value > 1 for name, value in metrics.items() if SHARE.fullmatch(name)):  # in percent
        metrics = {name: value / 100 if SHARE.fullmatch(name) else value for name, value in metrics.items()}
    return {
        "title": _title(results.entries),
        "about": _about(results.content.get("protocol", {})),
        "table": _table(*metric_table(task, metrics), left=int(task == RETRIEVAL)),
    }


def _validation(recalls: Mapping[str, float]) -> str:
    """Formats the recalls of a run's log as a table."""
    rows = []
    for kind in ("long", "short"):
        metrics = {name.removeprefix(f"{kind}_"): value for name, value in recalls.items() if name.startswith(kind)}
        rows += [[f"{kind} captions", *row] for row in metric_table(RETRIEVAL, metrics)[1] if {*row[1:]} != {"-"}]
    return _table(["texts", *RETRIEVAL_HEAD], rows, left=2)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Formats a table without its empty columns."""
    columns = [cells for cells in zip(head, *rows, strict=True) if {*cells[1:]} - {"-"}]
    if not columns:
        return ""
    titles, *body = zip(*columns, strict=True)
    return table([titles], body, "markdown", left)


def _title(entries: Sequence[EvalResult]) -> str:
    if not entries:
        return ""
    name, split = entries[0].dataset_name, entries[0].dataset_split
    return markdown_text(f"{name} ({split})" if split else name)


def _about(protocol: dict[str, Any]) -> str:
    """Describes an evaluation: numbers of images and texts, kind of captions, normalisation, cut texts."""
    images, texts, captions = (protocol.get(name) for name in ("num_images", "num_texts", "captions"))
    parts = []
    if isinstance(images, int):
        parts.append(f"{'the first ' if 'first_images' in protocol else ''}{images:,} images")
    if isinstance(texts, int):
        per_image = isinstance(images, int) and images > 0 and texts % images == 0 and texts // images
        parts.append(f"{per_image} text{'s' * (per_image != 1)} per image" if per_image else f"{texts:,} texts")
    if isinstance(classes := protocol.get("num_classes"), int):
        parts.append(f"{classes:,} classes")
    if captions is not None:
        parts.append(f"{captions} captions" if captions in CAPTIONS else f"captions: {markdown_text(captions)}")
    if "normalization" in protocol:
        parts.append("captions not normalised" if protocol["normalization"] is None else "captions normalised")
    cut, limit = protocol.get("num_texts_cut"), protocol.get("max_length")
    if isinstance(cut, int) and isinstance(limit, int):
        parts.append(f"{cut or 'no'} text{'s' * (cut != 1)} cut at {limit} tokens")
    return "; ".join(parts)


def _backbone(config: Any) -> str:
    backbone = config.backbone_config
    name = getattr(backbone, "architecture", None) or backbone.model_type  # timm's models have one
    facts = [name.removesuffix("_text_model").removesuffix("_vision_model")]
    is_map = hasattr(backbone, "depths")  # ConvNeXt
    layers = sum(backbone.depths) if is_map else getattr(backbone, "num_hidden_layers", None)
    facts += [f"{layers} layers"] if layers else []
    facts.append(f"width {config.hidden_size}")
    if hasattr(backbone, "patch_size") and not is_map:
        height, width = pair(backbone.patch_size)
        facts.append(f"patches of {height} x {width} pixels")
    return ", ".join(facts)


def _image_size(image_processor: Any) -> str:
    if hasattr(image_processor, "max_num_patches"):
        side = image_processor.patch_size
        return f"any aspect ratio, at most {image_processor.max_num_patches} patches of {side} x {side}"
    return " x ".join(map(str, processed_size(image_processor)))


def _signature(text: str) -> str:
    """Last line of a rendered card. Its digest shows whether a user changed the card."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"<!-- Written by lotlip-hf ({digest}). Publishing replaces this text unless it was edited. -->"


def _is_ours(card: ModelCard) -> bool:
    """Whether this package rendered the text and no user changed it."""
    text, _, last = card.text.replace("\r\n", "\n").rstrip().rpartition("\n")
    return last.startswith(_signature(text).partition(". ")[0])


def _is_generated(card: ModelCard) -> bool:
    """Whether a trainer wrote the card, or the card is empty."""
    return not card.text.strip() or any(marker in card.text for marker in GENERATED)


def _with_metadata(fields: CardFields, card: ModelCard) -> CardFields:
    """Fills empty fields from the metadata of a card that is replaced."""
    names = ["license", *(("base_model", "datasets", "language", "tags") if _is_ours(card) else ())]
    found = {name: getattr(card.data, name) for name in names if not getattr(fields, name)}
    return replace(fields, **{name: value for name, value in found.items() if value and _is_text(name, value)})


def _is_text(name: str, value: Any) -> bool:
    """Whether a value of a card's metadata is a text, or a list of texts where the field is a list."""
    texts = value if isinstance(value, list) and name != "license" else [value]
    return all(isinstance(text, str) for text in texts)


def _updated(content: bytes, card: ModelCard, repo_id: str, fields: CardFields, results: Sequence[Results]) -> bytes:
    """Updates the metadata of a user's card. Without new metadata, the card is unchanged."""
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


def _with_run(fields: CardFields, run: Run) -> CardFields:
    """Fills empty fields from the options of the training run."""
    if not run.options:
        return fields
    base_model = pretrained_models(run.options)
    datasets = [name] if is_hub_id(name := run.options.get("data")) else []
    origin = "Trained with lotlip-hf"
    origin += f" from {' and '.join(base_model)}" if base_model else ""
    origin += f" on {datasets[0]}" if datasets else " on drawn scenes" if run.options.get("data") == SCENES else ""
    return replace(
        fields,
        base_model=fields.base_model or base_model,
        datasets=fields.datasets or datasets,
        origin=fields.origin or f"{origin}.",
    )
