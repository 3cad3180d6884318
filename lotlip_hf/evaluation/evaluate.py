"""Evaluation of a model on a data set, with the results in a file."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from ..encoder import Encoder
from ..files import printable, replacing
from ..prompts import MixedPrompts, PromptedClasses
from .embeddings import embed_images, embed_texts, image_digests
from .retrieval import accuracies, retrieval_metrics, telling_metrics
from .segmentation import segmentation_metrics
from .studies import length_study, sentence_ablation
from .tables import PROMPTS, RETRIEVAL, SEGMENTATION, metric_table, prompt_table, study_table, table
from .tasks import ClassificationData, Data, PromptData, RetrievalData, SegmentationData
from .zero_shot import DEFAULT_TEMPLATES, class_embeddings, class_texts

LIBRARIES = ("lotlip-hf", "torch", "transformers", "tokenizers", "pillow", "numpy")


def evaluate(
    encoder: Encoder,
    data: Data,
    *,
    benchmark: str | None = None,
    model_name: str | None = None,
    templates: Sequence[str] | None = None,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    prompts: PromptedClasses | MixedPrompts | None = None,
    max_length: int | None = None,
    bootstrap: int = 1000,
    cache: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Evaluates a dual encoder on a data set: retrieval in both directions for images with texts, zero-shot
    classification for images with classes, zero-shot segmentation for images with masks. With several processes
    (`accelerate launch`), each process encodes a share of the data, and all return the same results.

    Args:
        encoder (`Encoder`): The dual encoder.
        data (`RetrievalData` or `ClassificationData` or `SegmentationData`): The data set, for example from
            [`~lotlip_hf.evaluation.benchmarks.registry.load_benchmark`].
        benchmark (`str`, *optional*): Name of the benchmark, such as `"iiw"`, which chooses the column of a report.
            Defaults to the name of `data`.
        model_name (`str`, *optional*): Name of the model in the results. Defaults to its folder or Hub id.
        templates (`Sequence[str]`, *optional*): Prompt templates for classes. Defaults to none if there are
            descriptions, and to `("a photo of a {}.",)` if not.
        descriptions (`Mapping[str, Sequence[str]]`, *optional*): Texts of each class; see
            [`~lotlip_hf.evaluation.zero_shot.class_embeddings`].
        prompts (`PromptedClasses` or `MixedPrompts`, *optional*): Learnt prompts of the classes, in place of
            templates, for classification. See [`~lotlip_hf.prompts.load_prompts`].
        max_length (`int`, *optional*): Maximum length of a text in tokens. Defaults to the model's maximum.
        bootstrap (`int`, *optional*, defaults to 1000): Number of bootstrap samples for the 95 % intervals of R@1; 0
            for no intervals.
        cache (`str` or `os.PathLike`, *optional*): Folder for the cache of embeddings; see
            [`~lotlip_hf.evaluation.embeddings.embed_texts`].
        batch_size (`int`, *optional*): Number of images, or of texts of maximum length, in a batch. Defaults to 32
            images and 64 texts.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `dict[str, Any]`: JSON-serializable results with the keys `model`, `model_revision`, `model_fingerprint`,
        `task` (the Hub's name of the task), `benchmark`, `dataset`, `data_fingerprint`, `protocol`, `metrics`,
        `versions` and `date`. `metrics` has the names of [`~lotlip_hf.evaluation.retrieval`]; recalls are between 0
        and 1, and the best rank is 1. Metrics of the first k are left out if there are at most k candidates.

    Raises:
        `IncompleteDataError`: If images cannot be read; the message names them.
        `ValueError`: If `data` or an option is invalid, or the model cannot encode texts; the message names it.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
    >>> from lotlip_hf.evaluation.evaluate import evaluate

    >>> results = evaluate(load_encoder("checkpoint"), load_benchmark("scenes", num_images=8))
    >>> 0 <= results["metrics"]["text_to_image_r1"] <= 1
    True
    ```
    """
    # find invalid options before the long computation
    if bootstrap < 0:
        raise ValueError(f"`bootstrap` is {bootstrap}. Pass 0 or more.")
    encoder.encode_texts(["a"], max_length=max_length, progress=False)
    _check(data)
    if prompts is not None:
        _check_prompts(prompts, data)
    elif not isinstance(data, RetrievalData):
        class_texts(data.class_names, templates, descriptions)
    fingerprints = encoder.fingerprints()
    digests = image_digests(data.images, names=data.image_names, progress=progress)
    of_images = {
        "names": data.image_names,
        "digests": digests,
        "cache": cache,
        "batch_size": batch_size or 32,
        "fingerprint": fingerprints["image"],
        "progress": progress,
    }
    settings = {
        "cache": cache,
        "batch_size": batch_size or 64,
        "max_length": max_length,
        "fingerprint": fingerprints["text"],
        "progress": progress,
    }
    protocol: dict[str, Any] = {"batch_size": batch_size}
    if max_length is not None:
        protocol["max_length_asked"] = max_length
    if isinstance(data, RetrievalData):
        task = "image-text-retrieval"
        image_embeds = embed_images(encoder, data.images, **of_images)
        text_embeds, was_cut = embed_texts(encoder, data.texts, **settings)
        metrics = retrieval_metrics(image_embeds, text_embeds, data.text_to_image, bootstrap=bootstrap)
        protocol |= {
            "num_texts_cut": int(was_cut.sum()),
            "similarity": "cosine",
            "search": "exact",
            "bootstrap": bootstrap,
        }
    elif prompts is not None:
        task = "zero-shot-image-classification"
        image_embeds = embed_images(encoder, data.images, **of_images)
        with torch.no_grad():
            metrics = accuracies(prompts(image_embeds), data.labels)
        protocol |= {"prompts": prompts.describe()}
    else:
        class_embeds = class_embeddings(encoder, data.class_names, templates, descriptions=descriptions, **settings)
        if templates is None:
            templates = DEFAULT_TEMPLATES if descriptions is None else ()
        protocol |= {"templates": list(templates)}
        if descriptions is not None:
            texts = json.dumps([list(descriptions[name]) for name in data.class_names])
            digest = hashlib.blake2b(texts.encode(), digest_size=8).hexdigest()
            protocol |= {"descriptions": f"{sum(map(len, descriptions.values()))} texts, {digest}"}
        if isinstance(data, SegmentationData):
            task, options = SEGMENTATION, {"batch_size": batch_size or 32, "progress": progress}
            metrics = segmentation_metrics(encoder, data, class_embeds, **options)
        else:
            task = "zero-shot-image-classification"
            image_embeds = embed_images(encoder, data.images, **of_images)
            metrics = accuracies(image_embeds @ class_embeds.T, data.labels)
    record = record_of(encoder, data, fingerprints, digests, benchmark, model_name, protocol)
    return {"task": task, "metrics": telling_metrics(metrics, record["protocol"]), **record}


