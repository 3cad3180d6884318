"""Results files of `lotlip evaluate`, and their entries for a model card."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import EvalResult

from ..files import parse_json, printable, read_regular
from .retrieval import telling_metrics

# Kinds of captions of a data set
CAPTIONS = ("all", "long", "short")
# Names of metrics and study columns that are shares from 0 to 1
SHARE = re.compile(
    r"(image_to_text|text_to_image)_r\d+(_low|_high)?|accuracy_top\d+|mean_per_class_recall|texts_cut|"
    r"(calibrated_)?(mean_iou|pixel_accuracy)|supported_(parts|words)"
)
# String fields of a results file and of its `dataset`
TEXTS = (
    *("task", "study", "model", "model_revision", "data_fingerprint", "dtype"),
    *("id", "name", "split", "revision"),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Results:
    """
    A results file.

    Args:
        file (`str` or `os.PathLike`): Path of the file.
        content (`dict`): The JSON object in the file.
        entries (`list[EvalResult]`): The metrics as entries of a model card's `model-index`.
    """

    file: str | os.PathLike
    content: dict[str, Any]
    entries: list[EvalResult]


class ResultsError(ValueError):
    """
    A file does not contain results of `lotlip evaluate`.

    Args:
        file (`str` or `os.PathLike`): Path of the file.
        problem (`str`): Description of the error.
    """

    def __init__(self, file: str | os.PathLike, problem: str) -> None:
        self.file, self.problem = file, problem
        super().__init__(f"{file} contains no results ({problem}). Pass a JSON file written by `lotlip evaluate`.")


def load_results(file: str | os.PathLike) -> Results:
    """
    Reads a results file of an evaluation.

    Args:
        file (`str` or `os.PathLike`): File from `lotlip evaluate`, or any JSON object with `task` (such as
            `"image-text-retrieval"`), `dataset` (with `id`, `name` and optionally `split` and `revision`) and
            `metrics`. If its `protocol` has `first_images`, the entries state that number of images.

    Returns:
        `Results`: The results. Entries omit recall and accuracy at k if there are at most k candidates.

    Raises:
        `ResultsError`: If the file does not contain results.
        `OSError`: If the file cannot be read.
    """
    return parsed(file, lambda content: Results(file, content, entries_of(content)))


def parsed(file: str | os.PathLike, make: Callable[[dict[str, Any]], T]) -> T:
    """Calls `make` with the JSON object in a results file. Invalid contents raise a [`ResultsError`]."""
    data = read_regular(file)
    try:
        content = _one_line(parse_json(data))
        dataset = content.get("dataset")
        for where, part in (("", content), ("dataset.", dataset if isinstance(dataset, dict) else {})):
            for name in TEXTS:
                if not isinstance(part.get(name), str | None):
                    raise ValueError(f"`{where}{name}` is {part[name]!r} instead of a string")
        return make(content)
    except KeyError as error:
        raise ResultsError(file, f"{error} is missing") from error
    except (TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ResultsError(file, str(error)) from error


def _one_line(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(key): _one_line(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_one_line(part) for part in value]
    return printable(value) if isinstance(value, str) else value


def entries_of(content: Mapping[str, Any]) -> list[EvalResult]:
    """Converts the metrics of an evaluation to entries of a model card's `model-index`."""
    protocol = content.get("protocol", {})
    task, dataset, metrics = content["task"], content["dataset"], telling_metrics(content["metrics"], protocol)
    first_images, captions, limit = (protocol.get(name) for name in ("first_images", "captions", "max_length_asked"))
    # a model-index merges entries with the same data set and `config`
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
