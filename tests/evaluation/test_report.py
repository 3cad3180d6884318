"""The report: the paper's rows beside those of files, remarks beneath, and nothing written if a file is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from lotlip_hf.evaluation import report as reports
from lotlip_hf.evaluation.published import PAPER_COLUMNS, PUBLISHED
from lotlip_hf.evaluation.report import write_report
from lotlip_hf.evaluation.results import ResultsError
from lotlip_hf.evaluation.runs import summarise
from lotlip_hf.evaluation.tables import study_table

# The table of the paper, read anew: I2T and T2I of DCI, IIW, SV-10k and Urban-1k.
PAPER = """
CLIP ViT-B/32, 400M pairs (published)        43.06 40.32 86.76 84.15 58.08 51.77 60.90 47.00
CLIP ViT-B/16, 400M pairs (published)        45.45 43.01 88.24 87.58 60.22 56.16 67.10 52.90
Long-CLIP ViT-B/16, 400M pairs (published)   51.68 57.28 89.61 93.20 79.24 77.06 78.90 79.50
LoTLIP ViT-B/32, 100M pairs (published)      59.90 56.36 93.14 91.83 83.76 78.97 84.10 81.80
LoTLIP ViT-B/16, 100M pairs (published)      64.11 62.63 94.28 92.65 88.40 82.72 88.80 84.80
"""
SIZES = {
    "dci": 7805,
    "iiw": 612,
    "sharegpt4v-10k": 10000,
    "urban1k": 1000,
    "coco": 5000,
    "imagenet-1k": 50000,
    "scenes": 500,
}
METRICS = {
    "image_to_text_r1": 0.943627,
    "text_to_image_r1": 0.926471,
    "image_to_text_r1_low": 0.924,
    "image_to_text_r1_high": 0.961,
    "text_to_image_r1_low": 0.905,
    "text_to_image_r1_high": 0.947,
    "image_to_text_r5": 0.99,
    "text_to_image_r5": 0.98,
    "image_to_text_r10": 1.0,
    "text_to_image_r10": 0.995,
    "image_to_text_median_rank": 1.0,
    "text_to_image_median_rank": 1.5,
}
ACCURACIES = {"accuracy_top1": 0.6012, "accuracy_top5": 0.85, "mean_per_class_recall": 0.6}
LENGTH_ROWS = [
    {
        **{"max_length": limit, "image_to_text_r1": recall, "text_to_image_r1": recall / 2},
        **{"texts_cut": 0.5, "mean_tokens": 30.25, "text_flops": flops},
    }
    for limit, recall, flops in ((16, 0.25, 2.5e9), (126, 0.5, None))
]
LOST = ("image_to_text_r1", "text_to_image_r1", "image_to_text_mean_rank", "text_to_image_mean_rank", "score")
SENTENCE_ROWS = [
    {
        **{"sentence": k, "num_texts": 30 * k, "num_read": 29 * k, "image_to_text_r1": 0.5, "text_to_image_r1": 0.4},
        **{f"{name}_lost": 0.125 * k for name in LOST},
    }
    for k in range(3)
]


def results(benchmark: str = "iiw", model: str = "me/lotlip", **kwargs: Any) -> dict[str, Any]:
    """What `lotlip evaluate` writes."""
    is_classification = benchmark.startswith("imagenet")
    name = {"iiw": "IIW", "coco": "COCO", "imagenet-1k": "ImageNet-1k"}.get(benchmark, benchmark)
    num_images = SIZES.get(benchmark, 40)
    content = {
        "model": model,
        "model_revision": None,
        "model_fingerprint": {"image": "a1", "text": "b2"},
        "task": "zero-shot-image-classification" if is_classification else "image-text-retrieval",
        "benchmark": benchmark,
        "dataset": {"id": f"org/{benchmark}", "name": name, "split": None, "revision": "0123456"},
        "data_fingerprint": "d4",
        "protocol": {
            **{"num_images": num_images, "num_texts": num_images, "num_texts_cut": 3, "max_length": 126},
            **{"normalization": "stripped", "search": "exact"},
        },
        "metrics": ACCURACIES if is_classification else METRICS,
        "versions": {"torch": "2.13.0"},
        "dtype": "float32",
        "date": "2026-11-22T10:00:00+00:00",
    }
    protocol = {**content["protocol"], **kwargs.pop("protocol", {})}
    return {**content, "protocol": protocol, **kwargs}


def save(folder: Path, *contents: Any) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number}.json" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return files


def report(files: list[Path], format: Any = "text") -> str:
    return reports.report_tables(summarise(files), format)


def model_index(files: list[Path]) -> str:
    return reports.model_index(summarise(files))


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def row(text: str, model: str) -> list[str]:
    """The cells of a model's row in the first table."""
    return next(cells(line)[1:] for line in text.splitlines() if cells(line)[0] == model)


