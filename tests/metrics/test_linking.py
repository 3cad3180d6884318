"""Links of records, against scikit-learn's clustering and Rand index."""

import numpy as np
import pytest
import sklearn.metrics
from sklearn.cluster import AgglomerativeClustering

from lotlip_hf.metrics.linking import (
    adjusted_rand_index,
    best_threshold,
    clusters,
    nearest_precision,
    single_linkage,
)


def planted(groups: np.ndarray, noise: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    embeds = generator.normal(size=(groups.max() + 1, 8))[groups] + noise * generator.normal(size=(len(groups), 8))
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_clusters_are_those_of_single_linkage(threshold: float) -> None:
    embeds = planted(np.arange(40) // 4, 0.4)
    clustering = AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="single", distance_threshold=1 - threshold
    )
    expected, found = clustering.fit_predict(embeds), clusters(single_linkage(embeds), 40, threshold)
    assert 1 < len(set(found)) < 40
    assert adjusted_rand_index(expected, found) == 1


def test_the_rand_index_is_that_of_sklearn() -> None:
    generator = np.random.default_rng(0)
    for first, second in generator.integers(0, 5, (20, 2, 30)):
        expected = sklearn.metrics.adjusted_rand_score(first, second)
        assert adjusted_rand_index(first, second) == pytest.approx(expected, abs=1e-12)
    assert adjusted_rand_index(np.arange(4), np.arange(4)) == adjusted_rand_index(np.zeros(4), np.zeros(4)) == 1


def test_a_threshold_finds_planted_groups() -> None:
    groups = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4])
    embeds = planted(groups, 0.05)
    links = single_linkage(embeds)
    assert (clusters(links, 9, best_threshold(links, groups)) == groups).all()
    assert nearest_precision(embeds, groups) == 1
    assert nearest_precision(embeds, np.arange(9)) == 0
    assert nearest_precision(embeds, np.array([0, 1, 0, 2, 3, 4, 5, 6, 7])) == 0


def test_embeddings_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        single_linkage(np.array([[np.nan, 0.0], [1.0, 0.0], [1.0, 0.0]]))
