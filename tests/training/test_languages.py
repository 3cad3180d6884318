"""Captions in many languages: a column each, a text tower that knows them, and one run that draws from all of them."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTImageProcessorPil, ViTModel

from lotlip_hf.cli import main as lotlip
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.loading import load_processor
from lotlip_hf.training.config import parse_arguments
from lotlip_hf.training.data import load_data
from lotlip_hf.training.log import read_log

pytestmark = pytest.mark.usefixtures("alone")
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CAPTIONS = {
    "en": "a red cat",
    "de": "eine rote katze schläft. sie träumt.",
    "fr": "un chat rouge dort. il rêve.",
    "ja": "赤い猫が寝ている。夢を見る。",
}
WORDS = {
    "en": ["a", "red", "cat"],
    "de": ["eine", "rote", "katze", "schläft", "sie", "träumt"],
    "fr": ["un", "chat", "rouge", "dort", "il", "rêve"],
    "ja": [*"赤猫寝夢見"],
    "none": ["perro", "犬"],
}
NUMBER, FIRST_JAPANESE = 26, 24  # Japanese is only in the last records


def records() -> list[dict[str, str]]:
    """The captions of records. The first has English alone, and some have a language as an empty text."""
    made: list[dict[str, str]] = []
    for number in range(NUMBER):
        languages = ["en", "de", "fr"] if number else ["en"]
        languages += ["ja"] if number >= FIRST_JAPANESE else []
        captions = {language: CAPTIONS[language] for language in languages}
        made.append({**captions, **({"fr": ""} if number == 1 else {}), "file_name": f"{number}.png"})
    return made


def make_pictures(folder: Path, kind: str) -> Path:
    folder.mkdir()
    for number in range(NUMBER):
        Image.new("RGB", (32, 32), (number * 9, 0, 255 - number * 9)).save(folder / f"{number}.png")
    with open(folder / f"metadata.{kind}", "w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records())
        else:
            rows = csv.DictWriter(file, ["file_name", *CAPTIONS])
            rows.writeheader()
            rows.writerows(records())
    return folder


def make_towers(folder: Path) -> list[str]:
    text, image = folder / "text", folder / "image"
    text.mkdir()
    vocabulary = [*SPECIAL, ".", *(word for words in WORDS.values() for word in words)]
    (text / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertModel(BertConfig(**SIZE, vocab_size=len(vocabulary), max_position_embeddings=64)).save_pretrained(text)
    BertTokenizer.from_pretrained(text, strip_accents=False).save_pretrained(text)
    ViTModel(ViTConfig(**SIZE, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(image)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(image)
    return ["--text-model", str(text), "--image-model", str(image), "--max-text-length", "40"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_draws_from_all_languages(kind: str, streaming: bool, tmp_path: Path) -> None:
    """In one step: the embedding of a word changes if the step has the word."""
    words = make_towers(tmp_path)
    words += ["--data", str(make_pictures(tmp_path / "pictures", kind)), "--output", str(tmp_path / "run")]
    words += ["--short-column", "en", "--long-columns", "de", "fr", "ja", "--num-corner-tokens", "0"]
    words += "--max-steps 1 --batch-size 26 --weight-decay 0 --num-workers 0 --trackers none".split()
    words += ["--streaming"] if streaming else []
    assert lotlip(["train", *words]) == 0
    (entry,) = read_log(tmp_path / "run")
    assert 0 < entry["loss"] < 10

    config = parse_arguments(words)
    name = "embeddings.word_embeddings.weight"
    before = load_file(tmp_path / "text" / "model.safetensors")[name]
    after = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")[f"text_model.backbone.{name}"]
    vocabulary = BertTokenizer.from_pretrained(tmp_path / "text").get_vocab()
    for language, known in WORDS.items():
        rows = torch.tensor([vocabulary[word] for word in known])
        changed = (after[rows] != before[rows]).any(1)
        assert changed.all() if language != "none" else not changed.any(), language

    # A record draws one text of each of its languages before it draws a second one.
    processor = load_processor(tmp_path / "run" / "checkpoint-1")
    given = list(load_data(config)[0])
    drawn = LoTLIPCollator(processor, config.draw(), return_texts=True)(given)["texts"]
    for number, (short, *long) in enumerate(drawn):
        assert short == CAPTIONS["en"]
        found = [name for name, words in WORDS.items() for text in long if words[1] in text]
        expected = {"de", "fr", "ja"} if number >= FIRST_JAPANESE else {"de"} if number == 1 else {"de", "fr"}
        assert set(found) == (expected if number else {"en"}), number
