"""Zero-shot classification: prompt templates, and class embeddings from prompts."""

import os
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional as F

from ..encoder import Encoder
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


def class_embeddings(
    encoder: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    fingerprint: str | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """
    Computes the class embeddings of a zero-shot classifier. The embedding of a class is the mean of the normalised
    embeddings of its prompts, normalised again, as in CLIP (Radford et al., 2021, section 3.1.4, and its notebook on
    ImageNet). Prompts are tokenized like other texts; LoTLIP's tokenizer keeps the full stop at their end.

    Arguments not listed here are those of [`~lotlip_hf.evaluation.embeddings.embed_texts`].

    Args:
        encoder (`Encoder`): The dual encoder.
        class_names (`Sequence[str]`): C class names.
        templates (`Sequence[str]`, *optional*, defaults to `("a photo of a {}.",)`): Prompt templates, for example
            from [`read_templates`].

    Returns:
        `torch.Tensor`: [C, dim], float32 on the CPU, each row of length 1.

    Raises:
        `TypeError`: If a string is passed instead of a list.
        `ValueError`: If a list is empty, or a template has no placeholder.

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
    for name, values in (("class_names", class_names), ("templates", templates)):
        if isinstance(values, str):
            raise TypeError(f"`{name}` is the string {values!r}. Pass a list: [{values!r}].")
    prompts = [prompt(template, class_name) for class_name in class_names for template in templates]
    embeds, _ = embed_texts(
        encoder,
        prompts,
        cache=cache,
        batch_size=batch_size,
        max_length=max_length,
        fingerprint=fingerprint,
        progress=progress,
    )
    means = embeds.unflatten(0, (len(class_names), len(templates))).mean(1)  # [C, P]
    return F.normalize(means, dim=-1)
