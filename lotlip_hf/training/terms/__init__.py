"""The terms of the objective, for `--terms`. To add a term, write a file in this folder and list it in `TERMS`."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, get_type_hints

import torch
from torch import nn

from ... import options
from ...modeling.configuration_lotlip import LoTLIPConfig
from .byol import BYOL
from .caption_margin import CaptionMargin
from .cosine import Cosine
from .distribution import Distribution
from .groups import Groups
from .hard_negatives import HardNegatives
from .infonce import InfoNCE
from .instance import Instance
from .margin import Margin
from .masked_words import MaskedWords
from .negatives import Negatives
from .primary_components import PrimaryComponents
from .region_text import RegionText
from .regions import Regions
from .sigmoid import Sigmoid
from .simclr import SimCLR
from .similarities import Similarities
from .soft_labels import SoftLabels
from .structure import Structure
from .tags import Tags
from .two_views import TwoViews

TERMS: dict[str, type[nn.Module]] = {
    "infonce": InfoNCE,
    "sigmoid": Sigmoid,
    "primary_components": PrimaryComponents,
    "soft_labels": SoftLabels,
    "distribution": Distribution,
    "hard_negatives": HardNegatives,
    "negatives": Negatives,
    "tags": Tags,
    "masked_words": MaskedWords,
    "region_text": RegionText,
    "regions": Regions,
    "margin": Margin,
    "caption_margin": CaptionMargin,
    "groups": Groups,
    "instance": Instance,
    "structure": Structure,
    "similarities": Similarities,
    "cosine": Cosine,
    "two_views": TwoViews,
    "simclr": SimCLR,
    "byol": BYOL,
}
# Options of terms that default to a field of the model's configuration.
MODEL_DEFAULTS = {name: name for name in ("projection_dim", "short_loss_weight", "long_loss_weight")}
MODEL_DEFAULTS["vocab_size"] = "text_config.vocab_size"


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
    given: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for name in weights if model_config else ():
        own = MODEL_DEFAULTS.keys() & hints[name].keys()
        given[name] = {option: attrgetter(MODEL_DEFAULTS[option])(model_config) for option in own}
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
