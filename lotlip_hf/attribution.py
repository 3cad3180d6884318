"""Attribution of a similarity to the tokens of a tower, by its attention and the gradient with respect to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel


def relevance(similarity: Tensor, attentions: Sequence[Tensor]) -> Tensor:
    """
    Computes what each token contributes to each other token's part of a similarity: the attention times the gradient
    of the similarity with respect to it, averaged over the heads and added up over the layers. Negative values are
    kept.

    Args:
        similarity (`torch.Tensor`): A similarity, or [N] with one for each of N texts or images.
        attentions (`Sequence[torch.Tensor]`): Attentions [N, heads, L, L] of some layers, which `similarity` was
            computed from. Only eager attention returns them, see [`eager`].

    Returns:
        `torch.Tensor`: Relevance [N, L, L]. The row of the pooled token has the relevance of all tokens. With mean
        pooling, take the mean of the rows.

    Example:

    ```python
    >>> from lotlip_hf import LoTLIPModel, LoTLIPProcessor
    >>> from lotlip_hf.attribution import eager, relevance

    >>> model, processor = LoTLIPModel.from_pretrained("checkpoint"), LoTLIPProcessor.from_pretrained("checkpoint")
    >>> inputs = processor(text=["a cat", "a dog"], images="photos/cat.png", return_tensors="pt")
    >>> with eager(model):
    ...     output = model(**inputs, output_attentions=True)
    >>> relevance(output.logits_per_text[:, 0], output.text_model_output.attentions).shape[0]
    2
    ```
    """
    gradients = torch.autograd.grad(similarity.sum(), list(attentions), retain_graph=True)
    layers = [(one * gradient).mean(1) for one, gradient in zip(attentions, gradients, strict=True)]
    return torch.stack(layers).sum(0)


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """
    Sets eager attention in all towers of a model, so that `output_attentions=True` returns attentions, and restores
    the former attention at the end.

    Args:
        model (`PreTrainedModel`): The model.
    """
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    former = [config._attn_implementation for config in configs]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in zip(configs, former, strict=True):
            config._attn_implementation = implementation
