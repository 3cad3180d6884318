"""The terms of the objective, by the names that `--terms` takes. A new term is a file here and a line in `TERMS`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import nn

from ... import options
from .infonce import InfoNCE
from .primary_components import PrimaryComponents
from .sigmoid import Sigmoid

TERMS: dict[str, type[nn.Module]] = {
    "infonce": InfoNCE,
    "sigmoid": Sigmoid,
    "primary_components": PrimaryComponents,
}


def make_terms(
    terms: Sequence[str], term_options: Sequence[str], seed: int = 0, defaults: Mapping[str, Any] | None = None
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """
    The terms that options name, with new weights that are the same on every process.

    Args:
        terms (`Sequence[str]`): `name` or `name:weight`; a term of weight 0 is left out.
        term_options (`Sequence[str]`): `name.option=value`, arguments of the terms' constructors.
        seed (`int`, *optional*, defaults to 0): seed of the weights; other random numbers stay as they are.
        defaults (`Mapping[str, Any]`, *optional*): values of the constructors' arguments of these names.

    Returns:
        `tuple[dict[str, nn.Module], dict[str, float]]`: the terms and their weights, by name.

    Raises:
        ValueError: on a term or an option that does not exist, or a wrong value; the message names the option.
    """
    weights: dict[str, float] = {}
    for text in terms:
        name, mark, weight = text.partition(":")
        if name not in TERMS:
            raise ValueError(f"`terms`: there is no {name!r}, but {', '.join(TERMS)}.")
        if name in weights:
            raise ValueError(f"`terms`: {name} is given twice.")
        weights[name] = options.convert(f"terms: {name}", weight, float) if mark else 1.0
        if weights[name] < 0:
            raise ValueError(f"`terms`: the weight of {name} must be at least 0, got {weights[name]}.")
    if not any(weights.values()):
        raise ValueError("`terms` needs at least one term with a weight above 0.")

    given: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for text in term_options:
        key, mark, value = text.partition("=")
        name, _, option = key.partition(".")
        if not mark or name not in given:
            raise ValueError(f"`term_options`: {text!r} is no `name.option=value` of the terms {', '.join(given)}.")
        hints = _options(name)
        if option not in hints:
            raise ValueError(f"`term_options`: {name} has no option {option!r}, but {', '.join(hints) or 'none'}.")
        given[name][option] = options.convert(f"term_options: {key}", value, hints[option])

    made = {}
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # not those of the GPUs
        for name in (name for name, weight in weights.items() if weight):
            own = {option: value for option, value in (defaults or {}).items() if option in _options(name)}
            try:
                made[name] = TERMS[name](**{**own, **given[name]})
            except ValueError as error:
                raise ValueError(f"`term_options`: {name}: {error}") from error
    return made, {name: weights[name] for name in made}


def _options(name: str) -> dict[str, Any]:
    """The types of a term's options, by name."""
    hints = get_type_hints(TERMS[name].__init__)
    parameters = inspect.signature(TERMS[name]).parameters.values()
    return {
        each.name: hints.get(each.name, str)
        for each in parameters
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
