"""The outcome of a run: its table beside linear heads, `results.json`, and a page that loads and runs nothing."""

import json
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_training import arguments, config, log_of, make_checkpoint, make_folder
from test_training import run as run_processes

from lotlip_hf import Encoder
from lotlip_hf.data.sampling import WholeCaptions
from lotlip_hf.images import image_source
from lotlip_hf.loading import load_model
from lotlip_hf.training import linear_heads as linear_heads_module
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.linear_heads import PairStates, linear_heads
from lotlip_hf.training.outcome import StageResult, below_heads, logged_recalls, write_outcome
from lotlip_hf.training.stages import train_config
from lotlip_hf.training.validation import RECALL_KEYS

pytestmark = pytest.mark.usefixtures("alone")

KEYS = [*RECALL_KEYS["long"], *RECALL_KEYS["short"]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, with 2 corner tokens, and `records`. Read-only."""
    folder = tmp_path_factory.mktemp("outcome")
    make_checkpoint(folder / "model")
    make_folder(folder / "records", 27)
    return folder


class Page(HTMLParser):
    """The tags of a page, the addresses in it, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.pictures: list[str] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.pictures += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "figure", "img", "figcaption"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
NAMES = {"lang", "charset", "http-equiv", "content", "class", "dir", "src", "alt", "title", "colspan"}


def assert_self_contained(page: Page) -> None:
    assert page.tags <= TAGS
    assert page.names <= NAMES
    assert page.pictures
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in page.pictures)
    assert max(map(len, page.pictures)) < 40_000


def run(output: Path, start: Path, **options: Any) -> tuple[TrainingConfig, Path]:
    """A run in this process with a report."""
    options = {"model": str(start / "model"), "data": str(start / "records"), "report": True, **options}
    made = config(output, cache=str(output / "cache"), max_steps=2, **options)
    return made, train_config(made)


def test_a_run_of_frozen_towers(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_heads_module, "BATCH_SIZE", 32)
    options = {"eval_data": str(start / "records"), "eval_samples": 20, "lock_text": True, "lock_vision": True}
    made, checkpoint = run(tmp_path / "run", start, num_corner_tokens=None, **options)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["model", "linear heads (baseline)"]
    model, heads = (row["recalls"] for row in results["rows"])
    assert model == {name: log_of(tmp_path / "run")[-1][name] for name in KEYS}
    records = loaded(start)
    states = computed_states(start / "model", [records[index] for index in range(27)])
    held_out = PairStates(*(each[:20] for each in states))
    assert heads == pytest.approx(linear_heads(states, held_out, made.seed), abs=0.051)  # one picture
    assert results["num_images"] == 20
    assert results["below_linear_heads"]
    page = Page(tmp_path / "run" / "report.html")
    assert_self_contained(page)
    for text in (printed, page.text):
        for row in (model, heads):
            assert f"{100 * row['long_text_to_image_r5']:.1f}" in text
    assert "below two linear heads" in page.text
    # the same again from the checkpoint: with an earlier stage, and without the heads
    stage = StageResult("heads", checkpoint, dict.fromkeys(KEYS, 0.25), made)
    made.no_cache = True
    write_outcome(tmp_path, [stage, StageResult("model", checkpoint, model, made)], records, records)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["model", "heads"]
    assert results["below_linear_heads"] is None
    assert "no_cache" in capsys.readouterr().out
    assert Page(tmp_path / "report.html").text.count("rank ") == page.text.count("rank ") > 5


def computed_states(checkpoint: Path, records: list[Any]) -> PairStates:
    """The pooled states of records without a cache."""
    encoder = Encoder(*load_model(checkpoint, device="cpu"))
    drawn = WholeCaptions()(records, [Random(0)] * len(records))
    images = [image_source(record["image"]).source for record in records]
    texts = [[each.short for each in drawn], [each.long[0] for each in drawn]]
    found = [dict(pair[:2] for pair in encoder.iterate_texts(each, pooled=True)) for each in texts]
    return PairStates(
        *(torch.stack([each[index] for index in range(len(records))]) for each in (
            dict(encoder.iterate_images(images, pooled=True)), *found
        ))
    )  # fmt: skip


