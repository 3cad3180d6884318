"""Measures how often word alignment finds the word of a caption that the picture contradicts, on Scenes.

    python benchmarks/exchanged_words.py --train run                         # train a model that sees all attributes
    python benchmarks/exchanged_words.py --model checkpoint                  # a model that was trained on Scenes
    python benchmarks/exchanged_words.py --model checkpoint --left-out       # also by leaving out each word

The captions are long captions of the test split with one attribute of one object exchanged: a colour, a shape or a
pattern, which changes one to six words. Captions that are longer than the longest text of the model are left out. A
model can only find what it sees, so `recognised` says in how many pictures the true caption has the higher cosine. For
each way to give words values, the table has the share of captions whose lowest word is exchanged (`lowest`); the mean
share of the other words above the lowest exchanged word (`others above`); and the share of captions where the
exchanged words have a lower mean than in the true caption (`below true`).

`--train` makes a model whose towers have mean pooling, in two stages. The image tower learns from labels, as image
towers usually do: the attributes of the object in each cell. Then `lotlip train` trains both towers with the term
`negatives`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lotlip_hf import Encoder, LoTLIPModel, load_encoder
from lotlip_hf.cli import main as lotlip
from lotlip_hf.files import printable
from lotlip_hf.metrics import word_alignment
from lotlip_hf.scenes.dataset import (
    COLOURS,
    GRID,
    NUMBERS,
    PATTERNS,
    SHAPES,
    Scene,
    long_captions,
    negatives,
    render,
    scene,
)
from lotlip_hf.scenes.small import small_model
from lotlip_hf.terminal import progress_bar, text_table
from lotlip_hf.words import split_words

Values = list[list[float]]
Method = Callable[[list, list[str]], Values]


class Exchanged(NamedTuple):
    """A scene with a true and a false caption, the indices of the words that differ, and the attribute."""

    scene: Scene
    true: str
    false: str
    indices: list[int]
    attribute: str


def exchanged(scenes: Sequence[Scene], encoder: Encoder) -> list[Exchanged]:
    """The captions that the model reads to their end."""
    tokenizer, found = encoder.engine.tokenizer, []  # pyright: ignore[reportAttributeAccessIssue]
    for one in scenes:
        true, false = long_captions(one)[0], negatives(one)[0]
        words = [[word.text.lower() for word in split_words(text)] for text in (true, false)]
        if len(words[0]) != len(words[1]):
            continue
        indices = [index for index, pair in enumerate(zip(*words, strict=True)) if pair[0] != pair[1]]
        lengths = map(len, tokenizer([true, false], verbose=False)["input_ids"])
        if indices and max(lengths) <= encoder.max_text_length:
            wrong = words[1][indices[0]]
            is_shape = wrong.startswith(SHAPES)
            attribute = "colour" if wrong in COLOURS else "shape" if is_shape else "pattern"
            found.append(Exchanged(one, true, false, indices, attribute))
    return found


def by_attention(encoder: Encoder, **options: object) -> Method:
    """Values of [`word_alignment`]."""

    def values(images: list, texts: list[str]) -> Values:
        found = word_alignment(images, texts, encoder, **options)  # pyright: ignore[reportArgumentType]
        return [[word.value for word in words] for words in found]

    return values


def by_leaving_out(encoder: Encoder) -> Method:
    """What the cosine loses without each word, which takes one text for each word."""

    def values(images: list, texts: list[str]) -> Values:
        found = []
        for image, text in zip(encoder.encode_images(images, progress=False), texts, strict=True):
            others = [text[: word.start] + text[word.end :] for word in split_words(text)]
            cosines = encoder.encode_texts([text, *others], progress=False) @ image
            found.append((cosines[0] - cosines[1:]).tolist())
        return found

    return values


def measure(method: Method, captions: Sequence[Exchanged]) -> dict[str, float]:
    """`lowest`, `above` and `below_true` of a method, as described above."""
    images = [render(one.scene) for one in captions]
    found, of_true = method(images, [one.false for one in captions]), method(images, [one.true for one in captions])
    lowest = above = below_true = 0.0
    for values, same, one in zip(found, of_true, captions, strict=True):
        wrong = [values[index] for index in one.indices]
        others = [value for index, value in enumerate(values) if index not in one.indices]
        lowest += min(wrong) < min(others)
        above += sum(value > min(wrong) for value in others) / len(others)
        below_true += sum(wrong) < sum(same[index] for index in one.indices)
    shares = {"lowest": lowest, "above": above, "below_true": below_true}
    return {name: value / len(captions) for name, value in shares.items()}


def train(output: Path, steps: int, num_scenes: int) -> Path:
    """Trains a model into the folder `output`, and returns its checkpoint."""
    torch.manual_seed(0)
    model, processor = small_model(max_text_length=128, hidden_size=192)
    for config in (model.config.text_config, model.config.vision_config):
        config.pooling = "mean"
    learn_cells(model, [scene(index) for index in range(num_scenes)], steps)
    start, run = output / "start", output / "run"
    model.save_pretrained(start)
    processor.save_pretrained(start)
    options = f"--data scenes --num-scenes {num_scenes} --num-sentences 0 --num-long-texts 1 --terms infonce negatives"
    options += f" --batch-size 64 --max-steps {steps} --warmup-steps 0.05"
    options += " --learning-rate 1.5e-3 --image-learning-rate 5e-4"
    if lotlip(["train", "--model", str(start), "--output", str(run), *options.split()]):
        raise SystemExit(1)
    return run / f"checkpoint-{steps}"


def learn_cells(model: LoTLIPModel, scenes: Sequence[Scene], steps: int) -> float:
    """
    Trains the image tower and a head, which is discarded, to name the attributes of the object in each cell. Returns
    the last loss.
    """
    names = [list(COLOURS), SHAPES, PATTERNS, NUMBERS[1:]]
    pixels = torch.from_numpy(np.stack([np.asarray(render(one)) for one in scenes])).permute(0, 3, 1, 2)
    labels = torch.full((len(scenes), GRID * GRID, len(names)), -1)
    for each, one in zip(labels, scenes, strict=True):
        for item in one.objects:
            values = (item.colour, item.shape, item.pattern, NUMBERS[item.count])
            indices = [known.index(value) for known, value in zip(names, values, strict=True)]
            each[item.cell] = -1 if item.inside else torch.tensor(indices)  # a cell with two objects has no labels
    tower = model.vision_model.train()
    head = nn.Linear(tower.config.hidden_size, sum(map(len, names)))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    loss = torch.zeros(())
    for _ in progress_bar(range(steps), desc="Learning cells", unit="step"):
        chosen = torch.randint(len(scenes), (64,))
        states = tower.backbone(pixel_values=pixels[chosen] / 127.5 - 1).last_hidden_state[:, 1:]
        logits, known = head(states).flatten(0, 1), labels[chosen].flatten(0, 1)
        parts = logits.split([len(each) for each in names], dim=-1)
        losses = [F.cross_entropy(part, known[:, index], ignore_index=-1) for index, part in enumerate(parts)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return loss.item()


def recognised(encoder: Encoder, captions: Sequence[Exchanged]) -> float:
    """The share of pictures that are nearer to the true caption."""
    images = encoder.encode_images([render(one.scene) for one in captions], progress=False)
    true = encoder.encode_texts([one.true for one in captions], progress=False)
    false = encoder.encode_texts([one.false for one in captions], progress=False)
    return ((true - false) * images).sum(1).gt(0).float().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="checkpoint that was trained on Scenes")
    model.add_argument("--train", type=Path, metavar="FOLDER", help="train a model in this new folder")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each stage of --train")
    parser.add_argument("--num-training-scenes", type=int, default=10_000, help="pictures to train on")
    parser.add_argument("--num-scenes", type=int, default=500, help="pictures to measure on")
    parser.add_argument("--left-out", action="store_true", help="also leave out each word, which takes minutes")
    arguments = parser.parse_args(argv)
    if arguments.train:
        arguments.model = str(train(arguments.train, arguments.steps, arguments.num_training_scenes))
    encoder = load_encoder(arguments.model)
    captions = exchanged([scene(index, split="test") for index in range(arguments.num_scenes)], encoder)
    last = {"layers": [-1]}
    methods = {
        "all rows, all layers": by_attention(encoder),
        "all rows, last layer": by_attention(encoder, **last),
        "pooled row, all layers": by_attention(encoder, rows="pooled"),
    }
    if arguments.left_out:
        methods["each word left out"] = by_leaving_out(encoder)
    chance = sum(len(one.indices) / len(split_words(one.false)) for one in captions) / len(captions)
    print(f"{printable(arguments.model)}: by chance, the lowest word is exchanged in {chance:.1%} of the captions.")
    rows = []
    for attribute in ("colour", "shape", "pattern", "any"):
        some = [one for one in captions if attribute in (one.attribute, "any")]
        known = f"{recognised(encoder, some):.2f}"
        for name, method in methods.items():
            found = measure(method, some)
            shares = (f"{found[key]:.2f}" for key in ("lowest", "above", "below_true"))
            rows.append([attribute, str(len(some)), known, name, *shares])
    header = ["exchanged", "captions", "recognised", "method", "lowest", "others above", "below true"]
    print(text_table([header], rows, left=[0, 3]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
