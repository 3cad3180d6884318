"""Zero-shot classification: classes as embeddings of the prompts that name them."""

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
# What stands for the class in a template.
PLACEHOLDERS = ("{}", "{c}")
# open_clip's lists of templates, by the name they have here.
OPEN_CLIP_TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def read_templates(name_or_file: str | os.PathLike) -> tuple[str, ...]:
    """
    Prompt templates: a list by its name, or a text file.

    Args:
        name_or_file: `"default"`, which is `DEFAULT_TEMPLATES`; `"openai"`, the 80 that CLIP's authors wrote for
            ImageNet, or `"simple"`, their choice of 7, both out of open_clip; or a UTF-8 text file with a template on
            each line, `{}` or `{c}` standing for the class. Empty lines are passed over. A file that has the name of
            a list is written `./openai`.

    Returns:
        The templates.

    Raises:
        FileNotFoundError: if there is neither such a list nor such a file.
        ImportError: if open_clip is asked for and not installed.
        ValueError: if a line has no place for the class or both kinds of it, or the file has no template or is no
            text.

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
        # functions of the class's name; "{}" for a name makes templates of them
        functions = getattr(open_clip_metadata(), OPEN_CLIP_TEMPLATES[name_or_file])
        return tuple(function("{}") for function in functions)
    file = Path(name_or_file)
    if not file.is_file():
        names = ", ".join(["default", *OPEN_CLIP_TEMPLATES])
        raise FileNotFoundError(
            f"{file}: no such file of templates; expected one of {names}, or a text file with a template on each line."
        )
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    templates = tuple(line.strip() for line in lines if line.strip())
    for template in templates:
        prompt(template, "")
    if not templates:
        raise ValueError(f"{file}: there is no template in it; expected one on each line.")
    return templates


def open_clip_metadata() -> ModuleType:
    """
    open_clip's templates and its names of ImageNet's classes (`IMAGENET_CLASSNAMES`), which are CLIP's. The file is
    read by itself: importing open_clip needs torchvision.

    Raises:
        ImportError: if open_clip is not installed.
    """
    package = find_spec("open_clip")
    folders = (package.submodule_search_locations if package else None) or []
    files = [file for folder in folders if (file := Path(folder) / "zero_shot_metadata.py").is_file()]
    if not files:
        raise ImportError(
            "CLIP's prompt templates and class names are in open_clip: pip install open_clip_torch. Or pass a file "
            "with one on each line."
        )
    loader = SourceFileLoader("open_clip_zero_shot_metadata", str(files[0]))
    module = ModuleType(loader.name)
    loader.exec_module(module)
    return module


def prompt(template: str, class_name: str) -> str:
    """
    A template with the name of a class in its place.

    Args:
        template: With `{}` or `{c}`, once or several times; any other braces are text.
        class_name: As it stands in a prompt.

    Raises:
        ValueError: if the template has no place for the class, or both `{}` and `{c}`.

    Example:

    ```python
    >>> prompt("a sketch of the {c}.", "tree frog")
    'a sketch of the tree frog.'
    ```
    """
    found = [one for one in PLACEHOLDERS if one in template]
    if len(found) != 1:
        raise ValueError(f"template {template!r} must have either {' or '.join(PLACEHOLDERS)} where the class goes.")
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
    What images are compared with to classify them: for each class the mean of the normalised embeddings of its
    prompts, normalised again, as in CLIP (Radford et al., 2021, section 3.1.4, and its notebook on ImageNet).

    Prompts are read as every text is: LoTLIP's tokenizer drops a full stop only where a space follows it, so the one
    at a prompt's end stays.

    Args:
        encoder: The dual encoder.
        class_names: C names, as they stand in a prompt.
        templates: As [`read_templates`] gives them.
        cache, batch_size, max_length, fingerprint, progress: As in
            [`~lotlip_hf.evaluation.embeddings.embed_texts`].

    Returns:
        [C, P], float32 on the CPU, each row of length 1.

    Raises:
        TypeError: if a list is given as a single string.
        ValueError: if a list is empty, or a template has no place for the class.

    Example:

    ```python
    >>> from lotlip_hf import load_encoder
    >>> from lotlip_hf.evaluation.zero_shot import class_embeddings

    >>> encoder = load_encoder("path/to/checkpoint")  # doctest: +SKIP
    >>> classes = class_embeddings(encoder, ["cat", "dog"])  # doctest: +SKIP
    >>> (encoder.encode_images(["a.jpg"]) @ classes.T).argmax(1)  # doctest: +SKIP
    ```
    """
    for name, values in (("class_names", class_names), ("templates", templates)):
        if isinstance(values, str):
            raise TypeError(f"`{name}` must be a list of strings, got a single one: pass [{values!r}].")
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
