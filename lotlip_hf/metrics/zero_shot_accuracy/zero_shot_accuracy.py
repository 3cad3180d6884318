"""Accuracy of zero-shot classification as an `evaluate` module, from class scores, ties counted fairly."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

# not relative: `evaluate.load` runs a copy of this file
from lotlip_hf.evaluation.retrieval import TIE_TOLERANCE, accuracies

_DESCRIPTION = """\
Top-k accuracy from the scores of all classes: the share of images whose class is among the k classes with the highest
scores, such as the similarities of an image with the prompts of the classes.

Classes that score the same come in random order, and the result is the expected accuracy. So constant scores give k/C
with C classes, not 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: [N, C] the score of each class, the higher the more likely: similarities or logits.
    references: [N] the right class of each image, from 0.
    ks: numbers of classes to look at; by default 1 and 5.
    tolerance: scores closer than this share of the label's or of the highest one are ties; by default 1e-6. Take 0
        for probabilities.
Returns:
    `accuracy_top1`, `accuracy_top5` and so on: top-k accuracy, from 0 to 1.
    `mean_per_class_recall`: the top-1 accuracy of each class that has images, averaged over these classes.
Examples:
    >>> from lotlip_hf.metrics import ZeroShotAccuracy
    >>> metric = ZeroShotAccuracy()
    >>> metric.compute(predictions=[[0.3, 0.1, 0.1], [0.2, 0.1, 0.1]], references=[0, 1], ks=[1, 2])
    {'accuracy_top1': 0.5, 'accuracy_top2': 0.75, 'mean_per_class_recall': 0.5}
"""

# Ties of scores, expected over all orders
_CITATION = """\
Frank McSherry and Marc Najork: Computing Information Retrieval Performance Measures Efficiently in the Presence of
Tied Scores. ECIR 2008.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ZeroShotAccuracy(evaluate.Metric):
    """`compute(ks=..., tolerance=...)` over the scores and classes that were added."""

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
        """Top-k accuracy at each of `ks` and the mean recall of the classes; see the class."""
        # checked before anything else: a `compute` that fails later has lost the batches that were added
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
