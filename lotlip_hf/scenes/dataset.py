"""
Scenes: an embedded data set of drawn pictures with short and long captions, to train a small model in minutes.

A picture shows three to five kinds of shapes on a 3 x 3 grid: one large object, which is all that the short caption
tells of, and other, smaller ones: single, in groups of two or three, or inside the large one. No two kinds of one
picture have the same colour. The long captions tell all of it: every object with its size, pattern, colour, number and
place, the background, and how objects lie to one another.

In the held-out splits, `validation` and `test`, pictures come in groups of `GROUP_SIZE` that share background, large
object and short caption, and differ in the other objects: only a long caption tells them apart. No picture of one
split is in another, whatever the seeds.
"""

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageChops, ImageDraw

COLOURS = {
    "red": (225, 25, 25),
    "orange": (255, 140, 0),
    "yellow": (250, 230, 30),
    "green": (20, 150, 50),
    "turquoise": (50, 215, 210),
    "blue": (25, 60, 220),
    "purple": (130, 30, 160),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (150, 150, 150), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
PATTERNS = ("plain", "striped", "spotted", "hollow")
SIZES = {"large": 0.98, "small": 0.68, "tiny": 0.42}  # width as a share of a grid cell's
NUMBERS = ("no", "one", "two", "three")

# The cells of the grid, row by row, and what captions call them.
GRID = 3
PLACES = (
    ("at the top left", "in the upper left corner", "in the top left corner"),
    ("at the top center", "at the top in the middle", "in the middle of the upper edge"),
    ("at the top right", "in the upper right corner", "in the top right corner"),
    ("at the middle left", "on the left side, halfway down", "in the middle of the left edge"),
    ("in the center", "in the middle of the picture", "right in the center"),
    ("at the middle right", "on the right side, halfway down", "in the middle of the right edge"),
    ("at the bottom left", "in the lower left corner", "in the bottom left corner"),
    ("at the bottom center", "at the bottom in the middle", "in the middle of the lower edge"),
    ("at the bottom right", "in the lower right corner", "in the bottom right corner"),
)
WORDS = {
    "large": ("large", "big", "huge"),
    "small": ("small", "little"),
    "tiny": ("tiny", "very small"),
    "plain": ("", "plain"),
    "striped": ("striped", "stripy"),
    "spotted": ("spotted", "dotted"),
    "hollow": ("hollow",),
}

# A picture belongs to the split in which its digest falls, out of four.
SPLITS = {"train": (0, 1), "validation": (2,), "test": (3,)}
GROUP_SIZE = 4
NUM_CAPTIONS = 3
SUPERSAMPLING = 4

FEATURES = Features(
    {
        "image": Image(),
        "short_caption": Value("string"),
        "long_captions": List(Value("string")),
        "id": Value("string"),
        "group": Value("string"),
    }
)


@dataclass(frozen=True)
class SceneObject:
    """
    One kind of shape in a picture.

    Args:
        colour (`str`): a key of `COLOURS`; no two objects of a picture share it.
        shape (`str`): one of `SHAPES`.
        pattern (`str`): one of `PATTERNS`; groups and objects inside another are plain.
        size (`str`): a key of `SIZES`; `"large"` is the salient object alone.
        count (`int`): how many there are, 1 to 3, side by side in the cell.
        cell (`int`): the cell of the 3 x 3 grid, row by row.
        inside (`bool`): whether it lies inside the large object, whose cell it shares.
    """

    colour: str
    shape: str
    pattern: str
    size: str
    count: int
    cell: int
    inside: bool = False


@dataclass(frozen=True)
class Scene:
    """
    What is in a picture, the salient object first.

    Args:
        background (`str`): a key of `BACKGROUNDS`.
        objects (`tuple[SceneObject, ...]`): three to five kinds; the first is the large one.
        id (`str`): the scene's name, unique over splits, seeds and indices.
        group (`str`): the scenes of one group share background, salient object and short caption.
    """

    background: str
    objects: tuple[SceneObject, ...]
    id: str
    group: str

    @property
    def contents(self) -> tuple[str, tuple[SceneObject, ...]]:
        """All that the picture shows, up to a small displacement of the objects."""
        return self.background, self.objects


def scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """
    The scene with the given number. Any number may be asked for, in any order.

    Args:
        index (`int`): number of the scene, from 0. In the held-out splits, `GROUP_SIZE` successive ones are a group.
        seed (`int`): another seed gives another data set.
        split (`str`): `"train"`, `"validation"` or `"test"`.

    Returns:
        `Scene`: always the same one for the same arguments.

    Raises:
        ValueError: if there is no such split.

    Example:

    ```python
    >>> from lotlip_hf.scenes.dataset import render, scene, short_caption

    >>> one = scene(7)
    >>> render(one, image_size=64).size
    (64, 64)
    >>> short_caption(one) == short_caption(scene(7))
    True
    ```
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    if split == "train":
        name = f"{split}-{seed}-{index}"
        random = Random(name)
        background = random.choice(list(BACKGROUNDS))
        salient = _salient(random.choice(_salient_kinds()), random.randrange(GRID * GRID))
        return _draw(random, split, background, salient, id=name, group=name)
    return _held_out_group(index // GROUP_SIZE, seed, split)[index % GROUP_SIZE]


@lru_cache(maxsize=1024)
def _held_out_group(number: int, seed: int, split: str) -> tuple[Scene, ...]:
    # Groups go through every kind of salient object before one comes again, then elsewhere or on another background,
    # so that short captions repeat as late, and pictures of different groups never, as far as there are such: in the
    # first 5,184 groups.
    kinds = _salient_kinds()
    Random(f"{split}-{seed}").shuffle(kinds)
    kind = kinds[number % len(kinds)]
    layouts = [(background, cell) for background in BACKGROUNDS for cell in range(GRID * GRID)]
    Random(f"{split}-{seed}-{kind}").shuffle(layouts)
    background, cell = layouts[number // len(kinds) % len(layouts)]

    group = f"{split}-{seed}-group-{number}"
    random = Random(group)
    scenes: list[Scene] = []
    while len(scenes) < GROUP_SIZE:
        index = number * GROUP_SIZE + len(scenes)
        drawn = _draw(random, split, background, _salient(kind, cell), id=f"{split}-{seed}-{index}", group=group)
        if all(drawn.contents != other.contents for other in scenes):
            scenes.append(drawn)
    return tuple(scenes)


def _salient_kinds() -> list[tuple[str, str, str]]:
    """(colour, shape, pattern) of every salient object there is."""
    return [(colour, shape, pattern) for colour in COLOURS for shape in SHAPES for pattern in PATTERNS]


def _salient(kind: tuple[str, str, str], cell: int) -> SceneObject:
    colour, shape, pattern = kind
    return SceneObject(colour, shape, pattern, size="large", count=1, cell=cell)


def _draw(random: Random, split: str, background: str, salient: SceneObject, id: str, group: str) -> Scene:
    """A scene of the split with the given salient object; pictures that belong to another split are thrown away."""
    while True:
        number = random.randint(2, 4)
        colours = random.sample([colour for colour in COLOURS if colour != salient.colour], number)
        cells = random.sample([cell for cell in range(GRID * GRID) if cell != salient.cell], number)
        others = []
        for colour, cell in zip(colours, cells, strict=True):
            shape = random.choice(SHAPES)
            count = random.choice((1, 1, 1, 2, 3))
            if count == 1:
                others.append(SceneObject(colour, shape, random.choice(PATTERNS), "small", count, cell))
            else:
                others.append(SceneObject(colour, shape, "plain", "tiny", count, cell))
        if random.random() < 0.3:
            shape = random.choice(SHAPES)
            others[-1] = SceneObject(colours[-1], shape, "plain", "tiny", 1, salient.cell, inside=True)
        objects = (salient, *sorted(others, key=lambda other: (other.cell, other.inside)))
        drawn = Scene(background, objects, id, group)
        if crc32(repr(drawn.contents).encode()) % 4 in SPLITS[split]:
            return drawn


def render(scene: Scene, image_size: int = 64) -> PILImage.Image:
    """
    Draws a scene.

    Args:
        scene (`Scene`): what to draw.
        image_size (`int`): width and height in pixels; under 32 the shapes cannot be told apart.

    Returns:
        `PIL.Image.Image`: a picture of mode RGB.
    """
    random = Random(f"{scene.id} pixels")
    cell_size = image_size / GRID
    picture = PILImage.new("RGB", (image_size, image_size), BACKGROUNDS[scene.background])
    for item in scene.objects:
        row, column = divmod(item.cell, GRID)
        side = round(SIZES[item.size] * cell_size)
        stamp = _stamp(item.shape, item.pattern, side)
        # A small displacement that leaves it in its cell, and one inside another where it is.
        slack = 0 if item.inside or item.count > 1 else (cell_size - side) / 4
        x = (column + 0.5) * cell_size + random.uniform(-slack, slack)
        y = (row + 0.5) * cell_size + random.uniform(-slack, slack)
        for dx, dy in _arrangement(item.count):
            corner = (round(x + dx * cell_size - side / 2), round(y + dy * cell_size - side / 2))
            picture.paste(COLOURS[item.colour], corner, stamp)
    return picture


def _arrangement(count: int) -> tuple[tuple[float, float], ...]:
    """Centres of the members of a group, from the cell's centre, in widths of a cell."""
    return {
        1: ((0.0, 0.0),),
        2: ((-0.25, 0.0), (0.25, 0.0)),
        3: ((-0.25, 0.23), (0.25, 0.23), (0.0, -0.23)),
    }[count]


@lru_cache(maxsize=1024)
def _stamp(shape: str, pattern: str, side: int) -> PILImage.Image:
    """The mask [side, side] of a shape, its edges smoothed."""
    large = side * SUPERSAMPLING
    mask = _outline(shape, large)
    if pattern == "striped":
        bars = PILImage.new("L", mask.size, 255)
        draw = ImageDraw.Draw(bars)
        for bar in range(3):
            top = large * (0.2 + 0.25 * bar)
            draw.rectangle((0, top, large, top + large * 0.12), fill=0)
        mask = ImageChops.multiply(mask, bars)
    elif pattern == "spotted":
        draw = ImageDraw.Draw(mask)
        for x, y in ((0.5, 0.3), (0.32, 0.55), (0.68, 0.55), (0.5, 0.78)):
            radius = 0.09
            draw.ellipse([large * value for value in (x - radius, y - radius, x + radius, y + radius)], fill=0)
    elif pattern == "hollow":
        hole = _outline(shape, round(large * 0.56))
        # A triangle's middle lies below that of its box.
        down = 0.08 if shape == "triangle" else 0.02 if shape == "star" else 0.0
        corner = ((large - hole.width) // 2, round((large - hole.height) / 2 + large * down))
        mask.paste(0, corner, hole)
    return mask.reduce(SUPERSAMPLING)


def _outline(shape: str, side: int) -> PILImage.Image:
    """The filled shape as a mask [side, side]."""
    mask = PILImage.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0.03 * side, 0.03 * side, 0.97 * side, 0.97 * side), fill=255)
        return mask
    points = {
        "square": ((0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)),
        "triangle": ((0.5, 0.03), (1.0, 0.93), (0.0, 0.93)),
        "diamond": ((0.5, 0.0), (0.85, 0.5), (0.5, 1.0), (0.15, 0.5)),
        "cross": tuple(
            (x / 3, y / 3)
            for x, y in zip((1, 2, 2, 3, 3, 2, 2, 1, 1, 0, 0, 1), (0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1), strict=True)
        ),
        "star": tuple(
            (0.5 + radius * math.sin(math.pi * corner / 5), 0.53 - radius * math.cos(math.pi * corner / 5))
            for corner in range(10)
            for radius in [0.22 if corner % 2 else 0.53]
        ),
    }[shape]
    draw.polygon([(x * side, y * side) for x, y in points], fill=255)
    return mask


