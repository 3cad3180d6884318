"""
Benchmarks by name. To add one, write a file with a `TASK` and its `rows`, and add it to the tuple below.

A data set that lacks images or captions is refused with what is missing; only `num_images` makes a smaller one, and
the results say so.
"""

import os
from typing import Any

from ...data.records import is_hub_name
from ..tasks import ClassificationData, RetrievalData
from . import (
    classification,
    dci,
    docci,
    iiw,
    imagenet,
    imagenet_v2,
    karpathy,
    retrieval,
    scenes,
    sharegpt4v,
    urban1k,
)
from .collect import Options, Source, collect

TASKS = {
    task.key: task
    for task in (
        dci.TASK,
        iiw.TASK,
        sharegpt4v.SMALL,
        sharegpt4v.LARGE,
        urban1k.TASK,
        docci.TASK,
        karpathy.COCO,
        karpathy.FLICKR30K,
        imagenet.TASK,
        imagenet_v2.TASK,
        classification.TASK,
        retrieval.TASK,
        scenes.TASK,
    )
}
# Of a retrieval task, beside scoring it.
STUDIES = {
    "length-study": "a retrieval task's recall with its texts cut at one limit of tokens after the other",
    "sentence-ablation": "a retrieval task's recall with its texts less one of their sentences",
}


def load_benchmark(
    task: str, data: str | os.PathLike | None = None, **options: Any
) -> RetrievalData | ClassificationData:
    """
    Reads a benchmark: images with their texts, or with their classes.

    Args:
        task (`str`): a name in `TASKS`, such as `"iiw"`.
        data (`str` or `os.PathLike`, *optional*):
            The folder that the data set was unpacked to, the publisher's own or the one around it; or the name of a
            data set on the Hub (`owner/name`). By default the task's own on the Hub, if it has one.
        options:
            The fields of [`~lotlip_hf.evaluation.benchmarks.collect.Options`]. Each task has some of them; one that it
            does not have is refused.

    Returns:
        `RetrievalData` or `ClassificationData`: the data, with what was chosen in its `protocol`.

    Raises:
        IncompleteDataError: if images, captions or classes are missing. It says which, and where to get them.
        FileNotFoundError: if there is no such folder.
        ImportError: if `class_names` is `"openai"` and open_clip is not installed.
        ValueError: if a file cannot be read, an argument is none that the task has, or the Hub does not give the data.

    Example:

    ```python
    >>> from lotlip_hf.evaluation.benchmarks.registry import load_benchmark

    >>> data = load_benchmark("scenes", num_images=8)
    >>> len(data.images), len(data.texts), list(data.text_to_image)
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7])
    >>> iiw = load_benchmark("iiw", "path/to/iiw")  # doctest: +SKIP
    ```
    """
    if task not in TASKS:
        raise ValueError(
            f"`task` (--task) must be one of {', '.join(TASKS)}, or on the command line a study of a retrieval task, "
            f"which --benchmark names: {', '.join(STUDIES)}; got {task!r}."
        )
    given = Options(**options)
    has = TASKS[task].options if task == "scenes" else (*TASKS[task].options, "image_root")
    for option, value in vars(given).items():
        if value is not None and option not in has:
            raise ValueError(f"`{option}` is no option of {task}; it has {', '.join(has)}.")
    if given.captions not in (None, "long", "all", "short"):
        raise ValueError(f'`captions` must be "long", "all" or "short", got {given.captions!r}.')
    if data is None and TASKS[task].hub_id is None and task != "scenes":
        raise ValueError(
            f"`data` (--data): {task} needs its folder, or what else it is in. Where to get it: {TASKS[task].source}"
        )
    if given.revision is not None and data is not None and not is_hub_name(data):
        raise ValueError(f"`revision` is for data sets on the Hub, and {data} is none.")
    return collect(Source(TASKS[task], None if data is None else os.fspath(data), given))


def describe_tasks() -> str:
    """
    What can be evaluated, for a list on the command line.

    Returns:
        `str`: a line for each task, its key and what is scored, and for each study of a retrieval task.

    Example:

    ```python
    >>> print(describe_tasks().splitlines()[1])
    iiw                long captions by people: IIW-400, DCI-Test and DOCCI-Test
    ```
    """
    described = {key: task.description for key, task in TASKS.items()} | STUDIES
    width = max(map(len, described)) + 2
    return "\n".join(f"{key:{width}}{description}" for key, description in described.items())
