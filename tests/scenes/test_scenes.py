"""Scenes: every caption is true of its picture, held-out groups need the long caption, and all of it is repeatable."""

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import datasets
import numpy as np
import pytest

from lotlip_hf import LoTLIPTokenizer
from lotlip_hf.data.record import check_record
from lotlip_hf.scenes.dataset import (
    BACKGROUNDS,
    COLOURS,
    GROUP_SIZE,
    SHAPES,
    TAGS,
    Scene,
    SceneObject,
    long_captions,
    negatives,
    regions,
    render,
    rewrites,
    scene,
    scenes_dataset,
    short_caption,
    tags,
)

NUMBERS = {"a": 1, "two": 2, "three": 3}
TOTALS = "zero one two three four five six seven eight nine ten eleven twelve thirteen".split()
ADJECTIVES = {
    **dict.fromkeys(("large", "big", "huge"), ("size", "large")),
    **dict.fromkeys(("small", "little"), ("size", "small")),
    **dict.fromkeys(("tiny", "very small"), ("size", "tiny")),
    **dict.fromkeys(("striped", "stripy"), ("pattern", "striped")),
    **dict.fromkeys(("spotted", "dotted"), ("pattern", "spotted")),
    "hollow": ("pattern", "hollow"),
    "plain": ("pattern", "plain"),
}
NAME = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(s|es)?"
PHRASE = re.compile(rf"\b(a|two|three) ((?:(?:{'|'.join(sorted(ADJECTIVES, key=len, reverse=True))}) )+){NAME}\b")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def some_scenes(number: int = 150) -> list[Scene]:
    return [scene(index, seed=3, split=split) for split in ("train", "test") for index in range(number)]


def parse_phrase(match: re.Match[str]) -> dict[str, object]:
    """An object phrase as the attributes that it states."""
    number, adjectives, colour, shape, plural = match.groups()
    assert (plural or "") == ("" if number == "a" else "es" if shape == "cross" else "s"), match[0]
    stated = {"count": NUMBERS[number], "colour": colour, "shape": shape, "pattern": "plain"}
    for word in re.findall("very small|[a-z]+", adjectives):
        attribute, value = ADJECTIVES[word]
        stated[attribute] = value
    return stated


def parse_place(words: str) -> int:
    """The cell of the grid that a phrase of place means."""
    words = words.replace("right in the center", "in the center")
    column = 0 if "left" in words else 2 if "right" in words else 1
    row = 0 if re.search("top|upper", words) else 2 if re.search("bottom|lower", words) else 1
    assert column != 1 or row != 1 or re.search("center|middle", words), words
    return 3 * row + column


def named(one: Scene, words: str) -> SceneObject:
    """The object that "red circle" or "green stars" means, of which there must be exactly one."""
    match = re.fullmatch(NAME, words)
    assert match, words
    (item,) = [item for item in one.objects if item.colour == match[1]]
    assert item.shape == match[2]
    assert (match[3] or "") == ("" if item.count == 1 else "es" if item.shape == "cross" else "s")
    return item


