"""Zero-shot classification: prompt templates, descriptions of classes, and class embeddings from both."""

import os
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from ..encoder import Encoder
from ..files import FileError, parse_json, printable, read_regular
from .embeddings import embed_texts

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# Placeholders of the class name in a template.
PLACEHOLDERS = ("{}", "{c}")
# Lists of templates in open_clip, by their name in `read_templates`.
OPEN_CLIP_TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def read_templates(name_or_file: str | os.PathLike) -> tuple[str, ...]:
    """
    Reads prompt templates from a named list or a text file.

    Args:
        name_or_file (`str` or `os.PathLike`): `"default"` for `DEFAULT_TEMPLATES`; `"openai"` for the 80 templates of
            CLIP's authors for ImageNet; `"simple"` for 7 of these (the last two need open_clip); or a UTF-8 text file
            with one template per line, with the placeholder `{}` or `{c}`. Empty lines are ignored. For a file with
            the name of a list, pass `./openai`.

    Returns:
        `tuple[str, ...]`: The templates.

    Raises:
        `FileNotFoundError`: If no list or file has this name.
        `ImportError`: If open_clip is needed but not installed.
        `ValueError`: If a template does not have exactly one kind of placeholder, or the file is empty or not UTF-8.

    Example:

    ```python
    >>> from lotlip_hf.evaluation.zero_shot import read_templates

    >>> read_templates("default")
    ('a photo of a {}.',)
    ```
    """
    if name_or_file == "default":
        return DEFAULT_TEMPLATES
    if name_or_file in OPEN_CLIP_TEMPLATES:
        # open_clip's templates are functions of the class name
        functions = getattr(open_clip_metadata(), OPEN_CLIP_TEMPLATES[name_or_file])
        return tuple(function("{}") for function in functions)
    file = Path(name_or_file)
    if not file.is_file():
        names = ", ".join(["default", *OPEN_CLIP_TEMPLATES])
        raise FileNotFoundError(
            f"{file}: no list or file of templates has this name. Pass {names}, or a text file with one on each line."
        )
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    templates = tuple(line.strip() for line in lines if line.strip())
    for template in templates:
        prompt(template, "")
    if not templates:
        raise ValueError(f"{file} contains no template. Write one on each line.")
    return templates


def read_class_descriptions(file: str | os.PathLike) -> dict[str, list[str]]:
    """
    Reads descriptions of classes from a JSON file.

    Args:
        file (`str` or `os.PathLike`): A JSON object in UTF-8 of at most 256 MiB: a list of texts for each class.

    Returns:
        `dict[str, list[str]]`: The texts of each class.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If the file is too large or not such JSON, or a class has no texts; the message names the class.

    Example:

    ```python
    >>> import json
    >>> from lotlip_hf.evaluation.zero_shot import read_class_descriptions

    >>> texts = {"cat": ["A cat has pointed ears. It has long whiskers."], "dog": ["A dog has a long snout."]}
    >>> with open("classes.json", "w") as file:
    ...     json.dump(texts, file)
    >>> read_class_descriptions("classes.json") == texts
    True
    ```
    """
    try:
        descriptions = parse_json(read_regular(file))
        _check_descriptions(descriptions)
    except (ValueError, TypeError) as error:
        if isinstance(error, FileError):
            raise
        raise ValueError(
            f"{printable(file)} has no descriptions of classes ({error}). "
            'Write JSON such as {"cat": ["A cat has pointed ears."]}.'
        ) from error
    return descriptions


def _check_descriptions(descriptions: Any) -> None:
    """Raises a `TypeError` or `ValueError` unless each class has a list of texts."""
    if not isinstance(descriptions, Mapping):
        raise TypeError(f"`descriptions` is a {type(descriptions).__name__}. Pass a list of texts for each class.")
    for name, texts in descriptions.items():
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(f"The descriptions of class {name!r:.80} are {texts!r:.80}. Write a list of texts.")
        if not texts:
            raise ValueError(f"Class {name!r:.80} has no description. Write one or more texts.")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"A description of class {name!r:.80} is {text!r:.80}. Write a text.")


def open_clip_metadata() -> ModuleType:
    """
    Loads open_clip's module with CLIP's templates and names of the ImageNet classes (`IMAGENET_CLASSNAMES`). The
    module is loaded without its package, because `import open_clip` needs torchvision.


    Raises:
        `ImportError`: If open_clip is not installed.
    """
    package = find_spec("open_clip")
    folders = (package.submodule_search_locations if package else None) or []
    files = [file for folder in folders if (file := Path(folder) / "zero_shot_metadata.py").is_file()]
    if not files:
        raise ImportError(
            "CLIP's prompt templates and class names need open_clip: pip install 'lotlip-hf[open-clip]'. Or pass "
            "a text file with your own, one per line."
        )
    loader = SourceFileLoader("open_clip_zero_shot_metadata", str(files[0]))
    module = ModuleType(loader.name)
    loader.exec_module(module)
    return module


