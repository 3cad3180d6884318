"""
Retrieval between images and texts, by exact search over blocks of similarities: recall at k, ranks, intervals. The
top-k accuracy of class scores is the same count, of the label among the classes.

Candidates as similar as the right one come in random order, and a result is the expected value over all orders, after
McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores"
(ECIR 2008). So a model that gives everything the same embedding scores as guessing does, and captions that several
images share are shared fairly.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

# Images and texts of one block of similarities: 4 MB in float32, which a processor's caches hold.
BLOCK_SIZE = 1024
# Cosine similarities closer than this are ties. Rounding in float32, which differs with the batch and the padding of a
# text, moves them by a few 1e-7.
TIE_TOLERANCE = 1e-6
DIRECTIONS = ("image_to_text", "text_to_image")
# Metrics of the first k candidates, and the protocol's name of the number of candidates
TOP = re.compile(r"(image_to_text_r|text_to_image_r|accuracy_top)(\d+)")
CANDIDATES = {"image_to_text_r": "num_texts", "text_to_image_r": "num_images", "accuracy_top": "num_classes"}


class TiedRanks(NamedTuple):
    """
    The rank of each query's best positive, with its ties, each tensor [N] and int64: it comes after `better`
    candidates, at random among the `tied` ones that are as similar, itself included. `positives` of the tied are
    positives too, itself included.
    """

    better: torch.Tensor
    tied: torch.Tensor
    positives: torch.Tensor

    def hits(self, k: int) -> torch.Tensor:
        """
        The probability that a positive is among the first k candidates, [N] in float64 on the CPU. With b better
        candidates and p positives among t tied ones, k - b of these are drawn: `1 - C(t - p, k - b) / C(t, k - b)`.
        """
        better, tied, positives = (part.cpu().double() for part in self)
        drawn = (k - better).clamp(min=0).minimum(tied)
        # C(t - p, m) / C(t, m) is the product over j < p of (t - m - j) / (t - j), and the same with m and p swapped
        fewer, more = drawn.minimum(positives), drawn.maximum(positives)
        missed = torch.ones_like(better)
        for j in range(int(fewer.max())):
            factor = ((tied - more - j) / (tied - j)).clamp(min=0)
            missed = torch.where(j < fewer, missed * factor, missed)
        return 1 - missed

    def ranks(self) -> torch.Tensor:
        """The expected rank of the first positive, 1 for the first candidate; [N] in float64 on the CPU."""
        better, tied, positives = (part.cpu().double() for part in self)
        return better + (tied + 1) / (positives + 1)


class Ranks(NamedTuple):
    """The expected rank of the best text of each image [I] and of the image of each text [T], float64, 1 the first."""

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
    Recall at k in both directions: the share of images that have one of their texts among the k texts most similar to
    them, and the share of texts that have their image among the k images. Similarity is the cosine, in float32 or
    better.

    Candidates as similar as the best right one come in random order: the result is the expected recall. So a model
    that gives everything the same embedding scores k/N with one text an image, as guessing does, and so do captions
    that several images share.

    Args:
        image_embeds (`torch.Tensor`): [I, dim], on any device.
        text_embeds (`torch.Tensor`): [T, dim], on the same device.
        text_to_image (`Sequence[int]`, *optional*):
            [T] the index of each text's image, from 0 to I - 1; every image has a text. By default text i
            belongs to image i.
        ks (`Sequence[int]`, *optional*, defaults to 1, 5 and 10): numbers of candidates to look at.
        block_size (`int`, *optional*, defaults to 1024): images and texts in a block of similarities.

    Returns:
        `image_to_text_r1`, `text_to_image_r1` and so on for each k, from 0 to 1.

    Raises:
        ValueError: if shapes do not fit or are empty, if an embedding holds NaN or infinity, if `text_to_image` names
            no image or leaves one without text, and on numbers below 1.

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
    The rank at which each image finds the first of its texts, and each text its image, from 1. Among candidates that
    are as similar as the best right one it is the expected rank, so it may lie between two.

    Args:
        image_embeds, text_embeds, text_to_image, block_size: as in [`recalls`].

    Returns:
        `image_to_text` [I] and `text_to_image` [T], float64 on the CPU.

    Raises:
        ValueError: as in [`recalls`].

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
    What a table of retrieval results holds: recall at k as [`recalls`] gives it, the median rank, and how sure R@1 is.

    The interval is the percentile bootstrap's at 95 % (Efron and Tibshirani, 1993, section 13.3): images are drawn
    with replacement, each with all its texts, since the texts of one image are no independent samples. The candidates
    stay all those there are.

    Args:
        image_embeds, text_embeds, text_to_image, ks, block_size: as in [`recalls`].
        bootstrap (`int`, *optional*, defaults to 1000): how often images are drawn; 0 for no interval.
        seed (`int`, *optional*, defaults to 0): of the draws. The same seed gives the same interval.

    Returns:
        For each direction `image_to_text` and `text_to_image`: `..._r1` and so on for each k, from 0 to 1;
        `..._median_rank`, 1 the first; and if `ks` holds 1, `..._r1_low` and `..._r1_high`.

    Raises:
        ValueError: as in [`recalls`].

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
    One direction of retrieval, for any number of right candidates a query: the rank of the best of them.

    Args:
        query_embeds (`torch.Tensor`): [N, dim], on any device.
        candidate_embeds (`torch.Tensor`): [M, dim], on the same device.
        positives (`Sequence[Sequence[int]]`):
            [N] the indices of each query's right candidates, one or more, from 0 to M - 1.
        block_size (`int`, *optional*, defaults to 1024): queries and candidates in a block of similarities.

    Returns:
        [`TiedRanks`]; its `hits(k)` [N] and `ranks()` [N] are what recall and median rank are made of.

    Raises:
        ValueError: if shapes do not fit or are empty, if an embedding holds NaN or infinity, if a query has no
            positive or one that is no candidate.

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
                f"`positives[{query}]` must hold one or more of the {len(candidate_embeds)} candidates, numbered from "
                f"0; got {distinct}."
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
    Accuracy of classification: the share of rows whose label is among the k classes with the highest scores.

    It is the recall of the label among the classes, so ties are counted as there: classes that score the same come in
    random order. Constant scores give k/C.

    Args:
        scores (`torch.Tensor`): [N, C], the higher, the more likely: similarities or logits, on any device.
        labels (`Sequence[int]`): [N] the right class of each row, from 0 to C - 1.
        ks (`Sequence[int]`, *optional*, defaults to 1 and 5): numbers of classes to look at.
        tolerance (`float`, *optional*, defaults to 1e-6):
            Scores closer than this share of the label's or of the row's highest one, whichever is larger, are
            ties: what rounding leaves of equal classes. Take 0 for probabilities, whose small values are apart.

    Returns:
        `accuracy_top1` and so on for each k, and `mean_per_class_recall`, the top-1 accuracy of each class that has
        rows, averaged over these classes. All from 0 to 1.

    Raises:
        ValueError: if shapes do not fit or are empty, if scores hold NaN or infinity, if a label is no class, on
            numbers below 1, and on a negative tolerance.

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.evaluation.retrieval import accuracies

    >>> accuracies(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), [0, 1], ks=[1])
    {'accuracy_top1': 0.5, 'mean_per_class_recall': 0.5}
    ```
    """
    if scores.dim() != 2 or 0 in scores.shape:
        raise ValueError(f"`scores` must have shape [N, C], one row for each image; got {list(scores.shape)}.")
    if tolerance < 0:
        raise ValueError(f"`tolerance` must be at least 0, got {tolerance}.")
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
    Metrics without those that say nothing: a share of right ones among the first k, above 1, of no more than k.

    Args:
        metrics (`Mapping[str, float]`): numbers by name.
        protocol (`Mapping[str, Any]`): with `num_images`, and `num_texts` or `num_classes`.

    Returns:
        The others.
    """

    def tells(name: str) -> bool:
        match = TOP.fullmatch(name)
        candidates = None if match is None else protocol.get(CANDIDATES[match[1]])
        return match is None or candidates is None or int(match[2]) == 1 or int(match[2]) < candidates

    return {name: value for name, value in metrics.items() if tells(name)}


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
    The 2.5th and the 97.5th percentile of the mean of `image_hits` [I], and those of `text_hits` [T], over `draws`
    samples of I images with replacement, each with all its texts.
    """
    number_of_images = len(image_hits)
    # of each image its own hit, those of its texts, and how many these are: [3, I]
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
    """The ranks of the images' texts among the texts, and of the texts' images among the images."""
    pairs = torch.stack([text_to_image, torch.arange(len(text_to_image), device=text_to_image.device)])
    return _tied_ranks(image_embeds, text_embeds, pairs, block_size)


