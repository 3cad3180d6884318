"""Gradient caching (https://arxiv.org/abs/2101.06983): a large batch in the memory of a few samples."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..distributed import max_over_ranks
from .objective import Objective, embed, similarity_scale


def cached_backward(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_size: int,
    objective: Objective,
    accelerator: Accelerator | None = None,
) -> dict[str, torch.Tensor]:
    """
    Computes [`batch_loss`] and its backward pass in the memory of `chunk_size` samples.

    The batch is first embedded in chunks without a graph. The loss of all embeddings then provides the gradient of
    each embedding. Each chunk is then embedded again with the same dropout, and its gradients go back through the
    model. The sum in the parameters' `grad` is the gradient of the whole batch.

    Args:
        model (`nn.Module`): A [`LoTLIPModel`], also wrapped in DDP or FSDP.
        batch (`Mapping[str, Any]`): See [`~lotlip_hf.training.objective.embed`]. The first dimension of every tensor
            is the batch dimension.
        chunk_size (`int`): Number of samples in a chunk.
        objective (`Objective`): The objective. The parameters of the objective get gradients too.
        accelerator (`Accelerator`, *optional*): Applies autocast, loss scaling and gradient accumulation. Gradients
            are synchronised only with the last chunk.

    Returns:
        `dict[str, torch.Tensor]`: The losses, without gradients.
    """
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    first = next(iter(inputs.values()))
    num_samples = len(first)
    # Every process needs the same number of chunks, because DDP or FSDP may communicate in each chunk.
    num_chunks = -(-num_samples // chunk_size)
    num_chunks = int(max_over_ranks(torch.tensor(num_chunks, device=first.device)))
    bounds = [num_samples * i // num_chunks for i in range(num_chunks + 1)]
    chunks = list(zip(bounds[:-1], bounds[1:], strict=True))
    if accelerator is not None:
        autocast, backward = accelerator.autocast, accelerator.backward
        no_sync = partial(accelerator.no_sync, model)
    else:
        autocast, backward = nullcontext, torch.Tensor.backward
        no_sync = getattr(model, "no_sync", nullcontext)

    def embed_chunk(start: int, stop: int) -> dict[str, torch.Tensor]:
        # An empty chunk embeds one sample and drops the result.
        begin = min(start, num_samples - 1)
        rows = {name: value[begin : max(stop, begin + 1)] for name, value in inputs.items()}
        with autocast():
            return {name: value[: stop - start] for name, value in embed(model, rows, objective.needs).items()}

    random_states, cached = [], []
    with torch.no_grad():
        for chunk in chunks:
            random_states.append((torch.get_rng_state(), *get_device_states(*inputs.values())))
            cached.append(embed_chunk(*chunk))
    torch.clear_autocast_cache()  # older versions of torch cache the weights that autocast converted without a graph

    embeds = {name: torch.cat([chunk[name] for chunk in cached]) for name in cached[0]}
    # Tensors of the batch itself, such as labels, and masks get no gradients.
    computed = {name: value for name, value in embeds.items() if name not in inputs and value.is_floating_point()}
    leaves = {name: value.requires_grad_() for name, value in computed.items()}
    logit_scale = extract_model_from_parallel(model).logit_scale
    parameters = [each for each in (logit_scale, *objective.parameters()) if each.requires_grad]
    losses = objective(embeds, similarity_scale(model))
    # Gradients are computed without the caller's autocast.
    exact = partial(torch.autocast, logit_scale.device.type, enabled=False)
    with exact():
        gradients = torch.autograd.grad(
            losses["loss"], [*leaves.values(), *parameters], allow_unused=True, materialize_grads=True
        )
    embed_gradients, parameter_gradients = gradients[: len(leaves)], gradients[len(leaves) :]

    for (start, stop), (cpu_state, *device_states) in zip(chunks, random_states, strict=True):
        is_last = (start, stop) == chunks[-1]
        torch.set_rng_state(cpu_state)
        set_device_states(*device_states)
        with nullcontext() if is_last else no_sync():
            outputs = embed_chunk(start, stop)
            pairs = [(outputs[name], g[start:stop]) for name, g in zip(leaves, embed_gradients, strict=True)]
            if is_last:
                pairs += zip(parameters, parameter_gradients, strict=True)
            with exact():
                product = torch.stack([(value * gradient).sum() for value, gradient in pairs]).sum()
                backward(product)
    return {name: value.detach() for name, value in losses.items()}
