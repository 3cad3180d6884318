"""The objective as a training run needs it: over all processes, and in tiles of similarities."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..distributed import all_sizes, average_gradient, gather, max_over_ranks, rank, sum_over_ranks, world_size
from ..modeling.loss_lotlip import LoTLIPLoss, check_pairs, primary_components, stack_features, weighted_loss

# Images and texts of one tile of similarities: 64 MB in float32.
TILE_SIZE = 4096

LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], LoTLIPLoss]


class Objective(nn.Module):
    """
    LoTLIP's loss over the whole batch of all processes.

    Every process gathers the images, with gradients, and compares them with its own texts, one tile of similarities at
    a time. Text-to-image terms are complete locally; image-to-text sums are all-reduced. So the texts, K times as many
    as the images, are not gathered, no similarity is computed twice, and a process holds its embeddings, the images
    and a few tiles: the backward pass computes the tiles again. Similarities are float32 also under autocast.

    The mean of the returned values over the processes is the loss, and the mean of their gradients, as
    `DistributedDataParallel` computes it, is that of one process with the whole batch, also if the last batch differs
    in size between the processes.

    With `loss="sigmoid"` the objective has a parameter, `logit_bias`: give it to the optimiser and save it beside the
    model. The objective averages its gradient.

    Args:
        loss (`str`, *optional*, defaults to `"infonce"`): the paper's, or `"sigmoid"`, SigLIP's.
        short_loss_weight (`float`, *optional*, defaults to 1.0): weight of the short texts' share.
        long_loss_weight (`float`, *optional*, defaults to 1.0): weight of the long texts' share.
        num_primary_components (`int`, *optional*): match the short texts with this many principal components of the
            images, as Long-CLIP does (`loss_lotlip.primary_components`), in place of the images.
        tile_size (`int`, *optional*, defaults to 4096): images and texts in a tile of similarities.

    Raises:
        ValueError: on an unknown `loss`.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.training.objective import Objective

    >>> images, texts = torch.eye(4), torch.eye(4)[:, None].expand(4, 3, 4)
    >>> Objective()(images, texts, None, torch.tensor(100.0)).loss.item()
    0.0
    ```
    """

    def __init__(
        self,
        loss: Literal["infonce", "sigmoid"] = "infonce",
        *,
        short_loss_weight: float = 1.0,
        long_loss_weight: float = 1.0,
        num_primary_components: int | None = None,
        tile_size: int = TILE_SIZE,
    ) -> None:
        super().__init__()
        if loss not in ("infonce", "sigmoid"):
            raise ValueError(f"`loss` must be 'infonce' or 'sigmoid', got {loss!r}.")
        self.short_loss_weight = short_loss_weight
        self.long_loss_weight = long_loss_weight
        self.num_primary_components = num_primary_components
        self.tile_size = tile_size
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if loss == "sigmoid" else None  # SigLIP's first value

    def forward(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        corner_embeds: torch.Tensor | None,
        logit_scale: torch.Tensor,
    ) -> LoTLIPLoss:
        """
        Args:
            image_embeds (`torch.Tensor` of shape `[b, dim]`): this process's images, normalised; b may differ between
                the processes.
            text_embeds (`torch.Tensor` of shape `[b, T, dim]`): normalised [CLS] features, the short text first.
            corner_embeds (`torch.Tensor` of shape `[b, T - 1, m, dim]`, *optional*): those of the long texts'
                corner tokens, normalised.
            logit_scale (`torch.Tensor`): scalar factor on the cosine similarities, not its logarithm.

        Returns:
            `LoTLIPLoss`: this process's share; the mean over the processes is the loss.

        Raises:
            ValueError: if the numbers of images and of rows of texts differ.
        """
        check_pairs(image_embeds, text_embeds)
        with torch.autocast(image_embeds.device.type, enabled=False):
            dtype = torch.promote_types(image_embeds.dtype, torch.float32)
            sizes = all_sizes(image_embeds)
            images = logit_scale.to(dtype) * gather(image_embeds, sizes, dtype)  # [N, dim]
            text_sets = stack_features(text_embeds, corner_embeds).to(dtype).unbind(1)  # K of [b, dim]
            image_sets = [images] * len(text_sets)
            if self.num_primary_components is not None:
                image_sets[0] = primary_components(images, self.num_primary_components)
            start = sum(sizes[: rank()])
            own = slice(start, start + len(image_embeds))

            if self.logit_bias is None:
                sums = _contrastive_sums(image_sets, text_sets, own, self.tile_size)
            else:
                bias = average_gradient(self.logit_bias).to(dtype)
                sums = _sigmoid_sums(image_sets, text_sets, bias, own, self.tile_size)
            losses = sums * world_size() / len(images)
        return weighted_loss(losses, self.short_loss_weight, self.long_loss_weight)


def _contrastive_sums(
    image_sets: Sequence[torch.Tensor], text_sets: Sequence[torch.Tensor], own: slice, tile_size: int
) -> torch.Tensor:
    """[K]: the symmetric InfoNCE summed over this process's images and texts.

    `image_sets` are K of [N, dim], the scaled images of all processes, those of this one at `own`; `text_sets` are K
    of [b, dim], this process's.
    """
    per_image, per_text, matches = [], [], []
    for images, texts in zip(image_sets, text_sets, strict=True):
        image_sums, text_sums = _LogSumExps.apply(images, texts, tile_size)  # pyright: ignore[reportGeneralTypeIssues]
        per_image.append(image_sums)
        per_text.append(text_sums)
        matches.append((images[own] * texts).sum())
    # what the images make of the texts of the other processes
    own_sums = torch.stack(per_image)  # [K, N]
    largest = max_over_ranks(own_sums)
    image_sums = largest + sum_over_ranks((own_sums - largest).exp()).log()
    return (image_sums[:, own].sum(1) + torch.stack(per_text).sum(1)) / 2 - torch.stack(matches)


def _sigmoid_sums(
    image_sets: Sequence[torch.Tensor],
    text_sets: Sequence[torch.Tensor],
    logit_bias: torch.Tensor,
    own: slice,
    tile_size: int,
) -> torch.Tensor:
    """[K]: SigLIP's loss summed over the pairs of this process's texts with the images of all processes.

    -logsigmoid(-x) = softplus(x) for the pairs that do not match, and -logsigmoid(x) = softplus(x) - x for the others.
    """
    sums = []
    for images, texts in zip(image_sets, text_sets, strict=True):
        tiles = [
            # computed again in the backward pass, not kept
            checkpoint(_softplus_sum, image_tile, text_tile, logit_bias, use_reentrant=False, preserve_rng_state=False)
            for image_tile in images.split(tile_size)
            for text_tile in texts.split(tile_size)
        ]
        matches = (images[own] * texts).sum() + len(texts) * logit_bias
        sums.append(torch.stack(tiles).sum() - matches)
    return torch.stack(sums)


class _LogSumExps(torch.autograd.Function):
    """[N], [b]: the logarithms of the sums over the rows and over the columns of exp(images @ texts.t()), in tiles."""

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, texts: torch.Tensor, tile_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tile_size = tile_size
        per_image, per_text = [], []
        for image_tile in images.split(tile_size):
            # one tile serves both directions: its rows are a part of the images' sums, its columns of the texts'
            sums = [_log_sum_exps(image_tile @ text_tile.t()) for text_tile in texts.split(tile_size)]
            per_image.append(torch.stack([rows for rows, _ in sums]).logsumexp(0))
            per_text.append(torch.cat([columns for _, columns in sums]))
        answers = torch.cat(per_image), torch.stack(per_text).logsumexp(0)
        ctx.save_for_backward(images, texts, *answers)
        return answers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        images, texts, *sums = ctx.saved_tensors
        image_grads, text_grads = torch.zeros_like(images), torch.zeros_like(texts)
        with torch.autocast(images.device.type, enabled=False):
            of_images = [part.split(ctx.tile_size) for part in (images, image_grads, sums[0], grads[0])]
            of_texts = [part.split(ctx.tile_size) for part in (texts, text_grads, sums[1], grads[1])]
            for image_tile, image_grad, image_sums, image_weights in zip(*of_images, strict=True):
                for text_tile, text_grad, text_sums, text_weights in zip(*of_texts, strict=True):
                    tile = image_tile @ text_tile.t()
                    # the derivative of a sum's logarithm is the softmax
                    grad = (tile - image_sums.unsqueeze(1)).exp_().mul_(image_weights.unsqueeze(1))
                    grad += tile.sub_(text_sums).exp_().mul_(text_weights)
                    image_grad.addmm_(grad, text_tile)
                    text_grad.addmm_(grad.t(), image_tile)
        return image_grads, text_grads, None


def _log_sum_exps(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.logsumexp(1), logits.logsumexp(0)


def _softplus_sum(scaled_images: torch.Tensor, texts: torch.Tensor, logit_bias: torch.Tensor) -> torch.Tensor:
    return F.softplus(scaled_images @ texts.t() + logit_bias).sum()


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keeps `logit_scale`, a logarithm, at or below ln 100, as CLIP does; call it after each step of the optimiser."""
    extract_model_from_parallel(model).logit_scale.clamp_(max=math.log(100))


def similarity_scale(model: nn.Module) -> torch.Tensor:
    """The factor on the similarities. FSDP leaves scalars alone: their gradient is averaged over the ranks here."""
    logit_scale = extract_model_from_parallel(model).logit_scale
    return (average_gradient(logit_scale) if isinstance(model, FSDPModule) else logit_scale).exp()


class Embeddings(NamedTuple):
    """
    The normalised inputs of the objective: `image_embeds` [B, dim], `text_embeds` [B, T, dim], the short text first,
    and `corner_embeds` [B, T - 1, m, dim] of the long texts, or `None` for m = 0 or T = 1.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    corner_embeds: torch.Tensor | None


def embed(model: nn.Module, batch: Mapping[str, Any]) -> Embeddings:
    """
    The embeddings of a batch.

    Args:
        model (`nn.Module`): a [`LoTLIPModel`] or its wrapper.
        batch (`Mapping[str, Any]`): the model's arguments: `input_ids` [B, T, L], or [B, L] of the short texts with or
            without `long_input_ids` [B, T - 1, L']. Entries that are no tensors are left out.

    Returns:
        `Embeddings`: of the images, the texts and the corner tokens.
    """
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    has_all_texts = inputs["input_ids"].dim() == 3
    # a short text alone needs no corner tokens, not even in training mode
    has_corners = has_all_texts or "long_input_ids" in inputs
    outputs = model(**inputs, return_loss=False, output_corner_embeds=has_corners, pooled_only=True)
    text_embeds, corner_embeds = outputs.text_embeds, outputs.corner_embeds
    if not has_corners:
        text_embeds = text_embeds.unsqueeze(1)
    if has_all_texts and corner_embeds is not None:
        corner_embeds = corner_embeds[:, 1:]
    return Embeddings(outputs.image_embeds, text_embeds, corner_embeds)


def batch_loss(model: nn.Module, batch: Mapping[str, Any], loss_function: LossFunction) -> LoTLIPLoss:
    """
    The loss of a batch, to call `backward` on.

    Args:
        model (`nn.Module`): a [`LoTLIPModel`] or its wrapper.
        batch (`Mapping[str, Any]`): see [`embed`].
        loss_function (`Callable`): an [`Objective`], or a function with its arguments and result.

    Returns:
        `LoTLIPLoss`: the loss and its shares.
    """
    return loss_function(*embed(model, batch), similarity_scale(model))
