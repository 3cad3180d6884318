"""
Scenes: a data set of drawn pictures with short and long captions, for training a small model in minutes.

A picture shows three to five objects of different colours on a 3 x 3 grid. One object is large. The other objects are
smaller: one shape, a group of two or three shapes, or a shape inside the large object. The short caption describes
only the large object. The long captions describe the background, the size, pattern, colour, number and cell of every
object, and the relations between objects.

In the held-out splits `validation` and `test`, groups of `GROUP_SIZE` pictures share background, large object and
short caption. The pictures of a group differ in the other objects, so that only a long caption distinguishes them. No
picture occurs in two splits, for any seeds.

The further texts of a scene are true, too: `rewrites` of the short caption, `tags` and `regions`. `negatives` are
false in one attribute of one object. They have random generators of their own.
"""

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal
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
SIZES = {"large": 0.98, "small": 0.68, "tiny": 0.42}  # width as a fraction of a cell
NUMBERS = ("no", "one", "two", "three")

GRID = 3  # cells per side
# Names of the cells in captions, row by row.
CELL_NAMES = (
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

# The digest of a picture modulo 4 determines its split.
SPLITS = {"train": (0, 1), "validation": (2,), "test": (3,)}
GROUP_SIZE = 4
NUM_CAPTIONS = 3
SUPERSAMPLING = 4
# The vocabulary of `tags`
TAGS = (
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    *(f"{background} background" for background in BACKGROUNDS),
)

FEATURES = Features(
    {
        "image": Image(),
        "short_caption": Value("string"),
        "long_captions": List(Value("string")),
        "id": Value("string"),
        "group": Value("string"),
        "negatives": List(Value("string")),
        "rewrites": List(Value("string")),
        "tags": List(Value("string")),
        "regions": List({"box": List(Value("float64")), "text": Value("string")}),
    }
)


@dataclass(frozen=True)
class SceneObject:
    """
    A shape of a picture, or a group of equal shapes.

    Args:
        colour (`str`): A key of `COLOURS`. The objects of a picture have different colours.
        shape (`str`): One of `SHAPES`.
        pattern (`str`): One of `PATTERNS`. Groups, and shapes inside the large object, are `"plain"`.
        size (`str`): A key of `SIZES`. Only the large object is `"large"`.
        count (`int`): Number of shapes in the group, 1 to 3.
        cell (`int`): Index of the cell in the 3 x 3 grid, row by row.
        inside (`bool`, *optional*, defaults to `False`): Whether the shape is inside the large object, in its cell.
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
    The contents of a picture.

    Args:
        background (`str`): A key of `BACKGROUNDS`.
        objects (`tuple[SceneObject, ...]`): Three to five objects. The first object is the large one.
        id (`str`): Id of the scene, unique over splits, seeds and indices.
        group (`str`): Id of the group. Scenes of a group share background, large object and short caption.
    """

    background: str
    objects: tuple[SceneObject, ...]
    id: str
    group: str

    @property
    def contents(self) -> tuple[str, tuple[SceneObject, ...]]:
        """The background and the objects, which determine the picture except for small displacements."""
        return self.background, self.objects


def scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """
    Returns a scene by its index. The same arguments return the same scene.

    Args:
        index (`int`): Index of the scene, from 0. In the held-out splits, `GROUP_SIZE` successive scenes are a group.
        seed (`int`, *optional*, defaults to 0): Seed of the data set.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"` or `"test"`.

    Returns:
        `Scene`: The scene.

    Raises:
        `ValueError`: If the split does not exist.

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
        large = _large_object(random.choice(_large_kinds()), random.randrange(GRID * GRID))
        return _draw(random, split, background, large, id=name, group=name)
    return _held_out_group(index // GROUP_SIZE, seed, split)[index % GROUP_SIZE]


@lru_cache(maxsize=1024)
def _held_out_group(number: int, seed: int, split: str) -> tuple[Scene, ...]:
    # All kinds of large objects are used before a kind is repeated in another cell or on another background.
    kinds = _large_kinds()
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
        drawn = _draw(random, split, background, _large_object(kind, cell), id=f"{split}-{seed}-{index}", group=group)
        if all(drawn.contents != other.contents for other in scenes):
            scenes.append(drawn)
    return tuple(scenes)


def _large_kinds() -> list[tuple[str, str, str]]:
    """Returns (colour, shape, pattern) of every possible large object."""
    return [(colour, shape, pattern) for colour in COLOURS for shape in SHAPES for pattern in PATTERNS]


def _large_object(kind: tuple[str, str, str], cell: int) -> SceneObject:
    colour, shape, pattern = kind
    return SceneObject(colour, shape, pattern, size="large", count=1, cell=cell)


def _draw(random: Random, split: str, background: str, large: SceneObject, id: str, group: str) -> Scene:
    """Draws scenes with the given large object until one belongs to the split."""
    while True:
        number = random.randint(2, 4)
        colours = random.sample([colour for colour in COLOURS if colour != large.colour], number)
        cells = random.sample([cell for cell in range(GRID * GRID) if cell != large.cell], number)
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
            others[-1] = SceneObject(colours[-1], shape, "plain", "tiny", 1, large.cell, inside=True)
        objects = (large, *sorted(others, key=lambda other: (other.cell, other.inside)))
        drawn = Scene(background, objects, id, group)
        if crc32(repr(drawn.contents).encode()) % 4 in SPLITS[split]:
            return drawn


def render(scene: Scene, image_size: int = 64) -> PILImage.Image:
    """
    Draws a scene.

    Args:
        scene (`Scene`): The scene.
        image_size (`int`, *optional*, defaults to 64): Width and height in pixels. Below 32 pixels, shapes are hard to
            distinguish.

    Returns:
        `PIL.Image.Image`: An RGB picture.
    """
    picture = PILImage.new("RGB", (image_size, image_size), BACKGROUNDS[scene.background])
    for item, corner, stamp in _placed(scene, image_size):
        picture.paste(COLOURS[item.colour], corner, stamp)
    return picture


def segments(scene: Scene, image_size: int = 64) -> PILImage.Image:
    """
    Draws which object each pixel of [`render`] shows.

    Args:
        scene (`Scene`): The scene.
        image_size (`int`, *optional*, defaults to 64): Width and height in pixels.

    Returns:
        `PIL.Image.Image`: A picture of mode L. A pixel is the index in `COLOURS` of the object's colour, or 255, which
        segmentation ignores, for the background.
    """
    picture = PILImage.new("L", (image_size, image_size), 255)
    for item, corner, stamp in _placed(scene, image_size):
        is_object = stamp.point([255 * (value > 127) for value in range(256)])
        picture.paste(list(COLOURS).index(item.colour), corner, is_object)
    return picture


def _placed(scene: Scene, image_size: int) -> Iterator[tuple[SceneObject, tuple[int, int], PILImage.Image]]:
    """Yields each shape of the picture: its object, its top left corner, and its mask."""
    random = Random(f"{scene.id} pixels")
    cell_size = image_size / GRID
    for item in scene.objects:
        row, column = divmod(item.cell, GRID)
        side = round(SIZES[item.size] * cell_size)
        stamp = _stamp(item.shape, item.pattern, side)
        # Displace single shapes within their cells, except for a shape inside the large object.
        slack = 0 if item.inside or item.count > 1 else (cell_size - side) / 4
        x = (column + 0.5) * cell_size + random.uniform(-slack, slack)
        y = (row + 0.5) * cell_size + random.uniform(-slack, slack)
        for dx, dy in _arrangement(item.count):
            yield item, (round(x + dx * cell_size - side / 2), round(y + dy * cell_size - side / 2)), stamp


def _arrangement(count: int) -> tuple[tuple[float, float], ...]:
    """Returns the centres of the shapes of a group, relative to the centre of the cell, in cell widths."""
    return {
        1: ((0.0, 0.0),),
        2: ((-0.25, 0.0), (0.25, 0.0)),
        3: ((-0.25, 0.23), (0.25, 0.23), (0.0, -0.23)),
    }[count]


@lru_cache(maxsize=1024)
def _stamp(shape: str, pattern: str, side: int) -> PILImage.Image:
    """Returns the mask [side, side] of a shape with its pattern, with smooth edges."""
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
        # The centre of a triangle or a star is below the centre of its bounding box.
        down = 0.08 if shape == "triangle" else 0.02 if shape == "star" else 0.0
        corner = ((large - hole.width) // 2, round((large - hole.height) / 2 + large * down))
        mask.paste(0, corner, hole)
    return mask.reduce(SUPERSAMPLING)


def _outline(shape: str, side: int) -> PILImage.Image:
    """Returns the mask [side, side] of a filled shape."""
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
    Returns a caption of the large object.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `str`: A phrase. All scenes of a group have the same caption.
    """
    random = Random(f"{scene.group} short caption")
    item = _phrase(scene.objects[0], random)
    return random.choice((item, f"a picture of {item}", f"a drawing with {item}", f"there is {item}"))


def long_captions(scene: Scene) -> list[str]:
    """
    Returns captions of all objects and of the background, in different words and orders.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `list[str]`: `NUM_CAPTIONS` captions of 5 to 12 sentences. Most have more than 77 tokens of BERT.
    """
    return [_long_caption(scene, number) for number in range(NUM_CAPTIONS)]


def _long_caption(scene: Scene, number: int) -> str:
    random = Random(f"{scene.id} long caption {number}")
    sentences = [_object_sentence(scene, item, random) for item in scene.objects]
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
    return " ".join(sentences)


def negatives(scene: Scene) -> list[str]:
    """
    Returns the long captions of the scene with one attribute of one object exchanged, so that they are false.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `list[str]`: Each long caption with another colour, shape or pattern of one object.
    """
    random = Random(f"{scene.id} negatives")
    texts = []
    for number in range(NUM_CAPTIONS):
        index = random.randrange(len(scene.objects))
        name = random.choice(_attributes(scene.objects[index]))
        texts.append(_long_caption(_exchanged(scene, index, name, random), number))
    return texts


def _attributes(item: SceneObject) -> list[str]:
    """Returns the attributes that may be exchanged; "hollow" not, as its draw of a word differs from the others'."""
    has_pattern = item.pattern != "hollow" and item.count == 1 and not item.inside
    return ["colour", "shape", *(["pattern"] if has_pattern else [])]


def _exchanged(scene: Scene, index: int, attribute: str, random: Random) -> Scene:
    """Returns the scene with another value of an attribute of one object, which none of its captions is true of."""
    taken = {item.colour for item in scene.objects}
    values = {
        "colour": [colour for colour in COLOURS if colour not in taken],
        "shape": [shape for shape in SHAPES if shape != scene.objects[index].shape],
        # "plain" may be left out of a caption, which would then be true.
        "pattern": [pattern for pattern in ("striped", "spotted") if pattern != scene.objects[index].pattern],
    }
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **{attribute: random.choice(values[attribute])})
    return replace(scene, objects=tuple(objects))