def loaded(start: Path) -> Dataset:
    made = TrainingConfig(model="m", data=str(start / "records"))
    records = load_data(made)[0]
    assert isinstance(records, Dataset)
    return records


HOSTILE = "</p><script>alert(1)</script><img src=x onerror='a()'> \"&amp; \x1b[2J \u202e"


def test_hostile_records_and_broken_pictures(start: Path, tmp_path: Path) -> None:
    number = 40
    Image.new("RGB", (4000, 10), "red").save(tmp_path / "thin.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    images = [{"path": str(tmp_path / ("broken" if index == 3 else "thin")) + ".png"} for index in range(number)]
    records = Dataset.from_dict(
        {
            "image": images,
            "short_caption": ["a"] * (number - 1) + [""],
            "long_captions": [[f"{index} {HOSTILE} " + "long" * 5000] for index in range(number)],
            "id": [f"{index}{HOSTILE}" for index in range(number)],
        }
    )
    made = TrainingConfig(model="m", data="d", on_error="skip")
    stage = StageResult(HOSTILE, start / "model", dict.fromkeys(KEYS, 0.5), made)
    write_outcome(tmp_path, [stage], records, records.to_iterable_dataset())
    page = Page(tmp_path / "report.html")
    assert_self_contained(page)
    assert "alert(1)" in page.text
    assert "\x1b" not in page.text
    assert len(page.pictures) <= 3 * 5 * 6
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_a_report_needs_evaluation_records(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report"):
        run(tmp_path / "run", start)


def test_the_warning_names_what_is_below() -> None:
    heads = dict.fromkeys(KEYS, 0.5)
    recalls = {name: 0.6 if name.startswith("long") else 0.4 for name in KEYS}
    warning = below_heads(recalls, heads)
    assert warning is not None
    assert "40.0 % instead of 50.0 % by short" in warning
    assert "long" not in warning
    assert below_heads(heads, heads) is below_heads(recalls, None) is None
    assert below_heads({name: value - 1e-9 for name, value in heads.items()}, heads) is None  # the same in the table


@pytest.mark.parametrize(
    "line", [None, {}, {"long_image_to_text_r1": 0.5}, dict.fromkeys(RECALL_KEYS["long"])], ids=str
)
def test_a_log_without_the_recalls_is_named(line: dict[str, Any] | None, tmp_path: Path) -> None:
    if line is not None:
        (tmp_path / "log.jsonl").write_text(json.dumps({"step": 2, **line}) + "\n")
    with pytest.raises(ValueError, match="log.jsonl"):
        logged_recalls(tmp_path / "checkpoint-2")


def draw_few_pairs() -> None:
    """Makes the steps of linear heads small in this process."""
    linear_heads_module.BATCH_SIZE = 32


@pytest.mark.slow
def test_processes_write_one_outcome(start: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": start / "model", "data": start / "records", "eval_data": start / "records"}
    options |= {"lock_text": True, "lock_vision": True, "report": True, "max_steps": 2}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    # the first process trains the heads
    one = run_processes(
        arguments(alone, cache=tmp_path / "one", **{**options, "batch_size": 8}), tmp_path, 1, draw_few_pairs
    )
    two = run_processes(arguments(shared, cache=tmp_path / "two", **options), tmp_path, 2, draw_few_pairs)
    assert one.codes + two.codes == [0] * 3, one.text + two.text
    assert two.text.count("Retrieval by long captions") == 1
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (alone, shared))
    for expected, row in zip(one["rows"], two["rows"], strict=True):
        assert row["recalls"] == pytest.approx(expected["recalls"], abs=1e-5)
