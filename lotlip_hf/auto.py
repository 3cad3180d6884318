"""LoTLIP in transformers' Auto classes, from the moment that somebody uses one."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

# All Auto classes import it.
AUTO_CLASSES = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Makes LoTLIP known to the Auto classes. Imports them, and with them PyTorch."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForZeroShotImageClassification,
        AutoProcessor,
        AutoTokenizer,
    )

    from .diffusion.text_encoder import LoTLIPTextEncoder, LoTLIPTextEncoderConfig
    from .modeling.configuration_lotlip import LoTLIPConfig, LoTLIPTextConfig, LoTLIPVisionConfig
    from .modeling.modeling_lotlip import LoTLIPModel, LoTLIPTextModel, LoTLIPVisionModel
    from .modeling.processing_lotlip import LoTLIPProcessor
    from .modeling.tokenization_lotlip import LoTLIPTokenizer

    for config, model in (
        (LoTLIPConfig, LoTLIPModel),
        (LoTLIPTextConfig, LoTLIPTextModel),
        (LoTLIPVisionConfig, LoTLIPVisionModel),
        (LoTLIPTextEncoderConfig, LoTLIPTextEncoder),
    ):
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
    AutoModelForZeroShotImageClassification.register(LoTLIPConfig, LoTLIPModel)
    for config in (LoTLIPConfig, LoTLIPTextConfig, LoTLIPTextEncoderConfig):
        AutoTokenizer.register(config, fast_tokenizer_class=LoTLIPTokenizer)
    AutoProcessor.register(LoTLIPConfig, LoTLIPProcessor)

    def push_to_hub(model: LoTLIPModel, repo_id: str, **kwargs: Any) -> Any:
        """The whole checkpoint, with processor and model card; see [`~lotlip_hf.hub.push.push`]."""
        from .hub.push import push

        return push(model, repo_id, **kwargs)

    LoTLIPModel.push_to_hub = push_to_hub  # the stock method publishes the weights alone


def register_when_used() -> None:
    """
    Calls `register` as soon as somebody has imported the Auto classes, so that `import lotlip_hf` imports neither them
    nor PyTorch.

    They are also imported in the middle of modules that ours need, so the end of the outermost import is waited for.
    """
    if AUTO_CLASSES in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the modules of transformers and of this package as Python does, and is told when their import ends."""

    def __init__(self) -> None:
        self.unfinished = 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(("transformers.", "lotlip_hf.")):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(self, name, spec.loader.path)
        return spec

    def register_if_ready(self) -> None:
        if not self.unfinished and AUTO_CLASSES in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


class _Loader(SourceFileLoader):
    def __init__(self, finder: _Finder, name: str, path: str) -> None:
        super().__init__(name, path)
        self.finder = finder

    def exec_module(self, module: ModuleType) -> None:
        self.finder.unfinished += 1
        try:
            super().exec_module(module)
        finally:
            self.finder.unfinished -= 1
        self.finder.register_if_ready()
