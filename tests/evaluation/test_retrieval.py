"""Retrieval: exact against independent formulations whatever the blocks, fair to ties, no number for broken input."""

import doctest
import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import torchmetrics
from datasets import Dataset
from torch.nn import functional as F

from lotlip_hf.evaluation.retrieval import (
    DIRECTIONS,
    TiedRanks,
    accuracies,
    find_ranks,
    ranks,
    recalls,
    retrieval_metrics,
)

KS = (1, 2, 5, 10)


def cosines(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).t()


def brute_force(
    images: torch.Tensor, texts: torch.Tensor, k: int, owners: torch.Tensor | None = None
) -> dict[str, float]:
    """Recall at k of embeddings without ties, by sorting the whole matrix of similarities in float64."""
    owners = torch.arange(len(texts)) if owners is None else owners
    is_pair = torch.arange(len(images))[:, None] == owners
    similarities = cosines(images, texts)
    results = {}
    for direction, queries, own in zip(
        DIRECTIONS, (similarities, similarities.t()), (is_pair, is_pair.t()), strict=True
    ):
        nearest = queries.argsort(dim=1, descending=True)[:, :k]
        results[f"{direction}_r{k}"] = own.gather(1, nearest).any(1).double().mean().item()
    return results


def over_all_orders(scores: torch.Tensor, is_positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What sorting gives, averaged over every order that the few candidates can come in: the expected hits [N, M] at 1 to
    M, and the expected rank [N] of the first positive. `scores` and `is_positive` are [N, M].
    """
    orders = torch.tensor(list(itertools.permutations(range(scores.shape[1]))))
    in_order_of_scores = scores[:, orders].argsort(dim=-1, descending=True, stable=True)  # [N, orders, M]
    in_order = is_positive[:, orders].gather(-1, in_order_of_scores)
    hits = in_order.cumsum(-1).clamp(max=1).double().mean(1)
    return hits, (in_order.int().argmax(-1) + 1).double().mean(1)


def noisy_pairs(number: int, dim: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(number, dim)
    return images, images + noise * torch.randn(number, dim)


def captioned(number: int, captions: int, dim: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with several captions each, in no order."""
    images = torch.randn(number, dim)
    owners = torch.arange(number).repeat(captions)[torch.randperm(number * captions)]
    return images, images[owners] + noise * torch.randn(len(owners), dim), owners


@pytest.mark.parametrize("block_size", [1, 7, 64, 301, 4096])
@pytest.mark.parametrize("noise", [0.3, 1.5, 30.0])
def test_agrees_with_brute_force(block_size, noise):
    images, texts = noisy_pairs(301 if block_size > 7 else 30, 16, noise)
    results = recalls(images, texts, block_size=block_size)
    assert list(results) == [f"{direction}_r{k}" for k in (1, 5, 10) for direction in DIRECTIONS]
    for k in (1, 5, 10):
        for name, value in brute_force(images, texts, k).items():
            assert results[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("block_size", [17, 50, 4096])
def test_several_captions_an_image_agree_with_brute_force(block_size):
    images, texts, owners = captioned(60, 5, 16, 2.0)
    owners[7] = owners[8]  # not all have as many
    results = recalls(images, texts, owners.tolist(), ks=KS, block_size=block_size)
    expected = {}
    for k in KS:
        expected |= brute_force(images, texts, k, owners)
    assert results == pytest.approx(expected, abs=1e-12)
    similarities = cosines(images, texts)
    found = ranks(images, texts, owners, block_size=block_size)
    of_pairs = similarities[owners, torch.arange(len(texts))]
    assert torch.equal(found.text_to_image, (similarities > of_pairs).sum(0) + 1.0)
    best = torch.full((60,), -torch.inf).double().scatter_reduce(0, owners, of_pairs, "amax")
    assert torch.equal(found.image_to_text, (similarities > best[:, None]).sum(1) + 1.0)


def test_any_positives_agree_with_torchmetrics():
    queries, candidates = torch.randn(40, 8), torch.randn(70, 8)
    is_positive = torch.rand(40, 70) < 0.05
    is_positive[torch.arange(40), torch.randint(0, 70, (40,))] = True
    positives = [row.nonzero().flatten().tolist() for row in is_positive]
    found = find_ranks(queries, candidates, positives, block_size=16)
    numbers = torch.arange(40)[:, None].expand(40, 70)
    scores = cosines(queries, candidates) + 2  # torchmetrics takes a score of 0 or less for a candidate not retrieved
    for k in KS:
        metric = torchmetrics.retrieval.RetrievalHitRate(top_k=k)
        expected = metric(scores.flatten(), is_positive.flatten(), numbers.flatten())
        assert found.hits(k).mean().item() == pytest.approx(expected.item(), abs=1e-6), k  # 1/40 for one more hit
    reciprocal = torchmetrics.retrieval.RetrievalMRR()
    expected = reciprocal(scores.flatten(), is_positive.flatten(), numbers.flatten())
    assert (1 / found.ranks()).mean().item() == pytest.approx(expected.item(), abs=1e-6)


def test_one_direction_is_half_of_both():
    images, texts, owners = captioned(30, 3, 8, 2.0)
    texts = texts.sign()  # with ties
    of_image = [(owners == image).nonzero().flatten().tolist() for image in range(30)]
    found = ranks(images, texts, owners)
    assert torch.equal(find_ranks(images, texts, of_image).ranks(), found.image_to_text)
    assert torch.equal(find_ranks(texts, images, owners[:, None].tolist()).ranks(), found.text_to_image)
    # a positive named twice is one
    assert torch.equal(find_ranks(images, texts, [own * 2 for own in of_image]).ranks(), found.image_to_text)


def test_directions_are_told_apart():
    # every image is nearest to text 0, which is nearest to image 0; each other text is nearest to its own image
    images = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.8, 0.0, 0.6]])
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    expected = {"image_to_text_r1": 1 / 3, "text_to_image_r1": 1.0}
    assert recalls(images, texts, ks=[1]) == pytest.approx(expected, abs=1e-12)
    swapped = {"image_to_text_r1": 1.0, "text_to_image_r1": 1 / 3}
    assert recalls(texts, images, ks=[1]) == pytest.approx(swapped, abs=1e-12)


