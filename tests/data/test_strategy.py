"""A caption strategy of one's own: one class and one line in `STRATEGIES`; it sees the whole batch."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from lotlip_hf import LoTLIPProcessor
from lotlip_hf.data.collator import MODEL_INPUTS, LoTLIPCollator
from lotlip_hf.data.record import Record
from lotlip_hf.data.records import load_records
from lotlip_hf.data.sampling import STRATEGIES, SubCaptions, Texts, record_rng
from lotlip_hf.training.config import TrainingConfig, parse_arguments


@dataclass(frozen=True)
class NeighbourTexts:
    """The first long text of the next image in the batch is an extra one; half of the short texts are rewrites."""

    num_long_texts: int = 3
    num_sentences: int = 3

    def __call__(self, records: Sequence[Record], rngs: Sequence[Random]) -> list[Texts]:
        drawn = SubCaptions(self.num_long_texts, self.num_sentences)(records, rngs)
        texts = []
        for record, rng, own, other in zip(records, rngs, drawn, [*drawn[1:], drawn[0]], strict=True):
            rewrites = record.get("rewrites", [])
            short = rng.choice(rewrites) if rewrites and rng.random() < 0.5 else own.short
            texts.append(Texts(short, [*own.long, other.long[0]], own.stand_in))
        return texts


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "neighbours", NeighbourTexts)


def some_records(folder: Path, number: int = 6) -> Any:
    folder.mkdir()
    lines = []
    for index in range(number):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index}.png")
        row = {"file_name": f"{index}.png", "short_caption": f"cat {index}", "long_captions": [f"A cat. Cat {index}."]}
        lines.append(json.dumps({**row, "rewrites": [f"the cat {index}", f"one cat {index}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return load_records(folder)


def test_a_strategy_mixes_within_a_batch(processor: LoTLIPProcessor, tmp_path: Path) -> None:
    records = list(some_records(tmp_path / "data"))
    records[2]["image"] = b"no image"  # broken records are not drawn from
    draw = TrainingConfig(captions="neighbours", num_long_texts=1, num_sentences=0).draw()
    collator = LoTLIPCollator(processor, draw, seed=3, on_error="skip", return_ids=True)
    batch = collator(records)
    assert batch["ids"] == [f"{index}.png" for index in (0, 1, 3, 4, 5)]
    assert batch["counts"]["broken_images"] == 1
    long = batch["long_input_ids"]
    assert long.shape[:2] == (5, 2)
    assert torch.equal(long[:, 1], long[:, 0].roll(-1, 0))
    assert len({tuple(ids) for ids in long[:, 0].tolist()}) == 5
    assert set(batch) - set(MODEL_INPUTS) == {"return_loss", "ids", "counts"}


def test_optional_fields_are_drawn_from(tmp_path: Path) -> None:
    (record, *_) = some_records(tmp_path / "data")
    draw, seen = NeighbourTexts(1, 0), Counter()
    for epoch in range(200):
        (texts,) = draw([record], [record_rng(0, epoch, record["id"])])
        assert texts == draw([record], [record_rng(0, epoch, record["id"])])[0]
        seen[texts.short] += 1
    assert set(seen) == {"cat 0", "the cat 0", "one cat 0"}
    assert 70 < seen["cat 0"] < 130


def test_a_strategy_takes_the_options_that_it_has() -> None:
    config = parse_arguments("--captions neighbours --num-long-texts 2 --num-sentences 0".split())
    assert config.draw() == NeighbourTexts(2, 0)
    assert TrainingConfig(num_sentences=1, captioners=[1]).draw() == SubCaptions(num_sentences=1, captioners=(1,))
    for flags, word in (("neighbours --captioners 0", "captioners"), ("words", "captions")):
        with pytest.raises(ValueError, match=word):
            parse_arguments(["--captions", *flags.split()])
