"""Parts that commands share: the options of models and images, and the report of skipped images."""

import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..files import printable
from ..options import check, option

if TYPE_CHECKING:
    from ..encoder import Encoder


IMAGE_ROOT = "Folder that images must be in, after links are followed (default: --images)"


@dataclass(kw_only=True)
class ImageOptions:
    """Options of reading images."""

    max_image_pixels: int | None = option(
        "Skip images with more pixels; a pixel needs up to 12 bytes of memory (default: 178956970)",
        None,
        group="Images",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check(self)

    def apply(self) -> None:
        """Sets the limit for this process, and hides PIL's warnings, which do not name the image."""
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if self.max_image_pixels is not None:
            from ..images import set_max_image_pixels

            set_max_image_pixels(self.max_image_pixels)


@dataclass(kw_only=True)
class DeviceOptions(ImageOptions):
    """Options of where and how to compute."""

    device: str | None = option(
        "Device: cpu, cuda, cuda:1 or mps (default: an accelerator if there is one)", None, group="Model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Type of the weights; auto keeps the checkpoint's", "auto"
    )

    def load_named(self, name: str, revision: str | None = None, **options: int | None) -> "Encoder":
        """Loads an encoder, with more options of [`load_encoder`]."""
        from ..encoder import load_encoder
        from ..engines.exported import is_exported

        self.apply()
        if not is_exported(name):
            from transformers.utils import logging  # a late import: it takes seconds

            logging.disable_progress_bar()  # bars of loading weights
        return load_encoder(name, device=self.device, dtype=self.dtype, revision=revision, **options)


@dataclass(kw_only=True)
class ModelOptions(DeviceOptions):
    """Options of loading and running a model."""

    model: str = option("Checkpoint folder or Hub id of a LoTLIP, CLIP or SigLIP", group="Model")
    batch_size: int | None = option(
        "Images, or texts of full length, per batch (default: 32 images, 64 texts)", None, at_least=1
    )

    def load(self, revision: str | None = None) -> "Encoder":
        """Loads the encoder."""
        return self.load_named(self.model, revision)


@dataclass(kw_only=True)
class PatchOptions(ModelOptions):
    """Options of computing only some patches of an image, for commands that need only its embedding."""

    image_token_centers: int | None = option(
        "Patches that the later layers of the image tower compute: the medoids of clusters (default: all)",
        None,
        group="Model",
        at_least=1,
    )
    image_token_layer: int | None = option(
        "Layer, counted from 0, from which on only these are computed (default: the middle one)", None, at_least=0
    )

    def load_named(self, name: str, revision: str | None = None, **options: int | None) -> "Encoder":
        """Loads an encoder that computes these patches."""
        medoids = {"image_token_centers": self.image_token_centers, "image_token_layer": self.image_token_layer}
        return super().load_named(name, revision, **medoids, **options)


def report_skipped(skipped: dict[str, str]) -> None:
    """Prints the images that could not be read, with the reasons."""
    if skipped:
        print(f"{len(skipped)} {'image was' if len(skipped) == 1 else 'images were'} skipped:", file=sys.stderr)
        for name, reason in skipped.items():
            print(f"  {printable(name)}: {printable(reason)}", file=sys.stderr)
