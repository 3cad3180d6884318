"""Checkpoints go both ways between the installed transformers and the oldest that is supported.

As a script, `python tests/house/test_versions.py THEIRS OURS VERSION` loads what transformers VERSION saved in THEIRS,
compares, saves its own in OURS, and runs the tests of the golden files.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoProcessor

import oldest
import tiny
from lotlip_hf import LoTLIPModel, LoTLIPProcessor, LoTLIPTokenizer
from lotlip_hf.images import official_image_processor

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parents[1]
TOLERANCE = {"atol": 1e-5, "rtol": 0}
PAIRS = list(zip(itertools.cycle(tiny.TEXT_BACKBONES), tiny.VISION_BACKBONES))  # each backbone at least once
TEXTS = [["a cat", "A cat sleeps. It is old &amp; grey."], ["", "a [SEP] in a text, </s> too. " * 20]]


def tokenizer(text_backbone: str) -> LoTLIPTokenizer:
    """A tokenizer of the backbone's kind: WordPiece, byte-level BPE, or Unigram."""
    if text_backbone == "bert":
        return LoTLIPTokenizer.from_pretrained(TESTS / "golden" / "tokenizer", model_max_length=38)
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    special = [*names.values(), "<mask>"]
    if text_backbone == "roberta":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*special, *alphabet, "at"])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "t")], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pieces = [(token, 0.0) for token in special] + [(letter, -2.0) for letter in "▁abcdefghilmnoprstxy.&<>"]
        backend = Tokenizer(models.Unigram([*pieces, ("▁cat", -1.0)], unk_id=3))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return LoTLIPTokenizer(tokenizer_object=backend, mask_token="<mask>", model_max_length=38, **names)


def save(folder: Path) -> None:
    """Save a model and its processor for each pair of backbones, and what they answer."""
    for text_backbone, vision_backbone in PAIRS:
        name = f"{text_backbone}-{vision_backbone}"
        torch.manual_seed(len(name))
        LoTLIPModel(tiny.config(text_backbone, vision_backbone)).save_pretrained(folder / name)
        processor = LoTLIPProcessor(official_image_processor(32), tokenizer(text_backbone))
        processor.save_pretrained(folder / name)
        save_file(answers(folder / name), folder / f"{name}.safetensors")


def compare(folder: Path, version: str) -> None:
    """Load what `save` left there under another version."""
    for text_backbone, vision_backbone in PAIRS:
        name = f"{text_backbone}-{vision_backbone}"
        saved_under = json.loads((folder / name / "config.json").read_text())["transformers_version"]
        assert saved_under.startswith(version), f"{name} was saved under {saved_under}, not {version}"
        expected, ours = load_file(folder / f"{name}.safetensors"), answers(folder / name)
        assert ours.keys() == expected.keys()
        for key, value in ours.items():
            message = f"{name} of {version}: {key} differs\n".__add__
            torch.testing.assert_close(value, expected[key], **TOLERANCE, msg=message)


def answers(folder: Path) -> dict[str, torch.Tensor]:
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"{folder}: {info}"
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(7, tiny.TEXT_SIZE["vocab_size"], (2, 3, 11), generator=generator)
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        outputs = model(input_ids, pixel_values, return_loss=True)

    processor = AutoProcessor.from_pretrained(folder)
    with Image.open(TESTS / "golden" / "images" / "RGB_640x480.png") as image:
        batch = processor(text=TEXTS, images=[image, image], return_tensors="pt", verbose=False)
    return {
        "text_embeds": outputs.text_embeds,
        "image_embeds": outputs.image_embeds,
        "corner_embeds": outputs.corner_embeds,
        "loss": outputs.loss,
        "last_hidden_state": outputs.vision_model_output.last_hidden_state,
        "model_max_length": torch.tensor(processor.tokenizer.model_max_length),
        **batch,
    }


def run(*arguments: str | Path) -> str:
    """Run the interpreter that has the oldest transformers, outside of this run of pytest."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(TESTS)  # as pytest imports what the tests share
    command = [str(oldest.python()), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-5000:]
    return finished.stdout


def test_checkpoints_go_both_ways_and_golden_files_are_met(tmp_path: Path) -> None:
    """By one process of the oldest. Conversion, too: the golden files' checkpoints are converted for it."""
    save(tmp_path / "installed")
    printed = run(__file__, tmp_path / "installed", tmp_path / "oldest", transformers.__version__)
    compare(tmp_path / "oldest", oldest.oldest_version())
    assert " passed" in printed


if __name__ == "__main__":
    theirs, ours, their_version = sys.argv[1:]
    compare(Path(theirs), their_version)
    save(Path(ours))
    plain = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    sys.exit(pytest.main([*plain, str(TESTS / "modeling" / "test_golden.py")]))
