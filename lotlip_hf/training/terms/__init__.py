"""The terms of the objective, by the names that `--terms` takes. A new term is a file here and a line in `TERMS`."""

from collections.abc import Sequence
from typing import get_type_hints

import torch
from torch import nn

from ... import options
from ...modeling.configuration_lotlip import LoTLIPConfig
from .infonce import InfoNCE
from .primary_components import PrimaryComponents
from .sigmoid import Sigmoid

TERMS: dict[str, type[nn.Module]] = {
    "infonce": InfoNCE,
    "sigmoid": Sigmoid,
    "primary_components": PrimaryComponents,
}
# Options whose default is the field of that name of the model's configuration.
MODEL_DEFAULTS = ("projection_dim", "short_loss_weight", "long_loss_weight")


def make_terms(
    terms: Sequence[str], term_options: Sequence[str], seed: int = 0, model_config: LoTLIPConfig | None = None
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """
    The terms that options name, and their weights, by name.

    Args:
        terms (`Sequence[str]`): `name` or `name:weight`; a term of weight 0 is left out.
        term_options (`Sequence[str]`): `name.option=value`, arguments of the terms' constructors.
        seed (`int`, *optional*, defaults to 0): of the terms' own weights; no other random number depends on them.
        model_config (`LoTLIPConfig`, *optional*): for the defaults of the options in `MODEL_DEFAULTS`.

    Raises:
        ValueError: on a term or an option that does not exist, or a wrong value; the message names the option.
    """
    weights: dict[str, float] = {}
    for name, mark, weight in (text.partition(":") for text in terms):
        if name not in TERMS or name in weights:
            wrong = "is given twice" if name in weights else f"is none of {', '.join(TERMS)}"
            raise ValueError(f"`terms`: {name!r} {wrong}.")
        weights[name] = options.convert(f"terms: {name}", weight, float) if mark else 1.0
    if min(weights.values(), default=0) < 0 or not any(weights.values()):
        raise ValueError(f"`terms` must have weights of at least 0, one of them above, got {' '.join(terms)}.")
    hints = {name: get_type_hints(TERMS[name].__init__) for name in weights}
    for types in hints.values():
        types.pop("return", None)
    defaults = {name: getattr(model_config, name) for name in MODEL_DEFAULTS} if model_config else {}
    given = {name: {k: v for k, v in defaults.items() if k in hints[name]} for name in weights}
    for text in term_options:
        key, mark, value = text.partition("=")
        name, _, option = key.partition(".")
        if not mark or option not in hints.get(name, ()):
            known = ", ".join(f"{term}.{each}" for term in hints for each in hints[term])
            raise ValueError(f"`term_options`: {text!r} is no `name.option=value` with one of {known}.")
        given[name][option] = options.convert(f"term_options: {key}", value, hints[name][option])
    made = {}
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # not those of the GPUs
        for name in (name for name, weight in weights.items() if weight):
            try:
                made[name] = TERMS[name](**given[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"`term_options`: {name}: {error}") from error
    return made, {name: weights[name] for name in made}
