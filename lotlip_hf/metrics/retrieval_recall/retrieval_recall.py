"""Recall at k of retrieval as an `evaluate` module. A query may have several right candidates."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

# an absolute import, because `evaluate.load` runs a copy of this file
from lotlip_hf.evaluation.retrieval import check_positive, find_ranks

_DESCRIPTION = """\
Recall at k of retrieval by embeddings: the share of queries that have a right candidate among the k candidates with
the highest cosine similarity. A query may have several right candidates, for example the five captions of an image.

Candidates that tie with the best right one are ordered at random, and the result is the expected recall. A model with
constant embeddings therefore scores chance level, not 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: Embeddings of the queries, [N, dim].
    references: N lists with the right candidates of each query, one or more, as indices in `candidates` from 0.
    candidates: Embeddings of all candidates, [M, dim], passed to `compute`.
    ks: Values of k. Defaults to 1, 5 and 10.
Returns:
    `r1`, `r5` and so on: Recall at each k, from 0 to 1.
    `median_rank`: Median over the queries of the expected rank of the best right candidate; the first rank is 1.
Examples:
    >>> from lotlip_hf.metrics import RetrievalRecall
    >>> metric = RetrievalRecall()
    >>> metric.add_batch(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[[0], [1, 2]])
    >>> metric.add_batch(predictions=[[0.6, 0.8]], references=[[0]])
    >>> metric.compute(candidates=[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], ks=[1, 3])
    {'r1': 0.6666666666666666, 'r3': 1.0, 'median_rank': 1.0}
"""

# Reference for the treatment of ties
_CITATION = """\
Frank McSherry and Marc Najork: Computing Information Retrieval Performance Measures Efficiently in the Presence of
Tied Scores. ECIR 2008.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalRecall(evaluate.Metric):
    """Recall at k of the added queries: `compute(candidates=..., ks=...)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def compute(self, *, candidates: Any, ks: Sequence[int] = (1, 5, 10), **kwargs: Any) -> dict | None:
        """Computes recall at each of `ks` and the median rank."""
        # check first: if `super().compute` fails, the added batches are lost
        candidates = torch.as_tensor(np.asarray(candidates, dtype=np.float32))
        if candidates.dim() != 2 or not candidates.isfinite().all():
            raise ValueError(f"`candidates` has shape {list(candidates.shape)}. Pass finite values of shape [M, dim].")
        check_positive("ks", *ks)
        return super().compute(candidates=candidates, ks=ks, **kwargs)

    def _compute(
        self,
        predictions: Sequence[Sequence[float]],
        references: Sequence[Sequence[int]],
        candidates: torch.Tensor,
        ks: Sequence[int],
    ) -> dict[str, float]:
        queries = torch.as_tensor(np.asarray(predictions, dtype=np.float32))
        found = find_ranks(queries, candidates, references)
        results = {f"r{k}": found.hits(k).mean().item() for k in ks}
        results["median_rank"] = float(np.median(found.ranks().numpy()))
        return results