def _tied_ranks(
    query_embeds: torch.Tensor, candidate_embeds: torch.Tensor, pairs: torch.Tensor, block_size: int
) -> list[TiedRanks]:
    """
    The ranks of the queries' positives among the candidates, and those of the candidates' positives among the queries:
    a block of similarities serves both directions. `pairs` [2, P] are the indices of queries and their positives.

    Positives are compared with each other by themselves, and left out of the blocks: a similarity from a product of
    blocks and one from a pair differ in their last digits.
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
        # One memory for all blocks: fetching new memory takes longer than what is done in it.
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
                    # 0 and 1 as floating-point numbers, exact up to 2**24: torch adds them up far faster than booleans
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
    """Embeddings of length 1, in float32 or better; zeros stay zeros."""
    return F.normalize(embeds.detach().to(torch.promote_types(embeds.dtype, torch.float32)), dim=1)


def _check(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: Sequence[int] | torch.Tensor | None,
    ks: Sequence[int],
) -> torch.Tensor:
    """Raises a `ValueError` that names the argument; returns the index of each text's image, [T]."""
    check_positive("ks", *ks)
    _check_embeddings({"image_embeds": image_embeds, "text_embeds": text_embeds})
    number_of_images, number_of_texts = len(image_embeds), len(text_embeds)
    given = range(number_of_texts) if text_to_image is None else text_to_image
    owners = _as_indices("text_to_image", given, number_of_texts, number_of_images, "image", image_embeds.device)
    without = (owners.bincount(minlength=number_of_images) == 0).nonzero()
    if len(without):
        raise ValueError(
            f"`text_to_image` leaves {len(without)} of {number_of_images} images without a text, first image "
            f"{int(without[0])}."
        )
    return owners