def test_published_rows_are_the_papers(tmp_path: Path) -> None:
    text = report(save(tmp_path, results()))
    for line in PAPER.strip().splitlines():
        model, *numbers = re.split(r"  +", line)
        assert row(text, model) == numbers[0].split()
    assert text.count("(published)") == len(PUBLISHED) == 5
    assert "Published: LoTLIP (NeurIPS 2024), https://arxiv.org/abs/2410.05249." in text


def test_own_rows_stand_beside(tmp_path: Path) -> None:
    files = save(tmp_path, results(), results("urban1k", metrics={**METRICS, "text_to_image_r1": 1 / 3}))
    files += save(tmp_path / "more", results(model="openai/clip"))  # another model, on IIW alone
    text = report(files)
    assert row(text, "me/lotlip") == ["-", "-", "94.36", "92.65", "-", "-", "94.36", "33.33"]
    assert row(text, "openai/clip") == ["-", "-", "94.36", "92.65", "-", "-", "-", "-"]
    head, titles = text.splitlines()[2:4]
    assert cells(head) == ["DCI", "IIW", "SV-10k", "Urban-1k"]
    assert cells(titles) == ["model", *(4 * ["I2T", "T2I"])]


def test_the_table_as_it_is_printed(tmp_path: Path) -> None:
    table = report(save(tmp_path, results())).split("\n\n")[1].splitlines()
    assert table[:4] == [
        "                                                DCI           IIW          SV-10k       Urban-1k",
        "model                                         I2T    T2I    I2T    T2I    I2T    T2I    I2T    T2I",
        "------------------------------------------  -----  -----  -----  -----  -----  -----  -----  -----",
        "CLIP ViT-B/32, 400M pairs (published)       43.06  40.32  86.76  84.15  58.08  51.77  60.90  47.00",
    ]
    assert len({line.rstrip() for line in table}) == len(table) == 9


def test_long_titles_widen_their_columns(tmp_path: Path) -> None:
    name = "A data set with a very long name"
    own = results("retrieval", dataset={"id": "o", "name": name, "split": None})
    head, titles, rule, *body = report(save(tmp_path, own, results("coco"))).split("\n\n")[1].splitlines()
    assert {len(line) for line in (titles, rule, *body)} == {len(rule)}
    assert len(rule.split("  ")[-4]) + 2 + len(rule.split("  ")[-3]) == len(name)
    assert rule[head.index(name) - 2 : head.index(name) + 1] == "  -"  # it starts where its columns do


def test_other_benchmarks_get_columns(tmp_path: Path) -> None:
    files = save(
        tmp_path, results("coco"), results("imagenet-1k"), results("scenes", dataset={"id": "s", "name": "S"})
    )
    head, titles = report(files).splitlines()[2:4]
    assert cells(head) == [*PAPER_COLUMNS.values(), "COCO", "ImageNet-1k", "S"]
    assert cells(titles) == ["model", *(5 * ["I2T", "T2I"]), "top-1", "I2T", "T2I"]
    assert row(report(files), "me/lotlip")[8:] == ["94.36", "92.65", "60.12", "94.36", "92.65"]
    assert row(report(files), "LoTLIP ViT-B/16, 100M pairs (published)")[8:] == 5 * ["-"]


def test_splits_have_columns_of_their_own(tmp_path: Path) -> None:
    parts = [
        *(results("retrieval", dataset={"id": "o", "name": "Own", "split": split}) for split in ("test", "train")),
        *(results("dci", dataset={"id": "d", "name": "DCI", "split": split}) for split in ("all", "test")),
        *(results("coco", dataset={"id": "c", "name": "MSCOCO", "split": split}) for split in ("test", "val")),
    ]
    head = report(save(tmp_path, *parts)).splitlines()[2]
    assert cells(head)[4:] == ["Own (test)", "Own (train)", "DCI (test)", "MSCOCO", "MSCOCO (val)"]


