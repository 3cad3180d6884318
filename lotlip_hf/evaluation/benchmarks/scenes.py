"""Scenes that no model was trained on, drawn as they are asked for."""

from collections.abc import Iterator
from functools import partial

from ...scenes.dataset import long_captions, render, scene, short_caption
from .collect import Row, Source, Task


def rows(source: Source) -> Iterator[Row]:
    """The scenes of a split that is held out."""
    split, captions = source.options.split or "test", source.options.captions or "long"
    if source.data is not None:
        raise ValueError(f"`data` {source.data!r}: scenes are drawn, not read.")
    if split not in ("validation", "test"):
        raise ValueError(f"`split` must be validation or test, which are held out, got {split!r}.")
    source.split = split
    source.protocol["captions"] = captions
    for index in range(source.options.num_images or source.task.num_images or 0):
        drawn = scene(index, split=split)
        texts = [short_caption(drawn)] if captions == "short" else long_captions(drawn)
        yield Row(drawn.id, load=partial(render, drawn), texts=texts if captions == "all" else texts[:1])


TASK = Task(
    key="scenes",
    name="Scenes",
    id="scenes",
    description="drawn pictures with long captions that no model of the quickstart was trained on",
    source="nowhere: they are drawn.",
    rows=rows,
    options=("num_images", "split", "captions", "normalize"),
    num_images=500,
    num_texts=500,
    split="test",
)
