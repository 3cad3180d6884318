"""Changes of scenes in words, for composed search: another background, or another attribute of one object."""

from dataclasses import dataclass, replace
from random import Random

from .dataset import BACKGROUNDS, NUM_CAPTIONS, Scene, _attributes, _exchanged, _long_caption, _name


@dataclass(frozen=True)
class Change:
    """
    A change of a scene.

    Args:
        text (`str`): The change in words, such as "has a black background". It follows "a picture that".
        scene (`Scene`): The scene after the change.
    """

    text: str
    scene: Scene


def changes(scene: Scene, number: int = 4) -> list[Change]:
    """
    Returns changes of a scene: to each other background, and of the colour, shape or pattern of one object.

    Args:
        scene (`Scene`): The scene.
        number (`int`, *optional*, defaults to 4): Number of changes of an object. All differ.

    Returns:
        `list[Change]`: The changes: first those of the background.

    Example:

    ```python
    >>> from lotlip_hf.scenes.changes import changes
    >>> from lotlip_hf.scenes.dataset import scene

    >>> [change.text for change in changes(scene(0), 0)]
    ['has a white background', 'has a gray background']
    ```
    """
    random = Random(f"{scene.id} changes")
    found = [
        Change(f"has a {background} background", replace(scene, background=background))
        for background in BACKGROUNDS
        if background != scene.background
    ]
    own = [scene, *(change.scene for change in found)]
    for _ in range(number):
        changed = scene
        while changed in own:  # a scene has dozens of changes
            index = random.randrange(len(scene.objects))
            changed = _exchanged(scene, index, random.choice(_attributes(scene.objects[index])), random)
        own.append(changed)
        old, new = scene.objects[index], changed.objects[index]
        pattern = "" if new.pattern == old.pattern else f"{new.pattern} "
        article = "" if new.count > 1 else "an " if f"{pattern}{_name(new)}".startswith("orange") else "a "
        found.append(Change(f"has {article}{pattern}{_name(new)} instead of the {_name(old)}", changed))
    return found


def triplets(scene: Scene, number: int = 4) -> list[tuple[str, str, str]]:
    """
    Returns texts of the changes of a scene: a long caption, a change, and the caption after it.

    Args:
        scene (`Scene`): The scene.
        number (`int`, *optional*, defaults to 4): Number of changes of an object, as in [`changes`].

    Returns:
        `list[tuple[str, str, str]]`: Reference, change and target. Reference and target differ in the change alone.
    """
    found = []
    for index, change in enumerate(changes(scene, number)):
        caption = index % NUM_CAPTIONS
        found.append((_long_caption(scene, caption), change.text, _long_caption(change.scene, caption)))
    return found
