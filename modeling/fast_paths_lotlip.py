"""Faster computations of the same results: texts in one row without padding, a last layer for pooled tokens only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Texts share a group if the shortest has at least this share of the tokens of the longest, less the tokens of `SHORT`.
SIMILAR_LENGTH, SHORT = 0.8, 8


def to_row(states: Tensor, row_index: Tensor) -> Tensor:
    """[N, length, ...] -> [1, total, ...]: the tokens at `row_index` [total], indices into N * length tokens."""
    return states.flatten(0, 1).index_select(0, row_index).unsqueeze(0)


def from_row(row: Tensor, row_index: Tensor, num_texts: int, length: int) -> Tensor:
    """Inverse of [`to_row`]: [1, total, ...] -> [N, length, ...]. Padding becomes zeros."""
    padded = row.new_zeros(num_texts * length, *row.shape[2:])
    return padded.index_copy(0, row_index, row.squeeze(0)).unflatten(0, (num_texts, length))


@dataclass
class Group:
    """n texts of similar length that follow one another in a [`Row`], each of up to l words and of m corner tokens."""

    num_texts: int
    length: int  # l
    num_tokens: int  # in the row
    index: Tensor | None  # [num_tokens] indices into n (l + m) tokens, `None` if all texts have l words
    is_word: Tensor  # [n, l]
    corner_mask: Tensor | None = None  # [n, 1, m, l + m]

    def padded(self, states: Tensor) -> Tensor:
        """[num_tokens, ...] -> [n, l + m, ...]"""
        if self.index is None:
            return states.unflatten(0, (self.num_texts, -1))
        size = self.length + (0 if self.corner_mask is None else self.corner_mask.shape[2])
        return from_row(states.unsqueeze(0), self.index, self.num_texts, size)

    def unpadded(self, states: Tensor) -> Tensor:
        """Inverse of [`Group.padded`]."""
        return states.flatten(0, 1) if self.index is None else to_row(states, self.index).squeeze(0)


@dataclass
class Row:
    """All tokens except padding of N texts and their corner tokens, in groups of texts of similar length."""

    index: Tensor  # [total] indices into N (L + m) tokens
    num_texts: int  # N
    length: int  # L + m
    groups: list[Group]
    texts: Tensor  # [N] the order of the texts in the row
    left: int = 0  # number of earlier words that a word sees in layers with sliding windows
    pooled_mask: Tensor | None = None  # [N, 1, 1 + m, L + m] for the tokens of `pooled_tokens`

    def mask_corners(self, is_text: Tensor, seen: Tensor, num_corners: int) -> None:
        """Makes the masks of the corner tokens, which see the words `seen` [N, L] of the text `is_text` [N, L]."""
        seen, is_text = seen & is_text.bool(), is_text.bool()
        of_corners = _corners_see(seen, num_corners)
        of_pooled = nn.functional.pad(is_text, (0, num_corners)).unsqueeze(1)
        self.pooled_mask = torch.cat([of_pooled, of_corners], dim=1).unsqueeze(1)
        first = 0
        for group in self.groups if num_corners else ():
            texts = self.texts[first : first + group.num_texts]
            first += group.num_texts
            words = torch.zeros_like(group.is_word)
            words[group.is_word] = seen[texts][is_text[texts]]
            group.corner_mask = _corners_see(words, num_corners).unsqueeze(1)


def _corners_see(words: Tensor, num_corners: int) -> Tensor:
    """The mask [N, m, L + m] of corner tokens, which see `words` [N, L] and themselves."""
    own = torch.eye(num_corners, dtype=torch.bool, device=words.device).expand(len(words), -1, -1)
    return torch.cat([words.unsqueeze(1).expand(-1, num_corners, -1), own], dim=-1)


def make_row(is_text: Tensor, num_corners: int) -> Row:
    """The row of texts [N, L], where `is_text` is 0 for padding, with corner tokens behind each text."""
    lengths, texts = is_text.long().sum(-1).sort(descending=True)
    is_computed = nn.functional.pad(is_text.bool(), (0, num_corners), value=True)
    index = torch.arange(is_computed.numel(), device=is_text.device).view_as(is_computed)
    sizes, parts, groups = lengths.tolist(), [], []
    for start, stop in _similar(sizes):
        parts.append(index[texts[start:stop]][is_computed[texts[start:stop]]])
        length, own = max(1, sizes[start]), None
        is_word = torch.arange(length, device=is_text.device) < lengths[start:stop].unsqueeze(-1)
        if sizes[stop - 1] < length:
            own = nn.functional.pad(is_word, (0, num_corners), value=True).flatten().nonzero().squeeze(1)
        groups.append(Group(stop - start, length, len(parts[-1]), own, is_word))
    return Row(torch.cat(parts), *is_computed.shape, groups, texts)


def _similar(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Bounds of groups of similar lengths, which are sorted from long to short."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or lengths[stop] < SIMILAR_LENGTH * lengths[start] - SHORT:
            yield start, stop
            start = stop


def fast_options(
    family: Any, config: Any, is_text: Tensor, num_corners: int, pooled_index: Tensor | None
) -> dict[str, Any]:
    """The `row` of the texts, if this avoids padding or wide windows, and `pooled_tokens` [N, 1 + c]."""
    options, attention, window = {}, config._attn_implementation, family.window(config)
    # On CPUs, torch's compiler fails on flex attention if the size of the row varies.
    can_be_row = attention == "unpadded" or (attention == "flex_attention" and is_text.device.type != "cpu")
    if not family.takes_rows or torch.compiler.is_compiling() or torch.jit.is_tracing():  # `total` varies
        can_be_row = False
    if can_be_row and ((window is not None and is_text.shape[-1] > window) or not is_text.all()):
        options["row"] = make_row(is_text, num_corners)
    if pooled_index is not None:
        corners = torch.arange(is_text.shape[1], is_text.shape[1] + num_corners, device=is_text.device)
        tokens = [pooled_index.unsqueeze(1), corners.expand(is_text.shape[0], -1)]
        options["pooled_tokens"] = torch.cat(tokens, dim=1)
    return options


def run_texts(backbone: PreTrainedModel, inputs: dict[str, Tensor], mask: Any, **options: Any) -> Any:
    """The backbone's outputs for `inputs` [N, length, ...], computed in one row if `options` has a `row`."""
    row = options.get("row")
    if row is None:
        return backbone(attention_mask=mask, **inputs, **options)
    for name in inputs:  # overwrite the caller's padded tensors to free their memory
        inputs[name] = to_row(inputs[name], row.index)
    outputs, size = backbone(attention_mask=mask, **inputs, **options), (row.num_texts, row.length)
    if "pooled_tokens" not in options:
        outputs.last_hidden_state = from_row(outputs.last_hidden_state, row.index, *size)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(from_row(states, row.index, *size) for states in outputs.hidden_states)
    return outputs