def check_sentence(one: Scene, sentence: str) -> set[SceneObject]:
    """Hold a sentence against the scene; return the object that it describes in full, if it does."""
    words = sentence[0].lower() + sentence[1:]
    phrase = PHRASE.search(words)
    if phrase:
        stated = parse_phrase(phrase)
        (item,) = [item for item in one.objects if item.colour == stated["colour"]]
        assert stated == {name: getattr(item, name) for name in stated}, sentence
        assert {"size", "count", "colour", "shape", "pattern"} == stated.keys(), sentence
        rest = words.replace(phrase[0], "")
        if host := re.search(rf"inside the ({NAME})|the ({NAME}) has", rest):
            assert item.inside, sentence
            assert named(one, host[1] or host[5]) is one.objects[0], sentence
        else:
            assert not item.inside, sentence
            assert parse_place(rest) == item.cell, sentence
        assert ("are" in rest.split()) == (item.count > 1) or not re.search(r"\b(is|are)\b", rest), sentence
        return {item}
    if "background" in words:
        total = re.search(rf"\b({'|'.join(TOTALS)}) shapes", words)
        assert total, sentence
        assert TOTALS.index(total[1]) == sum(item.count for item in one.objects), sentence
        assert one.background in words.split() or f"{one.background}," in words.split(), sentence
    elif "nothing" in words:
        assert parse_place(words) not in {item.cell for item in one.objects}, sentence
    elif match := re.fullmatch(rf"the ({NAME}) is the (largest shape|biggest of all shapes)", words):
        assert named(one, match[1]).size == "large", sentence
        assert [item.size for item in one.objects].count("large") == 1
    elif match := re.fullmatch(rf"the ({NAME}) (is|are) between the ({NAME}) and the ({NAME})", words):
        middle, first, last = (named(one, match[group]) for group in (1, 6, 10))
        assert np.array_equal(2 * place(middle), place(first) + place(last)), sentence
        assert (match[5] == "is") == (middle.count == 1), sentence
    else:
        where = r"((?:above|below)?(?: and )?(?:to the (?:left|right) of)?)"
        match = re.fullmatch(rf"the ({NAME}) (is|are) {where} the ({NAME})", words)
        if match:
            subject, verb, relation, other = match[1], match[5], match[6], match[7]
        else:
            match = re.fullmatch(rf"{where} the ({NAME}) (is|are) the ({NAME})", words)
            assert match, f"not understood: {sentence}"
            relation, other, verb, subject = match[1], match[2], match[6], match[7]
        down, right = place(named(one, subject)) - place(named(one, other))
        assert ("above" in relation, "below" in relation) == (down < 0, down > 0), sentence
        assert ("left" in relation, "right" in relation) == (right < 0, right > 0), sentence
        assert (verb == "is") == (named(one, subject).count == 1), sentence
    return set()


def place(item: SceneObject) -> np.ndarray:
    """(row, column)."""
    assert not item.inside
    return np.array(divmod(item.cell, 3))


def test_every_long_caption_is_true_and_tells_all() -> None:
    seen = {"inside": 0, "between": 0, "nothing": 0, "three": 0}
    for one in some_scenes():
        captions = long_captions(one)
        assert len(captions) == len(set(captions)) == 3
        for caption in captions:
            assert caption.endswith(".")
            sentences = caption[:-1].split(". ")
            described = set().union(*(check_sentence(one, sentence) for sentence in sentences))
            assert described == set(one.objects)
            assert "background" in caption
            for word in seen:
                seen[word] += word in caption.lower()
    assert all(seen.values()), seen


def test_the_short_caption_tells_of_the_salient_object_only() -> None:
    for one in some_scenes():
        caption = short_caption(one)
        (phrase,) = PHRASE.finditer(caption)
        stated = parse_phrase(phrase)
        assert stated == {name: getattr(one.objects[0], name) for name in stated}
        assert stated["size"] == "large"
        assert caption.replace(phrase[0], "").strip() in {"", "a picture of", "a drawing with", "there is"}


def phrases(caption: str) -> list[dict[str, object]]:
    """The objects that a caption describes in full, in the order of the caption."""
    return [parse_phrase(match) for match in PHRASE.finditer(caption.lower())]


def test_a_negative_is_its_caption_with_one_attribute_exchanged_and_false() -> None:
    exchanged: Counter[str] = Counter()
    for one in some_scenes():
        for caption, negative in zip(long_captions(one), negatives(one), strict=True):
            before, after = phrases(caption), phrases(negative)
            changes = [
                (index, name)
                for index, (old, new) in enumerate(zip(before, after, strict=True))
                for name in old.keys() | new.keys()
                if old.get(name) != new.get(name)
            ]
            ((index, name),) = changes
            exchanged[name] += 1
            assert not any(
                all(getattr(item, attribute) == value for attribute, value in after[index].items())
                for item in one.objects
            )
            # Nothing else differs: one piece of words, wherever the object is named.
            old, new = (re.sub(r"\.", "", text).lower().split() for text in (caption, negative))
            pieces = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
            changed = {(*old[a:b], *new[c:d]) for kind, a, b, c, d in pieces if kind != "equal"}
            assert len(changed) == 1
    assert set(exchanged) == {"colour", "shape", "pattern"}


