"""
Metrics of images and texts. `RetrievalRecall` and `ZeroShotAccuracy` are `evaluate` modules, imported on first use
(`pip install evaluate`). `evaluate.load` also accepts their folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .clip_score import CLIPScores, clip_score

if TYPE_CHECKING:
    from .retrieval_recall.retrieval_recall import RetrievalRecall as RetrievalRecall
    from .zero_shot_accuracy.zero_shot_accuracy import ZeroShotAccuracy as ZeroShotAccuracy

_EVALUATE_MODULES = {"RetrievalRecall": "retrieval_recall", "ZeroShotAccuracy": "zero_shot_accuracy"}


def __getattr__(name: str) -> Any:
    if name not in _EVALUATE_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _EVALUATE_MODULES[name]
    try:
        return getattr(import_module(f".{module}.{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "evaluate":
            raise
        raise ImportError(f"{name} needs evaluate: pip install 'lotlip-hf[evaluation]'") from error


__all__ = ["CLIPScores", "clip_score"]