def unpadded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """
    `sdpa` for the tokens [1, heads, total, head_dim] of a `row`, by groups of texts of similar length. Words need no
    mask except for padding in a group, and in sliding windows the `attention_mask` for blocks of queries, which
    `create_corner_mask` returns.
    """
    row: Row | None = kwargs.pop("row", None)
    if row is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    is_causal, outputs = kwargs.get("is_causal"), []
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    states = [
        one.squeeze(0).transpose(0, 1).split([group.num_tokens for group in row.groups]) for one in (query, key, value)
    ]
    for group, *of_group in zip(row.groups, *states, strict=True):
        query, key, value = (group.padded(one).transpose(1, 2) for one in of_group)  # [n, heads, l + m, head_dim]
        words = [one[:, :, : group.length] for one in (query, key, value)]
        if attention_mask.numel() and group.length > row.left + 1:
            context = _in_windows(module, words, group.is_word, attention_mask, row.left, **kwargs)
        else:
            has_padding = group.index is not None and not is_causal
            mask = _visible(group.is_word)[:, None, None] if has_padding else None
            context, _ = sdpa_attention_forward(module, *words, mask, **kwargs)
        if group.corner_mask is not None:
            corners = query[:, :, group.length :]
            of_corners, _ = sdpa_attention_forward(module, corners, key, value, group.corner_mask, **kwargs)
            context = torch.cat([context, of_corners], dim=1)
        outputs.append(group.unpadded(context))
    return torch.cat(outputs).unsqueeze(0), None  # [1, total, heads, head_dim]