@pytest.mark.parametrize("constant", ["images", "texts", "both"])
@pytest.mark.parametrize(("captions", "block_size"), [(1, 30), (5, 30), (5, 4096)])
def test_constant_embeddings_score_chance(constant, captions, block_size):
    number, dim = 97, 67  # odd, so that blocks end in the middle of a vector instruction
    images, texts, owners = captioned(number, captions, dim, 0.1)
    if constant in ("images", "both"):
        images = images[:1].expand(number, -1)
    if constant in ("texts", "both"):
        texts = texts[:1].expand(len(texts), -1)
    results = recalls(images, texts, owners, ks=(1, 5, 10, 97, 1000), block_size=block_size)
    for k in (1, 5, 10, 97, 1000):
        assert results[f"text_to_image_r{k}"] == pytest.approx(min(k / number, 1), abs=1e-12)
        drawn = min(k, len(texts))
        if constant == "images":  # every image has the same k nearest texts
            nearest = cosines(images[:1], texts)[0].argsort(descending=True)[:drawn]
            expected = len(owners[nearest].unique()) / number
        else:  # k texts at random
            expected = 1 - math.comb(len(texts) - captions, drawn) / math.comb(len(texts), drawn)
        assert results[f"image_to_text_r{k}"] == pytest.approx(expected, abs=1e-12)


def test_shared_captions_are_shared_fairly():
    # as the held-out Scenes' short captions: groups of four images with one caption, all of them told apart perfectly
    images = torch.eye(25).repeat_interleave(4, 0)
    texts = images + 1e-8 * torch.randn(100, 25)  # what another padding does
    results = recalls(images, texts, ks=(1, 3, 4), block_size=13)
    for direction in DIRECTIONS:
        assert results[f"{direction}_r1"] == pytest.approx(0.25, abs=1e-12)
        assert results[f"{direction}_r3"] == pytest.approx(0.75, abs=1e-12)
        assert results[f"{direction}_r4"] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("block_size", [2, 64])
