"""The terms of the objective, for `--terms`. To add a term, write a file in this folder and list it in `TERMS`."""

from collections.abc import Sequence
from typing import get_type_hints

import torch
from torch import nn

from ... import options
from ...modeling.configuration_lotlip import LoTLIPConfig
from .cosine import Cosine
from .hard_negatives import HardNegatives
from .infonce import InfoNCE
from .instance import Instance
from .negatives import Negatives
from .primary_components import PrimaryComponents
from .region_text import RegionText
from .regions import Regions
from .sigmoid import Sigmoid
from .similarities import Similarities
from .soft_labels import SoftLabels
from .structure import Structure
from .tags import Tags

TERMS: dict[str, type[nn.Module]] = {
    "infonce": InfoNCE,
    "sigmoid": Sigmoid,
    "primary_components": PrimaryComponents,
    "soft_labels": SoftLabels,
    "hard_negatives": HardNegatives,
    "negatives": Negatives,
    "tags": Tags,
    "region_text": RegionText,
    "regions": Regions,
    "instance": Instance,
    "structure": Structure,
    "similarities": Similarities,
    "cosine": Cosine,
}
# Options of terms that default to the field with the same name in the model's configuration.
MODEL_DEFAULTS = ("projection_dim", "short_loss_weight", "long_loss_weight")


def make_terms(
    terms: Sequence[str], term_options: Sequence[str], seed: int = 0, model_config: LoTLIPConfig | None = None
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """
    Creates the terms of an objective. Returns the terms and their weights, both by name.

    Args:
        terms (`Sequence[str]`): Entries `name` or `name:weight`. A term with weight 0 is left out.
        term_options (`Sequence[str]`): Entries `name.option=value`, arguments of the constructors of the terms.
        seed (`int`, *optional*, defaults to 0): Seed for the parameters of terms. The global random generator is not
            changed.
        model_config (`LoTLIPConfig`, *optional*): Configuration of the model, for the defaults of the options in
            `MODEL_DEFAULTS`.

    Raises:
        `ValueError`: If a term or an option does not exist, or a value is wrong.
    """
    weights: dict[str, float] = {}
    for name, mark, weight in (text.partition(":") for text in terms):
        if name not in TERMS or name in weights:
            problem = "is given twice" if name in weights else f"is not one of {', '.join(TERMS)}"
            raise ValueError(f"`terms`: {name!r} {problem}.")
        weights[name] = options.convert(f"terms: {name}", weight, float) if mark else 1.0
    if min(weights.values(), default=0) < 0 or not any(weights.values()):
        raise ValueError(f"`terms` must have weights >= 0, at least one of them > 0, got {' '.join(terms)}.")
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
            raise ValueError(f"`term_options`: {text!r} must be `name.option=value` with one of {known}.")
        given[name][option] = options.convert(f"term_options: {key}", value, hints[name][option])
    made = {}
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # unlike `torch.manual_seed`, leaves the GPUs' generators unchanged
        for name in (name for name, weight in weights.items() if weight):
            try:
                made[name] = TERMS[name](**given[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"`term_options`: {name}: {error}") from error
    return made, {name: weights[name] for name in made}
