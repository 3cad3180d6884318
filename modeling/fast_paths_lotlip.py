"""Faster computations of the same results: texts in one row without padding, a last layer for pooled tokens only."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer


def to_row(states: Tensor, row_index: Tensor) -> Tensor:
    """[N, length, ...] -> [1, total, ...]: the tokens at `row_index` [total], indices into N * length tokens."""
    return states.flatten(0, 1).index_select(0, row_index).unsqueeze(0)


def from_row(row: Tensor, row_index: Tensor, num_texts: int, length: int) -> Tensor:
    """Inverse of [`to_row`]: [1, total, ...] -> [N, length, ...]. Padding becomes zeros."""
    padded = row.new_zeros(num_texts * length, *row.shape[2:])
    return padded.index_copy(0, row_index, row.squeeze(0)).unflatten(0, (num_texts, length))


def fast_options(config: Any, is_text: Tensor, num_corners: int, pooled_index: Tensor | None) -> dict[str, Tensor]:
    """`row_index` [total] of all tokens except padding; `pooled_tokens` [N, 1 + c] of the pooled and corner tokens."""
    options, attention = {}, config._attn_implementation
    # On CPUs, torch's compiler fails on flex attention if the size of the row varies.
    can_be_row = attention == "unpadded" or (attention == "flex_attention" and is_text.device.type != "cpu")
    if can_be_row and not torch.compiler.is_compiling() and not torch.jit.is_tracing():  # `total` varies
        is_computed = nn.functional.pad(is_text.bool(), (0, num_corners), value=True).flatten()
        if not is_computed.all():
            options["row_index"] = is_computed.nonzero().squeeze(1)
    if pooled_index is not None:
        corners = torch.arange(is_text.shape[1], is_text.shape[1] + num_corners, device=is_text.device)
        tokens = [pooled_index.unsqueeze(1), corners.expand(is_text.shape[0], -1)]
        options["pooled_tokens"] = torch.cat(tokens, dim=1)
    return options


def run_texts(backbone: PreTrainedModel, inputs: dict[str, Tensor], mask: Any, **options: Any) -> Any:
    """The backbone's outputs for `inputs` [N, length, ...], computed in one row if `options` has a `row_index`."""
    row_index, size = options.get("row_index"), inputs["inputs_embeds"].shape[:2]
    if row_index is None:
        return backbone(attention_mask=mask, **inputs, **options)
    for name in inputs:  # overwrite the caller's padded tensors to free their memory
        inputs[name] = to_row(inputs[name], row_index)
    outputs = backbone(attention_mask=mask, **inputs, **options)
    if "pooled_tokens" not in options:
        outputs.last_hidden_state = from_row(outputs.last_hidden_state, row_index, *size)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(from_row(states, row_index, *size) for states in outputs.hidden_states)
    return outputs


def unpadded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`sdpa` for a row [1, heads, total, head_dim], which is padded if a mask [N, 1, length, length] is given."""
    row_index = kwargs.pop("row_index", None)
    if row_index is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    num_texts, _, _, length = attention_mask.shape
    query, key, value = (
        from_row(states.transpose(1, 2), row_index, num_texts, length).transpose(1, 2)
        for states in (query, key, value)
    )
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return to_row(output, row_index), None  # [1, total, heads, head_dim]


AttentionInterface.register("unpadded", unpadded_attention)
AttentionMaskInterface.register("unpadded", sdpa_mask)


class Extension(nn.Module):
    """Methods that [`extend`] adds to a stock module."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, type(self).__bases__, self.__dict__  # pickle cannot import the generated class by name


def extend(backbone: PreTrainedModel, module: nn.Module, extension: type[Extension]) -> None:
    """Puts the methods of `extension` before those of the module's class."""
    module.__class__ = _extended(extension, type(module))
    backbone._no_split_modules = {*(backbone._no_split_modules or ()), type(module).__name__}


@cache
def _extended(extension: type, stock: type) -> type:
    return type(f"LoTLIP{stock.__name__}", (extension, stock), {})


def _new(extension: type, stock: type) -> nn.Module:
    return object.__new__(_extended(extension, stock))


class CheckpointedLayer(Extension, GradientCheckpointingLayer):
    """A layer of an encoder without gradient checkpointing in transformers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class PooledLayer(Extension):
    """A BERT-like layer that computes only the tokens `pooled_tokens` [N, Q], if this argument is passed."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Input [N, L, hidden_size], or [1, total, hidden_size] with `row_index`. Output [N, Q, hidden_size]."""
        tokens, row_index = kwargs.pop("pooled_tokens", None), kwargs.get("row_index")
        if tokens is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if row_index is not None:
            hidden_states = from_row(hidden_states, row_index, attention_mask.shape[0], attention_mask.shape[-1])
        if attention_mask is not None:
            attention_mask = take(attention_mask[:, 0], tokens).unsqueeze(1)  # [N, 1, Q, L]
        return self.pooled(hidden_states, attention_mask, tokens)

    def pooled(self, hidden_states: Tensor, mask: Tensor | None, tokens: Tensor) -> Tensor:
        """[N, L, hidden_size], mask [N, 1, Q, L] and tokens [N, Q] -> [N, Q, hidden_size]"""
        attention, states = self.attention.self, take(hidden_states, tokens)
        query, key, value = attention.query(states), attention.key(hidden_states), attention.value(hidden_states)
        context = _attend(attention, query, key, value, mask, attention.dropout.p)
        return self.feed_forward_chunk(self.attention.output(context, states))


class PooledViTLayer(PooledLayer):
    """[`PooledLayer`] for the layers of a ViT."""

    def pooled(self, hidden_states: Tensor, mask: Tensor | None, tokens: Tensor) -> Tensor:
        attention, normed = self.attention, self.layernorm_before(hidden_states)
        query = attention.q_proj(take(normed, tokens))
        key, value = attention.k_proj(normed), attention.v_proj(normed)
        context = _attend(attention, query, key, value, mask, attention.attention_dropout)
        states = self.dropout(attention.o_proj(context)) + take(hidden_states, tokens)
        return self.dropout(self.mlp(self.layernorm_after(states))) + states


def take(states: Tensor, tokens: Tensor) -> Tensor:
    """Selects the tokens [N, Q] of the states [N, L, size] -> [N, Q, size]."""
    texts = torch.arange(states.shape[0], device=states.device)
    return states[texts.unsqueeze(1), tokens]  # `take_along_dim` would fix the sizes in an exported graph


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Query [N, Q, hidden_size], key and value [N, L, hidden_size] -> [N, Q, hidden_size]."""
    heads = (states.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2) for states in (query, key, value))
    dropout = dropout if module.training else 0.0
    return sdpa_attention_forward(module, *heads, mask, dropout=dropout, scaling=module.scaling)[0].flatten(-2)
