"""ShareGPT4V: long captions by its captioner of images of SAM."""

import os
import re
from collections.abc import Iterator

from ...data.readers import every_row, value_of
from .collect import Row, Source, Task
from .files import caption_of, string_of

FILES = ("share4v_sam_10k.json", "share-captioner_coco_lcs_sam_1246k_1107.json")


def rows(source: Source) -> Iterator[Row]:
    """The first entries of SAM in either file."""
    folder = source.folder()
    file = source.file(*(f"{one}{name}" for one in ("", "share4v/", "data/", "data/share4v/") for name in FILES))
    wanted = source.options.num_images or source.task.num_images or 0
    source.where = f"{file} (the part of SAM)"
    source.protocol["captions"] = "conversations[1].value"
    source.protocol["images"] = f"the first {wanted} of SAM in {file.name}"
    # SA-1B is unpacked to folders by the hundreds, which the names in the large file do not tell of
    shards = sorted(path for path in folder.glob("sa_*") if path.is_dir())
    folders = (folder / "sam/images", folder / "images", folder, *(s / one for s in shards for one in ("images", "")))
    found = 0
    for entry in every_row(file):
        name = string_of(entry, "image", f"{file}, entry {entry.get('id')}")
        base = os.path.basename(name)
        if not re.fullmatch(r"sa_\d+\.jpg", base):
            continue  # of COCO and LAION
        text = caption_of(value_of(entry, "conversations[1].value"), f"{file}, {name}")
        paths = (folder / name, folder / "data" / name, *(one / base for one in folders))
        yield Row(name, paths, texts=[text])
        found += 1
        if found == wanted:
            return


def _task(size: str, number: int) -> Task:
    return Task(
        key=f"sharegpt4v-{size}",
        name=f"ShareGPT4V-{size}",
        id="Lin-Chen/ShareGPT4V",
        description=f"long captions by ShareGPT4V's captioner of the first {number} images of SAM",
        source=(
            "share-captioner_coco_lcs_sam_1246k_1107.json of Lin-Chen/ShareGPT4V on the Hub, or share4v_sam_10k.json "
            "of github.com/wuw2019/LoTLIP; the images are those of SA-1B, unpacked to sa_000000/images/ and so on, or "
            "to sam/images/."
        ),
        rows=rows,
        options=("num_images", "normalize"),
        num_images=number,
        num_texts=number,
    )


SMALL, LARGE = _task("1k", 1000), _task("10k", 10_000)
