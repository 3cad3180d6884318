"""The objective of a run: a weighted sum of terms over all processes, and the loss of a batch."""

import math
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.nn import functional as F

from ..data.collator import RIDERS, ModelInputs, num_riders
from ..distributed import average_gradient
from ..modeling.configuration_lotlip import LoTLIPConfig
from .config import TrainingConfig
from .terms import make_terms
from .terms.views import Views

IMAGE_INPUTS = {"pixel_values", "pixel_attention_mask", "spatial_shapes", "kept_patches", "image_states"}
IMAGE_EMBEDS = {"image_embeds", "image_embeds_2", "patch_embeds"}
TOKEN_EMBEDS = {"token_embeds", "masked_token_embeds"}
TEXT_EMBEDS = {"text_embeds", "corner_embeds", *TOKEN_EMBEDS, *RIDERS}


class Objective(nn.Module):
    """
    A weighted sum of terms (`lotlip_hf.training.terms`) over the batch of all processes, computed in float32 also
    under autocast.

    Each process returns its share of the loss. The mean of the shares is the loss, and the mean of their gradients,
    which `DistributedDataParallel` computes, equals the gradient in one process with the whole batch. The sizes of the
    batches may differ between processes.

    Terms may have parameters: pass them to the optimiser and save them with the model. The objective averages the
    gradients of these parameters over the processes.

    Args:
        terms (`Mapping[str, nn.Module]`): The terms by name.
        weights (`Mapping[str, float]`, *optional*): Weights of the terms. The default weight is 1.

    Attributes:
        needs (`frozenset[str]`): Names of the tensors that the terms use.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.training.objective import Objective
    >>> from lotlip_hf.training.terms.infonce import InfoNCE

    >>> objective = Objective({"infonce": InfoNCE(short_loss_weight=2.0)})
    >>> embeds = {"image_embeds": torch.eye(4), "text_embeds": torch.eye(4)[:, None].expand(4, 3, 4)}
    >>> losses = objective(embeds, torch.tensor(100.0))
    >>> {name: loss.item() for name, loss in losses.items()}
    {'loss': 0.0, 'loss_infonce_short': 0.0, 'loss_infonce_long': 0.0}
    ```
    """

    def __init__(self, terms: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.weights = dict.fromkeys(terms, 1.0) | dict(weights or {})
        self.needs: frozenset[str] = frozenset().union(*(term.needs for term in terms.values()))

    def forward(self, embeds: Mapping[str, torch.Tensor], logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Returns the loss and its terms, as shares of this process.

        Args:
            embeds (`Mapping[str, torch.Tensor]`): Tensors of this process with the names in `needs`, as returned by
                [`embed`]. The first dimension is the batch dimension.
            logit_scale (`torch.Tensor`): Scalar factor of the cosine similarities, not its logarithm.

        Returns:
            `dict[str, torch.Tensor]`: `loss`, and the weighted terms that add up to it: `loss_<term>`, or
            `loss_<term>_<part>` for a term with parts.
        """
        losses: dict[str, torch.Tensor] = {}
        with torch.autocast(logit_scale.device.type, enabled=False):
            views = Views(embeds, logit_scale)
            for name, term in self.terms.items():
                parameters = {each: average_gradient(parameter) for each, parameter in term.named_parameters()}
                shares = functional_call(term, parameters, (views,))
                shares = shares if isinstance(shares, dict) else {"": shares}
                for part, share in shares.items():
                    losses[f"loss_{name}_{part}" if part else f"loss_{name}"] = self.weights[name] * share
            # `DistributedDataParallel` waits for a gradient of the logit scale even if no term uses it.
            return {"loss": torch.stack([*losses.values()]).sum() + 0 * logit_scale, **losses}

    def follow(self, decay: float) -> None:
        """Updates the moving averages of their own weights that terms have. Call it after each step."""
        for term in self.terms.values():
            if hasattr(term, "follow"):
                cast(Any, term).follow(decay)


def make_objective(config: TrainingConfig, model_config: LoTLIPConfig) -> Objective:
    """
    Creates the objective of a run, on the CPU.

    Args:
        config (`TrainingConfig`): Options of the run. Only `terms`, `term_options`, `lock_corner_tokens` and `seed`
            are used.
        model_config (`LoTLIPConfig`): Configuration of the model, for the defaults of the terms (see [`make_terms`]).
    """
    objective = Objective(*make_terms(config.terms, config.term_options, config.seed, model_config))
    if config.lock_corner_tokens:
        objective.needs -= {"corner_embeds"}
    return objective


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Limits `logit_scale`, a logarithm, to ln 100 as CLIP does. Call it after each step of the optimiser."""
    extract_model_from_parallel(model).logit_scale.clamp_(max=math.log(100))


def similarity_scale(model: nn.Module) -> torch.Tensor:
    """Returns the factor of the similarities. FSDP does not average gradients of scalars, so this function does."""
    logit_scale = extract_model_from_parallel(model).logit_scale
    return (average_gradient(logit_scale) if isinstance(model, FSDPModule) else logit_scale).exp()


def embed(model: nn.Module, batch: Mapping[str, Any], needs: Collection[str]) -> dict[str, torch.Tensor]:
    """
    Embeds a batch: computes only the tensors that an objective needs.

    Args:
        model (`nn.Module`): A [`LoTLIPModel`], also wrapped in DDP or FSDP.
        batch (`Mapping[str, Any]`): A [`~lotlip_hf.data.collator.Batch`]: `input_ids` [B, L] of the short texts, with
            or without `long_input_ids` [B, T - 1, L']. With `negative_mask` [B, n] and `box_mask` [B, R], n
            negatives and R texts of regions follow the long texts of a row. `pixel_values` [B, 2, 3, H, W] are two
            views of each image. Further tensors in `needs` are returned unchanged.
        needs (`Collection[str]`): Names of the tensors ([`Objective.needs`]).

    Returns:
        `dict[str, torch.Tensor]`: The tensors by name. Embeddings are normalised: `image_embeds` [B, dim], with two
        views those of the first and `image_embeds_2` those of the second, `text_embeds` [B, T, dim] with the short
        text first, and `corner_embeds` [B, T - 1, m, dim] of the long texts.
        `corner_embeds` is missing if m = 0 or T = 1. `negative_embeds` are [B, n, dim] and
        `region_embeds` [B, R, dim]. `patch_embeds` are [B, P, dim], and `token_embeds` [B, T, L, dim] are those of
        texts padded to the longest, with `token_mask` [B, T, L]. `masked_token_embeds` [B, L', dim] and
        `masked_token_mask` [B, L'] are those of the masked text.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    inputs = {name: tensors[name] for name in ModelInputs.__annotations__ if name in tensors}
    if not IMAGE_EMBEDS & set(needs):
        inputs = {name: value for name, value in inputs.items() if name not in IMAGE_INPUTS}
    elif not TEXT_EMBEDS & set(needs):
        inputs = {name: value for name, value in inputs.items() if name in IMAGE_INPUTS}
    has_views = "pixel_values" in inputs and inputs["pixel_values"].dim() == 5
    if has_views:
        views = {name: inputs[name].flatten(0, 1) for name in ("pixel_values", "kept_patches") if name in inputs}
        inputs = {**inputs, **views}
    riders = num_riders(tensors)
    num_long = inputs["long_input_ids"].shape[1] - sum(riders.values()) if "long_input_ids" in inputs else 0
    # Short texts and riders need no corner tokens, not even in training mode.
    has_corners = "corner_embeds" in needs and num_long > 0
    options = {"output_patch_embeds": "patch_embeds" in needs, "output_token_embeds": bool(TOKEN_EMBEDS & set(needs))}
    outputs = model(**inputs, **options, return_loss=False, output_corner_embeds=has_corners, pooled_only=True)
    texts, corners = outputs.text_embeds, outputs.corner_embeds
    if texts is not None and texts.dim() == 2:
        texts = texts.unsqueeze(1)
    embeds = {"text_embeds": texts, "corner_embeds": corners, **_tokens(outputs, inputs, num_long)}
    for name in ("image_embeds", "patch_embeds"):
        embeds[name] = outputs.get(name)
        if has_views and embeds[name] is not None:
            embeds[name], embeds[f"{name}_2"] = embeds[name].unflatten(0, (-1, 2)).unbind(1)
    if "masked_labels" in tensors and outputs.long_token_embeds is not None:  # of the last rider
        embeds["masked_token_embeds"] = outputs.long_token_embeds[:, -1]
        embeds["masked_token_mask"] = inputs["long_attention_mask"][:, -1].bool()
    if riders and texts is not None:
        sizes = [texts.shape[1] - sum(riders.values()), *riders.values()]
        embeds |= dict(zip(("text_embeds", *riders), texts.split(sizes, dim=1), strict=True))
        if corners is not None:
            embeds["corner_embeds"] = corners[:, :num_long]
    return {name: value for name, value in {**embeds, **tensors}.items() if name in needs and value is not None}


def _tokens(outputs: Any, inputs: Mapping[str, torch.Tensor], num_long: int) -> dict[str, torch.Tensor]:
    """Returns the tokens [B, T, L, dim] of short and long texts and their mask [B, T, L], without riders."""
    if outputs.token_embeds is None:
        return {}
    embeds, masks = [outputs.token_embeds.unsqueeze(1)], [inputs["attention_mask"].unsqueeze(1)]
    if outputs.long_token_embeds is not None:
        embeds.append(outputs.long_token_embeds[:, :num_long])
        masks.append(inputs["long_attention_mask"][:, :num_long])
    longest = max(mask.shape[2] for mask in masks)
    return {
        "token_embeds": torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[2])) for each in embeds], dim=1),
        "token_mask": torch.cat([F.pad(mask.bool(), (0, longest - mask.shape[2])) for mask in masks], dim=1),
    }


def batch_loss(model: nn.Module, batch: Mapping[str, Any], objective: Objective) -> dict[str, torch.Tensor]:
    """
    Computes the loss of a batch. Call `backward` on its `loss`.

    Args:
        model (`nn.Module`): A [`LoTLIPModel`], also wrapped in DDP or FSDP.
        batch (`Mapping[str, Any]`): See [`embed`].
        objective (`Objective`): The objective.

    Returns:
        `dict[str, torch.Tensor]`: `loss` and its terms (see [`Objective.forward`]).
    """
    return objective(embed(model, batch, objective.needs), similarity_scale(model))
