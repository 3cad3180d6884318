"""Files of results, as `lotlip evaluate` writes them: read, and as the entries of a model card."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import EvalResult

from ..files import parse_json, printable, read_regular
from .retrieval import telling_metrics

# Kinds of captions, for data that have several
CAPTIONS = ("all", "long", "short")
# Shares, of evaluations and in the rows of studies
SHARE = re.compile(r"(image_to_text|text_to_image)_r\d+(_low|_high)?|accuracy_top\d+|mean_per_class_recall|texts_cut")
# Fields of a file of results, and of its `dataset`, that are texts
TEXTS = (
    *("task", "study", "model", "model_revision", "data_fingerprint", "dtype"),
    *("id", "name", "split", "revision"),
)

T = TypeVar("T")


@dataclass(frozen=True)
class Results:
    """
    A file of results.

    Args:
        file (`str` or `os.PathLike`): the file.
        content (`dict`): what it holds.
        entries (`list` of `EvalResult`): its metrics, as a card's metadata (`model-index`) has them.
    """

    file: str | os.PathLike
    content: dict[str, Any]
    entries: list[EvalResult]


class ResultsError(ValueError):
    """
    A file holds no results of `lotlip evaluate`.

    Args:
        file (`str` or `os.PathLike`): the file.
        problem (`str`): what is wrong with it.
    """

    def __init__(self, file: str | os.PathLike, problem: str) -> None:
        self.file, self.problem = file, problem
        super().__init__(f"{file}: no results of an evaluation, which are a JSON object ({problem}).")


def load_results(file: str | os.PathLike) -> Results:
    """
    Reads a file of results of an evaluation.

    Args:
        file (`str` or `os.PathLike`):
            What `lotlip evaluate` wrote, or any JSON object with `task` (such as `"image-text-retrieval"`), `dataset`
            (`id`, `name`, and maybe `split` and `revision`) and `metrics`, numbers by name. If its `protocol` has
            `first_images`, the entries say that they are of so many images.

    Returns:
        `Results`: one entry for each metric, but for a share of right ones among the first k of k candidates, which
        is 1.

    Raises:
        ResultsError: if the file is no such file.
        OSError: if it cannot be read.
    """
    return parsed(file, lambda content: Results(file, content, entries_of(content)))


def parsed(file: str | os.PathLike, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of a JSON object, of an evaluation or a study; whatever it lacks is a [`ResultsError`]."""
    data = read_regular(file)
    try:
        content = _one_line(parse_json(data))
        dataset = content.get("dataset")
        for where, part in (("", content), ("dataset.", dataset if isinstance(dataset, dict) else {})):
            for name in TEXTS:
                if not isinstance(part.get(name), str | None):
                    raise ValueError(f"`{where}{name}` is {part[name]!r}, expected a text")
        return make(content)
    except KeyError as error:
        raise ResultsError(file, f"it has no {error}") from error
    except (TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ResultsError(file, str(error)) from error


def _one_line(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(key): _one_line(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_one_line(part) for part in value]
    return printable(value) if isinstance(value, str) else value


def entries_of(content: Mapping[str, Any]) -> list[EvalResult]:
    """The metrics of an evaluation as a card's metadata has them."""
    protocol = content.get("protocol", {})
    task, dataset, metrics = content["task"], content["dataset"], telling_metrics(content["metrics"], protocol)
    first_images, captions, limit = (protocol.get(name) for name in ("first_images", "captions", "max_length_asked"))
    # entries of one data set and `config` are one entry of a model-index
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
