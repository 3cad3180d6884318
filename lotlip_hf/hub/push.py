"""Publishing on the Hub: weights, code, tokenizer, processor and card of a checkpoint, whole and in one commit."""

import copy
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import AutoProcessor

from ..encoder import Encoder
from ..evaluation.retrieval import telling_metrics
from ..files import all_or_nothing, markdown_text, parse_json, printable, read_regular
from ..images import processed_size
from ..loading import load_model
from ..modeling.modeling_lotlip import LoTLIPModel

logger = logging.getLogger(__name__)

# What makes `SentenceTransformer(repo_id)` normalise its embeddings, of texts and of images.
SENTENCE_TRANSFORMERS: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Normalize",
            "type": "sentence_transformers.base.modules.normalize.Normalize",
        },
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": "sentence_embedding",
    },
    "1_Normalize/config.json": {"module_input_name": "sentence_embedding"},
}
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
    "num_scenes": lambda options: options.get("data") == "scenes",
    "num_epochs": lambda options: not options.get("max_steps"),
    "unlocked_vision_layers": lambda options: options.get("lock_vision"),
}
# Kinds of captions, for data that have several
CAPTIONS = ("all", "long", "short")
# Metrics of `lotlip evaluate` that are shares
SHARE = re.compile(r"(image_to_text|text_to_image)_r\d+(_low|_high)?|accuracy_top\d+|mean_per_class_recall")
# What an earlier commit may have left that would be read beside this one: weights in other shards, an adapter, older
# code, settings of the processor in other files. Only beside it: folders are somebody's own.
STALE = [
    *("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("adapter_config.json", "adapter_model.*", "*_lotlip.py"),
    *("preprocessor_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
]
# In cards that transformers' Trainer and sentence-transformers write beside each checkpoint: nobody's own words.
GENERATED = [
    *("has been generated automatically", "has been automatically generated"),
    "This is a [sentence-transformers](https://www.SBERT.net) model",
]
MAX_SHARD_SIZE = "5GB"
# Fields of a file of results, and of its `dataset`, that are texts
RESULT_TEXTS = (
    "task",
    "study",
    "model",
    "model_revision",
    "data_fingerprint",
    "dtype",
    "id",
    "name",
    "split",
    "revision",
)
PAUSES = (1, 5)  # seconds before a commit that met a server's trouble is tried again
ADVICE = {
    401: "Log in with `hf auth login`, or set HF_TOKEN.",
    403: "The token may not write there: make one with write access, or take another --repo-id.",
    404: "There is no such repository or revision, or the token may not see it.",
    409: "Somebody else is writing there: try again.",
    412: "Somebody else wrote there at the same time: try again.",
    429: "The Hub asks for a pause: try again later.",
}


@dataclass(frozen=True)
class CardFields:
    """
    What a model card says that cannot be read off the model; see https://huggingface.co/docs/hub/model-cards.

    Args:
        license: The weights' licence, such as `"apache-2.0"`. Without one nobody may use them.
        base_model: Hub ids of the models that it was made from. By default those that the training was given.
        datasets: Hub ids of the data sets that it was trained on. By default the one that the training was given.
        language: Languages that it reads, as ISO 639 codes; by default `"en"`.
        tags: More tags.
        results: Files of results, as [`read_results`] takes them.
        origin: A sentence or two on where the weights come from. By default what the training's options say.

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


def push(
    model_or_path: LoTLIPModel | str | os.PathLike,
    repo_id: str,
    *,
    processor: Any | None = None,
    card: CardFields | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: str | Sequence[str] | None = None,
) -> CommitInfo:
    """
    Publishes a checkpoint: what [`write_repository`] writes, in one commit, so that nobody loads a half. Files of an
    earlier commit that would be read instead are removed by it. An upload that broke off is repeated by the same call;
    what the Hub has already is not sent again. What it stored is compared with what was sent; what arrived damaged is
    sent once more, and removed if that does not help.

    The card is the one beside the checkpoint; else the one that somebody wrote in the repository; else ours.

    Args:
        model_or_path: A [`LoTLIPModel`], or a checkpoint folder or Hub id of one.
        repo_id: `"organisation/name"`, or `"name"` for one's own, which is created if need be.
        processor: The processor of a model; by default the one beside the checkpoint that the model was loaded from.
            On the Hub that is the one on `main`: a model does not remember its `revision`.
        card: What the card says; see [`CardFields`].
        private: Whether a new repository is private; by default what the organisation has set.
        revision: Branch, which is created if need be, or a pull request (`"refs/pr/1"`); by default `"main"`.
        token: The Hub's; by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message: First line of the commit.
        commit_description: Its other lines.
        create_pr: Whether to open a pull request instead of writing to the branch.
        max_shard_size: Largest file of weights; by default 5 GB.
        tags: More tags, in place of those in `card`.

    Returns:
        What the Hub says of the commit.

    Raises:
        ValueError: if `repo_id` is no id, the checkpoint is no LoTLIP, has no processor, does not fit or has an
            adapter, or its card or the training's options cannot be read.
        OSError: if the Hub refuses or the connection breaks; the message says what to do.
    """
    validate_repo_id(repo_id)
    card = card or CardFields()
    card = card if tags is None else replace(card, tags=tags)
    api = HfApi(token=token, library_name="lotlip-hf")
    with tempfile.TemporaryDirectory() as temporary, _explained(repo_id):
        with _explained(str(getattr(model_or_path, "name_or_path", model_or_path))):
            model, processor, source = _loaded(model_or_path, processor, token)
        folder = Path(temporary, "repository")
        _write(folder, model, processor, source, repo_id, card, max_shard_size)  # whole, before anything is created
        repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = _card_there(api, repo_id, revision, Path(temporary, "there"))
        (folder / "README.md").write_bytes(_card_text(model, processor, source, repo_id, card, there))
        return _publish(
            api, repo_id, folder, revision, create_pr, commit_message or "Upload LoTLIP", commit_description or ""
        )


def write_repository(
    model_or_path: LoTLIPModel | str | os.PathLike,
    output: str | os.PathLike,
    repo_id: str,
    processor: Any | None = None,
    card: CardFields | None = None,
    *,
    max_shard_size: int | str | None = None,
) -> Path:
    """
    Writes the folder that [`push`] publishes: weights in safetensors, configuration, tokenizer, processor, the code
    that `trust_remote_code=True` runs, what sentence-transformers reads, and a card, `README.md`. A card that lies
    beside the checkpoint is kept, unless a trainer generated it; only what `card` gives is brought up to date in its
    metadata. No network is used for a checkpoint folder, so a card in the repository is not seen.

    Args:
        model_or_path: As in [`push`].
        output: The folder to make; there must be nothing of that name, or an empty folder.
        repo_id: The id that the card's examples load.
        processor: As in [`push`].
        card: As in [`push`].
        max_shard_size: As in [`push`].

    Returns:
        The folder.

    Raises:
        ValueError: as [`push`].
        FileExistsError: if there is something in `output`.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: choose another name or remove it.")
    model, own_processor, source = _loaded(model_or_path, processor)
    with all_or_nothing(output.resolve()) as folder:
        _write(folder, model, own_processor, source, repo_id, card or CardFields(), max_shard_size)
    return output


def _write(
    output: Path,
    model: LoTLIPModel,
    processor: Any,
    source: Path | None,
    repo_id: str,
    card: CardFields,
    max_shard_size: int | str | None,
) -> None:
    text = _card_text(model, processor, source, repo_id, card)  # before anything is written
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output, max_shard_size=max_shard_size or MAX_SHARD_SIZE)
    processor.save_pretrained(output)
    for name, settings in SENTENCE_TRANSFORMERS.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (output / "README.md").write_bytes(text)


def read_results(file: str | os.PathLike) -> list[EvalResult]:
    """
    The results of an evaluation, for a card's metadata (`model-index`).

    Args:
        file: What `lotlip evaluate` wrote, or any JSON object with `task` (such as `"image-text-retrieval"`),
            `dataset` (`id`, `name`, and maybe `split` and `revision`) and `metrics`, numbers by name. If its
            `protocol` has `first_images`, the results say that they are of so many images.

    Returns:
        One result for each number, but for a share of right ones among the first k of k candidates, which is 1.

    Raises:
        ValueError: if the file does not say so.
        OSError: if it cannot be read.
    """
    try:
        run = result_file(file)
        protocol = run.get("protocol", {})
        task, dataset, metrics = run["task"], run["dataset"], telling_metrics(run["metrics"], protocol)
        first_images, captions, limit = (
            protocol.get(name) for name in ("first_images", "captions", "max_length_asked")
        )
        # results of one data set and `config` are one entry of a model-index
        config = [f"{captions} captions"] if captions in CAPTIONS else []
        config += [f"texts cut at {limit} tokens"] if limit else []
        config += [f"first {first_images} images"] if first_images else []
        return [
            EvalResult(
                task_type=task,
                dataset_type=dataset["id"],
                dataset_name=dataset["name"],
                dataset_config=", ".join(config) or None,
                dataset_split=dataset.get("split"),
                dataset_revision=dataset.get("revision"),
                dataset_args=None if first_images is None else {"num_images": first_images},
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=float(value),
            )
            for name, value in metrics.items()
        ]
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(
            f"{file}: no results of an evaluation ({type(error).__name__}: {error}); expected a JSON object with "
            "`task`, `dataset` (`id`, `name`) and `metrics` (numbers by name)."
        ) from error


def result_file(file: str | os.PathLike) -> dict[str, Any]:
    """
    What a file of results says, its texts as one line each, for they are names.

    Args:
        file: The JSON file.

    Raises:
        ValueError: if it holds no JSON object, or something else where a text is expected.
        OSError: if it cannot be read.
    """

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {printable(key): shown(part) for key, part in value.items()}
        if isinstance(value, list):
            return [shown(part) for part in value]
        return printable(value) if isinstance(value, str) else value

    content = read_regular(file)
    try:
        content = shown(parse_json(content))
    except ValueError as error:
        raise ValueError(f"not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got a {type(content).__name__}")
    dataset = content.get("dataset")
    for where, part in (("", content), ("dataset.", dataset if isinstance(dataset, dict) else {})):
        for name in RESULT_TEXTS:
            if not isinstance(part.get(name), str | None):
                raise ValueError(f"`{where}{name}` is {part[name]!r}, expected a text")
    return content


def _result_rows(file: str | os.PathLike) -> list[list[str]]:
    """The rows of a file of results in a card's table: data, captions, images, metric and value, as Markdown."""
    results = read_results(file)
    protocol = result_file(file).get("protocol", {})
    values = {result.metric_type: result.metric_value for result in results}
    shares = [value for name, value in values.items() if SHARE.fullmatch(name)]
    factor = 100 if all(value <= 1 for value in shares) else 1  # some files have percentages already
    texts = protocol.get("captions")
    texts = f"{texts} captions" if texts in CAPTIONS else texts
    count = protocol.get("num_images")
    images = f"{'the first ' if 'first_images' in protocol else ''}{count}" if isinstance(count, int) else "-"
    split = results[0].dataset_split if results else None
    data = f"{results[0].dataset_name} ({split})" if split else results[0].dataset_name if results else ""
    rows = []
    for name, value in values.items():
        if name.endswith(("_low", "_high")):
            continue
        title = re.sub(r"^(image_to_text|text_to_image)_r(\d+)$", r"\1_R@\2", name)
        title = re.sub(r"^(image_to_text|text_to_image)_", r"\1, ", title)
        title = re.sub(r"^accuracy_top(\d+)$", r"top-\1 accuracy", title)
        shown = f"{value:g}"
        if SHARE.fullmatch(name):
            title, shown = f"{title} (%)", f"{factor * value:.2f}"
            if {f"{name}_low", f"{name}_high"} <= values.keys():
                low, high = (factor * values[f"{name}_{end}"] for end in ("low", "high"))
                shown += f" ({low:.2f} to {high:.2f})"
        kind = "-" if texts is None else markdown_text(texts)
        rows.append([markdown_text(data), kind, images, markdown_text(title.replace("_", " ")), shown])
    return rows


def _loaded(
    model_or_path: Any, processor: Any, token: str | bool | None = None
) -> tuple[LoTLIPModel, Any, Path | None]:
    """Model, processor, and the folder that they come from, if it is one."""
    if isinstance(model_or_path, torch.nn.Module):
        model, source = model_or_path, str(getattr(model_or_path, "name_or_path", ""))
    else:
        source = folder = os.fspath(model_or_path)
        if token is not None and not os.path.exists(source):
            folder = snapshot_download(
                source,
                token=token,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.py", "*.model"],
                ignore_patterns=["*/*"],
            )
        model, own_processor = load_model(folder, device="cpu")
        processor = own_processor if processor is None else processor
    if not isinstance(model, LoTLIPModel):
        what = f"A {type(model).__name__}" if model is model_or_path else f"{source} holds a {type(model).__name__}"
        raise ValueError(f"{what}: only a LoTLIPModel can be published here.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{source or 'The model'} has a PEFT adapter, without which its weights are others: merge the adapter "
            "first (`PeftModel.from_pretrained(model, adapter).merge_and_unload()`)."
        )
    if processor is None:
        try:
            processor = AutoProcessor.from_pretrained(source, token=token, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                "The model was not loaded from a checkpoint with a processor: give its `processor`."
            ) from error
    return model, processor, Path(source) if source and Path(source).is_dir() else None


def _card_there(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> Path | None:
    """The card in the repository."""
    try:
        return Path(api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{repo_id}: whether it has a README.md cannot be read from the Hub. Nothing was published; push again."
        ) from error


def _card_text(
    model: LoTLIPModel,
    processor: Any,
    source: Path | None,
    repo_id: str,
    fields: CardFields,
    there: Path | None = None,
) -> bytes:
    """The card, as bytes: what somebody wrote keeps its line endings. `there` is the repository's."""
    results = [result for file in fields.results for result in read_results(file)]
    for file in fields.results:
        _check_evaluated(model, processor, file)
    options = _training_options(source)
    trained = _with_training(fields, options)
    beside = source / "README.md" if source is not None else None
    for file, name in ((beside, str(beside)), (there, f"README.md of {repo_id}")):
        if file is None or not file.is_file():
            continue
        content, card = _read_card(file, name)
        if not (_is_generated(card) or (file is there and _is_ours(card))):
            if file is there:
                logger.warning(f"{repo_id}: the text of its README.md is somebody's own and is kept.")
            return _updated(content, card, repo_id, fields, results)
        trained = _with_metadata(trained, card)
    step = re.fullmatch(r"checkpoint-(\d+)", source.name) if source is not None else None
    return str(model_card(model, processor, repo_id, trained, options, int(step[1]) if step else None)).encode()


def _check_evaluated(model: LoTLIPModel, processor: Any, file: str | os.PathLike) -> None:
    """Refuses results that say that they are of another model."""
    results = result_file(file)
    fingerprints, dtype = results.get("model_fingerprint"), getattr(torch, str(results.get("dtype")), model.dtype)
    if not isinstance(fingerprints, dict):
        return
    if dtype != model.dtype:
        model = copy.deepcopy(model).to(dtype)
    encoder = Encoder(model, processor)
    if any(encoder.fingerprint(modality) != digest for modality, digest in fingerprints.items()):
        raise ValueError(
            f"{file}: these are results of {results.get('model')}, whose weights or preparation of images and texts "
            "are others than those to be published: evaluate these, or leave the file out."
        )


def _read_card(file: Path, name: str) -> tuple[bytes, ModelCard]:
    content = file.read_bytes()
    try:
        return content, ModelCard(content.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: its metadata, the YAML at its top, cannot be read ({reason}).") from error


def _is_generated(card: ModelCard) -> bool:
    """Whether nobody has written it: there is no text, or a trainer's."""
    return not card.text.strip() or any(marker in card.text for marker in GENERATED)


def _with_metadata(fields: CardFields, card: ModelCard) -> CardFields:
    """The fields, and where they are empty what a card says whose text is not kept."""
    said = ["license", *(("base_model", "datasets", "language", "tags") if _is_ours(card) else ())]
    return replace(
        fields, **{name: getattr(fields, name) or getattr(card.data, name) or getattr(fields, name) for name in said}
    )


def _updated(content: bytes, card: ModelCard, repo_id: str, fields: CardFields, results: list[EvalResult]) -> bytes:
    """Somebody's card with the metadata that is given; without any, as it was."""
    tags = list(card.data.tags or [])
    given = {
        "license": fields.license,
        "base_model": list(fields.base_model),
        "datasets": list(fields.datasets),
        "language": list(fields.language),
        "tags": [*tags, *(tag for tag in fields.tags if tag not in tags)] if fields.tags else None,
        "model_name": (card.data.model_name or repo_id.split("/")[-1]) if results else None,
        "eval_results": results,
    }
    given = {name: value for name, value in given.items() if value}
    for name, value in given.items():
        setattr(card.data, name, value)
    return card.content.encode() if given else content


def model_card(
    model: LoTLIPModel,
    processor: Any,
    repo_id: str,
    fields: CardFields | None = None,
    options: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> ModelCard:
    """
    The card of a model, rendered from `MODEL_CARD.md`.

    Args:
        model: The model.
        processor: Its processor.
        repo_id: The id that the card's examples load.
        fields: What cannot be read off the model.
        options: Of the training, by name. Paths, and names that are no option of a [`TrainingConfig`], are left out.
        step: How many steps of the training the checkpoint was saved after.
    """
    fields = fields or CardFields()
    results = [result for file in fields.results for result in read_results(file)]
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
        model_name=name if results else None,
        eval_results=results or None,
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
        results=[row for file in fields.results for row in _result_rows(file)],
        has_intervals=any(result.metric_type.endswith("_low") for result in results),
        options=_told_options(options or {}),
        step=step,
        languages=" and ".join(markdown_text(LANGUAGES.get(language, language)) for language in languages),
    )
    card.text = f"{card.text.rstrip()}\n\n{_signature(card.text)}\n"
    return card


def _signature(text: str) -> str:
    """A last line that tells our text from one that somebody has changed since."""
    digest = hashlib.sha256(text.strip().encode()).hexdigest()[:16]
    return f"<!-- Written by lotlip-hf ({digest}). Publishing writes it anew, but keeps a text that was changed. -->"


def _is_ours(card: ModelCard) -> bool:
    text, _, last = card.text.replace("\r\n", "\n").rstrip().rpartition("\n")
    return last == _signature(text)


def _backbone(config: Any) -> str:
    name = config.backbone_config.model_type.removesuffix("_text_model").removesuffix("_vision_model")
    return f"{name}, {config.num_hidden_layers} layers, width {config.hidden_size}"


def _training_options(source: Path | None) -> dict[str, Any]:
    """The options of the training by name, if they lie beside the checkpoint or in the run's folder that it is in."""
    from ..training.config import CONFIG_NAME

    if source is None:
        return {}
    folders = [source, source.parent] if re.fullmatch(r"checkpoint-\d+", source.name) else [source]
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
    from ..training.config import RESUMABLE, SCENES, TrainingConfig, choices

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
            shown = ", ".join(map(str, value)) if all(isinstance(one, int) for one in value) else ""
        else:
            shown = value if value in (SCENES, *choices(name)) or _is_hub_id(value) else ""
        if shown:
            told.append((name, f"{shown}, of each process" if name == "batch_size" else shown))
    return told


def _with_training(fields: CardFields, options: Mapping[str, Any]) -> CardFields:
    """The fields, and where they are empty what the options of the training say."""
    from ..training.config import SCENES

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
    """Where something lay on a disk is not published."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    on_disk = re.search(r"/checkpoint-\d+$|\.(jsonl?|csv|tsv|txt|tar|parquet|ya?ml|zip|pt)$", name or "")
    return bool(name) and name.count("/") == 1 and on_disk is None and not os.path.exists(name)


def _publish(
    api: HfApi,
    repo_id: str,
    folder: Path,
    revision: str | None,
    create_pr: bool,
    message: str,
    description: str,
) -> CommitInfo:
    """
    Commits what differs between the folder and the branch until nothing does. Each try looks first, so that it sees
    what a commit did whose answer was lost, and what others wrote; a commit follows on what was seen, or is refused.
    """
    commit: CommitInfo | None = None  # what is looked at; by default what the branch points to
    first: CommitInfo | None = None  # which is returned
    parent: str | None = None  # what the commit that was tried last follows on
    failure: Exception | None = None  # why nothing more is sent: there is one last look
    is_unclear = False  # whether a pull request may have been opened all the same
    sent: Counter[str] = Counter()  # how often a commit brought a file
    pauses = list(PAUSES)
    while True:
        head, is_commit = None, False
        try:
            head = commit.oid if commit else str(api.model_info(repo_id, revision=revision).sha)
            seen = api.verify_repo_checksums(repo_id, revision=head, local_dir=folder)
            damaged = [mismatch["path"] for mismatch in seen.mismatches]
            missing = list(seen.extra_paths)  # which are here alone
            others = [path for path in seen.missing_paths if "/" not in path]
            stale = list(filter_repo_objects(others, allow_patterns=STALE))
            if not (damaged or missing or stale):
                url = f"{api.endpoint}/{repo_id}/commit/{head}"
                return first or CommitInfo(url, message, description, head, _endpoint=api.endpoint)
            if failure is not None:
                raise _failed(repo_id, failure, _outcome(first, is_unclear or head != parent))
            lost = [path for path in damaged if sent[path] > 1]
            if any(sent[path] > 1 for path in missing):
                names = ", ".join(sorted(path for path in missing if sent[path] > 1))
                raise OSError(f"{repo_id}: {names} did not arrive whole, twice, and is not there. Push again.")
            new = [] if lost else [*damaged, *missing]
            operations = [
                *(CommitOperationAdd(path, folder / path) for path in new),
                *(CommitOperationDelete(path) for path in [*stale, *lost]),
            ]
            is_commit, parent = True, head
            commit = api.create_commit(
                repo_id,
                operations,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
                commit_message="Remove what did not arrive whole" if lost else message,
                commit_description=description,
            )
            sent.update(new)
            first = first or commit
            if create_pr:
                revision, create_pr = commit.pr_revision, False
        except (HTTPError, RuntimeError, json.JSONDecodeError) as error:
            if isinstance(error, RuntimeError) and not is_commit:
                raise
            status = _status(error)
            if failure is not None or not (is_commit or (pauses and _may_pass(error))):
                is_unclear = is_unclear or (parent is not None and first is None)
                raise _failed(repo_id, failure or error, _outcome(first, is_unclear)) from error
            if is_commit:  # it may be there: look at the branch again
                commit = None
                sent.clear()
                is_unclear = create_pr and not isinstance(error, RuntimeError) and (status is None or status >= 500)
            if is_unclear or not pauses or not _may_pass(error):
                failure = error
                continue
            pause = pauses.pop(0)
            logger.warning(f"{repo_id}: {type(error).__name__} ({status or 'no answer'}); again in {pause} s.")
            time.sleep(pause)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    status = _status(error)
    return isinstance(error, RuntimeError) or status is None or status in (409, 412, 429) or status >= 500


def _status(error: BaseException) -> int | None:
    """What the Hub answered; None if there was no answer. huggingface_hub wraps errors of the storage."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else error
    response = cause.response if isinstance(cause, HfHubHTTPError) else None
    return None if response is None else response.status_code


def _outcome(first: CommitInfo | None, is_unclear: bool) -> str:
    if first is not None:
        return f"{first.commit_url} is there, but it is not certain that all of it arrived whole"
    return "It is not known whether it was published: look there" if is_unclear else "Nothing was published"


def _failed(repo_id: str, error: BaseException, outcome: str = "Nothing was published") -> OSError:
    status = _status(error)
    cause = (isinstance(error, RuntimeError) and error.__cause__) or error
    reason = (getattr(cause, "server_message", None) or str(cause).strip() or "no reason given").splitlines()[0]
    again = "push again: what has arrived is not sent again."
    if isinstance(error, RuntimeError):
        what = status or type(cause).__name__
        return OSError(f"{repo_id}: {str(error).rstrip('.')} ({what}: {reason}). {outcome}; {again}")
    if status is not None:
        advice = ADVICE.get(status, again.capitalize())
        return OSError(f"{repo_id}: the Hub answered {status} ({reason}). {outcome}. {advice}")
    problem = "the Hub's answer cannot be read" if isinstance(error, ValueError) else "the connection to the Hub broke"
    return OSError(f"{repo_id}: {problem} ({type(error).__name__}: {reason}). {outcome}; {again}")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        raise _failed(name, error) from error