def short_caption(scene: Scene) -> str:
    """
    The caption that tells of the salient object only.

    Args:
        scene (`Scene`): what to describe.

    Returns:
        `str`: one phrase; the same for all scenes of a group.
    """
    random = Random(f"{scene.group} short caption")
    item = _phrase(scene.objects[0], random)
    return random.choice((item, f"a picture of {item}", f"a drawing with {item}", f"there is {item}"))


def long_captions(scene: Scene) -> list[str]:
    """
    Captions that tell all that a scene holds, each in other words and with the sentences in another order.

    Args:
        scene (`Scene`): what to describe.

    Returns:
        `list[str]`: `NUM_CAPTIONS` captions of 5 to 12 sentences, most of them over 77 of BERT's word pieces.
    """
    captions = []
    for number in range(NUM_CAPTIONS):
        random = Random(f"{scene.id} long caption {number}")
        sentences = [_place_sentence(scene, item, random) for item in scene.objects]
        sentences.append(_whole_sentence(scene, random))
        relations = list(_relations(scene, random))
        chosen = random.sample(relations, min(len(relations), random.randint(2, 4)))
        sentences += [_relation_sentence(*relation, random) for relation in chosen]
        if random.random() < 0.5:
            sentences.append(_empty_sentence(scene, random))
        if random.random() < 0.5:
            largest = f"The {_name(scene.objects[0])} is the "
            sentences.append(largest + random.choice(("largest shape.", "biggest of all shapes.")))
        random.shuffle(sentences)
        captions.append(" ".join(sentences))
    return captions


