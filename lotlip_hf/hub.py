"""Publishing on the Hub: weights, code, tokenizer, processor and card of a checkpoint, whole and in one commit."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import AutoProcessor

from .encoding import load_model
from .modeling.modeling_lotlip import LoTLIPModel

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
CARD_TEMPLATE = Path(__file__).with_name("MODEL_CARD.md")
TAGS = ["lotlip", "long-captions", "image-text-retrieval", "zero-shot-image-classification", "sentence-transformers"]
# What an earlier commit may have left that would be read beside this one: weights in other shards, older code,
# settings of the processor in other files.
STALE = [
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*_lotlip.py"),
    *("preprocessor_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
]
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
        language: Languages that it reads.
        tags: More tags.
        results: Files of results, as [`read_results`] takes them.
        origin: A sentence or two on where the weights come from. By default what the training's options say.
    """

    license: str | None = None
    base_model: Sequence[str] = ()
    datasets: Sequence[str] = ()
    language: Sequence[str] = ("en",)
    tags: Sequence[str] = ()
    results: Sequence[str | os.PathLike] = ()
    origin: str | None = None


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
    max_shard_size: int | str = "5GB",
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """
    Publishes a checkpoint: what [`write_repository`] writes, in one commit, so that nobody loads a half. Files of an
    earlier commit that would be read instead are removed by it. An upload that broke off is repeated by the same call;
    what the Hub has already is not sent again. What it stored is compared with what was sent.

    Args:
        model_or_path: A [`LoTLIPModel`], or a checkpoint folder or Hub id of one.
        repo_id: `"organisation/name"`, which is created if need be.
        processor: The processor of a model; by default the one beside the checkpoint that the model was loaded from.
        card: What the card says; see [`CardFields`].
        private: Whether a new repository is private; by default what the organisation has set.
        revision: Branch, which is created if need be; by default `"main"`.
        token: The Hub's; by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message: First line of the commit.
        commit_description: Its other lines.
        create_pr: Whether to open a pull request instead of writing to the branch.
        max_shard_size: Largest file of weights.
        tags: More tags, in place of those in `card`.

    Returns:
        What the Hub says of the commit.

    Raises:
        ValueError: if `repo_id` is no id, or the checkpoint is no LoTLIP, has no processor or does not fit.
        OSError: if the Hub refuses or the connection breaks; the message says what to do.
    """
    validate_repo_id(repo_id)
    card = card or CardFields()
    card = card if tags is None else replace(card, tags=tags)
    api = HfApi(token=token, library_name="lotlip-hf")
    with tempfile.TemporaryDirectory() as temporary, _explained(repo_id):
        folder = write_repository(
            model_or_path, Path(temporary, "repository"), repo_id, processor, card, max_shard_size=max_shard_size
        )
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = _commit(
            api,
            repo_id,
            folder,
            revision=revision,
            commit_message=commit_message or "Upload LoTLIP",
            commit_description=commit_description,
            create_pr=create_pr,
        )
        stored = api.verify_repo_checksums(repo_id, revision=commit.oid, local_dir=folder)
        damaged = sorted(mismatch["path"] for mismatch in stored.mismatches)
        if damaged:
            api.create_commit(
                repo_id,
                [CommitOperationDelete(path) for path in damaged],
                revision=commit.pr_revision or revision,
                commit_message="Remove what did not arrive whole",
            )
        damaged += stored.extra_paths  # which are here alone
        if damaged:
            raise OSError(f"{repo_id}: {', '.join(damaged)} did not arrive whole and is not there. Push again.")
    return commit


def write_repository(
    model_or_path: LoTLIPModel | str | os.PathLike,
    output: str | os.PathLike,
    repo_id: str,
    processor: Any | None = None,
    card: CardFields | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> Path:
    """
    Writes the folder that [`push`] publishes: weights in safetensors, configuration, tokenizer, processor, the code
    that `trust_remote_code=True` runs, what sentence-transformers reads, and a card, `README.md`. A card that lies
    beside the checkpoint is kept; only its results are brought up to date.

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
        ValueError: if the checkpoint is no LoTLIP, has no processor or does not fit.
        FileExistsError: if there is something in `output`.
    """
    output, card = Path(output), card or CardFields()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: choose another name or remove it.")
    model, processor, source = _loaded(model_or_path, processor)
    text = _card_text(model, processor, source, repo_id, card)  # before anything is written
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output, max_shard_size=max_shard_size)
    processor.save_pretrained(output)
    for name, settings in SENTENCE_TRANSFORMERS.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (output / "README.md").write_text(text, encoding="utf-8")
    return output


def read_results(file: str | os.PathLike) -> list[EvalResult]:
    """
    The results of an evaluation, for a card's metadata (`model-index`).

    Args:
        file: A JSON object with `task` (such as `"image-text-retrieval"`), `dataset` (`id`, `name`, and maybe `split`
            and `revision`) and `metrics`, numbers by name; as `lotlip evaluate` writes it.

    Returns:
        One result for each number.

    Raises:
        ValueError: if the file does not say so.
        OSError: if it cannot be read.
    """
    try:
        run = json.loads(Path(file).read_text(encoding="utf-8"))
        task, dataset, metrics = run["task"], run["dataset"], run["metrics"]
        return [
            EvalResult(
                task_type=task,
                dataset_type=dataset["id"],
                dataset_name=dataset["name"],
                dataset_split=dataset.get("split"),
                dataset_revision=dataset.get("revision"),
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=float(value),
            )
            for name, value in metrics.items()
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file}: no results of an evaluation ({type(error).__name__}: {error}); expected a JSON object with "
            "`task`, `dataset` (`id`, `name`) and `metrics` (numbers by name)."
        ) from error


