"""
Token prepending (https://arxiv.org/abs/2412.11556): in a range of decoder layers, a placeholder before the text
starts from the last token's state, so that causal words see a summary of the whole text.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .fast_paths_lotlip import Extension, extend, take


class PrependingLayer(Extension):
    """A decoder layer whose input can be taken from other tokens."""

    is_prepending = False

    def forward(self, hidden_states: Tensor, *args: Any, sources: Tensor | None = None, **kwargs: Any) -> Any:
        """Token i of `hidden_states` [N, L, hidden_size] gets the state of token `sources[:, i]` [N, L]."""
        if sources is not None and self.is_prepending:
            hidden_states = take(hidden_states, sources)
        return super().forward(hidden_states, *args, **kwargs)


def prepend_in(backbone: PreTrainedModel, first: int, last: int) -> None:
    """Adds token prepending to the layers from `first` to `last`, counted from 0."""
    for index, layer in enumerate(backbone.get_submodule("layers").children()):
        extend(backbone, layer, PrependingLayer)
        layer.is_prepending = first <= index <= last


def prepending_sources(is_placeholder: Tensor, last_index: Tensor, length: int) -> Tensor:
    """[N, L] and the index [N] of the last token -> `sources` [N, length]: the last token for a first placeholder."""
    is_placeholder = is_placeholder & (is_placeholder.long().cumsum(-1) == 1)  # a word may be the same token
    own = torch.arange(length, device=is_placeholder.device)
    is_placeholder = torch.nn.functional.pad(is_placeholder, (0, length - is_placeholder.shape[1]))
    return torch.where(is_placeholder, last_index.unsqueeze(1), own)
