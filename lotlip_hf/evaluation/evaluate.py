"""One evaluation from a model and a data set to a file of results."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from ..encoding import max_text_length
from ..store import fingerprint
from .data import ClassificationData, RetrievalData
from .embeddings import embed_images, embed_texts, image_digests
from .models import model_revision, model_versions
from .report import study_table, table
from .retrieval import accuracies, retrieval_metrics
from .studies import length_study, sentence_ablation
from .zero_shot import DEFAULT_TEMPLATES, class_embeddings

LIBRARIES = ("lotlip-hf", "torch", "transformers", "tokenizers", "pillow", "numpy")


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    data: RetrievalData | ClassificationData,
    *,
    benchmark: str | None = None,
    model_name: str | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    max_length: int | None = None,
    bootstrap: int = 1000,
    faiss_index: str | None = None,
    faiss_parameters: str | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Scores a dual encoder on a data set: retrieval in both directions where it has texts, zero-shot classification
    where it has classes. Of several processes each encodes its share; all return the same.

    Args:
        model: A dual encoder, as [`~lotlip_hf.encoding.load_model`] gives it.
        processor: Its processor.
        data: What [`~lotlip_hf.evaluation.benchmarks.load_benchmark`] reads, or data of one's own.
        benchmark: Name of the benchmark, such as `"iiw"`: the column of the report. By default the name of `data`.
        model_name: What the results call the model; by default the folder or Hub id that it was loaded from.
        templates: Prompts for classes, with `{}` in the place of the class.
        max_length: Tokens to cut texts at; by default as many as the model takes.
        bootstrap: Samples for the 95 % intervals of R@1; 0 for none.
        faiss_index: Search with this FAISS index (`"Flat"`, `"IVF256,Flat"`, ...) instead of exactly.
        faiss_parameters: Settings of the index, such as `"nprobe=16"`.
        cache: Folder that keeps the embeddings; see [`~lotlip_hf.evaluation.embeddings.embed_texts`].
        batch_size: Images, or texts of full length, in a batch; by default 32 and 64.
        progress: Whether to show progress bars.

    Returns:
        A dictionary that JSON can hold: `model`, `model_revision`, `model_fingerprint`; `task` (as the Hub calls it),
        `benchmark`, `dataset`, `data_fingerprint`, `protocol`; `metrics`, shares from 0 to 1 and ranks from 1;
        `versions` and `date`. The names of the metrics are those of [`~lotlip_hf.evaluation.retrieval`].

    Raises:
        IncompleteDataError: if images cannot be read; it names them.
        ValueError: if the model or the processor lacks something; it says what.

    Example:

    ```python
    >>> from lotlip_hf.encoding import load_model
    >>> from lotlip_hf.evaluation.benchmarks import load_benchmark
    >>> from lotlip_hf.evaluation.evaluate import evaluate

    >>> model, processor = load_model("path/to/checkpoint")  # doctest: +SKIP
    >>> results = evaluate(model, processor, load_benchmark("iiw", "path/to/iiw"))  # doctest: +SKIP
    >>> results["metrics"]["text_to_image_r1"]  # doctest: +SKIP
    ```
    """
    settings = {"cache": cache, "progress": progress}
    digests = image_digests(data.images, names=data.image_names, progress=progress)
    image_embeds = embed_images(
        model,
        processor,
        data.images,
        names=data.image_names,
        digests=digests,
        batch_size=batch_size or 32,
        **settings,
    )
    settings |= {"batch_size": batch_size or 64, "max_length": max_length}
    protocol: dict[str, Any] = {"max_length": max_length or max_text_length(model, processor.tokenizer)}
    if isinstance(data, RetrievalData):
        task = "image-text-retrieval"
        text_embeds, was_cut = embed_texts(model, processor, data.texts, **settings)
        metrics = retrieval_metrics(
            image_embeds,
            text_embeds,
            data.text_to_image,
            bootstrap=bootstrap,
            faiss_index=faiss_index,
            faiss_parameters=faiss_parameters,
        )
        protocol |= {
            "num_texts_cut": int(was_cut.sum()),
            "similarity": "cosine",
            "search": " ".join(["FAISS", faiss_index, faiss_parameters or ""]).strip() if faiss_index else "exact",
            "bootstrap": bootstrap,
        }
    else:
        task = "zero-shot-image-classification"
        class_embeds = class_embeddings(model, processor, data.class_names, templates, **settings)
        metrics = accuracies(image_embeds @ class_embeds.T, data.labels)
        protocol |= {"templates": list(templates)}
    record = _record(model, processor, data, digests, benchmark, model_name, protocol)
    return {"task": task, "metrics": metrics, **record}


