"""Measures how often word alignment finds the word of a caption that the picture contradicts, on Scenes.

    python benchmarks/exchanged_words.py --model checkpoint                  # a model that was trained on Scenes
    python benchmarks/exchanged_words.py --model checkpoint --left-out       # also by leaving out each word

The captions are long captions of the test split with one attribute of one object exchanged, which changes one to six
words. Captions that are longer than the longest text of the model are left out. For each way to give words values, the
table has the share of captions whose lowest word is exchanged; the mean share of the other words above the lowest
exchanged word; and the share of captions where the exchanged words have a lower mean than in the true caption.
"""

import argparse
from collections.abc import Callable, Sequence

from lotlip_hf import Encoder, load_encoder
from lotlip_hf.files import printable
from lotlip_hf.metrics import word_alignment
from lotlip_hf.scenes.dataset import Scene, long_captions, negatives, render, scene
from lotlip_hf.terminal import text_table
from lotlip_hf.words import split_words

Values = list[list[float]]
Method = Callable[[list, list[str]], Values]


def exchanged(scenes: Sequence[Scene], encoder: Encoder) -> list[tuple[Scene, str, str, list[int]]]:
    """Scenes with a true and a false caption of whole texts and the indices of the words that differ."""
    tokenizer, found = encoder.engine.tokenizer, []  # pyright: ignore[reportAttributeAccessIssue]
    for one in scenes:
        true, false = long_captions(one)[0], negatives(one)[0]
        words = [[word.text.lower() for word in split_words(text)] for text in (true, false)]
        if len(words[0]) != len(words[1]):
            continue
        indices = [index for index, pair in enumerate(zip(*words, strict=True)) if pair[0] != pair[1]]
        lengths = map(len, tokenizer([true, false], verbose=False)["input_ids"])
        if indices and max(lengths) <= encoder.max_text_length:
            found.append((one, true, false, indices))
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


def measure(method: Method, captions: Sequence[tuple[Scene, str, str, list[int]]]) -> dict[str, float]:
    """`lowest`, `above` and `below_true` of a method, as described above."""
    images = [render(one) for one, *_ in captions]
    false, true = (method(images, [entry[index] for entry in captions]) for index in (2, 1))
    lowest = above = below_true = 0.0
    for values, same, (*_, indices) in zip(false, true, captions, strict=True):
        wrong = [values[index] for index in indices]
        others = [value for index, value in enumerate(values) if index not in indices]
        lowest += min(wrong) < min(others)
        above += sum(value > min(wrong) for value in others) / len(others)
        below_true += sum(wrong) < sum(same[index] for index in indices)
    shares = {"lowest": lowest, "above": above, "below_true": below_true}
    return {name: value / len(captions) for name, value in shares.items()}


def recognised(encoder: Encoder, captions: Sequence[tuple[Scene, str, str, list[int]]]) -> float:
    """The share of pictures that are nearer to the true caption."""
    images = encoder.encode_images([render(one) for one, *_ in captions], progress=False)
    true, false = (encoder.encode_texts([entry[index] for entry in captions], progress=False) for index in (1, 2))
    return ((true - false) * images).sum(1).gt(0).float().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint that was trained on Scenes")
    parser.add_argument("--num-scenes", type=int, default=500)
    parser.add_argument("--left-out", action="store_true", help="also leave out each word, which takes minutes")
    arguments = parser.parse_args(argv)
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
    chance = sum(len(indices) / len(split_words(false)) for *_, false, indices in captions) / len(captions)
    print(
        f"{printable(arguments.model)}: {len(captions)} captions; {recognised(encoder, captions):.1%} of the pictures"
    )
    print(f"are nearer to the true one. By chance, the lowest word is exchanged in {chance:.1%}.")
    rows = []
    for name, method in methods.items():
        found = measure(method, captions)
        rows.append([name, *(f"{found[key]:.3f}" for key in ("lowest", "above", "below_true"))])
    print(text_table([["method", "lowest", "others above", "below true"]], rows, left=[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
