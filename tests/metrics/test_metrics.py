"""The `evaluate` modules: what the functions give, batch by batch, from the class or from the folder, offline."""

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import lotlip_hf.metrics
from lotlip_hf.evaluation.retrieval import accuracies, ranks, recalls
from lotlip_hf.metrics import RetrievalRecall, ZeroShotAccuracy

FOLDER = Path(lotlip_hf.metrics.__file__).parent


@pytest.fixture
def retrieval_recall() -> RetrievalRecall:
    return RetrievalRecall(keep_in_memory=True)


@pytest.fixture
def zero_shot_accuracy() -> ZeroShotAccuracy:
    return ZeroShotAccuracy(keep_in_memory=True)


def captioned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, two or three texts each, and the image of each text."""
    images = torch.randn(20, 6)
    owners = torch.cat([torch.arange(20).repeat(2), torch.arange(5)])
    return images, images[owners] + torch.randn(45, 6), owners


def classified() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with ties, and labels."""
    return torch.randint(0, 4, (40, 7)).float(), torch.randint(0, 7, (40,))


@pytest.mark.parametrize("as_list", [False, True])
def test_recall_is_that_of_the_functions(retrieval_recall, as_list):
    images, texts, owners = captioned()
    own = [(owners == image).nonzero().flatten().tolist() for image in range(20)]
    found, medians = recalls(images, texts, owners), ranks(images, texts, owners)
    queries, candidates = (images.tolist(), texts.tolist()) if as_list else (images.numpy(), texts)
    results = retrieval_recall.compute(predictions=queries, references=own, candidates=candidates)
    expected = {f"r{k}": found[f"image_to_text_r{k}"] for k in (1, 5, 10)}
    assert results == {**expected, "median_rank": np.median(medians.image_to_text)}
    # the other way round, in batches
    for batch, labels in zip(texts.split(10), owners[:, None].split(10), strict=True):
        retrieval_recall.add_batch(predictions=batch.numpy(), references=labels.tolist())
    retrieval_results = retrieval_recall.compute(candidates=images, ks=[3])
    assert retrieval_results == {
        "r3": recalls(images, texts, owners, ks=[3])["text_to_image_r3"],
        "median_rank": np.median(medians.text_to_image),
    }


def test_accuracy_is_that_of_the_functions(zero_shot_accuracy):
    scores, labels = classified()
    expected = accuracies(scores, labels)
    assert zero_shot_accuracy.compute(predictions=scores.numpy(), references=labels) == expected
    for batch, of_batch in zip(scores.split(9), labels.split(9), strict=True):
        zero_shot_accuracy.add_batch(predictions=batch.tolist(), references=of_batch.tolist())
    assert zero_shot_accuracy.compute() == expected
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        zero_shot_accuracy.add(prediction=row, reference=label)
    assert zero_shot_accuracy.compute(ks=[2]) == accuracies(scores, labels, ks=[2])
    near = [[0.5, 0.5 + 1e-7]]
    assert zero_shot_accuracy.compute(predictions=near, references=[0], ks=[1])["accuracy_top1"] == 0.5
    assert zero_shot_accuracy.compute(predictions=near, references=[0], ks=[1], tolerance=0)["accuracy_top1"] == 0


def test_accuracy_combines(tmp_path):
    scores, labels = classified()
    both = evaluate.combine(
        {name: ZeroShotAccuracy(cache_dir=str(tmp_path), experiment_id=name) for name in ("coarse", "fine")}
    )
    for batch, of_batch in zip(scores.split(16), labels.split(16), strict=True):
        both.add_batch(predictions=batch.numpy(), references=of_batch)
    results = both.compute(ks=[1])
    assert results == {
        f"{name}_{metric}": value
        for name in ("coarse", "fine")
        for metric, value in accuracies(scores, labels, ks=[1]).items()
    }
    alone = evaluate.combine([ZeroShotAccuracy(cache_dir=str(tmp_path))])
    assert alone.compute(predictions=scores.numpy(), references=labels) == accuracies(scores, labels)


def test_a_wrong_call_keeps_what_was_added(tmp_path):
    recall, accuracy = (one(cache_dir=str(tmp_path)) for one in (RetrievalRecall, ZeroShotAccuracy))
    recall.add_batch(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[[0], [1]])
    accuracy.add_batch(predictions=[[1.0, 0.0]], references=[0])
    for metric, arguments, name in (
        (recall, {"candidates": [1.0, 0.0]}, "`candidates`"),
        (recall, {"candidates": [[1.0, float("nan")]]}, "`candidates`"),
        (recall, {"candidates": np.eye(2), "ks": [0]}, "`ks`"),
        (accuracy, {"ks": [0]}, "`ks`"),
    ):
        with pytest.raises(ValueError, match=name):
            metric.compute(**arguments)
    assert recall.compute(candidates=np.eye(2), ks=[1]) == {"r1": 1.0, "median_rank": 1.0}
    assert accuracy.compute(ks=[1]) == {"accuracy_top1": 1.0, "mean_per_class_recall": 1.0}


@pytest.mark.parametrize(
    ("references", "candidates", "message"),
    [([[0], [5]], np.eye(2), r"\[1\].*\[5\]"), ([[0], [1]], np.eye(3), "candidate_embeds")],
)
def test_wrong_inputs_are_named(retrieval_recall, references, candidates, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall.compute(predictions=np.eye(2), references=references, candidates=candidates)


@pytest.mark.parametrize("name", ["retrieval_recall", "zero_shot_accuracy"])
def test_the_description_says_how_to_use_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    module = importlib.import_module(f"lotlip_hf.metrics.{name}.{name}")
    (metric,) = (value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__)
    info = metric(keep_in_memory=True).info
    for part in ("Args:", "Returns:", "Examples:"):
        assert part in info.inputs_description
    assert info.description.strip() in metric.__doc__
    example = doctest.DocTestParser().get_doctest(info.inputs_description, {}, name, None, None)
    assert len(example.examples) >= 3
    assert doctest.DocTestRunner().run(example).failed == 0


OFFLINE = """
import socket, sys

def refuse(*arguments):
    raise AssertionError("a connection")

socket.socket.connect = refuse
import lotlip_hf.metrics

assert lotlip_hf.metrics.clip_score
assert "evaluate" not in sys.modules
import evaluate

recall = evaluate.load(sys.argv[1] + "/retrieval_recall")
recall.add_batch(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[[0], [0, 1]])
print(recall.compute(candidates=[[1, 0], [1, 0]], ks=[1]))
accuracy = evaluate.load(sys.argv[1] + "/zero_shot_accuracy")
accuracy.add_batch(predictions=[[0.1, 0.1], [0.1, 0.3]], references=[0, 1])
print(accuracy.compute(ks=[1]))
"""


@pytest.mark.slow
def test_evaluate_loads_the_folders_offline(tmp_path):
    home = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | home
    command = [sys.executable, "-c", OFFLINE, str(FOLDER)]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [
        "{'r1': 0.75, 'median_rank': 1.25}",
        "{'accuracy_top1': 0.75, 'mean_per_class_recall': 0.75}",
    ]


@pytest.mark.parametrize("name", ["RetrievalRecall", "ZeroShotAccuracy"])
def test_without_evaluate_it_says_what_to_install(name, monkeypatch):
    for module in [one for one in sys.modules if one.startswith("lotlip_hf.metrics.") and "clip" not in one]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=name):
        getattr(lotlip_hf.metrics, name)