def test_markdown(tmp_path: Path) -> None:
    files = save(tmp_path, results(model="a|b"), results("imagenet-1k", model="a|b"))
    lines = report(files, format="markdown").splitlines()
    assert lines[0] == "**R@1, top-1 accuracy, mIoU and supported parts (%)**"
    table = [line for line in lines if line.startswith("|")]
    titles = [f"{column} {way}" for column in PAPER_COLUMNS.values() for way in ("I2T", "T2I")]
    assert table[0] == f"| model | {' | '.join(titles)} | ImageNet-1k top-1 |"
    assert table[1] == f"| --- |{9 * ' ---: |'}"
    assert table[2].startswith("| CLIP ViT-B/32, 400M pairs (published) | 43.06 | 40.32 |")
    assert table[7] == "| a\\|b | - | - | 94.36 | 92.65 | - | - | - | - | 60.12 |"
    for line in table[2:8]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 11
    assert "- Published: LoTLIP" in "\n".join(lines)


def test_runs_in_full(tmp_path: Path) -> None:
    few = {"image_to_text_r1": 0.5, "text_to_image_r1": 0.25}
    text = report(save(tmp_path, results(), results(model="few", metrics=few), results("imagenet-1k")))
    retrieval, classification = text.split("Retrieval runs in full\n\n")[1].split(
        "\n\nClassification runs in full\n\n"
    )
    head, _, *body = [cells(line) for line in retrieval.splitlines()]
    assert head == [
        *("model", "data", "images", "texts", "texts cut", "max tokens"),
        *("direction", "R@1 (%)", "95 % interval", "R@5 (%)", "R@10 (%)", "median rank"),
    ]
    same = ["IIW", "612", "612", "3", "126"]
    assert body == [
        ["me/lotlip", *same, "image to text", "94.36", "92.40 - 96.10", "99.00", "100.00", "1"],
        ["me/lotlip", *same, "text to image", "92.65", "90.50 - 94.70", "98.00", "99.50", "1.5"],
        ["few", *same, "image to text", "50.00", "-", "-", "-", "-"],
        ["few", *same, "text to image", "25.00", "-", "-", "-", "-"],
    ]
    head, _, *body = [cells(line) for line in classification.splitlines()]
    assert head[2:] == ["images", "classes", "top-1 (%)", "top-5 (%)", "mean per class (%)"]
    assert body == [["me/lotlip", "ImageNet-1k", "50000", "-", "60.12", "85.00", "60.00"]]


@pytest.mark.parametrize(
    ("benchmark", "protocol", "left_out"),
    [
        ("imagenet-1k", {"num_classes": 5}, {"top-5 (%)": [0]}),
        ("imagenet-1k", {"num_classes": 6}, {}),
        # rows are image to text and text to image
        ("iiw", {"num_texts": 5, "num_images": 10}, {"R@5 (%)": [0], "R@10 (%)": [0, 1]}),
        ("iiw", {"num_texts": 11, "num_images": 11}, {}),
    ],
)
def test_the_first_k_of_k_are_left_out(
    tmp_path: Path, benchmark: str, protocol: dict[str, int], left_out: dict[str, list[int]]
) -> None:
    files = save(tmp_path, results(benchmark, protocol=protocol))
    head, _, *body = [cells(line) for line in report(files).split(" in full\n\n")[1].splitlines()]
    for title in ("top-1 (%)", "top-5 (%)", "R@1 (%)", "R@5 (%)", "R@10 (%)"):
        if title in head:
            found = [place for place, row in enumerate(body) if row[head.index(title)] == "-"]
            assert found == left_out.get(title, [])
    if benchmark == "imagenet-1k":
        assert ("accuracy_top5" in model_index(files)) == (not left_out)


def test_a_part_of_a_set_is_marked(tmp_path: Path) -> None:
    files = save(tmp_path, results(protocol={"num_images": 100}))
    text = report(files)
    assert row(text, "me/lotlip")[2:4] == ["94.36*", "92.65*"]
    assert "me/lotlip on IIW (*): only 100 of 612 images." in text
    own = {"id": "o", "name": "Own", "split": None}
    text = report(save(tmp_path, results("retrieval", dataset=own, protocol={"first_images": 7, "num_images": 7})))
    assert row(text, "me/lotlip")[8:] == ["94.36*", "92.65*"]
    assert "me/lotlip on Own (*): only the first 7 images." in text
    assert "*" not in report(save(tmp_path, results(), results("retrieval", dataset=own)))
    (entry,) = yaml.safe_load(model_index(save(tmp_path, results(protocol={"num_images": 100}))))["model-index"]
    assert entry["results"][0]["dataset"]["args"] == {"num_images": 100}
    text = report(save(tmp_path, results("dci", protocol={"num_images": 9000})))
    assert row(text, "me/lotlip")[:2] == ["94.36*", "92.65*"]
    assert "me/lotlip on DCI (*): 9000 images instead of 7805." in text