def _loaded(model_or_path: Any, processor: Any) -> tuple[LoTLIPModel, Any, Path | None]:
    """Model, processor, and the folder that they come from, if it is one."""
    if isinstance(model_or_path, LoTLIPModel):
        model, source = model_or_path, model_or_path.name_or_path
        if processor is None:
            try:
                processor = AutoProcessor.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise ValueError(
                    "The model was not loaded from a checkpoint with a processor: give its `processor`."
                ) from error
    else:
        source = os.fspath(model_or_path)
        model, own_processor = load_model(source, device="cpu")
        processor = own_processor if processor is None else processor
    if not isinstance(model, LoTLIPModel):
        raise ValueError(f"{model_or_path} holds a {type(model).__name__}: only a LoTLIPModel can be published here.")
    return model, processor, Path(source) if source and Path(source).is_dir() else None


def _card_text(model: LoTLIPModel, processor: Any, source: Path | None, repo_id: str, fields: CardFields) -> str:
    results = [result for file in fields.results for result in read_results(file)]
    own = source / "README.md" if source is not None else None
    if own is not None and own.is_file():
        kept = ModelCard.load(own)
        if results:
            kept.data.model_name = kept.data.model_name or repo_id.split("/")[-1]
            kept.data.eval_results = results
        return kept.content
    return str(model_card(model, processor, repo_id, _with_training(fields, source), results))


def model_card(
    model: LoTLIPModel,
    processor: Any,
    repo_id: str,
    fields: CardFields | None = None,
    results: list[EvalResult] | None = None,
) -> ModelCard:
    """
    The card of a model, rendered from `MODEL_CARD.md`.

    Args:
        model: The model.
        processor: Its processor.
        repo_id: The id that the card's examples load.
        fields: What cannot be read off the model.
        results: Results of evaluations, for the metadata.
    """
    fields = fields or CardFields()
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        language=list(fields.language),
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
    return ModelCard.from_template(
        data,
        template_path=str(CARD_TEMPLATE),
        model_id=repo_id,
        model_name=name,
        origin=fields.origin or "",
        text_backbone=_backbone(text),
        vision_backbone=f"{_backbone(vision)}, patches of {vision.patch_size}",
        num_corner_tokens=text.num_corner_tokens,
        max_text_tokens=min(processor.tokenizer.model_max_length, text.max_position_embeddings),
        image_size=vision.image_size,
        projection_dim=model.config.projection_dim,
        num_parameters=f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million",
        results=[(result.dataset_name, result.metric_name, result.metric_value) for result in results or []],
    )


def _backbone(config: Any) -> str:
    name = config.backbone_config.model_type.removesuffix("_text_model").removesuffix("_vision_model")
    return f"{name}, {config.num_hidden_layers} layers, width {config.hidden_size}"


def _with_training(fields: CardFields, source: Path | None) -> CardFields:
    """The fields, and where they are empty what the options of the training say, if they lie beside the checkpoint."""
    from .training.arguments import CONFIG_NAME

    path = source / CONFIG_NAME if source is not None else None
    if path is None or not path.is_file():
        return fields
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    base_model = [name for key in ("model", "text_model", "image_model") if _is_hub_id(name := options.get(key))]
    datasets = [name] if _is_hub_id(name := options.get("data")) else []
    origin = "Trained with lotlip-hf"
    origin += f" from {' and '.join(base_model)}" if base_model else ""
    origin += f" on {datasets[0]}." if datasets else "."
    return replace(
        fields,
        base_model=fields.base_model or base_model,
        datasets=fields.datasets or datasets,
        origin=fields.origin or origin,
    )


def _is_hub_id(name: Any) -> bool:
    """Where something lay on a disk is not published."""
    return bool(name) and name.count("/") == 1 and name[0] not in "./~" and not os.path.exists(name)


def _commit(api: HfApi, repo_id: str, folder: Path, revision: str | None, **settings: Any) -> CommitInfo:
    """All files of the folder, and the removal of stale ones, in one commit; `upload_folder` may make several."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    there = api.list_repo_files(repo_id, revision=revision)
    stale = [path for path in filter_repo_objects(there, allow_patterns=STALE) if path not in files]
    operations = [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    for pause in (*PAUSES, None):
        try:
            return api.create_commit(repo_id, operations, revision=revision, **settings)
        except HTTPError as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if pause is None or not (status is None or status == 429 or status >= 500):
                raise
            logger.warning(f"{repo_id}: {type(error).__name__} ({status or 'no answer'}); again in {pause} s.")
            time.sleep(pause)
    raise AssertionError  # the last attempt returns or raises


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = (error.server_message or str(error).strip() or "no reason given").splitlines()[0]
        advice = ADVICE.get(status, "Push again: what has arrived is not sent again.")
        raise OSError(f"{repo_id}: the Hub answered {status} ({reason}). {advice}") from error
    except HTTPError as error:
        raise OSError(
            f"{repo_id}: the connection to the Hub broke ({type(error).__name__}: {error}). Nothing was published; "
            "push again: what has arrived is not sent again."
        ) from error
