"""All families of text encoders, tiny and random: the table of tests/modeling/test_families.py."""

import copy
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCAB, PAD, LONGEST = 99, 1, 40
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": LONGEST,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
LOCAL = {"layer_types": ["full_attention", "sliding_attention"]}
DECODER = {**SIZE, "num_key_value_heads": 2, "head_dim": 8, **ROPE}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
DEBERTA = {
    **SIZE,
    **NO_DROPOUT,
    "relative_attention": True,
    "max_relative_positions": -1,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}


@dataclass(frozen=True)
class Family:
    """
    A row of the table.

    Args:
        model_type (`str`): Type of the stock configuration.
        config (`dict`): Fields of the stock configuration.
        pooling (`str`): Expected default pooling.
        positions (`str`): Where corner tokens are. `"inserted"`: learned positions behind the first token. `"first"`:
            the position of the first token. `"behind"`: the positions behind the text. `"memory"`: relative positions
            before the text.
        offset (`int`): First position of the stock encoder.
        corners_first (`bool`): Whether corner tokens precede the text in memory.
        causal (`bool`): Whether a token sees the tokens before it only.
        window (`Callable`, *optional*): Whether a token sees another one at a distance, in sliding layers.
        rows (`bool`): Whether texts can share a row without padding.
    """

    model_type: str
    config: dict[str, Any]
    pooling: str = "mean"
    positions: str = "inserted"
    offset: int = 0
    corners_first: bool = False
    causal: bool = False
    window: Callable[[int], bool] | None = None
    rows: bool = False

    def stock_config(self, **changes: Any) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **copy.deepcopy({**self.config, **changes}))

    def stock_auto_class(self) -> Any:
        return AutoModelForTextEncoding if self.model_type.endswith("t5") else AutoModel

    def stock_model(self, **changes: Any) -> PreTrainedModel:
        return spread(self.stock_auto_class().from_config(self.stock_config(**changes)))

    def save(self, folder: Path, **changes: Any) -> Path:
        """Saves the stock encoder and a tokenizer."""
        self.stock_model(**changes).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder


def tokenizer() -> BertTokenizer:
    """BERT's pipeline for letters and digits, with the special tokens of `SIZE`."""
    characters = string.ascii_lowercase + string.digits
    tokens = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{one}" for one in characters), *".,-"]
    tokens += [f"[unused{number}]" for number in range(VOCAB - len(tokens))]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=LONGEST)