def test_ties_agree_with_all_orders(block_size):
    # few values in few dimensions: groups of candidates that are tied with, before and behind the match
    for _ in range(10):
        images, texts = (torch.randint(-1, 2, (6, 2)).float() for _ in range(2))
        owners = torch.cat([torch.arange(3), torch.randint(0, 3, (3,))])
        similarities = cosines(images[:3], texts).round(decimals=9)
        is_pair = torch.arange(3)[:, None] == owners
        found = ranks(images[:3], texts, owners, block_size=block_size)
        expected = {}
        for direction, scores, own in zip(
            DIRECTIONS, (similarities, similarities.t()), (is_pair, is_pair.t()), strict=True
        ):
            hits, expected_ranks = over_all_orders(scores, own)
            torch.testing.assert_close(getattr(found, direction), expected_ranks, rtol=0, atol=1e-12)
            for k in range(1, scores.shape[1] + 1):
                expected[f"{direction}_r{k}"] = hits[:, k - 1].mean().item()
        results = recalls(images[:3], texts, owners, ks=range(1, 7), block_size=block_size)
        assert {name: results[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_hits_of_large_groups_are_exact():
    cases = [(b, t, p) for b in (0, 1, 7, 10, 50) for t in (1, 2, 30, 1000, 10**6) for p in (1, 2, 5, 29) if p <= t]
    found = TiedRanks(*torch.tensor(cases).t())
    for k in (1, 2, 10, 100, 2000):
        expected = []
        for better, tied, positives in cases:
            drawn = min(max(k - better, 0), tied)
            missed = Fraction(math.comb(tied - positives, drawn), math.comb(tied, drawn))
            expected.append(float(1 - missed))
        assert found.hits(k).tolist() == pytest.approx(expected, abs=1e-12), k
    expected = [float(better + Fraction(tied + 1, positives + 1)) for better, tied, positives in cases]
    assert found.ranks().tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    images, texts = noisy_pairs(60, 16, 1.0)
    images, texts = images.to(dtype), texts.to(dtype)
    expected = {**brute_force(images, texts, 1), **brute_force(images, texts, 5)}
    assert recalls(images, texts, ks=(1, 5)) == pytest.approx(expected, abs=1e-12)
    scaled = recalls(images.float() * torch.rand(60, 1).exp(), 1e-3 * texts.float(), ks=(1, 5))  # lengths count not
    assert scaled == pytest.approx(expected, abs=1e-12)
    mixed = recalls(images.float(), texts.bfloat16(), ks=(1, 5))
    assert mixed == recalls(images.float(), texts.bfloat16().float(), ks=(1, 5))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_on_an_accelerator():
    device = torch.accelerator.current_accelerator()
    images, texts = noisy_pairs(3000, 64, 3.0)
    on_device = recalls(images.to(device), texts.to(device), block_size=1000)
    assert on_device == pytest.approx(recalls(images, texts), abs=1e-12)
    constant = recalls(images[:1].to(device).expand(3000, -1), texts.to(device), ks=[1], block_size=999)
    assert constant["image_to_text_r1"] == pytest.approx(1 / 3000, abs=1e-12)


def test_precision_is_not_the_callers():
    # neighbours that bfloat16, with its 8 bits, cannot tell apart
    angles = torch.arange(200) * 0.004
    images = torch.stack([angles.cos(), angles.sin()], dim=1).repeat(1, 16)
    exact = recalls(images, images, ks=[1])
    assert exact == pytest.approx({"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}, abs=1e-12)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert recalls(images, images, ks=[1]) == exact
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["image_embeds", "text_embeds"])
def test_broken_embeddings_are_refused(name, value):
    embeds = dict(zip(("image_embeds", "text_embeds"), noisy_pairs(9, 4, 0.5), strict=True))
    embeds[name][7, 2] = value
    with pytest.raises(ValueError, match=f"`{name}`.*row 7"):
        recalls(**embeds, block_size=4)


@pytest.mark.parametrize(("images", "texts"), [((4, 3), (4, 2)), ((4, 2, 3), (4, 2, 3)), ((0, 3), (0, 3))])
def test_shapes_are_checked(images, texts):
    with pytest.raises(ValueError, match=r"\[N, dim\]"):
        recalls(torch.ones(images), torch.ones(texts))


def test_numbers_are_checked():
    with pytest.raises(ValueError, match="ks"):
        recalls(torch.eye(3), torch.eye(3), ks=[1, 0])


def test_near_ties_are_ties():
    # one candidate 1e-7 nearer than the match, as rounding leaves equal ones; and one 1e-4 nearer, which is another
    def at(cosine: float) -> list[float]:
        return [cosine, math.sqrt(1 - cosine**2)]

    image = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for nearer, expected in ((1e-7, 1.5), (1e-4, 2.0), (-1e-7, 1.5), (-1e-4, 1.0)):
        texts = torch.tensor([at(0.5), at(0.5 + nearer)], dtype=torch.float64)
        assert find_ranks(image, texts, [[0]]).ranks().item() == pytest.approx(expected, abs=1e-12)


def test_one_candidate():
    assert recalls(torch.ones(1, 3), -torch.ones(1, 3), ks=[1, 5]) == dict.fromkeys(
        [f"{direction}_r{k}" for k in (1, 5) for direction in DIRECTIONS], 1.0
    )
    assert recalls(torch.ones(1, 3), torch.randn(4, 3), [0] * 4, ks=[1])["text_to_image_r1"] == 1.0


@pytest.mark.parametrize(
    "text_to_image", [None, [0, 1, 2], [0, 1, 2, 3], [0, -1, 2, 1], [0, 0, 2, 2], [0.0, 1.0, 2.0, 2.0]]
)
@pytest.mark.parametrize("function", [recalls, ranks, retrieval_metrics])
def test_text_to_image_is_checked(function, text_to_image):
    with pytest.raises(ValueError, match="text_to_image"):
        function(torch.randn(3, 2), torch.randn(4, 2), text_to_image)


@pytest.mark.parametrize("positives", [[[0], []], [[0], [1, 3]], [[-1, 1], [1]]])
def test_positives_are_checked(positives):
    with pytest.raises(ValueError, match="positives"):
        find_ranks(torch.randn(2, 2), torch.randn(3, 2), positives)


class TestMetrics:
    """`retrieval_metrics`."""

    def test_it_holds_recalls_ranks_and_intervals(self):
        images, texts, owners = captioned(50, 3, 8, 1.5)
        metrics = retrieval_metrics(images, texts, owners, block_size=16)
        names = [f"r{k}" for k in (1, 5, 10)] + ["median_rank", "r1_low", "r1_high"]
        assert set(metrics) == {f"{direction}_{name}" for direction in DIRECTIONS for name in names}
        assert all(type(value) is float for value in metrics.values())
        found = ranks(images, texts, owners)
        for name, value in recalls(images, texts, owners).items():
            assert metrics[name] == value
        for direction in DIRECTIONS:
            own = metrics[f"{direction}_r1"]
            assert metrics[f"{direction}_r1_low"] < own < metrics[f"{direction}_r1_high"]
            assert metrics[f"{direction}_median_rank"] == np.median(getattr(found, direction))
        without = retrieval_metrics(images, texts, owners, ks=[5], bootstrap=0)
        assert set(without) == {f"{direction}_{name}" for direction in DIRECTIONS for name in ("r5", "median_rank")}
        assert without["image_to_text_r5"] == metrics["image_to_text_r5"]

    def test_the_median_of_an_even_number_lies_between(self):
        # the right text of image 0 comes first, that of image 1 second
        images, texts = torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([[1.0, 0.05], [0.0, 1.0]])
        assert retrieval_metrics(images, texts)["image_to_text_median_rank"] == 1.5

    def test_draws_are_repeated_by_their_seed(self):
        images, texts, owners = captioned(30, 2, 8, 2.0)
        metrics = retrieval_metrics(images, texts, owners, seed=5)
        assert retrieval_metrics(images, texts, owners, seed=5, block_size=7) == metrics
        assert retrieval_metrics(images, texts, owners, seed=6) != metrics

    def test_intervals_agree_with_scipy(self):
        images, texts, owners = captioned(80, 5, 8, 2.5)
        metrics = retrieval_metrics(images, texts, owners, bootstrap=4000)
        found = ranks(images, texts, owners)
        of_texts = np.array([(found.text_to_image[owners == image] == 1).double().mean() for image in range(80)])
        of_images = (found.image_to_text == 1).double().numpy()
        for direction, hits in zip(DIRECTIONS, (of_images, of_texts), strict=True):
            low, high = scipy.stats.bootstrap(
                (hits,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
            ).confidence_interval
            assert metrics[f"{direction}_r1_low"] == pytest.approx(low, abs=0.015)
            assert metrics[f"{direction}_r1_high"] == pytest.approx(high, abs=0.015)

    def test_the_captions_of_an_image_stay_together(self):
        # half of the images find all of their texts, and are found by them; the others never
        images = torch.eye(40)
        owners = torch.arange(40).repeat_interleave(25)
        texts = images[(owners + (owners % 2) * 20) % 40]
        metrics = retrieval_metrics(images, texts, owners)
        assert metrics["text_to_image_r1"] == 0.5
        # 40 images: half of the interval is 1.96 * sqrt(0.25 / 40); of 1000 texts on their own it were 0.031
        assert metrics["text_to_image_r1_high"] - 0.5 == pytest.approx(0.155, abs=0.025)
        assert 0.5 - metrics["text_to_image_r1_low"] == pytest.approx(0.155, abs=0.025)

    def test_intervals_of_unequal_captions_weigh_them(self):
        # image 0 has a text that finds it, image 1 has three that do not: 0, 1/4 or 1 of the texts drawn
        images, texts, owners = torch.eye(2), torch.eye(2)[[0, 0, 0, 0]], [0, 1, 1, 1]
        metrics = retrieval_metrics(images, texts, owners)
        assert metrics["text_to_image_r1"] == 0.25
        assert (metrics["text_to_image_r1_low"], metrics["text_to_image_r1_high"]) == (0.0, 1.0)


class TestAccuracies:
    """`accuracies`."""

    def adversarial(self):
        """Scores [N, 4] of many kinds, with a label each."""
        near = torch.tensor([[0.5, 0.5 + 1e-8, 0.2, 0.9]])
        rows = [
            torch.randn(40, 4),
            torch.randint(-1, 2, (60, 4)).float(),
            torch.zeros(5, 4),
            torch.full((5, 4), -3.0),
            torch.randn(10, 4).to(torch.bfloat16).float(),
            1e30 * torch.randn(5, 4),
            1e-30 * torch.randn(5, 4),
            near.expand(5, 4),
        ]
        scores = torch.cat(rows)
        return scores, torch.arange(len(scores)) % 4

    def test_agrees_with_sklearn_over_all_orders_of_the_classes(self):
        scores, labels = self.adversarial()
        scores[-5:] = scores[-5:].round(decimals=6)  # sklearn knows no near ties
        results = accuracies(scores, labels, ks=(1, 2, 3))
        orders = [list(order) for order in itertools.permutations(range(4))]
        for k in (1, 2, 3):
            expected = [
                sklearn.metrics.top_k_accuracy_score(
                    np.argsort(order)[labels], scores[:, order].numpy(), k=k, labels=range(4)
                )
                for order in orders
            ]
            assert results[f"accuracy_top{k}"] == pytest.approx(np.mean(expected), abs=1e-9), k
        expected = []
        for order in orders:
            predicted = np.array(order)[scores[:, order].numpy().argmax(1)]
            expected.append(sklearn.metrics.balanced_accuracy_score(labels, predicted))
        assert results["mean_per_class_recall"] == pytest.approx(np.mean(expected), abs=1e-9)

    def test_agrees_with_torchmetrics(self):
        scores, labels = torch.randn(300, 12), torch.cat([torch.arange(12), torch.randint(0, 12, (288,))])
        scores[torch.arange(300), labels] += 1
        results = accuracies(scores, labels, ks=(1, 3, 5))
        for k in (1, 3, 5):
            metric = torchmetrics.classification.MulticlassAccuracy(num_classes=12, top_k=k, average="micro")
            assert results[f"accuracy_top{k}"] == pytest.approx(metric(scores, labels).item(), abs=1e-6)
        per_class = torchmetrics.classification.MulticlassAccuracy(num_classes=12, average="macro")
        assert results["mean_per_class_recall"] == pytest.approx(per_class(scores, labels).item(), abs=1e-6)

    def test_near_ties_are_ties_at_any_scale(self):
        scores = torch.tensor([[0.3, 0.3 + 1e-7, 0.1], [0.3, 0.301, 0.1]], dtype=torch.float64)
        for scale in (1e-20, 1, 100, 1e20):
            assert accuracies(scale * scores, [0, 0], ks=[1])["accuracy_top1"] == pytest.approx(0.25, abs=1e-12)
        assert accuracies(scores, [0, 0], ks=[1], tolerance=0)["accuracy_top1"] == 0
        # the small values of a confident softmax are not equal
        probabilities = torch.tensor([[1 - 1e-7, 3e-8, 7e-8]], dtype=torch.float64)
        assert accuracies(probabilities, [2], ks=[2], tolerance=0)["accuracy_top2"] == 1

    def test_classes_weigh_the_same_in_the_mean_over_them(self):
        # class 0: two of three found; class 2: none of one; class 1 has no rows
        scores = torch.eye(3)[[0, 0, 1, 1]]
        results = accuracies(scores, [0, 0, 0, 2], ks=[1])
        assert results == pytest.approx({"accuracy_top1": 1 / 2, "mean_per_class_recall": 1 / 3}, abs=1e-12)

    @pytest.mark.parametrize(
        ("scores", "labels", "options", "word"),
        [
            (torch.ones(3), [0, 0, 0], {}, "scores"),
            (torch.ones(0, 3), [], {}, "scores"),
            (torch.ones(2, 3), [0], {}, "labels"),
            (torch.ones(2, 3), [0, 3], {}, "labels"),
            (torch.tensor([[0.0, math.nan]]), [0], {}, "scores"),
            (torch.ones(2, 3), [0, 1], {"ks": [0]}, "ks"),
            (torch.ones(2, 3), [0, 1], {"tolerance": -1e-6}, "tolerance"),
        ],
    )
    def test_arguments_are_checked(self, scores, labels, options, word):
        with pytest.raises(ValueError, match=word):
            accuracies(scores, labels, **options)


@pytest.mark.parametrize("function", [recalls, ranks, retrieval_metrics, find_ranks, accuracies])
def test_the_example_runs(function):
    text = function.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, function.__name__, None, None)
    assert len(example.examples) >= 3
    assert doctest.DocTestRunner().run(example).failed == 0


def test_docs_faiss(tmp_path, monkeypatch, capsys):
    """The FAISS example of `docs/search-images.md`, on files as `lotlip embed` writes them."""
    pytest.importorskip("faiss", reason="needs `pip install faiss-cpu`")
    monkeypatch.chdir(tmp_path)
    images, texts = (F.normalize(embeds, dim=1) for embeds in noisy_pairs(20, 8, 1.0))
    for kind, names, embeds in (("images", "file", images), ("texts", "text", texts)):
        columns = {names: [f"{names} {n}" for n in range(20)], "embedding": list(embeds.numpy())}
        Dataset.from_dict(columns).to_parquet(f"{kind}.parquet")
    page = Path(__file__).parents[2].joinpath("docs/search-images.md").read_text()
    (code,) = (block.split("```")[0] for block in page.split("```python\n") if block.startswith("import faiss"))
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    best = (texts @ images.T).argsort(dim=1, descending=True)[:, :3]
    for n, (line, own) in enumerate(zip(printed, best.tolist(), strict=True)):
        assert line.startswith(f"text {n} {[f'file {k}' for k in own]}")
    assert Path("images.faiss").is_file()
