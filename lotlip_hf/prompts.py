"""Learnt prompts: vectors in place of word embeddings, in the texts of a frozen dual encoder."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def word_vectors(model: Any, at: torch.Tensor, vectors: torch.Tensor) -> Iterator[None]:
    """
    Context in which vectors replace the word embeddings of some tokens. The model reads token ids as usual, so that
    positions, masks and pooled tokens are those of the ids. Gradients reach the vectors.

    Args:
        model (`PreTrainedModel`): LoTLIP or another dual encoder with a `text_model`, such as CLIP or SigLIP.
        at (`torch.Tensor`): Bool [N, L] in the shape of the token ids: the tokens that are replaced.
        vectors (`torch.Tensor`): Vectors [n, width] in the order of the n tokens, row by row.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.prompts import word_vectors

    >>> engine = load_encoder("checkpoint").engine
    >>> inputs = engine.on_device(engine.pad(engine.tokenize(["a cat"], 16)[0]))
    >>> at = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    >>> at[0, 1] = True
    >>> vectors = torch.zeros(1, engine.model.text_model.get_input_embeddings().embedding_dim, requires_grad=True)
    >>> with word_vectors(engine.model, at, vectors):
    ...     features = engine.model.get_text_features(**inputs).pooler_output
    ```
    """

    def replace(module: torch.nn.Module, args: Any, embeds: torch.Tensor) -> torch.Tensor:
        return embeds.masked_scatter(at.reshape(*embeds.shape[:-1], 1), vectors.to(embeds))

    handle = model.text_model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
