"""Roles of captions: the short text that `mixed` draws, and the negatives, regions and tags of a batch."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

from lotlip_hf import LoTLIPProcessor
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.record import RecordError, record_rng, texts_digest
from lotlip_hf.data.records import MissingColumn, load_records
from lotlip_hf.data.sampling import Mixed, SubCaptions, WholeCaptions
from lotlip_hf.images import official_image_processor
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.training.config import parse_arguments

LONG = ["A cat sleeps. It is grey. It dreams. It purrs."]


def record(number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "short_caption": "raw caption", "long_captions": LONG, **fields}


def short_texts(number: int, seed: int = 3, epoch: int = 0, options: Any = None, **fields: Any) -> list[str]:
    records: list[Any] = [record(index, **fields) for index in range(number)]
    texts = Mixed(**(options or {}))(records, [record_rng(seed, epoch, one["id"]) for one in records])
    return [each.short for each in texts]


# Five captions, each with a probability of a fifth, are LaCLIP's; a half is VeCLIP's.
@pytest.mark.parametrize(("number", "probability"), [(4, 0.2), (1, 0.5), (2, 0.0), (2, 1.0)])
def test_shares_of_draws(number: int, probability: float) -> None:
    rewrites = [f"rewrite number {index}" for index in range(number)]
    drawn = Counter(short_texts(10_000, rewrites=rewrites, options={"short_probability": probability}))
    assert set(drawn) <= {"raw caption", *rewrites}
    assert drawn["raw caption"] / 10_000 == pytest.approx(probability, abs=0.015)
    for rewrite in rewrites:
        assert drawn[rewrite] / 10_000 == pytest.approx((1 - probability) / number, abs=0.015)


def test_a_draw_depends_on_seed_epoch_and_record_alone() -> None:
    fields = {"rewrites": ["a cat", "the cat", "one cat"]}
    first = short_texts(50, **fields)
    assert short_texts(60, **fields)[:50] == first
    assert first != short_texts(50, seed=4, **fields)
    assert first != short_texts(50, epoch=1, **fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rewrites": ["cat", " cat "]}, {"raw caption"}),  # fewer than two words
        ({"rewrites": ["cat", "a cat"]}, {"raw caption", "a cat"}),
        ({}, {"It is grey", "A cat sleeps", "It dreams", "It purrs"}),
        ({"long_captions": ["Sleeping. Purring."]}, {"raw caption"}),
        ({"long_captions": [""]}, {"raw caption"}),
        ({"long_captions": []}, {"raw caption"}),
    ],
)
def test_what_a_short_text_is_drawn_from(fields: dict[str, Any], expected: set[str]) -> None:
    for number in (0, 2):
        options = {"short_probability": 0.0, "num_sentences": 1, "num_long_texts": number}
        assert set(short_texts(300, options=options, **fields)) == expected


def test_long_texts_are_those_of_sub_captions() -> None:
    records: list[Any] = [record(index, rewrites=["a cat"]) for index in range(20)]
    mixed, plain = (
        strategy(2, 1, sentence_order="shuffled")(records, [record_rng(0, 0, one["id"]) for one in records])
        for strategy in (Mixed, SubCaptions)
    )
    assert [each.long for each in mixed] == [each.long for each in plain]
    assert {each.short for each in mixed} == {"raw caption", "a cat"}


def test_options_of_mixed(tmp_path: Path) -> None:
    flags = "--data rows.jsonl --captions mixed --short-probability 0.2 --num-long-texts 0".split()
    config = parse_arguments(flags)
    assert config.draw() == Mixed(num_long_texts=0, short_probability=0.2)
    for argv in (["--short-probability", "0.2"], [*flags, "--short-probability", "1.5"], ["--num-negatives", "0"]):
        with pytest.raises(ValueError, match=r"short.probability|num.negatives"):
            parse_arguments(argv)
    # The short text may come from a long caption, but the data need not have any.
    path = tmp_path / "rows.jsonl"
    for column, long in (("long_captions", ["A long one."]), ("other", [])):
        path.write_text(f'{{"image": "a.png", "short_caption": "a", "{column}": ["A long one."]}}\n')
        assert load_records(path, config.column_mapping())[0]["long_captions"] == long
    path.write_text('{"image": "a.png"}\n')
    with pytest.raises(MissingColumn):
        load_records(path, config.column_mapping())


# Negatives and tags


def pictured(processor: LoTLIPProcessor, **fields: list[Any]) -> list[dict[str, Any]]:
    names = ("image", "short_caption", "long_captions", "id")
    records = [{name: row[name] for name in names} for row in scenes_dataset(4, image_size=32)]
    return [{**one, **{name: values[index] for name, values in fields.items()}} for index, one in enumerate(records)]


NEGATIVES = [["a dog", "two dogs", "no dog"], ["a dog"], None, ["", " ", None]]


@pytest.mark.parametrize("num_long_texts", [0, 2])
def test_negatives_ride_behind_the_long_texts(num_long_texts: int, processor: LoTLIPProcessor) -> None:
    records = pictured(processor, negatives=NEGATIVES)
    draw = SubCaptions(num_long_texts)
    seen = set()
    for epoch in range(12):
        collators = [LoTLIPCollator(processor, draw, num_negatives=2, frozen=frozen) for frozen in ((), ("text",))]
        for collator in collators:
            collator.set_epoch(epoch)
        batch, frozen = (collator(records) for collator in collators)
        assert batch["negative_mask"].tolist() == [[True, True], [True, False], [False, False], [False, False]]
        assert torch.equal(batch["negative_mask"], frozen["negative_mask"])
        texts = frozen["texts"]
        own = [row[1 + num_long_texts :] for row in texts]
        assert len(set(own[0])) == 2
        assert set(own[0]) <= set(NEGATIVES[0])
        assert own[1:] == [
            ["a dog", records[1]["short_caption"]],
            *([one["short_caption"]] * 2 for one in records[2:]),
        ]
        seen |= set(own[0])
        long = processor(text=[row[1:] for row in texts], return_tensors="pt")
        assert torch.equal(batch["long_input_ids"], long["input_ids"])
        assert torch.equal(batch["long_attention_mask"], long["attention_mask"])
        # The other texts and the patches are those of a step without negatives.
        plain = LoTLIPCollator(processor, draw, return_texts=True, patch_dropout=0.5, patch_size=8)
        plain.set_epoch(epoch)
        assert [row[: 1 + num_long_texts] for row in texts] == plain(records)["texts"]
        plain.num_negatives = 2
        both = plain(records)
        plain.num_negatives = 0
        assert torch.equal(both["kept_patches"], plain(records)["kept_patches"])
    assert seen == set(NEGATIVES[0])


@pytest.mark.parametrize("splitter", ["sentences", "full_stops"])
def test_a_negative_has_the_form_of_the_long_texts(splitter: Any) -> None:
    """A full stop at the end alone would tell it from them."""
    caption = "A cat sleeps.\nIt is 3.5 feet long! Does it dream?  It purrs."
    one: Any = record(long_captions=[caption])
    for draw in (SubCaptions(1, 0, splitter=splitter), WholeCaptions(splitter=splitter)):
        assert draw.negative(one, caption, Random(0)) == draw([one], [Random(0)])[0].long[0]
    assert SubCaptions(0).negative(one, caption, Random(0)) == caption  # the short caption is not split


def test_a_negative_sub_caption_has_a_false_sentence() -> None:
    one: Any = record(long_captions=[LONG[0], "It has a tail. It is soft."])
    false = "A cat sleeps. It is grey. It runs. It purrs. It is soft."
    draw = SubCaptions(1, 2)
    drawn = {draw.negative(one, false, Random(seed)) for seed in range(40)}
    assert drawn == {"It is grey. It runs", "It runs. It purrs"}
    shuffled = SubCaptions(1, 2, sentence_order="shuffled")
    assert len({shuffled.negative(one, false, Random(seed)) for seed in range(40)}) == 4
    all_true = {draw.negative(one, LONG[0], Random(seed)) for seed in range(40)}
    assert all_true == {"A cat sleeps. It is grey", "It is grey. It dreams", "It dreams. It purrs"}
    assert SubCaptions(1, 9).negative(one, "A dog.", Random(0)) == "A dog"
    assert draw.negative(one, "...", Random(0)) == "..."  # has no sentence


def test_regions_ride_behind_the_negatives(processor: LoTLIPProcessor) -> None:
    """A region without a text is none. The other texts are those of a step without regions."""
    boxes = {"red": [0, 0, 0.5, 0.5], "blue": [0.5, 0, 1, 1], "green": [0, 0.25, 1, 1]}
    known = [{"box": box, "text": text} for text, box in boxes.items()]
    records = pictured(
        processor, negatives=NEGATIVES, regions=[known, [known[1], {**known[0], "text": " "}], [], None]
    )
    seen = set()
    for epoch in range(12):
        collators = [
            LoTLIPCollator(processor, num_negatives=1, num_regions=number, return_texts=True) for number in (2, 0)
        ]
        for collator in collators:
            collator.set_epoch(epoch)
        batch, plain = (collator(records) for collator in collators)
        assert batch["box_mask"].tolist() == [[True, True], [True, False], [False, False], [False, False]]
        assert [row[:-2] for row in batch["texts"]] == plain["texts"]
        phrases = [row[-2:] for row in batch["texts"]]
        assert len(set(phrases[0])) == 2
        assert phrases[1:] == [["blue", records[1]["short_caption"]], *([r["short_caption"]] * 2 for r in records[2:])]
        expected = [[boxes.get(text, [0, 0, 1, 1]) for text in row] for row in phrases]
        assert torch.equal(batch["boxes"], torch.tensor(expected, dtype=torch.float32))
        long = processor(text=[row[1:] for row in batch["texts"]], return_tensors="pt")
        assert torch.equal(batch["long_input_ids"], long["input_ids"])
        seen |= set(phrases[0])
    assert seen == set(boxes)


def white_part(image: torch.Tensor) -> list[float]:
    """The box of the white pixels of an image [3, H, W]."""
    white = image.mean(0) > image.mean(0).min() + (image.max() - image.min()) / 2
    sides = [white.any(axis).nonzero().squeeze(1) for axis in (0, 1)]
    (x0, x1), (y0, y1) = ((side[0].item(), side[-1].item() + 1) for side in sides)
    height, width = white.shape
    return [x0 / width, y0 / height, x1 / width, y1 / height]


CROPS: dict[str, Any] = {
    "the released models": official_image_processor(64),
    "a margin": CLIPImageProcessorPil(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64}),
    "a frame": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 64, "width": 64}),
    "squashed, with a margin": CLIPImageProcessorPil(
        size={"height": 96, "width": 72}, crop_size={"height": 64, "width": 64}
    ),
    "not resized": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 64, "width": 64}),
    "squashed": ViTImageProcessorPil(size={"height": 64, "width": 64}),
    "ConvNeXt": ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.8),
}


@pytest.mark.parametrize("kind", CROPS)
@pytest.mark.parametrize("size", [(128, 96), (96, 128), (100, 100)])
def test_boxes_are_those_of_the_image_that_the_model_sees(
    kind: str, size: tuple[int, int], processor: LoTLIPProcessor
) -> None:
    """A region whose centre is outside of the crop is left out."""
    image = Image.new("RGB", size, "black")
    box = [0.375, 0.375, 0.75, 0.625]
    image.paste("white", tuple(round(value * side) for value, side in zip(box, (*size, *size), strict=True)))
    regions = [{"box": box, "text": "white"}, {"box": [0, 0, 0.02, 0.02], "text": "corner"}]
    record = {"image": image, "short_caption": "a", "long_captions": ["a"], "id": "a", "regions": regions}
    collator = LoTLIPCollator(LoTLIPProcessor(CROPS[kind], processor.tokenizer), num_regions=2)
    batch = collator([record])
    found = dict(zip(batch["region_keys"][0].tolist(), batch["boxes"][0].tolist(), strict=True))
    expected = white_part(batch["pixel_values"][0])
    assert found[texts_digest(["white"])] == pytest.approx(expected, abs=2 / 64)
    is_whole = kind in ("squashed", "a frame") or (kind == "the released models" and size == (100, 100))
    assert batch["box_mask"].sum() == 1 + is_whole


def test_tags_are_digests(processor: LoTLIPProcessor) -> None:
    records = pictured(processor, tags=[["Red  star", "blue circle"], ["red star", "a", "b"], [], None])
    tags = LoTLIPCollator(processor, return_tags=True)(records)["tags"]
    assert tags.dtype == torch.int64
    assert tags.shape == (4, 3)
    assert (tags == 0).sum(1).tolist() == [1, 0, 3, 3]
    assert tags[0, 0] == tags[1, 0] != tags[0, 1]
    assert LoTLIPCollator(processor, return_tags=True)(records[2:])["tags"].tolist() == [[0], [0]]


def test_roles_that_no_term_needs_change_nothing(processor: LoTLIPProcessor) -> None:
    roles = {"negatives": NEGATIVES, "tags": [["a"]] * 4, "rewrites": [["b c"]] * 4}
    roles["regions"] = [[{"box": [0, 0, 1, 1], "text": "d"}]] * 4
    batch, plain = (LoTLIPCollator(processor, seed=1)(pictured(processor, **fields)) for fields in (roles, {}))
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[name], plain[name]) for name in batch if name != "return_loss")


@pytest.mark.parametrize(
    "fields",
    [
        {"negatives": "a dog"},
        {"negatives": [1]},
        {"rewrites": {"a": "b"}},
        {"tags": [["a"]]},
        {"regions": [{"box": [0, 0, 2, 1], "text": "a"}]},
        {"regions": [{"box": [0.5, 0, 0.1, 1], "text": "a"}]},
        {"group": 3},
    ],
    ids=str,
)
def test_a_broken_role_is_a_broken_record(fields: dict[str, Any], processor: LoTLIPProcessor) -> None:
    records = pictured(processor)
    records[1] |= fields
    options = {"num_negatives": 1, "return_tags": True}
    with pytest.raises(RecordError, match=next(iter(fields))):
        LoTLIPCollator(processor, **options)(records)
    batch = LoTLIPCollator(processor, on_error="skip", return_ids=True, **options)(records)
    assert batch["counts"]["broken_records"] == 1
    assert batch["negative_mask"].shape == (3, 1)
