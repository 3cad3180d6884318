"""Accuracy of zero-shot classification as an `evaluate` module, computed from class scores."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

# an absolute import, because `evaluate.load` runs a copy of this file
from lotlip_hf.evaluation.retrieval import TIE_TOLERANCE, accuracies

_DESCRIPTION = """\
Top-k accuracy from the scores of all classes: the share of images whose class is among the k classes with the highest
scores. A score is, for example, the similarity of an image and the prompt of a class.

Classes with tied scores are ordered at random, and the result is the expected accuracy. Constant scores of C classes
therefore give k/C, not 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: Scores of the classes, [N, C], such as similarities or logits. Higher means more likely.
    references: The right class of each image, [N], from 0.
    ks: Values of k. Defaults to 1 and 5.
    tolerance: Relative tolerance of ties. Scores tie with the right class's score if they differ by less than this
        share of it, or of the highest score if that is larger. Defaults to 1e-6. Pass 0 for probabilities.
Returns:
    `accuracy_top1`, `accuracy_top5` and so on: Top-k accuracy, from 0 to 1.
    `mean_per_class_recall`: Top-1 accuracy of each class, averaged over the classes that have images.
Examples:
    >>> from lotlip_hf.metrics import ZeroShotAccuracy
    >>> metric = ZeroShotAccuracy()
    >>> metric.compute(predictions=[[0.3, 0.1, 0.1], [0.2, 0.1, 0.1]], references=[0, 1], ks=[1, 2])
    {'accuracy_top1': 0.5, 'accuracy_top2': 0.75, 'mean_per_class_recall': 0.5}
"""

# Reference for the treatment of ties
_CITATION = """\
Frank McSherry and Marc Najork: Computing Information Retrieval Performance Measures Efficiently in the Presence of
Tied Scores. ECIR 2008.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ZeroShotAccuracy(evaluate.Metric):
    """Top-k accuracy of the added scores and classes: `compute(ks=..., tolerance=...)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def compute(
        self, *, ks: Sequence[int] = (1, 5), tolerance: float = TIE_TOLERANCE, **kwargs: Any
    ) -> dict[str, float] | None:
        """Computes the top-k accuracy at each of `ks` and the mean per-class recall."""
        # check first: if `super().compute` fails, the added batches are lost
        accuracies(torch.zeros(1, 1), [0], ks, tolerance=tolerance)
        return super().compute(ks=ks, tolerance=tolerance, **kwargs)

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[int],
        ks: Sequence[int],
        tolerance: float,
    ) -> dict[str, float]:
        scores = torch.as_tensor(np.asarray(predictions, dtype=np.float32))
        return accuracies(scores, references, ks, tolerance=tolerance)