OTHER_RULES = {
    "captions not normalised": {"normalization": None},
    "texts cut at 16 tokens": {"max_length": 16, "max_length_asked": 16},
}


@pytest.mark.parametrize("words", OTHER_RULES)
def test_other_rules_than_the_papers_are_marked(tmp_path: Path, words: str) -> None:
    text = report(save(tmp_path, results(protocol=OTHER_RULES[words]), results(model="b")))
    assert row(text, "me/lotlip")[2:4] == ["94.36*", "92.65*"]
    assert row(text, "b")[2:4] == ["94.36", "92.65"]
    assert f"me/lotlip on IIW (*): {words}." in text
    # where nothing published stands, models are set apart from each other alone
    assert "*" not in report(save(tmp_path, results("coco", protocol=OTHER_RULES[words])))


def test_all_that_is_marked_is_said(tmp_path: Path) -> None:
    protocol = {name: value for rules in OTHER_RULES.values() for name, value in rules.items()}
    files = save(tmp_path, results(protocol={**protocol, "num_images": 100}))
    assert f"me/lotlip on IIW (*): only 100 of 612 images; {'; '.join(OTHER_RULES)}." in report(files)
    (entry,) = yaml.safe_load(model_index(files))["model-index"]
    assert entry["results"][0]["dataset"]["args"] == {"num_images": 100, "normalization": "none", "max_length": 16}


def test_what_a_file_does_not_say_is_not_marked(tmp_path: Path) -> None:
    own = results()
    own["protocol"] = {"num_images": 612}
    assert "*" not in report(save(tmp_path, own))
    assert "*" not in report(save(tmp_path, results(protocol={"max_length": 16})))
    # nothing was lost by it
    assert "*" not in report(save(tmp_path, results(protocol={"max_length_asked": 100, "num_texts_cut": 0})))
    notes = report(save(tmp_path, results(), results(model="b", protocol={"batch_size": 7, "bootstrap": 0})))
    assert "differs" not in notes


@pytest.mark.parametrize("swapped", [False, True])
def test_the_newer_run_counts(tmp_path: Path, swapped: bool) -> None:
    old = results(metrics={**METRICS, "image_to_text_r1": 0.1}, date="2026-11-22T10:30:00+01:00")
    new = results(metrics={**METRICS, "image_to_text_r1": 0.2}, date="2026-11-22T10:00:00")  # UTC
    files = save(tmp_path, *((new, old) if swapped else (old, new)))
    text = report(files)
    assert row(text, "me/lotlip")[2:4] == ["20.00", "92.65"]
    first, second = files if swapped else files[::-1]
    assert f"me/lotlip on IIW: {second} is not shown; {first} is newer." in text
    assert "20.00" in text
    assert "10.00" not in text
    assert "value: 0.2" in model_index(files)
    assert "value: 0.1\n" not in model_index(files)


