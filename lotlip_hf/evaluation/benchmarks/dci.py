"""DCI: very long captions, written by people."""

from collections.abc import Iterator

from .collect import Row, Source, Task
from .files import caption_of, field_of, read_json, string_of

CAPTIONS = ("short_caption", "extra_caption")


def rows(source: Source) -> Iterator[Row]:
    """Yields the photos and captions in the annotation files of a split."""
    folders = ("", "densely_captioned_images/", "data/densely_captioned_images/")
    splits_file = source.file(*(f"{folder}splits.json" for folder in folders))
    splits, split = read_json(splits_file), source.split
    source.check_split(["all", *splits])
    source.protocol["captions"] = "short_caption, a line end, extra_caption"
    source.known = () if split == "all" else None
    for file in (name for key, own in splits.items() if split in ("all", key) for name in own):
        path = splits_file.parent / "annotations" / file
        if not path.is_file():
            yield Row(f"annotations/{file}")
            continue
        annotation = read_json(path)
        name = f"photos/{string_of(annotation, 'image', path)}"
        parts = [caption_of(field_of(annotation, key, path), f"{path}, {key}") for key in CAPTIONS]
        text = None if None in parts else "\n".join(part or "" for part in parts)
        yield Row(name, (splits_file.parent / name,), texts=[text])


TASK = Task(
    key="dci",
    name="DCI",
    id="facebook/DCI",
    description="very long captions, written by people, all splits",
    source=(
        "download dci.tar.gz from github.com/facebookresearch/DCI (densely_captioned_images/ with splits.json and "
        "annotations/), and unpack sa_000138.tar of SA-1B to densely_captioned_images/photos/."
    ),
    rows=rows,
    options=("num_images", "split", "normalize"),
    num_images=7805,
    num_texts=7805,
    split="all",
)