def test_rewrites_tags_and_regions_are_true() -> None:
    for one in some_scenes():
        again = rewrites(one)
        assert len({*again, short_caption(one)}) == 5
        for text in again:
            (stated,) = phrases(text)
            assert stated == {name: getattr(one.objects[0], name) for name in stated}
        assert set(tags(one)) <= set(TAGS)
        expected = {f"{item.colour} {item.shape}" for item in one.objects} | {f"{one.background} background"}
        assert set(tags(one)) == expected
        for item, region in zip(one.objects, regions(one), strict=True):
            (stated,) = phrases(region["text"])
            assert stated == {name: getattr(item, name) for name in stated}
        check_record({"image": None, "short_caption": "a", "long_captions": [], "id": "a", "regions": regions(one)})


def test_a_box_contains_its_object() -> None:
    for one in some_scenes(30):
        pixels = np.asarray(render(one, image_size=96)).astype(int)
        for item, region in zip(one.objects, regions(one), strict=True):
            rows, columns = np.nonzero((pixels == np.array(COLOURS[item.colour])).all(-1))
            x0, y0, x1, y1 = (round(96 * edge, 6) for edge in region["box"])
            assert x0 <= columns.min() < columns.max() + 1 <= x1
            assert y0 <= rows.min() < rows.max() + 1 <= y1