# What two runs of a model on the same data differ in, and the words by which their rows do.
APART: dict[str, tuple[dict[str, Any], str, str]] = {
    "part": ({"protocol": {"num_images": 9}}, "", "only 9 of 612 images"),
    "normalization": ({"protocol": {"normalization": None}}, "", "captions not normalised"),
    "max_length": ({"protocol": {"max_length": 64, "max_length_asked": 64}}, "126 tokens", "64 tokens"),
    "search": ({"protocol": {"search": "FAISS HNSW32"}}, "search exact", "search FAISS HNSW32"),
    "templates": ({"protocol": {"templates": ["a {}."]}}, "", 'templates ["a {}."]'),
    "revision": ({"dataset": {"id": "i", "name": "IIW", "revision": "new"}}, "revision 0123456", "revision new"),
    "data": ({"data_fingerprint": "other"}, "0.json", "1.json"),
    "a rule of later versions": ({"protocol": {"seed": 7}}, "", "seed 7"),
}


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("other_column", [False, True])
def test_runs_by_other_rules_stand_side_by_side(tmp_path: Path, kind: str, other_column: bool) -> None:
    change, *words = APART[kind]
    runs = [results(), results(metrics={**METRICS, "text_to_image_r1": 0.125}, **change)]
    if other_column:  # in the row of the same rules
        runs.append(results("urban1k"))
    files = save(tmp_path, *runs)
    names = [f"me/lotlip ({word})" if word else "me/lotlip" for word in words]
    own_row = other_column and kind in ("revision", "data")  # what IIW's rows are told apart by is of IIW alone
    text = report(files)
    assert (
        sorted(models(files))
        == sorted(models(files[::-1]))
        == sorted({*names, *models(files[2:])} if own_row else names)
    )
    assert [row(text, name)[3].rstrip("*") for name in names] == ["92.65", "12.50"]
    assert not other_column or row(text, "me/lotlip" if own_row else names[0])[7] == "92.65"
    assert "counts" not in text
    (entry,) = yaml.safe_load(model_index(files))["model-index"]
    values = [result["metrics"][1]["value"] for result in entry["results"]]
    assert values.count(0.125) == 1
    assert values.count(METRICS["text_to_image_r1"]) == len(runs) - 1


def test_several_rules_tell_runs_apart(tmp_path: Path) -> None:
    limits = [{"max_length": limit, "max_length_asked": limit} for limit in (32, 64)]
    runs = [results(benchmark, protocol=limit) for benchmark in ("iiw", "dci") for limit in limits]
    runs.append(results(protocol={**limits[0], "search": "FAISS HNSW32"}))
    files = save(tmp_path, *runs, results(model="b", protocol=limits[0]))
    assert models(files) == [
        *("me/lotlip (32 tokens, search exact)", "me/lotlip (64 tokens, search exact)"),
        *("me/lotlip (32 tokens, search FAISS HNSW32)", "b"),
    ]
    assert row(report(files), models(files)[1])[:4] == ["94.36*", "92.65*", "94.36*", "92.65*"]


@pytest.mark.parametrize("swapped", [False, True])
def test_other_texts_are_other_columns(tmp_path: Path, swapped: bool) -> None:
    """Long and short captions of the same pictures, also of one model each."""
    own = {"id": "o", "name": "Own", "split": "test"}
    runs = [
        results(
            "retrieval",
            model,
            dataset=own,
            protocol={"captions": captions},
            metrics={**METRICS, "text_to_image_r1": r},
        )
        for model, captions, r in (("a", "long", 0.5), ("a", "short", 0.25), ("b", "short", 0.125))
    ]
    files = save(tmp_path, *(runs[::-1] if swapped else runs), results("coco"))
    text = report(files)
    titles = ["Own (test) (long captions)", "Own (test) (short captions)"]
    assert cells(text.splitlines()[2])[4:] == [*(titles[::-1] if swapped else titles), "COCO"]
    long, short = (11, 9) if swapped else (9, 11)
    assert (row(text, "a")[long], row(text, "a")[short]) == ("50.00", "25.00")
    assert (row(text, "b")[long], row(text, "b")[short]) == ("-", "12.50")
    assert "differs" not in text
    arguments = [
        entry["results"][0]["dataset"].get("args") for entry in yaml.safe_load(model_index(files))["model-index"]
    ]
    assert {"captions": "short"} in arguments


def test_one_data_set_of_two_tasks(tmp_path: Path) -> None:
    own = {"id": "o", "name": "Own", "split": None}
    classes = {**results("imagenet-1k", dataset=own), "benchmark": "classification"}
    text = report(save(tmp_path, results("retrieval", dataset=own), classes))
    assert row(text, "me/lotlip")[8:] == ["94.36", "92.65", "60.12"]


def test_the_same_file_twice_is_one_run(tmp_path: Path) -> None:
    (file,) = save(tmp_path, results())
    assert report([file, str(file), tmp_path / "." / file.name]) == report([file])


def models(files: list[Path]) -> list[str]:
    """What the first table calls the models of files."""
    rows = report(files).split("\n\n")[1].splitlines()[3:]
    return [cells(line)[0] for line in rows if "(published)" not in line]


