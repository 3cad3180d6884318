"""Urban1k: long captions of city scenes, from Long-CLIP."""

import os
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...data.records import is_hub_name
from .collect import Row, Source, Task
from .files import is_image_name, read_bytes, read_text
from .hub import hub_archive, hub_commit


def rows(source: Source) -> Iterator[Row]:
    """Yields each image with the caption file of the same number, from a folder or the published archive."""
    data = source.data
    if data is None or is_hub_name(data):
        source.id = data or source.task.hub_id or ""
        source.revision = hub_commit(source.id, source.options.revision)
        data = hub_archive(source.id, source.options.revision, source.revision)
    is_archive = os.path.isfile(data) and zipfile.is_zipfile(data)
    folder: Path | zipfile.Path = zipfile.Path(data) if is_archive else source.folder()
    candidates = (folder, *(folder / name for name in ("Urban1k", "Urban-1k", "urban1k")))
    root = next((one for one in candidates if (one / "caption").is_dir() and (one / "image").is_dir()), None)
    if root is None:
        raise source.incomplete(f"{data} does not contain the folders image/ and caption/")
    source.where, source.known = str(root / "caption"), ()
    source.protocol["captions"] = "the first line of each file"
    # keys are file names without extensions, which are numbers
    captions = {_stem(path): path for path in (root / "caption").iterdir() if path.name.lower().endswith(".txt")}
    images = {_stem(path): path for path in (root / "image").iterdir() if is_image_name(path.name)}
    stems = captions.keys() | (images.keys() if len(captions) < (source.task.num_images or 0) else set())
    for stem in sorted(stems, key=lambda stem: (not stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem)):
        text = re.split("\r\n|\r|\n", read_text(captions[stem]), maxsplit=1)[0] if stem in captions else None
        image = images.get(stem)
        name = f"image/{stem}.jpg" if image is None else f"image/{image.name}"
        if isinstance(image, zipfile.Path):
            yield Row(name, load=partial(read_bytes, image), texts=[text])
        else:
            yield Row(name, () if image is None else (image,), texts=[text])


def _stem(path: Path | zipfile.Path) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(path.name)[0])


TASK = Task(
    key="urban1k",
    name="Urban1k",
    id="BeichenZhang/Urban1k",
    description="long captions of city scenes, from Long-CLIP",
    source="download Urban1k.zip from BeichenZhang/Urban1k on the Hub; it contains image/ and caption/.",
    rows=rows,
    options=("num_images", "revision", "normalize"),
    num_images=1000,
    num_texts=1000,
    hub_id="BeichenZhang/Urban1k",
)
