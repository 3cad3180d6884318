"""Warnings before training: each on data that has the problem, none on data that has not, and in bounded time."""

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from PIL import Image
from test_training import make_folder

from lotlip_hf.data.masking import WordScores
from lotlip_hf.data.records import load_records
from lotlip_hf.training import data_checks
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data_checks import warn_of_data
from lotlip_hf.training.terms import make_terms

FINE = {"batch_size": 4, "num_sentences": 1, "num_long_texts": 1}


def pictures(number: int, **columns: Any) -> Dataset:
    """Records whose captions differ, with pictures of two colours; `columns` replace them."""
    image = Image.new("RGB", (8, 8), "red")
    image.paste("blue", (0, 0, 4, 4))
    given = {
        "image": [image] * number,
        "short_caption": [f"dog {index}" for index in range(number)],
        "long_captions": [[f"A dog {index}. It sits."] for index in range(number)],
        "id": [f"r{index}" for index in range(number)],
    }
    return Dataset.from_dict({**given, **columns})


def warned(pair: tuple[Any, Any], records: Dataset | IterableDataset, max_steps: int, **options: Any) -> list[str]:
    config = TrainingConfig(model="m", data="d", **{**FINE, **options})
    terms, _ = make_terms(config.terms, config.term_options)
    return warn_of_data(*pair, records, config, max_steps, terms=terms)


def test_data_without_a_problem(pair: tuple[Any, Any]) -> None:
    assert warned(pair, pictures(40), 20) == []
    assert warned(pair, pictures(40).to_iterable_dataset(), 1) == []


FLAT = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
PROBLEMS: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "unseen": ({}, {}, 9, "never sees 4 of 40 .*--max-steps 10 "),
    "many passes": ({}, {}, 300, "30 passes"),
    "many passes of heads": ({}, {"lock_text": True, "lock_vision": True}, 3000, "300 passes"),
    "cut": ({"long_captions": [["word " * 300]] * 4 + [["A dog."]] * 36}, {"num_long_texts": 1}, 10, "5% of 80 drawn"),
    "long captions": (
        {"long_captions": [[f"A big dog {index}. " * 80] for index in range(40)]},
        {},
        10,
        "100% of 40 long captions",
    ),
    "no groups": ({}, {"terms": ["groups"]}, 10, "None of 40 .*`group`.*groups"),
    "equal": (
        {"short_caption": ["A  Dog", "a dog ", *(f"cat {index}" for index in range(38))]},
        {},
        10,
        r'5% share a short caption \("a dog" 2 times\).*infonce.equal_positives=true',
    ),
    "one colour": ({"image": [FLAT] * 2 + [pictures(1)[0]["image"]] * 38}, {}, 10, "2 of 40 .*record r[01] .*white"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_is_told(problem: str, pair: tuple[Any, Any]) -> None:
    columns, options, max_steps, expected = PROBLEMS[problem]
    messages = warned(pair, pictures(40, **columns), max_steps, **options)
    (message,) = [message for message in messages if problem != "cut" or "cut" in message]  # the long ones are equal
    assert re.search(expected, message), message


def test_few_held_out_pictures_are_told(pair: tuple[Any, Any]) -> None:
    config = TrainingConfig(model="m", data="d", **FINE)
    (warning,) = warn_of_data(*pair, pictures(40), config, 20, num_held_out=16)
    assert re.search("16 pictures.*62%.*--eval-share", warning)
    assert not warn_of_data(*pair, pictures(40), config, 20, num_held_out=200)


def test_equal_captions_that_are_positives_are_no_problem(pair: tuple[Any, Any]) -> None:
    records = pictures(40, short_caption=["a dog"] * 40)
    assert warned(pair, records, 20)
    assert not warn_of_data(*pair, records, TrainingConfig(model="m", data="d", **FINE), 20)
    assert not warned(pair, records, 20, term_options=["infonce.equal_positives=true"])


@pytest.mark.parametrize(
    ("terms", "advised"), [(["primary_components"], "primary_components.equal_positives"), (["hard_negatives"], None)]
)
def test_the_advice_for_equal_captions_is_an_option_of_a_term(
    terms: list[str], advised: str | None, pair: tuple[Any, Any]
) -> None:
    (warning,) = warned(pair, pictures(40, short_caption=["a dog"] * 40), 20, terms=terms)
    assert advised in warning if advised else "equal_positives" not in warning


def test_broken_records_are_left_out(pair: tuple[Any, Any], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "records", 27)
    next(folder.glob("*.png")).write_bytes(b"no picture")
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "missing.png", "short_caption": ""}\n')
    records = load_records(folder)
    assert not [message for message in warned(pair, records, 20) if "colour" in message]


def test_the_work_does_not_grow_with_the_records(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def reading(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        read.extend(rows["id"])
        blank = [None] * len(rows["id"])
        return {"image": blank, "short_caption": ["a"] * len(blank), "long_captions": blank, "id": rows["id"]}

    monkeypatch.setattr(data_checks, "COMPARED", 500)
    records = Dataset.from_dict({"id": range(1_000_000)}).with_transform(reading)
    assert warned(pair, records, 10**6)
    assert len(read) <= data_checks.COMPARED + data_checks.DECODED


def test_records_without_scores_are_counted(pair: tuple[Any, Any], tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    config = TrainingConfig(model="m", data="d", **FINE)
    for number, share in ((40, None), (39, "1 have"), (1, "39 have")):
        file.write_text("".join(f'{{"id": "r{index}", "texts": [[]]}}\n' for index in range(number)))
        warnings = warn_of_data(*pair, pictures(40), config, 20, terms={}, word_scores=WordScores(file))
        assert [bool(share and share in text) for text in warnings] == ([True] if share else [])
