"""Texts and tokenizers that several tests share."""

import html
import json
import random
import re
from pathlib import Path

import ftfy
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaTokenizer, XLMRobertaTokenizer

GOLDEN = Path(__file__).resolve().parent / "golden" / "tokenizer"
TEXTS = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))
# What random texts are made of: everything that cleaning, splitting or the special tokens care about.
PIECES = [
    *("a", "cat", "Dog", "sleeps", " ", "  ", ". ", ".", ", ", "\n", "\t", "\r\n", "é", "e\u0301", "猫", "😀", "“x”"),
    *(
        "&amp;",
        "&amp;amp;",
        "&lt;",
        "&#91;SEP&#93;",
        "&",
        "<b>",
        "schÃ¶n",
        "â€™",
        "Ã",
        "\x00",
        "\x07",
        "\x1b",
        "\x1b[1m",
    ),
    *("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "[Corner0]", "［SEP］", "[", "]", "SEP", "(SEP)", "(SEP0)", "("),
    *("\ufdd0", "\u200b", "\xa0", "\u2028", "\x85", "Ａ", "İ", "ß", "ﬁ", "3.5"),
]


def random_texts(count: int, pieces: list[str] = PIECES, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(pieces, k=generator.randint(0, 12))) for _ in range(count)]


def toy_roberta() -> RobertaTokenizer:
    letters = list(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}
    return RobertaTokenizer(vocab=vocab, merges=[])


def toy_xlm_roberta() -> XLMRobertaTokenizer:
    """XLM-R's pipeline, with a normaliser that makes plain brackets of fullwidth ones, as in its file."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz<>/[]&#;.", "▁a", "<s", "</"]
    stock = XLMRobertaTokenizer(vocab=[(token, -float(len(token) == 1)) for token in tokens])
    stock.backend_tokenizer.normalizer = normalizers.NFKC()
    return stock


def official_clean(text: str) -> str:
    """The official cleaning as it is written there: every step, for every text."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def toy_qwen() -> PreTrainedTokenizerFast:
    """Qwen's pipeline: byte-level BPE after NFC, no separator and no token around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("c", "a"), ("ca", "t"), ("Ġ", "cat"), (".", '"')]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.normalizer = normalizers.NFC()
    split = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<PST>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def toy_qwen_embedding() -> PreTrainedTokenizerFast:
    """Qwen3-Embedding's: the padding token ends each text, too."""
    stock = toy_qwen()
    pad = stock.pad_token_id
    end = processors.TemplateProcessing(
        single="$A <|endoftext|>",
        pair="$A <|endoftext|> $B:1 <|endoftext|>:1",
        special_tokens=[("<|endoftext|>", pad)],
    )
    plain = processors.ByteLevel(trim_offsets=False)
    stock.backend_tokenizer.post_processor = processors.Sequence([plain, end])
    stock.padding_side = "left"
    return stock


def toy_llama() -> PreTrainedTokenizerFast:
    """Llama 2's pipeline: BPE with a mark for spaces, bytes for unknown letters, a start token, no padding token."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrst.:",
        "▁a",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