def _visible(is_word: Tensor) -> Tensor:
    """`is_word` [n, l], with a token in empty texts, because a softmax over no token is not defined."""
    return is_word | (torch.arange(is_word.shape[1], device=is_word.device) == 0)


def _in_windows(
    module: nn.Module, states: Sequence[Tensor], is_word: Tensor, mask: Tensor, left: int, **kwargs: Any
) -> Tensor:
    """Attention [n, l, heads, head_dim] of words in sliding windows, by blocks of queries."""
    query, key, value = states
    (num_texts, length), (block, seen) = is_word.shape, mask.shape[-2:]
    num_blocks = -(-length // block)
    after = num_blocks * block - length
    around = (left, seen - left - block + after)
    query = nn.functional.pad(query, (0, 0, 0, after)).unflatten(2, (num_blocks, block))
    key, value = (
        nn.functional.pad(one, (0, 0, *around)).unfold(2, seen, block).transpose(-1, -2) for one in (key, value)
    )
    sees = nn.functional.pad(is_word, around).unfold(1, seen, block).unsqueeze(2) & mask[0]  # [n, blocks, block, seen]
    is_query = nn.functional.pad(is_word, (0, after)).unflatten(1, (num_blocks, block)).unsqueeze(-1)
    sees = (sees | ~is_query).flatten(0, 1).unsqueeze(1)  # padding sees all, because of the softmax
    blocks = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    context, _ = sdpa_attention_forward(module, *blocks, sees, **kwargs)
    return context.unflatten(0, (num_texts, num_blocks)).flatten(1, 2)[:, :length]


AttentionInterface.register("unpadded", unpadded_attention)
AttentionMaskInterface.register("unpadded", sdpa_mask)


class Extension(nn.Module):
    """Methods that [`extend`] adds to a stock module."""

    def __reduce__(self) -> tuple[Any, ...]:
        bases = []  # pickle cannot import the generated classes by name
        stock: type = type(self)
        while issubclass(stock, Extension):
            extension, stock = stock.__bases__
            bases.append(extension)
        return _new, (stock, *reversed(bases)), self.__dict__


def extend(backbone: PreTrainedModel, module: nn.Module, extension: type[Extension]) -> None:
    """Puts the methods of `extension` before those of the module's class."""
    module.__class__ = _extended(extension, type(module))
    backbone._no_split_modules = {*(backbone._no_split_modules or ()), type(module).__name__}


@cache
def _extended(extension: type, stock: type) -> type:
    return type(f"LoTLIP{stock.__name__}", (extension, stock), {})


def _new(stock: type, *extensions: type) -> nn.Module:
    for extension in extensions:
        stock = _extended(extension, stock)
    return object.__new__(stock)


class PooledLayer(Extension):
    """A BERT-like layer that computes only the tokens `pooled_tokens` [N, Q], if this argument is passed."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Input [N, L, hidden_size], or [1, total, hidden_size] with a `row`. Output [N, Q, hidden_size]."""
        tokens, row = kwargs.pop("pooled_tokens", None), kwargs.get("row")
        if tokens is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if row is not None:
            hidden_states = from_row(hidden_states, row.index, row.num_texts, row.length)
            attention_mask = row.pooled_mask
        elif attention_mask is not None:
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
