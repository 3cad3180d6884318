"""ImageInWords: long captions by people of images of DOCCI and DCI."""

import logging
from collections.abc import Iterator

from ...data.readers import every_row
from .collect import Row, Source, Task
from .files import ImageFinder, caption_of, field_of, string_of

logger = logging.getLogger(__name__)

# Of each part: the folders of its images, as LoTLIP's evaluation lays them out and as they are unpacked.
PARTS = {
    "DOCCI_Test": ("docci", "docci/images", "images"),
    "IIW-400": ("docci_aar", "docci/images_aar", "images_aar"),
    "DCI_Test": ("dci", "dci/densely_captioned_images/photos", "densely_captioned_images/photos", "photos"),
}


def rows(source: Source) -> Iterator[Row]:
    """The lines of each part's file."""
    folder = source.folder()
    finder = ImageFinder(source.roots)
    source.protocol |= {"captions": "IIW", "parts": list(PARTS)}
    for part, folders in PARTS.items():
        above = ("", "datasets/", "imageinwords/", "imageinwords/datasets/")
        file = source.file(*(f"{one}{part}/data.jsonl" for one in above))
        for number, row in enumerate(every_row(file), start=1):
            where = f"{file}, entry {number}"
            key = string_of(row, "image" if "image" in row else "image/key", where)
            name = key if ".jpg" in key else f"{key}.jpg"
            paths = [folder / one / name for one in folders]
            if part == "IIW-400" and finder.find(*paths) is None:
                # The images came to be split anew: LoTLIP's evaluation takes those of the same number, and so do we.
                renamed = [folder / one / name.replace("test", "train") for one in folders]
                if finder.find(*renamed) is not None:
                    if "images_named_train" not in source.protocol:
                        logger.warning("Images of IIW-400 are there as train, not test: %s, ...", name)
                    source.protocol["images_named_train"] = source.protocol.get("images_named_train", 0) + 1
                    paths = renamed
            yield Row(f"{part}/{name}", paths, texts=[caption_of(field_of(row, "IIW", where), where)])


TASK = Task(
    key="iiw",
    name="IIW",
    id="google/imageinwords",
    description="long captions by people: IIW-400, DCI-Test and DOCCI-Test",
    source=(
        "the folders IIW-400, DCI_Test and DOCCI_Test of datasets/ of github.com/google/imageinwords; the images of "
        "DOCCI (google.github.io/docci) in docci/ and docci_aar/ (or as unpacked, images/ and images_aar/), those of "
        "DCI in dci/ (or densely_captioned_images/photos/)."
    ),
    rows=rows,
    options=("num_images", "normalize"),
    num_images=612,
    num_texts=612,
)