def prompt(template: str, class_name: str) -> str:
    """
    Inserts a class name into a template.

    Args:
        template (`str`): Template with the placeholder `{}` or `{c}`, once or more. Other braces are plain text.
        class_name (`str`): Name of the class.

    Returns:
        `str`: The prompt.

    Raises:
        `ValueError`: If the template has no placeholder, or both kinds.

    Example:

    ```python
    >>> prompt("a sketch of the {c}.", "tree frog")
    'a sketch of the tree frog.'
    ```
    """
    found = [one for one in PLACEHOLDERS if one in template]
    if len(found) != 1:
        raise ValueError(f"Template {template!r} needs exactly one of the placeholders {' and '.join(PLACEHOLDERS)}.")
    return template.replace(found[0], class_name)


def class_texts(
    class_names: Sequence[str],
    templates: Sequence[str] | None = None,
    descriptions: Mapping[str, Sequence[str]] | None = None,
) -> list[list[str]]:
    """
    Collects the texts of each class: its prompts, and its descriptions.

    Args:
        class_names (`Sequence[str]`): C class names.
        templates (`Sequence[str]`, *optional*): Prompt templates. Defaults to none if there are descriptions, and to
            `("a photo of a {}.",)` if not.
        descriptions (`Mapping[str, Sequence[str]]`, *optional*): Texts of each class, for example from
            [`read_class_descriptions`].

    Returns:
        `list[list[str]]`: One or more texts of each class, [C][...].

    Raises:
        `TypeError`: If a string is passed instead of a list.
        `ValueError`: If a template has no placeholder, a class has no descriptions, or `class_names` lacks a class
            with descriptions; the message names the class.

    Example:

    ```python
    >>> class_texts(["cat"], ["a {}."], {"cat": ["It has pointed ears."]})
    [['a cat.', 'It has pointed ears.']]
    ```
    """
    for name, values in (("class_names", class_names), ("templates", templates)):
        if isinstance(values, str):
            raise TypeError(f"`{name}` is the string {values!r}. Pass a list: [{values!r}].")
    if templates is None:
        templates = DEFAULT_TEMPLATES if descriptions is None else ()
    prompts = [[prompt(template, class_name) for template in templates] for class_name in class_names]
    if descriptions is None:
        return prompts
    _check_descriptions(descriptions)
    advice = "`descriptions` (--class-descriptions) need the classes of the data"
    if missing := [name for name in class_names if name not in descriptions]:
        raise ValueError(f"{advice}, but have no texts of {_named(missing)}. Write a list of texts for each.")
    if unknown := [name for name in descriptions if name not in class_names]:
        raise ValueError(f"{advice}, but {_named(unknown)} are not among them. Write the names as the data does.")
    return [[*own, *descriptions[name]] for own, name in zip(prompts, class_names, strict=True)]


def _named(names: Sequence[str]) -> str:
    """Names the first classes, and the number of the others."""
    more = f" and {len(names) - 3} other classes" if len(names) > 3 else ""
    return ", ".join(f"{name!r:.80}" for name in names[:3]) + more


def class_embeddings(
    encoder: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str] | None = None,
    *,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    fingerprint: str | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Computes the class embeddings of a zero-shot classifier. The embedding of a class is the mean of the normalised
    embeddings of its texts, normalised again, as in CLIP (Radford et al., 2021, section 3.1.4, and its notebook on
    ImageNet). Its texts are its prompts, or its descriptions, or both, as [`class_texts`] collects them. They are
    tokenized like other texts; LoTLIP's tokenizer keeps the full stop at their end.

    Arguments not listed here are those of [`~lotlip_hf.evaluation.embeddings.embed_texts`].

    Args:
        encoder (`Encoder`): The dual encoder.
        class_names (`Sequence[str]`): C class names.
        templates (`Sequence[str]`, *optional*): Prompt templates, for example from [`read_templates`]. Defaults to
            none if there are descriptions, and to `("a photo of a {}.",)` if not.
        descriptions (`Mapping[str, Sequence[str]]`, *optional*): Texts of each class, for example from
            [`read_class_descriptions`].

    Returns:
        `torch.Tensor`: [C, dim], float32 on the CPU, each row of length 1.

    Raises:
        `TypeError`: If a string is passed instead of a list.
        `ValueError`: If a template has no placeholder, or the descriptions do not fit the classes.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.evaluation.zero_shot import class_embeddings

    >>> encoder = load_encoder("checkpoint")
    >>> classes = class_embeddings(encoder, ["cat", "dog"])
    >>> scores = encoder.encode_images(["photos/cat.png"]) @ classes.T
    >>> scores.shape
    torch.Size([1, 2])
    ```
    """
    texts = class_texts(class_names, templates, descriptions)
    embeds, _ = embed_texts(
        encoder,
        [text for own in texts for text in own],
        cache=cache,
        batch_size=batch_size,
        max_length=max_length,
        fingerprint=fingerprint,
        progress=progress,
    )
    means = torch.stack([part.mean(0) for part in embeds.split([len(own) for own in texts])])  # [C, P]
    return F.normalize(means, dim=-1)
