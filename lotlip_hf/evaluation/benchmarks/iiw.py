"""ImageInWords: long captions, written by people, of images from DOCCI and DCI."""

import logging
from collections.abc import Iterator

from ...data.readers import every_row
from .collect import Row, Source, Task
from .files import ImageFinder, caption_of, field_of, string_of

logger = logging.getLogger(__name__)

# Part -> possible folders of its images, in the layout of LoTLIP's evaluation or of the unpacked archives.
PARTS = {
    "DOCCI_Test": ("docci", "docci/images", "images"),
    "IIW-400": ("docci_aar", "docci/images_aar", "images_aar"),
    "DCI_Test": ("dci", "dci/densely_captioned_images/photos", "densely_captioned_images/photos", "photos"),
}


def rows(source: Source) -> Iterator[Row]:
    """Yields the captions of all parts."""
    folder = source.folder()
    finder = ImageFinder(source.roots)
    source.protocol |= {"captions": "IIW", "parts": list(PARTS)}
    for part, folders in PARTS.items():
        parents = ("", "datasets/", "imageinwords/", "imageinwords/datasets/")
        file = source.file(*(f"{one}{part}/data.jsonl" for one in parents))
        for number, row in enumerate(every_row(file), start=1):
            where = f"{file}, entry {number}"
            key = string_of(row, "image" if "image" in row else "image/key", where)
            name = key if ".jpg" in key else f"{key}.jpg"
            paths = [folder / one / name for one in folders]
            if part == "IIW-400" and finder.find(*paths) is None:
                # DOCCI changed the splits of these images; like LoTLIP's evaluation, use the image of the same number
                renamed = [folder / one / name.replace("test", "train") for one in folders]
                if finder.find(*renamed) is not None:
                    if "images_named_train" not in source.protocol:
                        logger.warning("Images of IIW-400 are named train instead of test: %s, ...", name)
                    source.protocol["images_named_train"] = source.protocol.get("images_named_train", 0) + 1
                    paths = renamed
            yield Row(f"{part}/{name}", paths, texts=[caption_of(field_of(row, "IIW", where), where)])


TASK = Task(
    key="iiw",
    name="IIW",
    id="google/imageinwords",
    description="long captions, written by people: IIW-400, DCI-Test and DOCCI-Test",
    source=(
        "download the folders IIW-400, DCI_Test and DOCCI_Test from datasets/ of github.com/google/imageinwords. Put "
        "the images of DOCCI (google.github.io/docci) into docci/ and docci_aar/ (or images/ and images_aar/), those "
        "of DCI into dci/ (or densely_captioned_images/photos/)."
    ),
    rows=rows,
    options=("num_images", "normalize"),
    num_images=612,
    num_texts=612,
)