def _name(item: SceneObject) -> str:
    """What tells an object from the others of its picture."""
    plural = "" if item.count == 1 else "es" if item.shape == "cross" else "s"
    return f"{item.colour} {item.shape}{plural}"


def _phrase(item: SceneObject, random: Random) -> str:
    """An object with all its attributes."""
    words = [random.choice(WORDS[item.size]), random.choice(WORDS[item.pattern]), _name(item)]
    phrase = " ".join(word for word in words if word)
    return f"a {phrase}" if item.count == 1 else f"{NUMBERS[item.count]} {phrase}"


def _place_sentence(scene: Scene, item: SceneObject, random: Random) -> str:
    phrase, verb = _phrase(item, random), "is" if item.count == 1 else "are"
    if item.inside:
        host = _name(scene.objects[0])
        forms = (
            f"inside the {host} there is {phrase}",
            f"the {host} has {phrase} in its middle",
            f"{phrase} lies inside the {host}",
        )
    else:
        place = random.choice(PLACES[item.cell])
        forms = (
            f"{place} there {verb} {phrase}",
            f"{phrase} {verb} {place}",
            f"{place} you can see {phrase}",
            f"there {verb} {phrase} {place}",
            f"the picture shows {phrase} {place}",
        )
    return _sentence(random.choice(forms))


