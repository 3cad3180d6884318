"""Groups of records from embeddings, and how well they agree with known groups."""

from typing import NamedTuple

import numpy as np


def split_groups(groups: np.ndarray, shares: tuple[float, ...], seed: int = 0) -> list[np.ndarray]:
    """
    Divides rows into parts, so that no group is in two of them.

    Args:
        groups (`np.ndarray`): Groups [n].
        shares (`tuple[float, ...]`): Shares of the groups, 1 in all.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the groups.

    Returns:
        `list[np.ndarray]`: The indices of the rows of each part, rising.
    """
    unique, numbers = np.unique(groups, return_inverse=True)
    ranks = np.random.default_rng(seed).permutation(len(unique))[numbers] / len(unique)
    bounds = np.cumsum(shares)[:-1]
    return [np.flatnonzero(np.searchsorted(bounds, ranks, side="right") == part) for part in range(len(shares))]


class Link(NamedTuple):
    """A link of two rows of embeddings: their cosine and their indices."""

    cosine: float
    first: int
    second: int


def single_linkage(embeds: np.ndarray) -> list[Link]:
    """
    Returns the links along which single linkage joins rows, by falling cosine: a spanning tree of the largest cosines,
    by Prim's algorithm. The time grows with the square of the number of rows, the memory with the number.

    Args:
        embeds (`np.ndarray`): Embeddings [n, dim], normalised.

    Returns:
        `list[Link]`: n - 1 links. [`clusters`] cuts them at a threshold.

    Raises:
        `ValueError`: If an embedding is not finite.

    Example:

    ```python
    >>> import numpy as np
    >>> from lotlip_hf.metrics.linking import clusters, single_linkage

    >>> embeds = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    >>> clusters(single_linkage(embeds), 3, threshold=0.7).tolist()
    [0, 1, 0]
    ```
    """
    if not np.isfinite(embeds).all():
        raise ValueError("`embeds` has numbers that are not finite. Pass embeddings without them.")
    highest, partner = np.full(len(embeds), -np.inf), np.zeros(len(embeds), dtype=int)
    is_open, current, links = np.ones(len(embeds), dtype=bool), 0, list[Link]()
    for _ in range(len(embeds) - 1):
        is_open[current] = False
        cosines = embeds @ embeds[current]
        is_nearer = cosines > highest
        highest, partner[is_nearer] = np.where(is_nearer, cosines, highest), current
        current = int(np.where(is_open, highest, -np.inf).argmax())
        links.append(Link(float(highest[current]), int(partner[current]), current))
    return sorted(links, reverse=True)


def clusters(links: list[Link], number: int, threshold: float) -> np.ndarray:
    """
    Returns the clusters of `number` rows as numbers from 0: rows are together if links of at least the threshold
    connect them.

    Args:
        links (`list[Link]`): Links, as [`single_linkage`] returns them.
        number (`int`): Number of rows.
        threshold (`float`): Lowest cosine of a link.
    """
    parents = list(range(number))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    for cosine, first, second in links:
        if cosine >= threshold:
            parents[root(first)] = root(second)
    return np.unique([root(row) for row in range(number)], return_inverse=True)[1]


def adjusted_rand_index(groups: np.ndarray, found: np.ndarray) -> float:
    """
    Returns the adjusted Rand index of two groupings [n] of the same rows: 1 if they are equal, 0 on average for
    groupings at random.
    """

    def pairs(values: np.ndarray) -> float:
        counts = np.unique(values, return_counts=True, axis=0)[1].astype(float)
        return float((counts * (counts - 1) / 2).sum())

    both, one, other = pairs(np.stack([groups, found], axis=1)), pairs(groups), pairs(found)
    expected = one * other / max(1.0, len(groups) * (len(groups) - 1) / 2)
    largest = (one + other) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def best_threshold(links: list[Link], groups: np.ndarray) -> float:
    """Returns the threshold at which the clusters agree best with known groups [n], among 200 cosines of the links."""
    cosines = np.array([link.cosine for link in links])
    chosen = cosines[np.unique(np.linspace(0, len(cosines) - 1, 200).round().astype(int))]
    return float(max(chosen, key=lambda one: adjusted_rand_index(groups, clusters(links, len(groups), one))))


def nearest_precision(embeds: np.ndarray, groups: np.ndarray) -> float:
    """
    Returns the share of rows whose nearest other row has the same group, among the rows of groups of two or more.

    Args:
        embeds (`np.ndarray`): Embeddings [n, dim], normalised.
        groups (`np.ndarray`): Groups [n].
    """
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[numbers] > 1)
    hits = 0
    for row in rows:
        cosines = embeds @ embeds[row]
        cosines[row] = -np.inf
        hits += groups[cosines.argmax()] == groups[row]
    return float(hits / max(1, len(rows)))
