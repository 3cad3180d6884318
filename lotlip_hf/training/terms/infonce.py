"""The term of the paper: symmetric InfoNCE of images with short and long texts."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ...distributed import max_over_ranks, sum_over_ranks
from .pairs import Pairs, Sets, tiles_of
from .views import Views


class InfoNCE(Pairs):
    """
    The loss of LoTLIP. Text-to-image sums are complete on each process; image-to-text sums are all-reduced.

    Args:
        short_loss_weight, long_loss_weight (`float`, *optional*, defaults to 1.0): See [`Pairs`].
        label_smoothing (`float`, *optional*, defaults to 0.0): Fraction of the target that is spread evenly over the
            batch, as in `torch.nn.functional.cross_entropy`. Long-CLIP trains with 0.1.
        equal_positives (`bool`, *optional*, defaults to `False`): Whether records with equal captions are positives
            of each other: the target of a text is spread evenly over their images, and that of an image over their
            texts. `text_keys` of the batch tell which captions are equal. Without dropout this changes only texts
            that are drawn differently from equal captions, because equal texts have equal embeddings.
    """

    def __init__(
        self,
        short_loss_weight: float = 1.0,
        long_loss_weight: float = 1.0,
        label_smoothing: float = 0.0,
        equal_positives: bool = False,
    ) -> None:
        super().__init__(short_loss_weight, long_loss_weight)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be at least 0 and below 1, got {label_smoothing}.")
        self.label_smoothing = label_smoothing
        self.equal_positives = equal_positives
        if equal_positives:
            self.needs = self.needs | {"text_keys"}

    def positives(self, image_sets: Sets, views: Views) -> Sets:
        if not self.equal_positives:
            return super().positives(image_sets, views)
        keys = views.all("text_keys").unbind(1)  # T tensors [N]
        short, *long = (_means(*pair)[views.own] for pair in zip(image_sets, keys, strict=False))
        # The corner features of a long text share its key.
        num_corners = (len(image_sets) - 1) // max(1, len(long)) - 1
        return [short, *long, *(each for each in long for _ in range(num_corners))]

    def sums(self, image_sets: Sets, text_sets: Sets, positives: Sets, views: Views) -> torch.Tensor:
        per_image, per_text, matches = [], [], []
        for images, texts, of_texts in zip(image_sets, text_sets, positives, strict=True):
            image_sums, text_sums = _LogSumExps.apply(images, texts)  # pyright: ignore[reportGeneralTypeIssues]
            per_image.append(image_sums)
            per_text.append(text_sums)
            match = (of_texts * texts).sum()
            if self.label_smoothing:  # the sum of all similarities does not need tiles
                spread = (images.sum(0) * texts.sum(0)).sum() / len(images)
                match = (1 - self.label_smoothing) * match + self.label_smoothing * spread
            matches.append(match)
        # Combine the sums of each image over the texts of all processes.
        own_sums = torch.stack(per_image)  # [K, N]
        largest = max_over_ranks(own_sums)
        image_sums = largest + sum_over_ranks((own_sums - largest).exp()).log()
        return (image_sums[:, views.own].sum(1) + torch.stack(per_text).sum(1)) / 2 - torch.stack(matches)


def _means(images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Returns for each image [N, dim] the mean of the images with the same key [N]."""
    _, groups, sizes = keys.unique(return_inverse=True, return_counts=True)
    sums = images.new_zeros(len(sizes), images.shape[1]).index_add(0, groups, images)
    return (sums / sizes.unsqueeze(1))[groups]


class _LogSumExps(torch.autograd.Function):
    """The log-sum-exp of each row [N] and each column [b] of images @ texts.t(), computed in tiles."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        per_image, per_text = [], []
        for image_tile in tiles_of(images):
            # Each tile is used twice: its rows for the sums of images, its columns for the sums of texts.
            tiles = (image_tile @ text_tile.t() for text_tile in tiles_of(texts))
            rows, columns = zip(*((tile.logsumexp(1), tile.logsumexp(0)) for tile in tiles), strict=True)
            per_image.append(torch.stack(rows).logsumexp(0))
            per_text.append(torch.cat(columns))
        outputs = torch.cat(per_image), torch.stack(per_text).logsumexp(0)
        ctx.save_for_backward(images, texts, *outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, texts, *sums = ctx.saved_tensors
        image_grads, text_grads = torch.zeros_like(images), torch.zeros_like(texts)
        with torch.autocast(images.device.type, enabled=False):
            of_images = map(tiles_of, (images, image_grads, sums[0], grads[0]))
            of_texts = list(map(tiles_of, (texts, text_grads, sums[1], grads[1])))
            for image_tile, image_grad, image_sums, image_weights in zip(*of_images, strict=True):
                for text_tile, text_grad, text_sums, text_weights in zip(*of_texts, strict=True):
                    tile = image_tile @ text_tile.t()
                    # The derivative of log-sum-exp is the softmax.
                    grad = (tile - image_sums.unsqueeze(1)).exp_().mul_(image_weights.unsqueeze(1))
                    grad += tile.sub_(text_sums).exp_().mul_(text_weights)
                    image_grad.addmm_(grad, text_tile)
                    text_grad.addmm_(grad.t(), image_tile)
        return image_grads, text_grads
