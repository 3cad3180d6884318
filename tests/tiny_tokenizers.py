"""Texts and tokenizers that several tests share."""

import html
import json
import random
import re
from pathlib import Path

import ftfy
from tokenizers import normalizers, pre_tokenizers
from transformers import RobertaTokenizer, XLMRobertaTokenizer

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
