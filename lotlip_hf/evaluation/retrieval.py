"""
Retrieval between images and texts by exact search: recall at k, ranks and confidence intervals. The top-k accuracy of
class scores is computed in the same way, as the recall of the right class.

Candidates that tie with the right one are ordered at random, and each metric is the expected value over all orders
(McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
Scores", ECIR 2008). A model with constant embeddings therefore scores chance level.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

# A block of similarities has this many images and texts: 4 MB in float32, which fits into a CPU cache.
BLOCK_SIZE = 1024
# Cosine similarities closer than this are ties. Rounding in float32 depends on the batch and the padding of a text and
# changes similarities by a few 1e-7.
TIE_TOLERANCE = 1e-6
DIRECTIONS = ("image_to_text", "text_to_image")
# Metrics of the first k candidates, and the field of the protocol with the number of candidates
TOP = re.compile(r"(image_to_text_r|text_to_image_r|accuracy_top)(\d+)")
CANDIDATES = {"image_to_text_r": "num_texts", "text_to_image_r": "num_images", "accuracy_top": "num_classes"}


class TiedRanks(NamedTuple):
    """
    Ranks of the best positive (right candidate) of N queries, with ties. Each field is an int64 tensor [N].

    Args:
        better (`torch.Tensor`): Number of candidates more similar to the query than its best positive.
        tied (`torch.Tensor`): Number of candidates as similar as the best positive, including the positive itself.
        positives (`torch.Tensor`): Number of positives among the tied candidates, including the best positive.
    """

    better: torch.Tensor
    tied: torch.Tensor
    positives: torch.Tensor

    def hits(self, k: int) -> torch.Tensor:
        """
        Returns the probability that a positive is among the first k candidates, [N] in float64 on the CPU. With b
        better and t tied candidates, p of them positive, it is `1 - C(t - p, k - b) / C(t, k - b)`.
        """
        better, tied, positives = (part.cpu().double() for part in self)
        drawn = (k - better).clamp(min=0).minimum(tied)
        # With m = drawn, C(t - p, m) / C(t, m) is the product over j < p of (t - m - j) / (t - j), symmetric
        fewer, more = drawn.minimum(positives), drawn.maximum(positives)
        missed = torch.ones_like(better)
        for j in range(int(fewer.max())):
            factor = ((tied - more - j) / (tied - j)).clamp(min=0)
            missed = torch.where(j < fewer, missed * factor, missed)
        return 1 - missed

    def ranks(self) -> torch.Tensor:
        """Returns the expected rank of the first positive, from 1; [N] in float64 on the CPU."""
        better, tied, positives = (part.cpu().double() for part in self)
        return better + (tied + 1) / (positives + 1)


class Ranks(NamedTuple):
    """Expected ranks, from 1 and in float64: of the best text of each image [I] and of the image of each text [T]."""

    image_to_text: torch.Tensor
    text_to_image: torch.Tensor


def recalls(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: Sequence[int] | torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block_size: int = BLOCK_SIZE,
) -> dict[str, float]:
    """
    Computes recall at k in both directions: the share of images with one of their texts among the k most similar
    texts, and the share of texts with their image among the k most similar images. Similarity is the cosine, in
    float32 or better.

    Candidates that tie with the best right one are ordered at random, and the result is the expected recall. With one
    text per image, a model with constant embeddings scores k/N, the chance level.

    Args:
        image_embeds (`torch.Tensor`): Embeddings of the images, [I, dim], on any device.
        text_embeds (`torch.Tensor`): Embeddings of the texts, [T, dim], on the same device.
        text_to_image (`Sequence[int]`, *optional*): Index of the image of each text, [T]. Every image needs a text.
            By default, text i belongs to image i.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5, 10)`): Values of k.
        block_size (`int`, *optional*, defaults to 1024): Number of images and texts in a block of similarities.

    Returns:
        `dict[str, float]`: `image_to_text_r1`, `text_to_image_r1` and so on for each k, from 0 to 1.

    Raises:
        `ValueError`: If shapes do not match or are empty, if an embedding contains NaN or infinity, if `text_to_image`
            has an invalid index or leaves an image without text, or if a k is below 1.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.evaluation.retrieval import recalls

    >>> recalls(torch.eye(4), torch.eye(4), ks=[1])
    {'image_to_text_r1': 1.0, 'text_to_image_r1': 1.0}
    >>> recalls(torch.eye(4), torch.ones(4, 4), ks=[1])
    {'image_to_text_r1': 0.25, 'text_to_image_r1': 0.25}
    >>> recalls(torch.eye(2), torch.eye(2).repeat(5, 1), [0, 1] * 5, ks=[1])
    {'image_to_text_r1': 1.0, 'text_to_image_r1': 1.0}
    ```
    """
    owners = _check(image_embeds, text_embeds, text_to_image, ks)
    return _recalls(_both_ranks(image_embeds, text_embeds, owners, block_size), ks)


def ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: Sequence[int] | torch.Tensor | None = None,
    block_size: int = BLOCK_SIZE,
) -> Ranks:
    """
    Computes the expected rank, from 1, of the best text of each image and of the image of each text. With ties, it may
    not be a whole number. Arguments and errors are those of [`recalls`].

    Returns:
        `Ranks`: `image_to_text` [I] and `text_to_image` [T], float64 on the CPU.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.evaluation.retrieval import ranks

    >>> ranks(torch.eye(3), torch.ones(3, 3)).image_to_text
    tensor([2., 2., 2.], dtype=torch.float64)
    ```
    """
    owners = _check(image_embeds, text_embeds, text_to_image, ())
    return Ranks(*(found.ranks() for found in _both_ranks(image_embeds, text_embeds, owners, block_size)))


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: Sequence[int] | torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    block_size: int = BLOCK_SIZE,
) -> dict[str, float]:
    """
    Computes recall at k like [`recalls`], the median rank, and a confidence interval of R@1.

    The interval is a 95 % percentile bootstrap (Efron and Tibshirani, 1993, section 13.3). Images are drawn with
    replacement, each with all its texts, because the texts of one image are not independent samples. The set of
    candidates does not change.

    Arguments not listed here and errors are those of [`recalls`].

    Args:
        bootstrap (`int`, *optional*, defaults to 1000): Number of bootstrap samples; 0 for no interval.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap samples.

    Returns:
        `dict[str, float]`: For each direction, `image_to_text` and `text_to_image`: `..._r1` and so on for each k,
        from 0 to 1; `..._median_rank`, from 1; and, if `ks` contains 1, `..._r1_low` and `..._r1_high`.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.evaluation.retrieval import retrieval_metrics

    >>> metrics = retrieval_metrics(torch.eye(3), torch.eye(3)[[0, 1, 1]], ks=[1])
    >>> metrics["text_to_image_r1"], metrics["text_to_image_median_rank"]
    (0.6666666666666666, 1.0)
    ```
    """
    owners = _check(image_embeds, text_embeds, text_to_image, ks)
    both = _both_ranks(image_embeds, text_embeds, owners, block_size)
    results = _recalls(both, ks)
    for direction, found in zip(DIRECTIONS, both, strict=True):
        results[f"{direction}_median_rank"] = float(np.median(found.ranks().numpy()))
    if bootstrap and 1 in ks:
        image_hits, text_hits = (found.hits(1).numpy() for found in both)
        intervals = _bootstrap_intervals(image_hits, text_hits, owners.cpu().numpy(), bootstrap, seed)
        for direction, (low, high) in zip(DIRECTIONS, intervals, strict=True):
            results[f"{direction}_r1_low"], results[f"{direction}_r1_high"] = low, high
    return results


def find_ranks(
    query_embeds: torch.Tensor,
    candidate_embeds: torch.Tensor,
    positives: Sequence[Sequence[int]],
    block_size: int = BLOCK_SIZE,
) -> TiedRanks:
    """
    Finds the rank of the best right candidate of each query. A query may have several right candidates.

    Args:
        query_embeds (`torch.Tensor`): Embeddings of the queries, [N, dim], on any device.
        candidate_embeds (`torch.Tensor`): Embeddings of the candidates, [M, dim], on the same device.
        positives (`Sequence[Sequence[int]]`): Indices of the right candidates of each query, one or more.
        block_size (`int`, *optional*, defaults to 1024): Number of queries and candidates in a block of similarities.

    Returns:
        `TiedRanks`: The ranks. The mean of `hits(k)` is the recall, the median of `ranks()` the median rank.

    Raises:
        `ValueError`: If shapes do not match or are empty, if an embedding contains NaN or infinity, or if a query has
            no positive or an invalid index.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.evaluation.retrieval import find_ranks

    >>> find_ranks(torch.eye(2), torch.eye(2), [[0], [0, 1]]).hits(1)
    tensor([1., 1.], dtype=torch.float64)
    ```
    """
    _check_embeddings({"query_embeds": query_embeds, "candidate_embeds": candidate_embeds})
    rows, columns = [], []
    for query, (own, _) in enumerate(zip(positives, query_embeds, strict=True)):
        distinct = sorted({int(candidate) for candidate in own})
        if not distinct or distinct[0] < 0 or distinct[-1] >= len(candidate_embeds):
            raise ValueError(
                f"`positives[{query}]` is {distinct}. Pass one or more indices from 0 to {len(candidate_embeds) - 1}."
            )
        rows += [query] * len(distinct)
        columns += distinct
    pairs = torch.tensor([rows, columns], device=query_embeds.device)
    return _tied_ranks(query_embeds, candidate_embeds, pairs, block_size)[0]


def accuracies(
    scores: torch.Tensor,
    labels: Sequence[int] | torch.Tensor,
    ks: Sequence[int] = (1, 5),
    *,
    tolerance: float = TIE_TOLERANCE,
) -> dict[str, float]:
    """
    Computes the top-k accuracy: the share of rows with the label among the k classes with the highest scores. Classes
    with tied scores are ordered at random, and the result is the expected accuracy: k/C for constant scores.

    Args:
        scores (`torch.Tensor`): [N, C] similarities or logits, on any device. Higher means more likely.
        labels (`Sequence[int]`): Right class of each row, [N].
        ks (`Sequence[int]`, *optional*, defaults to `(1, 5)`): Values of k.
        tolerance (`float`, *optional*, defaults to 1e-6): Relative tolerance of ties. Scores tie with the label's
            score if they differ by less than this share of it, or of the row's highest score if that is larger. Pass 0
            for probabilities, where small differences are meaningful.

    Returns:
        `dict[str, float]`: `accuracy_top1` and so on for each k, and `mean_per_class_recall`, the top-1 accuracy of
        each class averaged over the classes that have rows. All are from 0 to 1.

    Raises:
        `ValueError`: If shapes do not match or are empty, if scores contain NaN or infinity, if a label is not a
            class, if a k is below 1, or if `tolerance` is negative.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.evaluation.retrieval import accuracies

    >>> accuracies(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), [0, 1], ks=[1])
    {'accuracy_top1': 0.5, 'mean_per_class_recall': 0.5}
    ```
    """
    if scores.dim() != 2 or 0 in scores.shape:
        raise ValueError(f"`scores` has shape {list(scores.shape)}. Pass shape [N, C], with one row for each image.")
    if tolerance < 0:
        raise ValueError(f"`tolerance` is {tolerance}. Pass 0 or more.")
    check_positive("ks", *ks)
    labels = _as_indices("labels", labels, len(scores), scores.shape[1], "class", scores.device)
    _check_finite("scores", scores)
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    own = scores.gather(1, labels[:, None])
    margin = tolerance * torch.maximum(own.abs(), scores.amax(1, keepdim=True).abs())
    better = (scores > own + margin).sum(1)
    tied = (scores >= own - margin).sum(1) - better
    found = TiedRanks(better, tied, torch.ones_like(tied))
    results = {f"accuracy_top{k}": found.hits(k).mean().item() for k in ks}
    classes = labels.cpu()
    number = classes.bincount()
    per_class = classes.bincount(found.hits(1)) / number
    results["mean_per_class_recall"] = per_class[number > 0].mean().item()
    return results


def telling_metrics(metrics: Mapping[str, float], protocol: Mapping[str, Any]) -> dict[str, float]:
    """
    Drops recall and accuracy at k > 1 if there are at most k candidates, because the value is always 1.

    Args:
        metrics (`Mapping[str, float]`): Metrics by name.
        protocol (`Mapping[str, Any]`): Protocol with `num_images`, and `num_texts` or `num_classes`.

    Returns:
        `dict[str, float]`: The other metrics.
    """

    def is_informative(name: str) -> bool:
        match = TOP.fullmatch(name)
        candidates = None if match is None else protocol.get(CANDIDATES[match[1]])
        return match is None or candidates is None or int(match[2]) == 1 or int(match[2]) < candidates

    return {name: value for name, value in metrics.items() if is_informative(name)}


def _recalls(both: Sequence[TiedRanks], ks: Sequence[int]) -> dict[str, float]:
    return {
        f"{direction}_r{k}": found.hits(k).mean().item()
        for k in ks
        for direction, found in zip(DIRECTIONS, both, strict=True)
    }


def _bootstrap_intervals(
    image_hits: np.ndarray, text_hits: np.ndarray, text_to_image: np.ndarray, draws: int, seed: int
) -> list[list[float]]:
    """
    Returns the 2.5th and 97.5th percentiles of the mean of `image_hits` [I] and of `text_hits` [T], over `draws`
    samples of I images with replacement. An image is drawn with all its texts.
    """
    number_of_images = len(image_hits)
    # [3, I]: for each image its own hit, the sum of the hits of its texts, and the number of its texts
    sums = np.stack([image_hits, *(np.bincount(text_to_image, weights) for weights in (text_hits, None))])
    generator = np.random.default_rng(seed)
    means = np.empty((2, draws))
    for draw in range(draws):
        drawn = generator.integers(number_of_images, size=number_of_images)
        image_sum, text_sum, texts = sums @ np.bincount(drawn, minlength=number_of_images)
        means[:, draw] = image_sum / number_of_images, text_sum / texts
    return np.quantile(means, [0.025, 0.975], axis=1).T.tolist()


def _both_ranks(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_to_image: torch.Tensor, block_size: int
) -> list[TiedRanks]:
    """Returns the ranks of each image's best text among all texts, and of each text's image among all images."""
    pairs = torch.stack([text_to_image, torch.arange(len(text_to_image), device=text_to_image.device)])
    return _tied_ranks(image_embeds, text_embeds, pairs, block_size)


def _tied_ranks(
    query_embeds: torch.Tensor, candidate_embeds: torch.Tensor, pairs: torch.Tensor, block_size: int
) -> list[TiedRanks]:
    """
    Returns the ranks of the queries' positives among the candidates and of the candidates' positives among the
    queries. Each block of similarities is used for both directions. `pairs` [2, P] contains the indices of the queries
    and of their positives.

    Positives are masked in the blocks and compared separately: the same similarity, computed by a block product and
    by a single dot product, differs in the last digits.
    """
    sides = _normalized(query_embeds), _normalized(candidate_embeds)
    with _full_precision(query_embeds.device.type):
        similarities = torch.cat(
            [(sides[0][part[0]] * sides[1][part[1]]).sum(1) for part in pairs.split(block_size, dim=1)]
        )
        best = [
            similarities.new_full((len(embeds),), -torch.inf).scatter_reduce_(0, end, similarities, "amax")
            for end, embeds in zip(pairs, sides, strict=True)
        ]
        counts = [torch.zeros(2, len(embeds), dtype=torch.int64, device=embeds.device) for embeds in sides]
        # Reuse one buffer for all blocks, because allocation takes longer than the computation.
        memory = similarities.new_empty(2, *(min(block_size, len(embeds)) for embeds in sides)).flatten(1)
        for row in range(0, len(sides[0]), block_size):
            for column in range(0, len(sides[1]), block_size):
                queries, candidates = sides[0][row : row + block_size], sides[1][column : column + block_size]
                shape = (len(queries), len(candidates))
                block, scratch = (part[: shape[0] * shape[1]].view(shape) for part in memory)
                torch.mm(queries, candidates.t(), out=block)
                local = pairs - pairs.new_tensor([[row], [column]])
                local = local[:, ((local >= 0) & (local < pairs.new_tensor(shape)[:, None])).all(0)]
                block[local[0], local[1]] = -torch.inf
                for side, first in enumerate((row, column)):
                    own = slice(first, first + shape[side])
                    matches = best[side][own].unsqueeze(1 - side)
                    # float32 counts exactly up to 2**24, and torch sums it much faster than booleans
                    above = torch.gt(block, matches + TIE_TOLERANCE, out=scratch).sum(1 - side).long()
                    at_least = torch.ge(block, matches - TIE_TOLERANCE, out=scratch).sum(1 - side).long()
                    counts[side][:, own] += torch.stack([above, at_least - above])
    found = []
    for end, matches, (better, tied) in zip(pairs, best, counts, strict=True):
        is_tied = similarities >= matches[end] - TIE_TOLERANCE
        positives = end.new_zeros(len(matches)).index_add_(0, end, is_tied.long())
        found.append(TiedRanks(better, tied + positives, positives))
    return found


def _normalized(embeds: torch.Tensor) -> torch.Tensor:
    """Normalises embeddings to length 1, in float32 or better; zeros stay zeros."""
    return F.normalize(embeds.detach().to(torch.promote_types(embeds.dtype, torch.float32)), dim=1)


def _check(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: Sequence[int] | torch.Tensor | None,
    ks: Sequence[int],
) -> torch.Tensor:
    """Checks the arguments and returns the index of each text's image, [T]."""
    check_positive("ks", *ks)
    _check_embeddings({"image_embeds": image_embeds, "text_embeds": text_embeds})
    number_of_images, number_of_texts = len(image_embeds), len(text_embeds)
    given = range(number_of_texts) if text_to_image is None else text_to_image
    owners = _as_indices("text_to_image", given, number_of_texts, number_of_images, "image", image_embeds.device)
    without = (owners.bincount(minlength=number_of_images) == 0).nonzero()
    if len(without):
        raise ValueError(
            f"`text_to_image` leaves {len(without)} of {number_of_images} images without a text; the first is image "
            f"{int(without[0])}. Remove these images."
        )
    return owners


