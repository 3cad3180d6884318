"""Zero-shot segmentation: the class of each pixel by the similarities of patches and class texts."""

from collections.abc import Iterable, Iterator
from functools import cache, partial

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..dense import can_calibrate, iterate_patches
from ..distributed import gather_lists, rank, world_size
from ..encoder import Encoder
from ..images import Background, ImageError, kept_box, load_image, load_mask
from ..terminal import progress_bar
from .embeddings import refuse_unreadable
from .tasks import IncompleteDataError, SegmentationData

IGNORED = 255
ROWS = 64  # of pixels that are compared at the same time


def segmentation_metrics(
    encoder: Encoder,
    data: SegmentationData,
    class_embeds: Tensor,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, float]:
    """
    Segments images by the class that is most similar to each patch, with similarities interpolated between patches.
    The part of an image that the image processor cuts off is not scored. With several processes, each process segments
    a share of the images.

    Args:
        encoder (`Encoder`): A LoTLIP.
        data (`SegmentationData`): The images and masks.
        class_embeds (`torch.Tensor`): [C, dim], from [`~lotlip_hf.evaluation.zero_shot.class_embeddings`].
        batch_size (`int`, *optional*, defaults to 32): Number of images in a batch.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict[str, float]`: `mean_iou` over the classes in masks or predictions and `pixel_accuracy`, from 0 to 1, and
        `calibrated_mean_iou` and `calibrated_pixel_accuracy` with [`~lotlip_hf.dense.calibrated`] patches, if they fit
        the image tower.

    Raises:
        `ValueError`: If the model is not a LoTLIP.
        `IncompleteDataError`: If an image or a mask cannot be read, or they do not fit; the message names them. Also
            if no pixel is left to score.
    """
    engine, model = encoder.lotlip()
    variants = {"": False, "calibrated_": True} if can_calibrate(model) else {"": False}
    confusions = {name: torch.zeros(len(class_embeds), len(class_embeds), dtype=torch.int64) for name in variants}
    box_of = cache(partial(kept_box, image_processor=engine.image_processor))
    own = range(rank(), len(data.images), world_size())
    errors: list[str] = []
    with progress_bar(total=len(own), desc="Segmenting", unit="image", shown=progress and rank() == 0) as bar:
        for start in range(0, len(own), batch_size):
            indices = own[start : start + batch_size]
            pairs = list(_read(data, indices, errors, engine.background))
            boxes = [box_of(image.size) for image, _ in pairs]
            for name, is_calibrated in variants.items():
                images = [image for image, _ in pairs]
                patches = iterate_patches(encoder, images, calibrated=is_calibrated, batch_size=batch_size)
                for (_, mask), box, embeds in zip(pairs, boxes, patches, strict=True):
                    confusions[name] += confusion(embeds @ class_embeds.T, mask, box)
            bar.update(len(indices))
    refuse_unreadable(gather_lists(errors), len(data.images))
    metrics = {}
    for name, mine in confusions.items():
        total = torch.stack(gather_lists([mine])).sum(0).double()
        if not total.any():
            raise IncompleteDataError(f"All pixels of the {len(data.images)} masks are {IGNORED} or cropped.")
        union = total.sum(0) + total.sum(1) - total.diag()
        metrics[f"{name}mean_iou"] = (total.diag() / union)[union > 0].mean().item()
        metrics[f"{name}pixel_accuracy"] = (total.diag().sum() / total.sum()).item()
    return metrics


def confusion(scores: Tensor, mask: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """
    Counts the pixels of each class and predicted class.

    Args:
        scores (`torch.Tensor`): Scores [h, w, C] of the classes on a grid.
        mask (`torch.Tensor`): Classes [H, W], uint8, 255 for pixels that are not counted.
        box (`tuple[float, float, float, float]`): Left, top, right and bottom edge of the grid, from 0 to 1 of the
            mask.

    Returns:
        `torch.Tensor`: [C, C], int64: the class in the mask, and the predicted class.
    """
    number = scores.shape[-1]
    counts = torch.zeros(number * number, dtype=torch.int64)
    lines = []  # coordinates from -1 to 1 in the box
    for length, low, high in zip(mask.shape, (box[1], box[0]), (box[3], box[2]), strict=True):
        lines.append((((torch.arange(length) + 0.5) / length - low) / (high - low)) * 2 - 1)
    rows, columns = (line.abs().le(1).nonzero().squeeze(1) for line in lines)
    for band in rows.split(ROWS):
        points = torch.stack(torch.meshgrid(lines[1][columns], lines[0][band], indexing="xy"), dim=-1)
        maps = F.grid_sample(scores.permute(2, 0, 1)[None], points[None], padding_mode="border", align_corners=False)
        predicted, classes = maps[0].argmax(0), mask[band][:, columns].long()
        counted = classes != IGNORED
        counts += torch.bincount(classes[counted] * number + predicted[counted], minlength=number * number)
    return counts.view(number, number)


def _read(
    data: SegmentationData, indices: Iterable[int], errors: list[str], background: Background
) -> Iterator[tuple[Image.Image, Tensor]]:
    """Yields images and masks. Appends a line to `errors` for each pair that cannot be read."""
    for index in indices:
        try:
            image, mask = load_image(data.images[index], background=background), load_mask(data.masks[index])
        except ImageError as error:
            errors.append(f"{data.image_names[index]}: {error.reason}")
            continue
        classes = mask[mask != IGNORED]
        if mask.shape != (image.height, image.width):
            sizes = f"{image.width}x{image.height}, its mask {mask.shape[1]}x{mask.shape[0]}"
            errors.append(f"{data.image_names[index]}: the image has {sizes} pixels")
        elif len(classes) and classes.max() >= len(data.class_names):
            problem = f"its mask has class {classes.max()}, but there are {len(data.class_names)} names"
            errors.append(f"{data.image_names[index]}: {problem}")
        else:
            yield image, mask
