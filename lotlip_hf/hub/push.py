"""Publishing a checkpoint on the Hub: weights, code, tokenizer, processor and model card in one commit."""

import glob
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers import AutoProcessor

from ..evaluation.results import Results
from ..files import all_or_nothing, check_output
from ..loading import load_model
from ..modeling.modeling_lotlip import LoTLIPModel
from .card import PICTURE, CardFields, Picture, card_bytes, checked_results, load_picture, warn_unstated

# Files with which `SentenceTransformer(repo_id)` gives normalised embeddings of texts and images
MODULES = "sentence_transformers.base.modules"
SENTENCE_TRANSFORMERS: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": f"{MODULES}.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{MODULES}.normalize.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            modality: {"method": f"get_{modality}_features", "method_output_name": "pooler_output"}
            for modality in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    },
    "1_Normalize/config.json": {"module_input_name": "sentence_embedding"},
}
# Outdated files, which loading would read beside the new ones: weights in other shards, an adapter, older code,
# settings of the processor in other files. Files in subfolders belong to the user.
STALE = [
    *("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("adapter_config.json", "adapter_model.*", "*_lotlip.py"),
    *("preprocessor_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
]
MAX_SHARD_SIZE = "5GB"
Loaded = tuple[LoTLIPModel, Any, Path | None]  # model, processor, folder of the checkpoint
Shown = tuple[list[Results], Picture | None]
ADVICE = {
    401: "Log in with `hf auth login`, or set HF_TOKEN.",
    403: "Use a token with write access, or another --repo-id.",
}


class PushError(OSError):
    """
    Publishing failed.

    Args:
        message (`str`): The message.
        published (`bool`, *optional*, defaults to `False`): Whether there is a new commit; `None` if that is unknown.
        status (`int`, *optional*): HTTP status of the Hub's answer.
    """

    def __init__(self, message: str, published: bool | None = False, status: int | None = None) -> None:
        super().__init__(message)
        self.published = published
        self.status = status


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
    Publishes a checkpoint on the Hub. All files of [`write_repository`] are in one commit, so an incomplete
    checkpoint is never visible. The commit also removes outdated files, such as other shards of weights. After the
    upload, the stored files are compared with the local ones. After an error, the same call sends the missing files.

    The model card is the user's card beside the checkpoint, or else the user's card in the repository, or else a card
    rendered from the model, its training run and `card`.

    Args:
        model_or_path (`LoTLIPModel` or `str` or `os.PathLike`): A model, a checkpoint folder or a Hub id.
        repo_id (`str`): `"organisation/name"`, or `"name"` for your own account. The repository is created if needed.
        processor (`LoTLIPProcessor`, *optional*): Processor of the model. Defaults to the processor in the checkpoint
            that the model was loaded from; on the Hub to the one on `main`, because a model does not store its
            `revision`.
        card (`CardFields`, *optional*): Facts for the model card.
        private (`bool`, *optional*): Whether a new repository is private. Defaults to the organisation's setting.
        revision (`str`, *optional*, defaults to `"main"`): Branch, which is created if needed, or pull request
            (`"refs/pr/1"`).
        token (`str` or `bool`, *optional*): Token of the Hub. Defaults to that of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, *optional*, defaults to `"Upload LoTLIP"`): Title of the commit.
        commit_description (`str`, *optional*): Description of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request to `main` instead.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Maximum size of a file of weights.
        tags (`str` or `Sequence[str]`, *optional*): Tags that replace those in `card`.

    Returns:
        `CommitInfo`: The commit.

    Raises:
        `ValueError`:
            If `repo_id` is not valid, the checkpoint is not a LoTLIP, has no processor or has an adapter, or a file
            for the model card cannot be read.
        `PushError`:
            If the Hub refuses, the connection breaks, another commit intervenes, or the stored files differ from
            those that were sent. The attribute `published` states whether there is a new commit.
    """
    validate_repo_id(repo_id)
    card = card or CardFields()
    card = card if tags is None else replace(card, tags=tags)
    api = HfApi(token=token, library_name="lotlip-hf")
    loaded = _loaded(model_or_path, processor, token)
    shown = _shown(loaded, card)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository")
        _write(folder, loaded, repo_id, card, shown, max_shard_size)  # fails before the repository is created
        with _explained(repo_id):
            repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
            if revision is not None and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            head = api.model_info(repo_id, revision=revision)
            names = [file.rfilename for file in head.siblings or []]
            there = Path(temporary, "there", "README.md")
            if there.name in names:
                api.hf_hub_download(repo_id, there.name, revision=head.sha, local_dir=there.parent)
        text = card_bytes(*loaded, repo_id, card, *shown, there)
        (folder / "README.md").write_bytes(text)
        patterns = STALE if shown[1] is None else [*STALE, f"{PICTURE}.*"]
        stale = filter_repo_objects((name for name in names if "/" not in name), allow_patterns=patterns)
        history = "discussions" if create_pr else f"commits/{revision or 'main'}"
        with _explained(repo_id, f"{api.endpoint}/{repo_id}/{history}"):
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,
                delete_patterns=[glob.escape(name) for name in stale] or None,
                commit_message=commit_message or "Upload LoTLIP",
                commit_description=commit_description,
            )
        with _explained(repo_id, commit.commit_url, published=True):
            seen = api.verify_repo_checksums(repo_id, revision=commit.oid, local_dir=folder)
    if damaged := sorted([*(mismatch["path"] for mismatch in seen.mismatches), *seen.extra_paths]):
        raise PushError(f"{commit.commit_url}: {', '.join(damaged)} differ from the local files. Push again.", True)
    warn_unstated(text)
    return commit


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
    for `trust_remote_code=True`, the settings of sentence-transformers, and `README.md`, the model card. A card
    beside the checkpoint is kept, with the metadata of `card`, unless a trainer generated it. Nothing is read from the
    repository.

    Args:
        model_or_path (`LoTLIPModel` or `str` or `os.PathLike`): A model, a checkpoint folder or a Hub id.
        output (`str` or `os.PathLike`): Folder to make. An empty folder may exist.
        repo_id (`str`): Repository id for the card's examples.
        processor (`LoTLIPProcessor`, *optional*): Processor of the model; see [`push`].
        card (`CardFields`, *optional*): Facts for the model card.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Maximum size of a file of weights.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: See [`push`].
        `FileExistsError`: If `output` exists and is not an empty folder.
    """
    check_output(output, folder=True)
    output = Path(output)
    card = card or CardFields()
    loaded = _loaded(model_or_path, processor)
    shown = _shown(loaded, card)
    with all_or_nothing(output.resolve()) as folder:
        _write(folder, loaded, repo_id, card, shown, max_shard_size)
    return output


def _write(
    output: Path, loaded: Loaded, repo_id: str, card: CardFields, shown: Shown, max_shard_size: int | str | None
) -> None:
    model, processor, _ = loaded
    text = card_bytes(*loaded, repo_id, card, *shown)  # fails before a file is written
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output, max_shard_size=max_shard_size or MAX_SHARD_SIZE)
    processor.save_pretrained(output)
    for name, settings in SENTENCE_TRANSFORMERS.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (output / "README.md").write_bytes(text)
    if (picture := shown[1]) is not None:
        (output / picture.name).write_bytes(picture.content)


