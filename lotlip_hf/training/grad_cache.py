"""A large batch in the memory of a few samples: gradient caching (https://arxiv.org/abs/2101.06983)."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..distributed import max_over_ranks
from ..modeling.loss_lotlip import LoTLIPLoss
from .objective import Embeddings, LossFunction, embed, similarity_scale


def cached_backward(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_size: int,
    loss_function: LossFunction,
    accelerator: Accelerator | None = None,
) -> LoTLIPLoss:
    """
    [`batch_loss`] and its `backward`, in the memory of `chunk_size` samples. The whole batch is embedded in chunks
    without a graph; the loss of all embeddings gives their gradients; then each chunk is embedded again, with the same
    dropout, and its gradients go back through the model. They are the whole batch's, added to the parameters' `grad`.

    Args:
        model (`nn.Module`): a [`LoTLIPModel`] or its wrapper.
        batch (`Mapping[str, Any]`): see [`embed`]; the samples are in the first dimension of every tensor.
        chunk_size (`int`): samples in a chunk.
        loss_function (`Callable`): an [`Objective`], or a function with its arguments and result; the parameters of a
            module get gradients too.
        accelerator (`Accelerator`, *optional*): for autocast, loss scaling, gradient accumulation, and to synchronise
            the gradients with the last chunk alone.

    Returns:
        `LoTLIPLoss`: the loss, without gradients.
    """
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    num_samples = len(inputs["pixel_values"])
    # As many chunks on every process, for a wrapper may communicate in each of them: some are then smaller.
    num_chunks = -(-num_samples // chunk_size)
    num_chunks = int(max_over_ranks(torch.tensor(num_chunks, device=inputs["pixel_values"].device)))
    bounds = [num_samples * i // num_chunks for i in range(num_chunks + 1)]
    chunks = list(zip(bounds[:-1], bounds[1:], strict=True))
    if accelerator is not None:
        autocast, backward = accelerator.autocast, accelerator.backward
        no_sync = partial(accelerator.no_sync, model)
    else:
        autocast, backward = nullcontext, torch.Tensor.backward
        no_sync = getattr(model, "no_sync", nullcontext)

    def embed_chunk(start: int, stop: int) -> Embeddings:
        # a chunk without a sample runs on one and keeps nothing of it
        first = min(start, num_samples - 1)
        rows = {name: value[first : max(stop, first + 1)] for name, value in inputs.items()}
        with autocast():
            return _map(lambda embeds: embeds[: stop - start], embed(model, rows))

    random_states, cached = [], []
    with torch.no_grad():
        for chunk in chunks:
            random_states.append((torch.get_rng_state(), *get_device_states(*inputs.values())))
            cached.append(embed_chunk(*chunk))
    torch.clear_autocast_cache()  # older versions of torch keep weights without a graph in it

    embeddings = _map(lambda *parts: torch.cat(parts).requires_grad_(), *cached)
    logit_scale = extract_model_from_parallel(model).logit_scale
    parameters = [logit_scale, *(loss_function.parameters() if isinstance(loss_function, nn.Module) else ())]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    loss = loss_function(*embeddings, similarity_scale(model))
    leaves = [embeds for embeds in embeddings if embeds is not None]
    # a caller's autocast is for the forward passes alone
    exact = partial(torch.autocast, logit_scale.device.type, enabled=False)
    with exact():
        gradients = torch.autograd.grad(loss.loss, [*leaves, *parameters])
    embed_gradients, parameter_gradients = gradients[: len(leaves)], gradients[len(leaves) :]

    for (start, stop), (cpu_state, *device_states) in zip(chunks, random_states, strict=True):
        is_last = (start, stop) == chunks[-1]
        torch.set_rng_state(cpu_state)
        set_device_states(*device_states)
        with nullcontext() if is_last else no_sync():
            outputs = [embeds for embeds in embed_chunk(start, stop) if embeds is not None]
            pairs = [(o, g[start:stop]) for o, g in zip(outputs, embed_gradients, strict=True)]
            if is_last:
                pairs += zip(parameters, parameter_gradients, strict=True)
            with exact():
                product = torch.stack([(value * gradient).sum() for value, gradient in pairs]).sum()
                backward(product)
    return LoTLIPLoss(*(value.detach() for value in loss))


def _map(function: Callable[..., torch.Tensor], *embeddings: Embeddings) -> Embeddings:
    """Applies a function to the images', the texts' and the corners' tensors of each argument."""
    return Embeddings(*(None if parts[0] is None else function(*parts) for parts in zip(*embeddings, strict=True)))