def test_models_of_one_name(tmp_path: Path) -> None:
    runs = [results(model_fingerprint={"image": "a1", "text": text}) for text in ("b2", "b3")]
    assert models(save(tmp_path, *runs)) == ["me/lotlip (0.json)", "me/lotlip (1.json)"]
    files = [*save(tmp_path / "a", *runs[:1], results("coco")), *save(tmp_path / "b", *runs[1:])]
    assert models(files) == ["me/lotlip (a/0.json)", "me/lotlip (b/0.json)"]  # two runs of the first
    halves = [runs[0], {**runs[1], "dtype": "bfloat16"}]
    assert models(save(tmp_path, *halves)) == ["me/lotlip (float32)", "me/lotlip (bfloat16)"]
    revisions = ("0123456789" * 4, "a" * 40, "v1.0", None)
    runs = [
        results(model_revision=revision, model_fingerprint={"image": "a1", "text": str(revision)})
        for revision in revisions
    ]
    assert models(save(tmp_path, *runs)) == [
        *("me/lotlip@0123456", "me/lotlip@aaaaaaa", "me/lotlip@v1.0", "me/lotlip")
    ]
    assert "counts" not in report(save(tmp_path, *runs))


def test_names_of_models_are_short(tmp_path: Path) -> None:
    names = {
        "openai/clip": "openai/clip",
        "/home/somebody/models/fine-tuned": "fine-tuned",
        "../other": "other",
        "/home/somebody/runs/long/checkpoint-700": "long/checkpoint-700",
        "runs/b/best": "b/best",
        "/runs/c/best/": "c/best",
        "best": "best",
        "open_clip:ViT-B-32": "open_clip:ViT-B-32",
        ".": ".",
    }
    files = save(tmp_path, *(results(model=name) for name in names))
    assert models(files) == list(names.values())
    assert "somebody" not in report(files)
    entries = yaml.safe_load(model_index(files))["model-index"]
    assert [entry["name"] for entry in entries] == list(names.values())
    assert models(save(tmp_path, results(model="./best"), results("coco", model="best/"))) == ["best"]


def test_different_protocols_and_data_are_said(tmp_path: Path) -> None:
    other = {"order": "short", "max_length": 126, "num_texts_cut": 7, "templates": ["a photo of a {}."] * 40}
    files = save(
        tmp_path,
        results(),
        results(model="b", protocol=other),
        results(model="c", data_fingerprint="e5"),
        results("urban1k", protocol={"order": "other"}),  # nobody else is in its column
    )
    text = report(files)
    assert 'IIW: `order` differs: null for me/lotlip, c; "short" for b.' in text
    assert re.search(r'IIW: `templates` differs: null for me/lotlip, c; \["a photo of .{40,}\.\.\. for b\.', text)
    assert "IIW: the models were evaluated on different images or texts." in text
    assert "`max_length` differs" not in text
    assert "`num_texts" not in text
    assert "Urban-1k: " not in text
    assert "differs" not in report(files[:1])
    assert "different images" not in report(files[:1])


def test_studies_are_tables_of_their_own(tmp_path: Path) -> None:
    files = save(
        tmp_path, results(study="length", rows=LENGTH_ROWS), results("scenes", study="sentences", rows=SENTENCE_ROWS)
    )
    text = report(files)
    assert "published" not in text  # nothing to set them beside
    blocks = text.split("\n\n")
    assert blocks[0] == "Texts cut at several lengths: me/lotlip on IIW"
    assert [cells(line) for line in blocks[1].splitlines()[2:]] == [
        ["16", "25.00", "12.50", "50.0", "30.2", "2.5"],
        ["126", "50.00", "25.00", "50.0", "30.2", "-"],
    ]
    assert blocks[2] == "One sentence removed: me/lotlip on scenes"
    assert cells(blocks[3].splitlines()[4]) == [
        *("2", "60", "58", "50.00", "40.00", "25.00", "25.00", "0.25", "0.25", "0.2500")
    ]
    assert report([*files, *save(tmp_path / "more", results())]).endswith(text)
    assert study_table("length", LENGTH_ROWS, "markdown").splitlines()[2].startswith("| 16 | 25.00 |")
    for output in ("model_index_file", "plot_file"):
        with pytest.raises(ValueError, match="studies"):
            write_report(files, **{output: tmp_path / "plot.png"})