def _shown(loaded: Loaded, card: CardFields) -> Shown:
    """Reads the results and the picture for the card."""
    model, processor, source = loaded
    return checked_results(model, processor, card.results), load_picture(source, card)


def _loaded(model_or_path: Any, processor: Any, token: str | bool | None = None) -> Loaded:
    """Loads the model and the processor, and returns them with the checkpoint's folder, if there is one."""
    if isinstance(model_or_path, torch.nn.Module):
        model, source = model_or_path, str(getattr(model_or_path, "name_or_path", ""))
    else:
        source = folder = os.fspath(model_or_path)
        if token is not None and not os.path.exists(source):
            patterns = ["*.json", "*.safetensors", "*.txt", "*.py", "*.model"]
            folder = snapshot_download(source, token=token, allow_patterns=patterns, ignore_patterns=["*/*"])
        model, own_processor = load_model(folder, device="cpu")
        processor = own_processor if processor is None else processor
    if not isinstance(model, LoTLIPModel):
        where = "" if model is model_or_path else f"{source}: "
        raise ValueError(f"{where}Only a LoTLIPModel can be published, got a {type(model).__name__}.")
    if getattr(model, "_hf_peft_config_loaded", False):
        merge = "`PeftModel.from_pretrained(model, adapter).merge_and_unload()`"
        raise ValueError(f"{source or 'The model'} has a PEFT adapter. Merge it first: {merge}.")
    if processor is None:
        try:
            processor = AutoProcessor.from_pretrained(source, token=token, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                "The model was not loaded from a checkpoint with a processor. Pass `processor`."
            ) from error
    return model, processor, Path(source) if source and Path(source).is_dir() else None


@contextmanager
def _explained(repo_id: str, url: str = "", published: bool | None = False) -> Iterator[None]:
    """Raises errors of the Hub and of the connection as a `PushError`. `url` is the page that shows the commit."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        response = error.response if isinstance(error, HfHubHTTPError) else None
        status = response.status_code if response else None
        with suppress(AttributeError, RuntimeError):  # some errors have no request
            if "/commit/" in (response or error).request.url.path and status not in ADVICE:
                published = None
        reason = (getattr(error, "server_message", None) or str(error) or type(error).__name__).splitlines()[0]
        outcome = {
            False: "Nothing was published.",
            True: f"{url} exists, but its files were not compared with those that were sent.",
            None: f"Upload status unknown: see {url}.",
        }[published]
        what = f"the Hub answered {status} ({reason})" if status else reason.rstrip(".")
        advice = ADVICE.get(status, "Push again: files that have arrived are not sent again.")
        raise PushError(f"{repo_id}: {what}. {outcome} {advice}", published, status) from error
