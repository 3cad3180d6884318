"""Encoding: normalised, in order, independent of batches and of the caller's state; wrong checkpoints are refused."""

import copy
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from lotlip_hf import Encoder, LoTLIPModel, LoTLIPProcessor
from lotlip_hf.encoder import FORMAT_VERSIONS
from lotlip_hf.engines.torch import TorchEngine
from lotlip_hf.images import ImageError, load_image
from lotlip_hf.loading import load_model

TEXTS = [
    "a dog",
    "",
    "A tram, painted cream above, waits at a stop. Two passengers are getting on. The clock says ten past four.",
    "one word " * 40,
    "naïve café &amp; 猫",
    "a dog",
    "   ",
    "a literal [SEP] and [CLS] and [Corner0]",
    "long " * 300,
]

Pair = tuple[Any, Any]


@pytest.fixture
def image_files(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    paths = []
    for number in range(11):
        height, width = generator.integers(1, 90, 2)
        paths.append(tmp_path / f"{number:02}.png")
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_texts_are_what_the_model_gives_one_by_one(pair: Pair) -> None:
    model, processor = pair
    encoder = Encoder(model, processor)
    assert isinstance(model, LoTLIPModel)
    assert isinstance(processor, LoTLIPProcessor)
    result = encoder.encode_texts(TEXTS, progress=False)
    assert result.shape == (len(TEXTS), 16)
    assert result.dtype == torch.float32
    assert result.device.type == "cpu"
    for text, embedding in zip(TEXTS, result, strict=True):
        inputs = processor.tokenizer([text], truncation=True, verbose=False, return_tensors="pt")
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output[0], dim=0)
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6, rtol=0)
    assert (result[0] - result[2]).abs().max() > 1e-3