def test_the_picture_shows_what_the_scene_says() -> None:
    for one in some_scenes(60):
        pixels = np.asarray(render(one, image_size=96)).astype(int)  # cells of 32 pixels
        assert pixels.shape == (96, 96, 3)
        palette = {**{name: COLOURS[name] for name in (item.colour for item in one.objects)}, "": None}
        palette[""] = BACKGROUNDS[one.background]
        exact = {name: (pixels == np.array(colour)).all(-1) for name, colour in palette.items()}
        assert sum(map(np.sum, exact.values())) > 0.85 * 96 * 96  # the rest are smoothed edges
        areas = {}
        for item in one.objects:
            rows, columns = np.nonzero(exact[item.colour])
            row, column = divmod(item.cell, 3)
            assert len(rows) > 20, item
            assert (rows // 32 == row).all(), item
            assert (columns // 32 == column).all(), item
            areas[item.colour] = np.ptp(rows) * np.ptp(columns) if item.count == 1 else 0
        assert max(areas, key=areas.__getitem__) == one.objects[0].colour
        cells = {item.cell for item in one.objects}
        for cell in set(range(9)) - cells:
            row, column = divmod(cell, 3)
            assert exact[""][row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].all()


def test_shapes_patterns_and_counts_look_different() -> None:
    pictures = set()
    variants = [(shape, pattern, 1, "large") for shape in SHAPES for pattern in ("plain", "striped", "spotted")]
    variants += [(shape, "hollow", 1, "small") for shape in SHAPES]
    variants += [(shape, "plain", count, "tiny") for shape in SHAPES for count in (1, 2, 3)]
    for shape, pattern, count, size in variants:
        one = Scene("black", (SceneObject("red", shape, pattern, size, count, cell=4),), id="one", group="one")
        pictures.add(render(one, image_size=64).tobytes())
    assert len(pictures) == len(variants)


@pytest.mark.slow
def test_held_out_groups_differ_in_what_only_long_captions_tell() -> None:
    for split in ("validation", "test"):
        scenes = [scene(index, split=split) for index in range(1200)]
        assert len({one.contents for one in scenes}) == len(scenes)
        assert len({one.id for one in scenes}) == len(scenes)
        for start in range(0, len(scenes), GROUP_SIZE):
            group = scenes[start : start + GROUP_SIZE]
            assert len({one.group for one in group}) == 1
            assert len({short_caption(one) for one in group}) == 1
            assert len({(one.background, one.objects[0]) for one in group}) == 1
            assert len({long_captions(one)[0] for one in group}) == GROUP_SIZE
        for first, second in pairwise(scenes[::GROUP_SIZE]):
            assert first.group != second.group
        kinds = {(one.objects[0].colour, one.objects[0].shape, one.objects[0].pattern) for one in scenes[:768]}
        assert len(kinds) == 192  # no short caption is asked for twice before all were


def test_no_picture_is_in_two_splits() -> None:
    contents = {
        split: {scene(index, seed, split).contents for seed in (0, 1) for index in range(1000)}
        for split in ("train", "validation", "test")
    }
    assert not contents["train"] & contents["test"]
    assert not contents["train"] & contents["validation"]
    assert not contents["validation"] & contents["test"]


def test_scenes_are_repeatable() -> None:
    first = [scene(index, seed=5, split=split) for split in ("train", "test") for index in range(40)]
    again = [scene(index, seed=5, split=split) for split in ("train", "test") for index in reversed(range(40))]
    assert first == again[39::-1] + again[:39:-1]
    assert scene(3, seed=5) != scene(3, seed=6)
    assert render(scene(3)).tobytes() == render(scene(3)).tobytes()
    # The same on every machine and in every process: a change here makes every number measured so far another one's.
    words = "\n".join(caption for one in first for caption in [short_caption(one), *long_captions(one)])
    assert crc32(words.encode()) == 831383010
    assert crc32(b"".join(render(one).tobytes() for one in first)) == 1269905090
    roles = [texts(one) for one in first for texts in (negatives, rewrites, tags, regions)]
    assert crc32(json.dumps(roles).encode()) == 3125231856


def test_bert_knows_every_word_and_long_captions_are_long(golden: Path) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=512)
    long_texts = [caption for one in some_scenes() for caption in long_captions(one)]
    short_texts = [text for one in some_scenes() for text in (short_caption(one), *rewrites(one), *tags(one))]
    lengths = {}
    for name, texts in {"long": long_texts, "short": short_texts}.items():
        ids = tokenizer(texts)["input_ids"]
        assert not any(tokenizer.unk_token_id in row for row in ids)
        lengths[name] = np.array([len(row) for row in ids])
    assert (lengths["long"] > 77).mean() > 0.8
    assert lengths["short"].max() < 20


def test_the_dataset_holds_the_scenes(tmp_path: Path) -> None:
    held_out = scenes_dataset(10, seed=2, split="test", image_size=48)
    roles = {"negatives": negatives, "rewrites": rewrites, "tags": tags, "regions": regions}
    assert held_out.column_names == ["image", "short_caption", "long_captions", "id", "group", *roles]
    assert len(held_out) == 10
    for index, row in enumerate(held_out):
        one = scene(index, seed=2, split="test")
        assert np.array_equal(np.asarray(row["image"]), np.asarray(render(one, image_size=48)))
        assert (row["short_caption"], row["long_captions"]) == (short_caption(one), long_captions(one))
        assert (row["id"], row["group"]) == (one.id, one.group)
        assert all(row[name] == role(one) for name, role in roles.items())
    (kept,) = {file["filename"] for file in held_out.cache_files}
    assert Path(kept).is_relative_to(tmp_path)
    # Drawn once, and a longer one starts the same.
    assert [file["filename"] for file in scenes_dataset(10, 2, "test", 48).cache_files] == [kept]
    assert scenes_dataset(12, 2, "test", 48)["id"][:10] == held_out["id"][:]
    for other in (scenes_dataset(10, 3, "test", 48), scenes_dataset(10, 2, "train", 48)):
        assert set(other["id"]).isdisjoint(held_out["id"])
    assert scenes_dataset(10, 2, "test", 64)[0]["image"].size == (64, 64)


def test_a_wrong_split_is_named() -> None:
    with pytest.raises(ValueError, match="dev"):
        scenes_dataset(4, split="dev")