def _whole_sentence(scene: Scene, random: Random) -> str:
    total = _number(sum(item.count for item in scene.objects))
    background = scene.background
    forms = (
        f"in all, {total} shapes are on a {background} background",
        f"the picture has a {background} background and {total} shapes",
        f"there are {total} shapes in front of a {background} background",
        f"the background is {background}, with {total} shapes on it",
    )
    return _sentence(random.choice(forms))


def _number(total: int) -> str:
    return ("three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen")[total - 3]


def _relations(scene: Scene, random: Random) -> Iterator[tuple[str, tuple[SceneObject, ...]]]:
    """How any two or three of the objects in cells of their own lie to one another, seen from either."""
    placed = [item for item in scene.objects if not item.inside]
    for pair in combinations(placed, 2):
        first, second = random.sample(pair, 2)
        (row, column), (other_row, other_column) = divmod(first.cell, GRID), divmod(second.cell, GRID)
        vertical = "above" if row < other_row else "below" if row > other_row else ""
        horizontal = "to the left of" if column < other_column else "to the right of" if column > other_column else ""
        yield " and ".join(word for word in (vertical, horizontal) if word), (first, second)
    for first, last in combinations(placed, 2):
        for middle in placed:
            (row, column), (end_row, end_column) = divmod(first.cell, GRID), divmod(last.cell, GRID)
            if middle not in (first, last) and divmod(middle.cell, GRID) == (
                (row + end_row) / 2,
                (column + end_column) / 2,
            ):
                yield "between", (middle, first, last)


def _relation_sentence(relation: str, items: tuple[SceneObject, ...], random: Random) -> str:
    subject, *others = items
    verb = "is" if subject.count == 1 else "are"
    target = " and ".join(f"the {_name(other)}" for other in others)
    forms = [f"the {_name(subject)} {verb} {relation} {target}"]
    if relation != "between":
        forms.append(f"{relation} {target} {verb} the {_name(subject)}")
    return _sentence(random.choice(forms))


def _empty_sentence(scene: Scene, random: Random) -> str:
    cells = sorted(set(range(GRID * GRID)) - {item.cell for item in scene.objects})
    place = random.choice(PLACES[random.choice(cells)])
    return _sentence(random.choice((f"there is nothing {place}", f"{place} nothing can be seen")))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def scenes_dataset(num_scenes: int, seed: int = 0, split: str = "train", image_size: int = 64) -> Dataset:
    """
    Scenes as a data set of the `datasets` library, drawn once and kept in its cache.

    Args:
        num_scenes (`int`): how many; the first ones stay the same when it grows.
        seed (`int`): another seed gives another data set.
        split (`str`): `"train"`, `"validation"` or `"test"`; see the module for what is held out.
        image_size (`int`): width and height in pixels.

    Returns:
        `datasets.Dataset`: `image`, `short_caption`, `long_captions` (a list of `NUM_CAPTIONS`), `id`, and `group`,
        which the scenes that one short caption was made for share.

    Raises:
        ValueError: if there is no such split.

    Example:

    ```python
    >>> from lotlip_hf.scenes.dataset import scenes_dataset

    >>> held_out = scenes_dataset(500, split="test")
    >>> len(set(held_out["short_caption"])) <= 500 / 4
    True
    ```
    """
    scene(0, seed, split)  # complains before anything is written
    arguments = {
        "num_scenes": num_scenes,
        "seed": seed,
        "scenes_split": split,  # `split` is a name that `from_generator` keeps for itself
        "image_size": image_size,
        "source": hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest(),
    }
    return Dataset.from_generator(_rows, features=FEATURES, gen_kwargs=arguments)


def _rows(num_scenes: int, seed: int, scenes_split: str, image_size: int, source: str) -> Iterator[dict[str, Any]]:
    """The rows of the data set. What the cache holds is drawn anew when `source`, this file's digest, differs."""
    for index in range(num_scenes):
        one = scene(index, seed, scenes_split)
        png = io.BytesIO()
        render(one, image_size).save(png, format="PNG", compress_level=1)
        yield {
            "image": {"bytes": png.getvalue(), "path": None},
            "short_caption": short_caption(one),
            "long_captions": long_captions(one),
            "id": one.id,
            "group": one.group,
        }