def _as_indices(
    name: str, indices: Sequence[int] | torch.Tensor, length: int, number: int, what: str, device: torch.device
) -> torch.Tensor:
    """`indices` as int64 [length], each from 0 to `number` - 1."""
    tensor = torch.as_tensor(indices, device=device)
    if tensor.shape != (length,) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ValueError(
            f"`{name}` must hold {length} whole numbers, the {what} of each; got {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )
    wrong = ((tensor < 0) | (tensor >= number)).nonzero()
    if len(wrong):
        item = int(wrong[0])
        raise ValueError(
            f"`{name}[{item}]` is {int(tensor[item])}, which is no {what}: they are numbered from 0 to {number - 1}."
        )
    return tensor.long()


def _check_embeddings(embeds: dict[str, torch.Tensor]) -> None:
    (name, one), (other_name, other) = embeds.items()
    if not (one.dim() == other.dim() == 2 and one.shape[1] == other.shape[1]) or 0 in (*one.shape, *other.shape):
        raise ValueError(
            f"`{name}` and `{other_name}` must have shape [N, dim] each, with the same dim; got {list(one.shape)} and "
            f"{list(other.shape)}."
        )
    for own_name, own in embeds.items():
        _check_finite(own_name, own)


def check_positive(name: str, *values: int) -> None:
    """Raises a `ValueError` that names the argument if one of the numbers is below 1 or not whole."""
    for value in values:
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` must be at least 1 and whole, got {value}.")


def _check_finite(name: str, embeds: torch.Tensor) -> None:
    if not torch.stack(embeds.aminmax()).isfinite().all():
        row = int(embeds.isfinite().all(1).int().argmin())
        raise ValueError(f"`{name}` hold NaN or infinity, first in row {row} of {len(embeds)}.")


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Neither autocast nor the products in TF32 or bfloat16 that a training run may have allowed."""
    has_backends = hasattr(torch.backends, "fp32_precision")  # torch 2.9; it refuses the older functions after the new
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