def test_model_index_is_the_hubs(tmp_path: Path) -> None:
    files = save(
        tmp_path, results(model="models/mine"), results("imagenet-1k", model="models/mine"), results(model="b")
    )
    entries = yaml.safe_load(model_index(files))["model-index"]
    assert [entry["name"] for entry in entries] == ["models/mine", "b"]
    _, found = model_index_to_eval_results(entries[:1])
    assert {one.metric_type: one.metric_value for one in found} == {**METRICS, **ACCURACIES}
    assert {(one.task_type, one.dataset_type, one.dataset_name) for one in found} == {
        ("image-text-retrieval", "org/iiw", "IIW"),
        ("zero-shot-image-classification", "org/imagenet-1k", "ImageNet-1k"),
    }
    assert {one.dataset_revision for one in found} == {"0123456"}


BROKEN = [
    ("{", "JSON"),
    ("[1, 2]", "list"),
    ("{}", "dataset"),
    (results(metrics={"text_to_image_r1": 0.5}), "image_to_text_r1"),
    (results(metrics={**METRICS, "text_to_image_r1": 92.65}), "text_to_image_r1"),
    (results(metrics={**METRICS, "text_to_image_r1": float("nan")}), "text_to_image_r1"),
    (results(metrics={**METRICS, "image_to_text_median_rank": float("inf")}), "image_to_text_median_rank"),
    (results(metrics={**METRICS, "image_to_text_median_rank": 0.5}), "image_to_text_median_rank"),
    (results(task="text-generation"), "task"),
    (results(date="yesterday"), "yesterday"),
    (results(protocol={"num_images": None}), "protocol.num_images"),
    (results(dataset={"id": "a"}), "name"),
    (results(study="width", rows=[]), "study"),
    (results(study="length", rows=SENTENCE_ROWS), "max_length"),
    (results(study="length", rows=[{**LENGTH_ROWS[0], "max_length": "16"}]), "format"),
    (results(study="length", rows=[LENGTH_ROWS[0], {**LENGTH_ROWS[1], "texts_cut": 50.0}]), r"rows\[1\].texts_cut"),
    (results(study="length"), "rows"),
]


@pytest.mark.parametrize(("content", "word"), BROKEN)
def test_files_that_are_no_results_are_named_before_anything_is_written(
    tmp_path: Path, content: Any, word: str
) -> None:
    files = save(tmp_path, results(), content)
    for function in (report, model_index):
        with pytest.raises(ResultsError, match=word) as error:
            function(files)
        assert error.value.file == files[1]
        assert "\n" not in str(error.value)
    with pytest.raises(ResultsError, match=word):
        write_report(files, "text", tmp_path / "index.yaml", tmp_path / "plot.png")
    assert sorted(tmp_path.iterdir()) == files


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        report([tmp_path / "nowhere.json"])
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        report([tmp_path])


def test_what_the_command_writes(tmp_path: Path) -> None:
    files = save(tmp_path, results(), results("imagenet-1k"), results(study="length", rows=LENGTH_ROWS))
    index, plot = tmp_path / "index.yaml", tmp_path / "plot.png"
    assert write_report(files, "markdown", index, plot) == report(files, "markdown")
    assert index.read_text(encoding="utf-8") == model_index(files)
    assert Image.open(plot).format == "PNG"
    with pytest.raises(FileExistsError, match="index.yaml"):
        write_report(files[:1], "text", index)
    write_report(files[:1], "text", index, plot, overwrite=True)  # a picture is replaced anyhow
    assert index.read_text(encoding="utf-8") == model_index(files[:1])


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    files = save(tmp_path, results())
    picture = tmp_path / "results.png"
    picture.write_bytes(files[0].read_bytes())
    missing, own = tmp_path / "missing", tmp_path / "own.png"
    for outputs, error, word in (
        ((files[0], None), ValueError, "0.json"),
        ((own, tmp_path / "." / own.name), ValueError, "own.png"),
        ((tmp_path / "i.yaml", missing / "p.png"), NotADirectoryError, "p.png"),
        ((tmp_path, own), FileExistsError, tmp_path.name),
        ((tmp_path / "i.yaml", tmp_path / "plot.doc"), ValueError, "plot.doc"),
    ):
        content = picture.read_bytes()
        with pytest.raises(error, match=word):
            write_report([*files, picture], "text", *outputs, overwrite=True)
        assert picture.read_bytes() == content
    assert sorted(tmp_path.iterdir()) == sorted([*files, picture])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    monkeypatch.setattr("lotlip_hf.evaluation.report.save", lambda figure, file: figures.append(figure))
    return figures


