"""What commands with a model share: its options, how it is loaded, and which images it could not read."""

import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..files import printable
from ..options import check, option

if TYPE_CHECKING:
    from ..encoder import Encoder


@dataclass(kw_only=True)
class ImageOptions:
    """Which images are read."""

    max_image_pixels: int | None = option(
        "skip images of more pixels, and decode no more at a time (178956970; each takes up to 12 bytes)",
        None,
        at_least=1,
    )

    def __post_init__(self) -> None:
        check(self)

    def apply(self) -> None:
        """Sets the limit for this process, and hides PIL's warnings, which do not name an image."""
        # PIL's warnings are of images that it reads all the same. What it cannot read is reported.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if self.max_image_pixels is not None:
            from ..images import set_max_image_pixels

            set_max_image_pixels(self.max_image_pixels)


@dataclass(kw_only=True)
class ModelOptions(ImageOptions):
    """A model and how it runs."""

    model: str = option("checkpoint folder or Hub id: LoTLIP, CLIP, SigLIP, ...")
    device: str | None = option("cpu, cuda, cuda:1, mps, ...; by default the accelerator, if there is one", None)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "of the weights; auto keeps the checkpoint's", "auto"
    )
    batch_size: int | None = option("images, or texts of full length, in a batch", None, at_least=1)

    def load(self, revision: str | None = None) -> "Encoder":
        """The encoder."""
        from transformers.utils import logging

        from ..encoder import load_encoder

        logging.disable_progress_bar()  # the loading of weights; ours stay
        self.apply()
        return load_encoder(self.model, device=self.device, dtype=self.dtype, revision=revision)


def report_skipped(skipped: dict[str, str]) -> None:
    """Names the images that could not be read."""
    if skipped:
        print(f"{len(skipped)} {'image was' if len(skipped) == 1 else 'images were'} skipped:", file=sys.stderr)
        for name, reason in skipped.items():
            print(f"  {printable(name)}: {printable(reason)}", file=sys.stderr)
