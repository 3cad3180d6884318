"""Relevance of tokens and patches by the attentions of a tower and their gradients."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .modeling.modeling_lotlip import LoTLIPModel


def relevance(similarity: Tensor, attentions: Sequence[Tensor]) -> Tensor:
    """
    Computes how much each token of a tower contributes to a similarity through the attention of each other token.

    Args:
        similarity (`torch.Tensor`): The similarity, a scalar or [N], with its graph. The graph is kept.
        attentions (`Sequence[torch.Tensor]`): Attentions [N, heads, L, L] of the tower's layers, on the graph.

    Returns:
        `torch.Tensor`: [N, L, L], the attentions times their gradients: the mean over heads, negative values included,
        and the sum over layers. The row of the pooled token is the relevance of all tokens for the similarity.
    """
    gradients = torch.autograd.grad(similarity.sum(), list(attentions), retain_graph=True)
    layers = [(one * gradient).mean(1) for one, gradient in zip(attentions, gradients, strict=True)]
    return torch.stack(layers).sum(0).detach()


@contextlib.contextmanager
def eager(model: LoTLIPModel) -> Iterator[None]:
    """Context in which both towers compute attention eagerly, so that they return attentions."""
    configs = [tower.backbone.config for tower in (model.vision_model, model.text_model)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