def test_images_are_what_the_model_gives_one_by_one(pair: Pair, image_files: list[Path]) -> None:
    model, processor = pair
    encoder = Encoder(model, processor)
    result = encoder.encode_images(image_files, progress=False)
    assert result.shape == (len(image_files), 16)
    assert result.dtype == torch.float32
    for path, embedding in zip(image_files, result, strict=True):
        inputs = processor(images=[Image.open(path).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output[0], dim=0)
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)
    assert (result[0] - result[1]).abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_embeddings_do_not_depend_on_batches(
    pair: Pair, image_files: list[Path], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(*pair)
    texts = encoder.encode_texts(TEXTS, progress=False)
    images = encoder.encode_images(image_files, progress=False)
    batched = encoder.encode_images(image_files, batch_size=batch_size, progress=False)
    torch.testing.assert_close(batched, images, atol=1e-5, rtol=0)
    backwards = encoder.encode_images(image_files[::-1], batch_size=batch_size, progress=False)
    torch.testing.assert_close(backwards.flip(0), images, atol=1e-5, rtol=0)
    monkeypatch.setattr("lotlip_hf.encoder.TEXT_CHUNK", 4)  # several chunks
    batched = encoder.encode_texts(TEXTS, batch_size=batch_size, progress=False)
    torch.testing.assert_close(batched, texts, atol=1e-5, rtol=0)
    backwards = encoder.encode_texts(TEXTS[::-1], batch_size=batch_size, progress=False)
    torch.testing.assert_close(backwards.flip(0), texts, atol=1e-5, rtol=0)


def test_text_batches_keep_to_the_token_budget(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = pair[0], Encoder(*pair)
    shapes: list[torch.Size] = []
    get_text_features = model.get_text_features

    def spy(**inputs: torch.Tensor) -> Any:
        shapes.append(inputs["input_ids"].shape)
        return get_text_features(**inputs)

    monkeypatch.setattr(model, "get_text_features", spy)
    texts = [f"{'word ' * (number % 50)}end" for number in range(300)]
    encoder.encode_texts(texts, batch_size=2, progress=False)
    assert sum(rows for rows, _ in shapes) == 300
    assert max(rows * width for rows, width in shapes) <= 2 * 126
    assert max(rows for rows, _ in shapes) > 15  # short ones go together
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)


def test_little_is_padded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = pair[0], Encoder(*pair)
    shapes: list[torch.Size] = []
    tokens = 0
    get_text_features = model.get_text_features

    def spy(**inputs: torch.Tensor) -> Any:
        nonlocal tokens
        shapes.append(inputs["input_ids"].shape)
        tokens += int(inputs["attention_mask"].sum())
        return get_text_features(**inputs)

    monkeypatch.setattr(model, "get_text_features", spy)
    texts = ["word " * int(length) for length in np.random.default_rng(0).integers(1, 125, 200)]
    encoder.encode_texts(texts, progress=False)
    assert sum(rows * width for rows, width in shapes) < 1.1 * tokens
    assert max(rows * width for rows, width in shapes) <= 2048
    # Not for batches that would be too small; the last has what is left.
    assert min(rows * width for rows, width in shapes[:-1]) >= 1024


def test_texts_tokenised_by_word_are_tokenised_as_by_a_call(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is given the same tensors, whichever way its tokenizer goes."""
    model, encoder = pair[0], Encoder(*pair)
    get_text_features = model.get_text_features
    given: list[dict[str, torch.Tensor]] = []

    def spy(**inputs: torch.Tensor) -> Any:
        given.append(inputs)
        return get_text_features(**inputs)

    monkeypatch.setattr(model, "get_text_features", spy)
    generator = np.random.default_rng(0)
    words = " ".join(TEXTS).split(" ") + ["\u200b", "[MASK]", "Dr.", "“Stop.”"]
    texts = [" ".join(generator.choice(words, generator.integers(0, 160))) for _ in range(60)] + TEXTS
    for arguments in ({}, {"max_length": 20}, {"batch_size": 3}):
        given.clear()
        fast = list(encoder.iterate_texts(texts, **arguments))
        by_word = list(given)
        given.clear()
        with monkeypatch.context() as context:
            context.setattr("lotlip_hf.engines.torch.LoTLIPTokenizer", type("Another", (), {}))
            plain = list(encoder.iterate_texts(texts, **arguments))
        assert [inputs.keys() for inputs in by_word] == [inputs.keys() for inputs in given]
        for ours, expected in zip(by_word, given, strict=True):
            assert ours.pop("pooled_only") is expected.pop("pooled_only") is True
            assert all(torch.equal(ours[name], expected[name]) for name in expected)
        assert [(index, was_cut) for index, _, was_cut in fast] == [(index, was_cut) for index, _, was_cut in plain]
        for (_, row, _), (_, expected, _) in zip(fast, plain, strict=True):
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)
        assert {was_cut for _, _, was_cut in fast} == {True, False}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ["embed 0", "yield 0", "embed 1", "yield 1", "embed 2"]),
        # A device has its next batch before the results of the last are fetched.
        ("cuda", ["embed 0", "embed 1", "yield 0", "embed 2", "yield 1"]),
    ],
)
def test_results_are_fetched_when_the_next_batch_is_under_way(pair: Pair, device: str, expected: list[str]) -> None:
    """In order, each once, and those before a batch that fails as well."""
    events: list[str] = []

    class Failing(TorchEngine):
        def embed(self, *_: Any) -> torch.Tensor:
            number = sum(event.startswith("embed") for event in events)
            events.append(f"embed {number}")
            if number == 2:
                raise RuntimeError("out of memory")
            return torch.eye(4)[number : number + 1]

    Failing.device = device  # pyright: ignore[reportAttributeAccessIssue]
    rows = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for number, (_, embedding, _) in enumerate(
            Encoder.from_engine(Failing(*pair)).iterate_texts(["word " * 120] * 3, batch_size=1)
        ):
            events.append(f"yield {number}")
            rows.append(embedding)
    assert events == expected
    assert torch.equal(torch.stack(rows), torch.eye(4)[:2])


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(pair: Pair, image_files: list[Path], training: bool) -> None:
    model, encoder = pair[0], Encoder(*pair)
    expected = encoder.encode_texts(TEXTS, progress=False)
    try:
        model.train(training)
        model.vision_model.eval()  # a locked tower
        before = [module.training for module in model.modules()]
        # Dropout and corner tokens are for training alone: the result is the same.
        torch.testing.assert_close(encoder.encode_texts(TEXTS, progress=False), expected, atol=1e-6, rtol=0)
        encoder.encode_images(image_files, progress=False)
        assert [module.training for module in model.modules()] == before
        for embeddings in (
            encoder.iterate_images(image_files, batch_size=2),
            encoder.iterate_texts(TEXTS, batch_size=2),
        ):
            for number, _ in enumerate(embeddings):
                assert [module.training for module in model.modules()] == before
                assert torch.is_grad_enabled()
                assert not torch.is_inference_mode_enabled()
                if number == 5:
                    embeddings.close()
            assert [module.training for module in model.modules()] == before
    finally:
        model.eval()


def test_the_mode_is_restored_after_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = pair[0], Encoder(*pair)

    def fail(**inputs: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "get_text_features", fail)
    try:
        model.train()
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder.encode_texts(TEXTS, progress=False)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_embeddings_can_be_trained_on(pair: Pair) -> None:
    encoder = Encoder(*pair)
    embeddings = encoder.encode_texts(TEXTS, progress=False)
    assert not embeddings.requires_grad
    assert not embeddings.is_inference()
    probe = torch.nn.Linear(16, 1)
    probe(embeddings).sum().backward()
    assert probe.weight.grad is not None


def test_the_callers_lists_are_not_changed(pair: Pair, image_files: list[Path]) -> None:
    encoder = Encoder(*pair)
    texts, images = list(TEXTS), list(image_files)
    encoder.encode_texts(texts, batch_size=1, progress=False)
    encoder.encode_images(images, batch_size=2, progress=False)
    assert texts == TEXTS
    assert images == image_files


def test_any_iterable_and_any_source_will_do(pair: Pair, image_files: list[Path]) -> None:
    encoder = Encoder(*pair)
    texts = encoder.encode_texts(TEXTS, progress=False)
    images = encoder.encode_images(image_files, progress=False)
    for same in (tuple(TEXTS), (text for text in TEXTS), dict.fromkeys(TEXTS[:5])):
        result = encoder.encode_texts(same, progress=False)
        torch.testing.assert_close(result, texts[: len(result)], atol=1e-5, rtol=0)
    opened = [Image.open(path) for path in image_files]
    sources: list[Callable[[], Any]] = [
        lambda: (str(path) for path in image_files),
        lambda: tuple(opened),
        lambda: (np.asarray(Image.open(path)) for path in image_files),
        lambda: [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in image_files],
    ]
    for source in sources:
        result = encoder.encode_images(source(), batch_size=4, progress=False)
        torch.testing.assert_close(result, images, atol=1e-5, rtol=0)
    # The same object many times, loaded by PIL on first use.
    again = encoder.encode_images([Image.open(image_files[0])] * 20, batch_size=3, progress=False)
    torch.testing.assert_close(again, images[:1].expand(20, -1), atol=1e-5, rtol=0)


def test_nothing_gives_no_rows(pair: Pair) -> None:
    encoder = Encoder(*pair)
    assert encoder.encode_texts([]).shape == (0, 16)
    assert encoder.encode_images([]).shape == (0, 16)
    assert list(encoder.iterate_texts(iter([]))) == []


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("a dog", TypeError, "`texts`"),
        (None, TypeError, "`texts`"),
        (["a", 3], TypeError, r"texts\[1\]"),
        (["a", "b", None], TypeError, r"texts\[2\]"),
        ([["a", "b"]], TypeError, r"texts\[0\]"),
        (["a", "b\ud800"], ValueError, r"texts\[1\].*Unicode"),
    ],
)
def test_wrong_texts_are_named(pair: Pair, texts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Encoder(*pair).encode_texts(texts, progress=False)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("a.jpg", TypeError, "`images`"),
        (Path("a.jpg"), TypeError, "`images`"),
        (Image.new("RGB", (4, 4)), TypeError, "`images`"),
        (np.zeros((4, 4, 3), dtype=np.uint8), TypeError, "`images`"),
        (7, TypeError, "`images`"),
        ([Image.new("RGB", (4, 4)), None], TypeError, r"images\[1\] must be a path"),
        ([Image.new("RGB", (4, 4)), np.zeros((4, 4))], ImageError, r"images\[1\]: an array must be uint8"),
        (["missing.jpg"], ImageError, r"missing\.jpg: cannot be opened"),
    ],
)
def test_wrong_images_are_named(pair: Pair, images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Encoder(*pair).encode_images(images, progress=False)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, None])
def test_wrong_batch_sizes_are_named(pair: Pair, batch_size: Any) -> None:
    for encode in (Encoder(*pair).encode_texts, Encoder(*pair).encode_images):
        with pytest.raises(ValueError, match="batch_size"):
            encode(["a"], batch_size=batch_size, progress=False)


def test_bad_images_do_not_stop_the_others(pair: Pair, image_files: list[Path]) -> None:
    encoder = Encoder(*pair)
    expected = encoder.encode_images(image_files, progress=False)
    for bad in (0, 3, 10):
        image_files[bad].write_text("no image")
    results = dict(encoder.iterate_images(image_files, batch_size=2))
    assert sorted(results) == list(range(11))
    for index, result in results.items():
        if index in (0, 3, 10):
            assert isinstance(result, ImageError)
            assert str(image_files[index]) in str(result)
        else:
            assert isinstance(result, torch.Tensor)
            torch.testing.assert_close(result, expected[index], atol=1e-5, rtol=0)


def test_texts_that_are_cut_are_counted_and_said_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(*pair)
    texts = ["word " * 124, "word " * 125, "a", "word " * 400]  # 126 tokens with [CLS] and [SEP], 127, 3, 402
    with caplog.at_level(logging.WARNING, "lotlip_hf"):
        encoder.encode_texts(texts, batch_size=1, progress=False)
    assert [record.getMessage() for record in caplog.records] == ["2 of 4 texts were cut at 126 tokens."]
    caplog.clear()
    encoder.encode_texts(texts[:1], progress=False)
    assert caplog.records == []


def test_texts_of_a_million_characters(pair: Pair) -> None:
    encoder = Encoder(*pair)
    result = encoder.encode_texts(["word " * 200_000, "word " * 400], progress=False)
    torch.testing.assert_close(result[0], result[1], atol=1e-5, rtol=0)


def test_progress_is_shown(pair: Pair, image_files: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder(*pair)
    encoder.encode_texts(TEXTS)
    encoder.encode_images(image_files)
    shown = capsys.readouterr()
    assert "Encoding texts: 100%" in shown.err
    assert "9/9" in shown.err
    assert "Encoding images: 100%" in shown.err
    assert "11/11" in shown.err
    assert shown.out == ""
    encoder.encode_texts(TEXTS, progress=False)
    encoder.encode_images(image_files, progress=False)
    assert capsys.readouterr().err == ""


def test_images_are_read_a_few_batches_ahead(
    pair: Pair, image_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many paths there are, few images are in memory: those read and not yet given to the model."""
    model, processor = pair
    lock = threading.Lock()
    waiting, most, encoded = 0, 0, 0
    encoder = Encoder(model, processor)
    load_pixels, get_image_features = encoder.engine.pixels, model.get_image_features

    def counting_load(*arguments: Any, **keywords: Any) -> dict[str, torch.Tensor]:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        return load_pixels(*arguments, **keywords)

    def counting_features(pixel_values: torch.Tensor, **options: Any) -> Any:
        nonlocal waiting, encoded
        with lock:
            waiting -= len(pixel_values)
            encoded += len(pixel_values)
        return get_image_features(pixel_values=pixel_values, **options)

    monkeypatch.setattr(encoder.engine, "pixels", counting_load)
    monkeypatch.setattr(model, "get_image_features", counting_features)

    def endless() -> Iterator[Path]:
        while True:
            yield image_files[0]

    for number, _ in enumerate(encoder.iterate_images(endless(), batch_size=8), 1):
        if number == 400:
            break
    assert encoded == 400
    assert 8 <= most <= 3 * 8


def test_very_long_and_thin_images_take_little_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair
    encoder = Encoder(model, processor)
    generator = np.random.default_rng(0)
    for shape in ((1, 12_001, 3), (12_000, 1, 3), (3, 18_001, 3)):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        seen: list[tuple[int, int]] = []
        call = type(processor.image_processor).__call__

        def spy(self: Any, images: list[Image.Image], seen: list = seen, call: Callable = call, **kwargs: Any) -> Any:
            seen.extend(image.size for image in images)
            return call(self, images, **kwargs)

        with monkeypatch.context() as context:
            context.setattr(type(processor.image_processor), "__call__", spy)
            result = encoder.encode_images([pixels], progress=False)
        assert max(seen[0]) <= 36  # the crop's 32, and what makes rounding the same
        # What the centre crop keeps is the same.
        whole = processor.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model.get_image_features(**whole).pooler_output, dim=1)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_large_jpegs_are_read_for_the_image_processor(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = pair
    encoder = Encoder(model, processor)
    path = tmp_path / "large.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((1201, 903), Image.Resampling.BICUBIC)
    picture.save(path, quality=90)
    seen: list[tuple[int, int]] = []
    call = type(processor.image_processor).__call__

    def spy(self: Any, images: list[Image.Image], **kwargs: Any) -> Any:
        seen.extend(image.size for image in images)
        return call(self, images, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "__call__", spy)
    sources = [path, str(path), path.read_bytes(), *map(load_image, [path])]
    result = encoder.encode_images(sources, progress=False)
    edge = processor.image_processor.size["shortest_edge"]
    assert sorted(seen) == [(edge * 1201 // 903, edge)] * 3 + [picture.size]
    for image, embedding in zip(
        [*[load_image(path, image_processor=processor.image_processor)] * 3, load_image(path)], result, strict=True
    ):
        inputs = processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output[0], dim=0)
        torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(result[:3], result[:1].expand(3, -1), atol=1e-6, rtol=0)
    assert result[0] @ result[3] > 0.9999


def test_embeddings_kept_of_another_way_of_reading_are_not_used(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {modality: Encoder(*pair).fingerprint(modality) for modality in ("image", "text")}
    monkeypatch.setitem(FORMAT_VERSIONS, "image", FORMAT_VERSIONS["image"] - 1)
    assert Encoder(*pair).fingerprint("image") != before["image"]
    assert Encoder(*pair).fingerprint("text") == before["text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_is_that_of_the_tensors(pair: Pair, dtype: torch.dtype) -> None:
    """As when engines gave tensors: indexes that are on disk stay valid."""
    model, processor = copy.deepcopy(pair[0]).to(dtype), pair[1]
    encoder = Encoder(model, processor)
    prefixes = ("vision_model.", "visual_projection.")
    for modality in ("image", "text"):
        settings = {"version": FORMAT_VERSIONS[modality], "modality": modality, **encoder.engine.settings(modality)}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
        for name, weight in sorted(model.state_dict().items()):
            if name != "logit_scale" and name.startswith(prefixes) == (modality == "image"):
                digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
                digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
        assert encoder.fingerprint(modality) == digest.hexdigest()


def test_exif_orientation_is_applied(pair: Pair, tmp_path: Path) -> None:
    encoder = Encoder(*pair)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels, -1))).save(tmp_path / "upright.png")
    result = encoder.encode_images([tmp_path / "turned.png", tmp_path / "upright.png"], progress=False)
    torch.testing.assert_close(result[0], result[1], atol=1e-6, rtol=0)


def test_features_that_are_not_finite_are_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder = pair[0], Encoder(*pair)
    monkeypatch.setattr(
        model, "get_text_features", lambda **inputs: torch.full((len(inputs["input_ids"]), 16), torch.nan)
    )
    with pytest.raises(ValueError, match="dtype"):
        encoder.encode_texts(["a"], progress=False)


def test_half_precision(pair: Pair, official_checkpoint: Path, image_files: list[Path]) -> None:
    half, processor = load_model(official_checkpoint, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    texts, images = (Encoder(half, processor).encode_texts(TEXTS), Encoder(half, processor).encode_images(image_files))
    assert texts.dtype == images.dtype == torch.float32
    assert (texts * Encoder(*pair).encode_texts(TEXTS)).sum(1).min() > 0.98
    assert (images * Encoder(*pair).encode_images(image_files)).sum(1).min() > 0.98


# Stock dual encoders.

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT_TOWER = {**TOWER, "vocab_size": 30522, "max_position_embeddings": 20}
VISION_TOWER = {**TOWER, "image_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def clip_checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP, with BERT's vocabulary: its [SEP] ends a text."""
    torch.manual_seed(0)
    text = {**TEXT_TOWER, "bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION_TOWER, projection_dim=8))
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer", model_max_length=20)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_stock_clip(clip_checkpoint: Path, image_files: list[Path]) -> None:
    model, processor = load_model(clip_checkpoint, device="cpu")
    assert isinstance(model, CLIPModel)
    texts = Encoder(model, processor).encode_texts(TEXTS, progress=False)
    images = Encoder(model, processor).encode_images(image_files, progress=False)
    assert texts.shape == (len(TEXTS), 8)
    assert images.shape == (len(image_files), 8)
    for text, embedding in zip(TEXTS, texts, strict=True):
        inputs = processor.tokenizer([text], truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output[0], dim=0)
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)


def test_stock_siglip_texts_have_the_full_length(golden: Path) -> None:
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config=SiglipTextConfig(**TEXT_TOWER, pad_token_id=0), vision_config=SiglipVisionConfig(**VISION_TOWER)
    )
    model = SiglipModel(config).eval()
    tokenizer = BertTokenizer.from_pretrained(golden / "tokenizer", model_max_length=20)
    tokenizer.model_input_names = ["input_ids"]
    texts = Encoder(model, tokenizer).encode_texts(TEXTS, batch_size=2, progress=False)
    inputs = tokenizer(TEXTS, truncation=True, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=1)
    torch.testing.assert_close(texts, expected, atol=1e-5, rtol=0)


def test_a_tokenizer_without_a_length_uses_the_models(clip_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, processor = load_model(clip_checkpoint, device="cpu")
    processor.tokenizer.model_max_length = int(1e30)
    Encoder(model, processor).encode_texts(["word " * 100], progress=False)
    assert "1 of 1 texts were cut at 20 tokens." in caplog.text
    model.config.text_config.max_position_embeddings = 10**9
    with pytest.raises(ValueError, match="model_max_length"):
        Encoder(model, processor).encode_texts(["word"], progress=False)


# Wrong checkpoints.


@pytest.fixture
def checkpoint(official_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(official_checkpoint, tmp_path / "checkpoint"))


def edit_weights(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    edit(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("text_projection.weight"), "1 missing: text_projection.weight"),
        (lambda weights: weights.pop("logit_scale"), "1 missing: logit_scale"),
        (lambda weights: weights.update({"foo.bar": torch.zeros(2)}), "1 unexpected: foo.bar"),
        (lambda weights: weights.update({"text_model.extra": torch.zeros(2)}), "1 unexpected: text_model.extra"),
        (
            lambda weights: weights.update({"text_projection.weight": torch.zeros(3, 3)}),
            "1 of another shape: text_projection.weight",
        ),
        (
            lambda weights: (weights.clear(), weights.update({"a": torch.zeros(1)})),
            r"missing: .*, \.\.\.; 1 unexpected: a",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(checkpoint, edit)
    with pytest.raises(ValueError, match=f"checkpoint: .*LoTLIPModel .*{message}"):
        load_model(checkpoint)
    assert caplog.records == []  # said once


def test_damaged_weights_are_named(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="checkpoint: .*weights"):
        load_model(checkpoint)


def test_other_architectures_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    BertModel(BertConfig(**TEXT_TOWER)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="'bert'"):
        load_model(tmp_path / "bert")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(ValueError, match="'lotlip_text_model'"):
        load_model(checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ValueError, match="unheard_of"):
        load_model(checkpoint)


def test_what_is_no_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(checkpoint / "model.safetensors")
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json"):
        shutil.move(checkpoint / name, tmp_path / name)
        with pytest.raises((OSError, ValueError), match="checkpoint"):
            load_model(checkpoint)
        shutil.move(tmp_path / name, checkpoint / name)
    assert isinstance(load_model(checkpoint, device="cpu")[0], LoTLIPModel)


def test_devices_that_are_not_there_are_named(official_checkpoint: Path) -> None:
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(ValueError, match=f"`device` '{device}'"):
            load_model(official_checkpoint, device=device)


def test_loading_leaves_transformers_verbosity(official_checkpoint: Path) -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    model, _ = load_model(str(official_checkpoint), device="cpu", dtype=torch.float32)
    assert transformers_logging.get_verbosity() == before
    assert not model.training


def test_a_checkpoint_that_is_nowhere_is_named() -> None:
    with pytest.raises(OSError, match="no-such-checkpoint"):
        load_model("no-such-checkpoint")
