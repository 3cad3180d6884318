"""
Makes transformers' Auto classes know LoTLIP without importing them. Importing them costs seconds, and torch with
them, so each is told when it is first imported, or at once if it has been.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _register_configurations(auto: ModuleType) -> None:
    from .modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig

    for config_class in (LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig):
        auto.AutoConfig.register(config_class.model_type, config_class)


def _register_models(auto: ModuleType) -> None:
    from .modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel

    for model_class in (LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel):
        auto.AutoModel.register(model_class.config_class, model_class)
    auto.AutoModelForZeroShotImageClassification.register(LoTLIPModel.config_class, LoTLIPModel)


def _register_tokenizers(auto: ModuleType) -> None:
    from .modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig
    from .modeling.tokenization_lotlip import LoTLIPTokenizer

    for config_class in (LoTLIPConfig, LoTLIPTextConfig):
        auto.AutoTokenizer.register(config_class, fast_tokenizer_class=LoTLIPTokenizer)


def _register_processors(auto: ModuleType) -> None:
    from .modeling.configuration_lotlip import LoTLIPConfig
    from .modeling.processing_lotlip import LoTLIPProcessor

    auto.AutoProcessor.register(LoTLIPConfig, LoTLIPProcessor)


_REGISTER = {
    "transformers.models.auto.configuration_auto": _register_configurations,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizers,
    "transformers.models.auto.processing_auto": _register_processors,
}


class _AutoFinder(MetaPathFinder):
    """Finds the Auto modules where they are, and has `register` called behind their code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _followed_by(spec.loader.exec_module, _REGISTER[fullname])
        return spec


def _followed_by(
    exec_module: Callable[[ModuleType], None], register: Callable[[ModuleType], None]
) -> Callable[[ModuleType], None]:
    def exec_and_register(module: ModuleType) -> None:
        exec_module(module)
        register(module)

    return exec_and_register


def register_auto_classes() -> None:
    """Registers LoTLIP with the Auto classes, now or when they are imported."""
    sys.meta_path.insert(0, _AutoFinder())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