def study(
    model: PreTrainedModel,
    processor: Any,
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
    Studies what long texts are worth to a model.

    Args:
        model, processor, benchmark, model_name, cache, batch_size, progress: As in [`evaluate`].
        data: Images and texts.
        kind: `"length"`, for [`~lotlip_hf.evaluation.studies.length_study`], or `"sentences"`, for
            [`~lotlip_hf.evaluation.studies.sentence_ablation`].
        limits: For `"length"`: where texts are cut.

    Returns:
        As [`evaluate`], but with `study` and `rows` in place of `metrics`.

    Raises:
        ValueError: if `data` has classes, not texts; and as the studies.
    """
    if not isinstance(data, RetrievalData):
        raise ValueError(f"{data.name} has classes and no texts: a study needs a retrieval task.")
    settings = {"cache": cache, "batch_size": batch_size, "progress": progress}
    if kind == "length":
        rows = length_study(model, processor, data, limits, **settings)
    else:
        rows = sentence_ablation(model, processor, data, **settings)
    digests = image_digests(data.images, names=data.image_names, progress=progress)
    protocol = {"max_length": max_text_length(model, processor.tokenizer), "similarity": "cosine"}
    record = _record(model, processor, data, digests, benchmark, model_name, protocol)
    return {"task": "image-text-retrieval", "study": kind, "rows": rows, **record}


def _record(
    model: PreTrainedModel,
    processor: Any,
    data: RetrievalData | ClassificationData,
    digests: Sequence[str],
    benchmark: str | None,
    model_name: str | None,
    protocol: dict[str, Any],
) -> dict[str, Any]:
    """What was measured with what: everything that somebody needs to do it again."""
    if isinstance(data, RetrievalData):
        counts = {"num_images": len(data.images), "num_texts": len(data.texts)}
        contents: Any = [list(data.texts), [int(place) for place in data.text_to_image]]
    else:
        counts = {"num_images": len(data.images), "num_classes": len(data.class_names)}
        contents = [list(data.class_names), [int(label) for label in data.labels]]
    return {
        "model": str(model_name or getattr(model, "name_or_path", "") or type(model).__name__),
        "model_revision": model_revision(model),
        "model_fingerprint": {modality: fingerprint(model, processor, modality) for modality in ("image", "text")},
        "benchmark": benchmark or data.name,
        "dataset": {"id": data.id, "name": data.name, "split": data.split, "revision": data.revision},
        "data_fingerprint": hashlib.blake2b(json.dumps([digests, contents]).encode(), digest_size=16).hexdigest(),
        "protocol": {**counts, **data.protocol, **protocol},
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
            **model_versions(model),
        },
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def check_results_file(output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """
    Finds out before the long work whether its results can be written.

    Args:
        output: The JSON file to be.
        overwrite: Whether it may be there already.

    Raises:
        FileExistsError: if it is there already and not to be overwritten.
        NotADirectoryError: if its folder is not there.
    """
    output = Path(output)
    if output.is_dir():
        raise FileExistsError(f"{output}: a folder, not a JSON file to write.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output}: exists already; choose another name, or --overwrite (`overwrite=True`).")
    if not output.parent.is_dir():
        raise NotADirectoryError(f"{output.parent}: no such folder to write {output.name} in.")


def write_results(results: dict[str, Any], output: str | os.PathLike) -> None:
    """Writes results as a JSON file, whole or not at all."""
    output = Path(output)
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, output)


def results_table(results: dict[str, Any]) -> str:
    """Results as text: a row for each direction of a retrieval, one of accuracies, or those of a study."""
    protocol, dataset = results["protocol"], results["dataset"]
    title = f"{results['model']} on {dataset['name']}" + (f" ({dataset['split']})" if dataset["split"] else "")
    title += f": {protocol['num_images']} images, "
    if "study" in results:
        return f"{title}{protocol['num_texts']} texts\n" + study_table(results["study"], results["rows"])
    metrics = results["metrics"]
    if results["task"] == "zero-shot-image-classification":
        title += f"{protocol['num_classes']} classes"
        names = {"accuracy_top1": "top-1", "accuracy_top5": "top-5", "mean_per_class_recall": "mean per class"}
        head = ["", *(names[name] for name in metrics)]
        rows = [["accuracy", *(f"{value:.2%}" for value in metrics.values())]]
    else:
        title += f"{protocol['num_texts']} texts ({protocol['num_texts_cut']} cut at {protocol['max_length']} tokens)"
        head = ["", "R@1", "95 % interval", "R@5", "R@10", "median rank"]
        rows = []
        for direction in ("image_to_text", "text_to_image"):
            values = {name.removeprefix(f"{direction}_"): value for name, value in metrics.items()}
            interval = f"{values['r1_low']:.2%} - {values['r1_high']:.2%}" if "r1_low" in values else ""
            rank = f"{values['median_rank']:g}" if "median_rank" in values else ""
            shares = [f"{values[f'r{k}']:.2%}" for k in (1, 5, 10)]
            rows.append([direction.replace("_", " "), shares[0], interval, *shares[1:], rank])
    return f"{title}\n" + table([head], rows, "text")