def study(
    encoder: Encoder,
    data: RetrievalData,
    kind: Literal["length", "sentences"],
    *,
    limits: Sequence[int] | None = None,
    benchmark: str | None = None,
    model_name: str | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Studies how much long texts help a model. Arguments not listed here are those of [`evaluate`].

    Args:
        data (`RetrievalData`): Images and texts.
        kind (`str`): `"length"` for [`~lotlip_hf.evaluation.studies.length_study`] or `"sentences"` for
            [`~lotlip_hf.evaluation.studies.sentence_ablation`].
        limits (`Sequence[int]`, *optional*): Maximum lengths of a text in tokens, for `"length"`.

    Returns:
        `dict[str, Any]`: Results as from [`evaluate`], with `study` and `rows` instead of `metrics`.

    Raises:
        `ValueError`: If `data` has classes or prompts instead of texts, or `limits` is invalid.
    """
    if not isinstance(data, RetrievalData):
        raise ValueError(f"{data.name} has classes or prompts instead of texts. A study needs a retrieval task.")
    _check(data)
    fingerprints = encoder.fingerprints()
    digests = image_digests(data.images, names=data.image_names, progress=progress)
    settings = {"digests": digests, "cache": cache, "batch_size": batch_size, "progress": progress}
    if kind == "length":
        rows = length_study(encoder, data, limits, **settings)
    else:
        rows = sentence_ablation(encoder, data, **settings)
    protocol = {"batch_size": batch_size, "similarity": "cosine", "search": "exact"}
    record = record_of(encoder, data, fingerprints, digests, benchmark, model_name, protocol)
    return {"task": "image-text-retrieval", "study": kind, "rows": rows, **record}


def _check(data: Data) -> None:
    """Raises a `ValueError` if the indices of the data do not match its images, texts or classes."""
    if isinstance(data, RetrievalData):
        name, indices, count, number = "text_to_image", data.text_to_image, len(data.texts), len(data.images)
    elif isinstance(data, PromptData):
        raise ValueError(f"{data.name} has prompts. Call `lotlip_hf.pictures.evaluate_prompts`.")
    elif isinstance(data, SegmentationData):
        if len(data.masks) != len(data.images):
            raise ValueError(f"`data.masks` has {len(data.masks)} masks. Pass {len(data.images)}.")
        return
    else:
        name, indices, count, number = "labels", data.labels, len(data.images), len(data.class_names)
    if len(indices) != count or not all(0 <= int(index) < number for index in indices):
        raise ValueError(f"`data.{name}` is invalid. Pass {count} indices from 0 to {number - 1}.")


def _check_prompts(prompts: PromptedClasses | MixedPrompts, data: Data) -> None:
    """Raises a `ValueError` if learnt prompts do not have the classes of the data."""
    if not isinstance(data, ClassificationData):
        raise ValueError(f"`prompts` (--prompts) are for classification, but {data.name} is another task.")
    if (own := prompts.class_names) != (names := list(data.class_names)):
        pairs = zip_longest(own, names)
        index, (one, other) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"`prompts` (--prompts) were learnt for {len(own)} classes, and {data.name} has {len(names)}. Class "
            f"{index} is {one!r} in the prompts and {other!r} in the data. Pass prompts of the same classes, in order."
        )


def record_of(
    encoder: Encoder,
    data: Data,
    fingerprints: dict[str, str],
    digests: Sequence[str],
    benchmark: str | None,
    model_name: str | None,
    protocol: dict[str, Any],
) -> dict[str, Any]:
    """Returns the part of the results that describes the model, the data and the settings."""
    if isinstance(data, RetrievalData):
        counts = {"num_images": len(data.images), "num_texts": len(data.texts)}
        contents: Any = [list(data.texts), [int(index) for index in data.text_to_image]]
    elif isinstance(data, PromptData):
        counts = {"num_images": len(data.images)}
        contents = [list(data.prompts), list(data.parts)]
    else:
        counts = {"num_images": len(data.images), "num_classes": len(data.class_names)}
        is_segmentation = isinstance(data, SegmentationData)
        labels = image_digests(data.masks, progress=False) if is_segmentation else [int(one) for one in data.labels]
        contents = [list(data.class_names), labels]
    return {
        "model": model_name or encoder.name,
        "model_revision": encoder.revision,
        "model_fingerprint": fingerprints,
        "benchmark": benchmark or data.name,
        "dataset": {"id": data.id, "name": data.name, "split": data.split, "revision": data.revision},
        "data_fingerprint": hashlib.blake2b(json.dumps([digests, contents]).encode(), digest_size=16).hexdigest(),
        "protocol": {
            **counts,
            **data.protocol,
            "max_length": protocol.get("max_length_asked", encoder.max_text_length),
            **protocol,
        },
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
            **encoder.versions,
        },
        "device": encoder.device.type,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_results(results: dict[str, Any], output: str | os.PathLike) -> None:
    """
    Writes results atomically to a JSON file.

    Args:
        results (`dict[str, Any]`): Results from [`evaluate`] or [`study`].
        output (`str` or `os.PathLike`): The file.

    Raises:
        `OSError`: If the file cannot be written; the message names it.
    """
    with replacing(Path(output)) as file:
        file.write((json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())


def results_table(results: dict[str, Any]) -> str:
    """Formats results as text: recalls in both directions, accuracies, scores of prompts, or the rows of a study."""
    protocol, dataset = results["protocol"], results["dataset"]
    title = f"{results['model']} on {dataset['name']}" + (f" ({dataset['split']})" if dataset["split"] else "")
    title = f"{printable(title)}: {protocol['num_images']} images, "
    if "study" in results:
        return f"{title}{protocol['num_texts']} texts\n" + study_table(results["study"], results["rows"])
    if results["task"] == PROMPTS:
        return f"{title}{protocol['num_texts_cut']} prompts cut at {protocol['max_length']} tokens\n" + prompt_table(
            results["metrics"], results["rows"], protocol
        )
    head, rows = metric_table(results["task"], results["metrics"])
    if results["task"] != RETRIEVAL:
        return f"{title}{protocol['num_classes']} classes\n" + table([head], rows, "text", left=0)
    title += f"{protocol['num_texts']} texts ({protocol['num_texts_cut']} cut at {protocol['max_length']} tokens)"
    return f"{title}\n" + table([head], rows, "text")