def _as_indices(
    name: str, indices: Sequence[int] | torch.Tensor, length: int, number: int, what: str, device: torch.device
) -> torch.Tensor:
    """Returns `indices` as int64 [length] after checking that each is from 0 to `number` - 1."""
    tensor = torch.as_tensor(indices, device=device)
    if tensor.shape != (length,) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"`{name}` has dtype {tensor.dtype} and shape {list(tensor.shape)}. Pass {length} integers, the index of "
            f"the {what} for each."
        )
    wrong = ((tensor < 0) | (tensor >= number)).nonzero()
    if len(wrong):
        item = int(wrong[0])
        raise ValueError(
            f"`{name}[{item}]` is {int(tensor[item])}. Pass the index of the {what}, from 0 to {number - 1}."
        )
    return tensor.long()


def _check_embeddings(embeds: dict[str, torch.Tensor]) -> None:
    (name, one), (other_name, other) = embeds.items()
    if not (one.dim() == other.dim() == 2 and one.shape[1] == other.shape[1]) or 0 in (*one.shape, *other.shape):
        raise ValueError(
            f"`{name}` and `{other_name}` have shapes {list(one.shape)} and {list(other.shape)}. Pass [N, dim] for "
            "each, not empty and with the same dim."
        )
    for own_name, own in embeds.items():
        _check_finite(own_name, own)


def check_positive(name: str, *values: int) -> None:
    """Raises a `ValueError` if a value is not an integer of 1 or more."""
    for value in values:
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` contains {value}. Pass integers of 1 or more.")


def _check_finite(name: str, embeds: torch.Tensor) -> None:
    if not torch.stack(embeds.aminmax()).isfinite().all():
        row = int(embeds.isfinite().all(1).int().argmin())
        raise ValueError(f"`{name}` contains NaN or infinity, first in row {row} of {len(embeds)}. Remove such rows.")


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Turns off autocast, TF32 and bfloat16 products within the context."""
    has_backends = hasattr(torch.backends, "fp32_precision")  # torch 2.9 or newer, which rejects the old setting
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if has_backends else ()
    precisions = [backend.fp32_precision for backend in backends]
    precision = None if has_backends else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if precision is not None:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, own in zip(backends, precisions, strict=True):
            backend.fp32_precision = own
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
