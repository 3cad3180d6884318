"""The objective of a training run: a weighted sum of terms over all processes, and the way from a batch to it."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call

from ..data.collator import ModelInputs
from ..distributed import average_gradient
from ..modeling.configuration_lotlip import LoTLIPConfig
from .config import TrainingConfig
from .terms import make_terms
from .terms.views import Views


class Objective(nn.Module):
    """
    A weighted sum of terms (`lotlip_hf.training.terms`) over the whole batch of all processes, in float32 also under
    autocast.

    The mean of the returned values over the processes is the loss, and the mean of their gradients, as
    `DistributedDataParallel` computes it, is that of one process with the whole batch, also if the last batch differs
    in size between the processes.

    Terms may have parameters: give them to the optimiser and save them beside the model. The objective averages their
    gradients over the processes.

    Args:
        terms (`Mapping[str, nn.Module]`): the terms by name.
        weights (`Mapping[str, float]`, *optional*): their weights, 1 by default.

    Attributes:
        needs (`frozenset[str]`): names of what the terms look at.

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
        Args:
            embeds (`Mapping[str, torch.Tensor]`): this process's tensors of the names in `needs`, samples first: the
                answer of [`embed`].
            logit_scale (`torch.Tensor`): scalar factor on the cosine similarities, not its logarithm.

        Returns:
            `dict[str, torch.Tensor]`: this process's share of `loss`, and of the weighted terms that add up to it:
            `loss_<term>`, or `loss_<term>_<part>` of a term in parts.
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
            # `DistributedDataParallel` waits for the gradient of the logit scale, which no term may use
            return {"loss": torch.stack([*losses.values()]).sum() + 0 * logit_scale, **losses}


def make_objective(config: TrainingConfig, model_config: LoTLIPConfig) -> Objective:
    """
    The objective that options choose, on the CPU.

    Args:
        config (`TrainingConfig`): `terms` and `term_options`, and the `seed` of the terms' own weights.
        model_config (`LoTLIPConfig`): the model's, for defaults of the terms' options, see [`make_terms`].
    """
    return Objective(*make_terms(config.terms, config.term_options, config.seed, model_config))


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keeps `logit_scale`, a logarithm, at or below ln 100, as CLIP does; call it after each step of the optimiser."""
    extract_model_from_parallel(model).logit_scale.clamp_(max=math.log(100))


def similarity_scale(model: nn.Module) -> torch.Tensor:
    """The factor on the similarities. FSDP leaves scalars alone: their gradient is averaged over the ranks here."""
    logit_scale = extract_model_from_parallel(model).logit_scale
    return (average_gradient(logit_scale) if isinstance(model, FSDPModule) else logit_scale).exp()


def embed(model: nn.Module, batch: Mapping[str, Any], needs: Collection[str]) -> dict[str, torch.Tensor]:
    """
    What an objective needs of a batch. The model computes no more than that.

    Args:
        model (`nn.Module`): a [`LoTLIPModel`] or its wrapper.
        batch (`Mapping[str, Any]`): a [`~lotlip_hf.data.collator.Batch`]: `input_ids` [B, L] of the short texts, with
            or without `long_input_ids` [B, T - 1, L']. Other tensors are passed on if they are needed.
        needs (`Collection[str]`): names, [`Objective.needs`].

    Returns:
        `dict[str, torch.Tensor]`: those of the names that there are. The model's are normalised: `image_embeds`
        [B, dim], `text_embeds` [B, T, dim], the short text first, and `corner_embeds` [B, T - 1, m, dim] of the long
        texts, left out for m = 0 or T = 1.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    inputs = {name: tensors[name] for name in ModelInputs.__annotations__ if name in tensors}
    # a short text alone needs no corner tokens, not even in training mode
    has_corners = "corner_embeds" in needs and "long_input_ids" in inputs
    outputs = model(**inputs, return_loss=False, output_corner_embeds=has_corners, pooled_only=True)
    embeds = {
        "image_embeds": outputs.image_embeds,
        "text_embeds": outputs.text_embeds if outputs.text_embeds.dim() == 3 else outputs.text_embeds.unsqueeze(1),
        "corner_embeds": outputs.corner_embeds,
    }
    return {name: value for name, value in {**embeds, **tensors}.items() if name in needs and value is not None}


def batch_loss(model: nn.Module, batch: Mapping[str, Any], objective: Objective) -> dict[str, torch.Tensor]:
    """
    The loss of a batch, to call `backward` on.

    Args:
        model (`nn.Module`): a [`LoTLIPModel`] or its wrapper.
        batch (`Mapping[str, Any]`): see [`embed`].
        objective ([`Objective`]): the objective.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, and its shares, see [`Objective.forward`].
    """
    return objective(embed(model, batch, objective.needs), similarity_scale(model))
