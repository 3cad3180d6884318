"""
Metrics of images and texts. `RetrievalRecall` and `ZeroShotAccuracy` are `evaluate` modules, imported on first use
(`pip install 'lotlip-hf[evaluation]'`). `evaluate.load` also accepts their folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .caption_reward import aggregate, caption_reward, caption_reward_of
from .clip_score import CLIPScores, clip_score
from .composed_score import composed_features, composed_score
from .direction import direction, direction_of
from .schur_entropy import schur_entropy, schur_entropy_of, text_part, without_text
from .word_alignment import WordScore, token_relevance, word_alignment

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


__all__ = [
    "CLIPScores",
    "WordScore",
    "aggregate",
    "caption_reward",
    "caption_reward_of",
    "clip_score",
    "composed_features",
    "composed_score",
    "direction",
    "direction_of",
    "schur_entropy",
    "schur_entropy_of",
    "text_part",
    "token_relevance",
    "without_text",
    "word_alignment",
]