def rewrites(scene: Scene) -> list[str]:
    """
    Returns rewrites of the short caption.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `list[str]`: Four captions of the large object. All scenes of a group have the same.
    """
    random = Random(f"{scene.group} rewrites")
    forms = ("the picture shows {}", "you can see {}", "{} can be seen", "a drawing shows {}")
    return [form.format(_phrase(scene.objects[0], random)) for form in forms]


def tags(scene: Scene) -> list[str]:
    """
    Returns the tags of a scene, from `TAGS`: colour and shape of every object, and the background.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `list[str]`: The tags, such as "red star" and "white background".
    """
    return [*(f"{item.colour} {item.shape}" for item in scene.objects), f"{scene.background} background"]


def regions(scene: Scene) -> list[dict[str, Any]]:
    """
    Returns the regions of the objects: the box of an object is its cell.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `list[dict[str, Any]]`: For each object `box`, [x0, y0, x1, y1] in [0, 1] from the top left corner, and `text`,
        a phrase with all attributes. A shape inside the large object has the same box as the large object.
    """
    random = Random(f"{scene.id} regions")
    cells = [divmod(item.cell, GRID) for item in scene.objects]
    return [
        {
            "box": [column / GRID, row / GRID, (column + 1) / GRID, (row + 1) / GRID],
            "text": _phrase(item, random),
        }
        for (row, column), item in zip(cells, scene.objects, strict=True)
    ]


