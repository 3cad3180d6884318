"""Held-out scenes of the drawn data set, rendered on demand."""

from collections.abc import Iterator
from functools import partial

from ...scenes.dataset import long_captions, render, scene, short_caption
from .collect import Row, Source, Task


def rows(source: Source) -> Iterator[Row]:
    """Yields the scenes of a held-out split."""
    split, captions = source.options.split or "test", source.options.captions or "long"
    if source.data is not None:
        raise ValueError(f"`data` is {source.data!r}, but scenes are drawn and need no data. Omit it.")
    if split not in ("validation", "test"):
        raise ValueError(f"`split` is {split!r}. Pass a held-out split: validation or test.")
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
    description="held-out drawn pictures with long captions",
    source="nothing to download; the scenes are drawn.",
    rows=rows,
    options=("num_images", "split", "captions", "normalize"),
    num_images=500,
    num_texts=500,
    split="test",
)