def bars(axes: Any) -> list[Any]:
    return sorted((bar for bars in axes.containers for bar in bars), key=lambda bar: bar.get_x())


def legend(figure: Any) -> dict[str, Any]:
    (legend,) = figure.legends
    return dict(zip((text.get_text() for text in legend.texts), legend.get_patches(), strict=True))


def test_bars_are_the_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    write_report(save(tmp_path, results(), results("imagenet-1k", model="b")), plot_file=tmp_path / "plot.png")
    image_to_text, text_to_image, accuracy = drawn[0].axes

    def groups(axes: Any) -> dict[str, list[float]]:
        """The heights of the bars nearest to each tick, from left to right."""
        ticks = dict(zip(axes.get_xticks(), (label.get_text() for label in axes.get_xticklabels()), strict=True))
        heights: dict[str, list[float]] = {name: [] for name in ticks.values()}
        for bar in bars(axes):
            middle = bar.get_x() + bar.get_width() / 2
            heights[ticks[min(ticks, key=lambda tick: abs(tick - middle))]].append(round(bar.get_height(), 2))
        return heights

    assert groups(image_to_text) == {
        "IIW": [86.76, 88.24, 89.61, 93.14, 94.28, 94.36],
    }  # published rows beside results of one's own alone
    assert groups(text_to_image) == {"IIW": [84.15, 87.58, 93.20, 91.83, 92.65, 92.65]}
    assert groups(accuracy) == {"ImageNet-1k": [60.12]}
    shown = {name: patch.get_facecolor() for name, patch in legend(drawn[0]).items()}
    assert list(shown) == [*(f"{model} (published)" for model in PUBLISHED), "me/lotlip", "b"]
    assert len(set(shown.values())) == 7
    assert bars(accuracy)[0].get_facecolor() == shown["b"]


def test_nothing_published_without_results_beside_it(tmp_path: Path, drawn: list[Any]) -> None:
    write_report(save(tmp_path, results("coco"), results("scenes")), plot_file=tmp_path / "plot.png")
    assert list(legend(drawn[0])) == ["me/lotlip"]
    assert [len(bars(axes)) for axes in drawn[0].axes] == [2, 2]


def test_marked_bars(tmp_path: Path, drawn: list[Any]) -> None:
    part, other = {"num_images": 100}, {"normalization": None}
    files = save(tmp_path, results(protocol=part), results(model="b", protocol=other), results(model="c"))
    write_report(files, plot_file=tmp_path / "plot.png")
    write_report(files[:1], plot_file=tmp_path / "plot.png")
    write_report(files[2:], plot_file=tmp_path / "plot.png")
    for axes in drawn[0].axes[:2]:
        texts = [text.get_text() for text in axes.texts]
        assert [text for text in texts if "*" in text] == 2 * ["94.4*" if axes is drawn[0].axes[0] else "92.6*"]
        assert len([bar for bar in bars(axes) if bar.get_alpha() != 1]) == 2
    assert list(legend(drawn[0]))[-1] == "* not the whole benchmark, or other settings than the paper"
    assert list(legend(drawn[1]))[-1] == "* not the whole benchmark"
    assert list(legend(drawn[2]))[-1] == "c"
    assert not any("*" in text.get_text() for text in drawn[2].axes[0].texts)


def test_many_models_and_long_names(tmp_path: Path, drawn: list[Any]) -> None:
    names = [f"model-{number}" for number in range(20)] + [number * "a-very-long-name" for number in (4, 8, 16)]
    long = {"id": "o", "name": "A data set with a very long name", "split": None}
    files = save(tmp_path, *(results(model=name) for name in names), results("retrieval", dataset=long))
    write_report(files, plot_file=tmp_path / "plot.png")
    (figure,) = drawn
    patches = legend(figure)
    assert {name.replace("\n", "") for name in patches} >= set(names)
    assert len({(patch.get_facecolor(), patch.get_hatch()) for patch in patches.values()}) == len(patches) == 29
    figure.draw_without_rendering()
    drawn_in = figure.get_tightbbox()
    assert drawn_in.x0 >= 0
    assert drawn_in.y0 >= 0
    assert drawn_in.x1 <= figure.get_figwidth()
    assert drawn_in.y1 <= figure.get_figheight()
    assert all(axes.get_position().height * figure.get_figheight() > 2 for axes in figure.axes)  # inches