def _name(item: SceneObject) -> str:
    """Returns the colour and shape of an object. The colour identifies it within its picture."""
    plural = "" if item.count == 1 else "es" if item.shape == "cross" else "s"
    return f"{item.colour} {item.shape}{plural}"


def _phrase(item: SceneObject, random: Random) -> str:
    """Returns a phrase with all attributes of an object."""
    words = [random.choice(WORDS[item.size]), random.choice(WORDS[item.pattern]), _name(item)]
    phrase = " ".join(word for word in words if word)
    return f"a {phrase}" if item.count == 1 else f"{NUMBERS[item.count]} {phrase}"


def _object_sentence(scene: Scene, item: SceneObject, random: Random) -> str:
    phrase, verb = _phrase(item, random), "is" if item.count == 1 else "are"
    if item.inside:
        host = _name(scene.objects[0])
        forms = (
            f"inside the {host} there is {phrase}",
            f"the {host} has {phrase} in its middle",
            f"{phrase} lies inside the {host}",
        )
    else:
        cell = random.choice(CELL_NAMES[item.cell])
        forms = (
            f"{cell} there {verb} {phrase}",
            f"{phrase} {verb} {cell}",
            f"{cell} you can see {phrase}",
            f"there {verb} {phrase} {cell}",
            f"the picture shows {phrase} {cell}",
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
    """Yields relations such as "above" with two or three objects, but not with shapes inside the large object."""
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
    cell = random.choice(CELL_NAMES[random.choice(cells)])
    return _sentence(random.choice((f"there is nothing {cell}", f"{cell} nothing can be seen")))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def scenes_dataset(num_scenes: int, seed: int = 0, split: str = "train", image_size: int = 64) -> Dataset:
    """
    Draws Scenes as a `datasets.Dataset`. The data set is drawn once and stored in the cache of `datasets`.

    Args:
        num_scenes (`int`): Number of scenes. A larger number adds scenes at the end.
        seed (`int`, *optional*, defaults to 0): Seed of the data set.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"` or `"test"`.
        image_size (`int`, *optional*, defaults to 64): Width and height in pixels.

    Returns:
        `datasets.Dataset`: The columns `image`, `short_caption`, `long_captions` (a list of `NUM_CAPTIONS`), `id`,
        `group`, `negatives`, `rewrites`, `tags` and `regions`. Scenes with the same `group` share a short caption.

    Raises:
        `ValueError`: If the split does not exist.

    Example:

    ```python
    >>> from lotlip_hf.scenes.dataset import scenes_dataset

    >>> held_out = scenes_dataset(500, split="test")
    >>> len(set(held_out["short_caption"])) <= 500 / 4
    True
    ```
    """
    scene(0, seed, split)  # checks the split
    arguments = {
        "num_scenes": num_scenes,
        "seed": seed,
        "scenes_split": split,  # `split` is an argument of `from_generator` itself
        "image_size": image_size,
        "source": hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest(),
    }
    return Dataset.from_generator(_rows, features=FEATURES, gen_kwargs=arguments)


def _rows(num_scenes: int, seed: int, scenes_split: str, image_size: int, source: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of the data set. They are drawn again if `source`, the digest of this file, changes."""
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
            "negatives": negatives(one),
            "rewrites": rewrites(one),
            "tags": tags(one),
            "regions": regions(one),
        }


def write_segmentation(folder: str | Path, num_scenes: int = 500, split: str = "test", image_size: int = 64) -> None:
    """
    Writes scenes as a folder for `lotlip evaluate --task segmentation`: `images`, the masks of [`segments`] as
    `masks`, and a class for each colour in `classes.txt`.

    Args:
        folder (`str` or `Path`): The folder. Existing files are overwritten.
        num_scenes (`int`, *optional*, defaults to 500): Number of scenes.
        split (`str`, *optional*, defaults to `"test"`): Split of the scenes.
        image_size (`int`, *optional*, defaults to 64): Width and height in pixels.
    """
    folder = Path(folder)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(num_scenes):
        one = scene(index, split=split)
        render(one, image_size).save(folder / "images" / f"{index:05}.png")
        segments(one, image_size).save(folder / "masks" / f"{index:05}.png")
    (folder / "classes.txt").write_text("".join(f"{colour} shape\n" for colour in COLOURS), encoding="utf-8")


def write_classification(
    folder: str | Path,
    num_scenes: int = 500,
    split: str = "test",
    image_size: int = 64,
    attribute: Literal["shape", "colour"] = "shape",
) -> None:
    """
    Writes scenes as a folder for `lotlip evaluate --task classification`: a folder of images for each class, which is
    the shape (`circle`) or the colour (`red_shape`) of the large object.

    Args:
        folder (`str` or `Path`): The folder. Existing files are overwritten.
        num_scenes (`int`, *optional*, defaults to 500): Number of scenes.
        split (`str`, *optional*, defaults to `"test"`): Split of the scenes.
        image_size (`int`, *optional*, defaults to 64): Width and height in pixels.
        attribute (`str`, *optional*, defaults to `"shape"`): What the classes are: `"shape"` or `"colour"`.
    """
    names = (
        {colour: f"{colour}_shape" for colour in COLOURS} if attribute == "colour" else {one: one for one in SHAPES}
    )
    for name in names.values():
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
    for index in range(num_scenes):
        one = scene(index, split=split)
        name = names[getattr(one.objects[0], attribute)]
        render(one, image_size).save(Path(folder) / name / f"{index:05}.png")