def spread(model: Any) -> Any:
    """Weights large enough that attention, positions and corner tokens matter to the outputs."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # sinusoids
            continue
        nn.init.normal_(
            parameter, mean=float(parameter.dim() == 1 and "norm" in name.lower()), std=0.3, generator=generator
        )
    return model.eval()


def _rotary(model_type: str, config: dict[str, Any], **settings: Any) -> Family:
    return Family(model_type, config, positions="first", rows=True, **settings)


def _relative(model_type: str, config: dict[str, Any], **settings: Any) -> Family:
    return Family(model_type, config, positions="memory", corners_first=True, **settings)


def _decoder(model_type: str, config: dict[str, Any] | None = None, **settings: Any) -> Family:
    settings = {"pooling": "last", "causal": True, "rows": True, **settings}
    return Family(model_type, {**DECODER, **(config or {})}, positions="behind", **settings)


BERT = {**SIZE, **NO_DROPOUT}
WITH_POOLER = {"pooling": "pooler", "rows": True}
_ROWS = [
    Family("bert", BERT, **WITH_POOLER),
    Family("roberta", BERT, **WITH_POOLER, offset=PAD + 1),
    Family("xlm-roberta", BERT, **WITH_POOLER, offset=PAD + 1),
    Family("camembert", BERT, **WITH_POOLER, offset=PAD + 1),
    Family("data2vec-text", BERT, **WITH_POOLER, offset=PAD + 1),
    Family("roberta-prelayernorm", BERT, offset=PAD + 1, rows=True),
    Family("xlm-roberta-xl", BERT, offset=PAD + 1, rows=True),
    Family("distilbert", {**SIZE, "dropout": 0.0, "attention_dropout": 0.0, "hidden_dim": 37}, rows=True),
    Family("mpnet", BERT, offset=2, corners_first=True),
    Family("electra", {**BERT, "embedding_size": 16}, pooling="cls", rows=True),
    Family("albert", {**BERT, "embedding_size": 16}, rows=True),
    _rotary(
        "modernbert",
        {**SIZE, "local_attention": 6, **LOCAL, "cls_token_id": 2, "sep_token_id": 3},
        pooling="cls",
        window=lambda distance: abs(distance) <= 3,
    ),
    _rotary("eurobert", {**SIZE, "num_key_value_heads": 2, **ROPE}),
    _rotary("nomic_bert", {**BERT, **ROPE}),
    _rotary("gte", {**BERT, **ROPE}, pooling="cls"),
    _rotary("jina_embeddings_v3", {**BERT, **ROPE}),
    _relative("deberta", {**DEBERTA}, pooling="cls"),
    _relative("deberta-v2", {**DEBERTA, "position_buckets": 4, "norm_rel_ebd": "layer_norm"}, pooling="cls"),
    _relative("t5", T5),
    _relative("mt5", T5),
    _relative("umt5", T5),
    _decoder("llama"),
    _decoder("qwen3"),
    _decoder("gemma3_text", {"sliding_window": 3, **LOCAL}, window=lambda distance: 0 <= distance < 3),
]
FAMILIES = {row.model_type: row for row in _ROWS}
FAMILIES["deberta-v2, learned positions"] = Family(
    "deberta-v2",
    {**DEBERTA, "position_biased_input": True, "position_buckets": 4},
    pooling="cls",
    positions="first",
    corners_first=True,
)
FAMILIES["gemma3_text, bidirectional"] = _decoder(
    "gemma3_text",
    {"sliding_window": 6, **LOCAL, "use_bidirectional_attention": True},
    pooling="mean",
    causal=False,
    window=lambda distance: abs(distance) < 4,
)

# Decoders of the same code path as those above, with windows in some layers or in all.
CAUSAL_WINDOW = {"window": lambda distance: 0 <= distance < 3}
WINDOWED = {**LOCAL, "sliding_window": 3, "use_sliding_window": True}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}}
_DECODERS = [
    *map(_decoder, ("gemma", "phi", "granite", "olmo2", "helium", "glm")),
    _decoder("qwen3_vl_text", MROPE),
    *(_decoder(name, {"sliding_window": 3}, **CAUSAL_WINDOW) for name in ("mistral", "phi3", "starcoder2")),
    *(_decoder(name, WINDOWED, **CAUSAL_WINDOW) for name in ("qwen2", "ministral", "smollm3", "exaone4")),
    _decoder("gemma2", WINDOWED, **CAUSAL_WINDOW, rows=False),  # sdpa lacks its cap of attention scores
    _decoder("qwen3", WINDOWED, **CAUSAL_WINDOW),
]
FAMILIES |= {row.model_type: row for row in _DECODERS}
DECODERS = [FAMILIES["llama"], FAMILIES["gemma3_text"], *_DECODERS]
FAMILIES |= {
    f"{row.model_type}, bidirectional layers": replace(
        row,
        config={**row.config, "is_causal": False},
        causal=False,
        window=row.window and (lambda distance: abs(distance) <= 3),
    )
    for row in DECODERS
}


QUICK = ("bert", "roberta", "mpnet", "albert", "modernbert", "deberta-v2", "t5", "llama", "mistral", "qwen2")
QUICK += ("gemma3_text", "gemma3_text, bidirectional")


def marked(names: Iterable[str]) -> list[Any]:
    """Parameters of a test. Only one family of each kind is in the quick tests."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def texts(*lengths: int, width: int | None = None, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and masks of padded texts [N, width]. Texts begin with 2 and end with 3."""
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    for row, length in zip(ids, lengths, strict=True):
        text = row[:length] if side == "right" else row[width - length :]
        text.copy_(torch.randint(5, VOCAB, (length,)))
        text[0], text[-1] = 2, 3
    return ids, (ids != PAD).long()


def naive(family: Family, backbone: PreTrainedModel, corners: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """
    States [L + m, width] of one text [L] and its corner tokens, with the masks and positions written out, by the
    stock encoder in eager attention.
    """
    m, length = len(corners), len(ids)
    words = backbone.get_input_embeddings()(ids)
    parts = [corners, words] if family.corners_first else [words, corners]
    embeds = torch.cat(parts).unsqueeze(0)
    kinds = ["corner"] * m + ["text"] * length if family.corners_first else ["text"] * length + ["corner"] * m
    first = kinds.index("text")
    pooled = first + length - 1 if family.positions == "behind" else first
    total = m + length
    full, sliding = torch.zeros(total, total, dtype=torch.bool), torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            if kinds[query] == "corner":
                sees = near = query == key or (kinds[key] == "text" and key != pooled)
            else:
                sees = kinds[key] == "text" and (not family.causal or key <= query)
                near = sees and (family.window is None or family.window(query - key))
            full[query, key], sliding[query, key] = sees, near

    inputs: dict[str, torch.Tensor] = {}
    if family.positions != "memory":
        word_positions = list(range(length))
        corner_positions = [0] * m
        if family.positions == "inserted":
            word_positions = [0, *range(m + 1, m + length)]
            corner_positions = list(range(1, m + 1))
        elif family.positions == "behind":
            corner_positions = list(range(length, length + m))
        positions = (
            [*corner_positions, *word_positions] if family.corners_first else [*word_positions, *corner_positions]
        )
        inputs["position_ids"] = torch.tensor([positions]) + family.offset

    def additive(mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 1, total, total).masked_fill(~mask, torch.finfo(torch.float32).min)

    if family.model_type.startswith("deberta"):  # its embeddings do not accept this mask
        states = backbone.embeddings(inputs_embeds=embeds, **inputs)
        states = backbone.encoder(states, full.view(1, 1, total, total)).last_hidden_state
    else:
        mask: Any = additive(full)
        if family.window is not None and "layer_types" not in family.config:
            mask = additive(sliding)
        elif family.window is not None:
            mask = {"full_attention": mask, "sliding_attention": additive(sliding)}
        states = backbone(inputs_embeds=embeds, attention_mask=mask, **inputs).last_hidden_state
    states = states[0]
    return states.roll(-m, 0) if family.corners_first else states
