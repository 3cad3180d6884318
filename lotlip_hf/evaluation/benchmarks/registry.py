"""
Benchmarks by name. To add a benchmark, write a file with its `TASK` and `rows`, and add it to the tuple below.

An incomplete data set raises an error that lists the missing parts. To evaluate only a part, pass `num_images`, which
the results record.
"""

import os
from typing import Any

from ...data.records import is_hub_name
from ..tasks import Data
from . import (
    classification,
    dci,
    docci,
    iiw,
    imagenet,
    imagenet_v2,
    karpathy,
    prompts,
    retrieval,
    scenes,
    segmentation,
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
        segmentation.TASK,
        retrieval.TASK,
        prompts.TASK,
        scenes.TASK,
    )
}
# Studies that run on a retrieval task.
STUDIES = {
    "length-study": "recall of a retrieval task with texts cut at several lengths",
    "sentence-ablation": "recall of a retrieval task with one sentence of each text removed",
}


def load_benchmark(task: str, data: str | os.PathLike | None = None, **options: Any) -> Data:
    """
    Reads a benchmark: images with texts, with classes, with masks of classes, or with the parts of their prompts.

    Args:
        task (`str`): Key of a task in `TASKS`, such as `"iiw"`.
        data (`str` or `os.PathLike`, *optional*): Folder of the unpacked data set or its parent, or the id of a data
            set on the Hub (`owner/name`). Defaults to the task's data set on the Hub, if it has one.
        **options: Fields of [`~lotlip_hf.evaluation.benchmarks.collect.Options`] that the task supports.

    Returns:
        `RetrievalData`, `ClassificationData`, `SegmentationData` or `PromptData`: The data set. Its
            `protocol` records the settings.

    Raises:
        `IncompleteDataError`: If images, captions or classes are missing. The message lists them and their source.
        `FileNotFoundError`: If the folder does not exist.
        `ImportError`: If `class_names` is `"openai"` but open_clip is not installed.
        `ValueError`: If a file cannot be read, the task does not support an option, or the Hub does not provide the
            data.

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
            f"`task` (--task) {task!r} is unknown. Pass one of {', '.join(TASKS)}. The command line also accepts the "
            f"studies {', '.join(STUDIES)}, with a retrieval task as `--benchmark`."
        )
    given = Options(**options)
    has = TASKS[task].options if task == "scenes" else (*TASKS[task].options, "image_root")
    for option, value in vars(given).items():
        if value is not None and option not in has:
            raise ValueError(f"{task} does not support `{option}`. Its options: {', '.join(has)}.")
    if given.captions not in (None, "long", "all", "short"):
        raise ValueError(f'`captions` is {given.captions!r}. Pass "long", "all" or "short".')
    if data is None and TASKS[task].hub_id is None and task != "scenes":
        raise ValueError(f"{task} needs its folder as `data` (--data). Where to get it: {TASKS[task].source}")
    if given.revision is not None and data is not None and not is_hub_name(data):
        raise ValueError(f"`revision` is only for data sets on the Hub, but {data} is not one. Omit it.")
    return collect(Source(TASKS[task], None if data is None else os.fspath(data), given))


def describe_tasks() -> str:
    """
    Lists the tasks and studies for the command line.

    Returns:
        `str`: A line with the key and the description of each task and study.

    Example:

    ```python
    >>> print(describe_tasks().splitlines()[1])
    iiw                long captions, written by people: IIW-400, DCI-Test and DOCCI-Test
    ```
    """
    described = {key: task.description for key, task in TASKS.items()} | STUDIES
    width = max(map(len, described)) + 2
    return "\n".join(f"{key:{width}}{description}" for key, description in described.items())
