"""The index of a folder: only what changed is embedded again, nothing embedded is lost, the best images come first."""

import errno
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from lotlip_hf import Encoder
from lotlip_hf.files import open_regular
from lotlip_hf.loading import load_model
from lotlip_hf.search import ImageIndex, SearchResult, build_index, encode_query
from lotlip_hf.store import EmbeddingStore

Pair = tuple[Any, Any]


def save_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.png", "b.png", "sub/c.png", "sub/deep/d.png", "e.png")):
        save_image(folder / name, number)
    return folder


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files given to the model, in order; to be cleared between calls."""
    names: list[str] = []
    iterate = Encoder.image_rows

    def spy(encoder: Encoder, images: list[Path], **keywords: Any) -> Iterator[Any]:
        names.extend(path.name for path in images)
        return iterate(encoder, images, **keywords)

    monkeypatch.setattr(Encoder, "image_rows", spy)
    return names


def index_of(pair: Pair, photos: Path, **keywords: Any) -> ImageIndex:
    return build_index(Encoder(*pair), photos, progress=False, **keywords)


def vectors_of(index: ImageIndex) -> np.ndarray:
    with index.store as store:
        return store.vectors(index.locations)


def search_folder(pair: Pair, photos: Path, text: str, *, top: int = 5, progress: bool = False) -> list[SearchResult]:
    encoder = Encoder(*pair)
    return build_index(encoder, photos, progress=progress).search(encode_query(encoder, text), top)


def test_an_index_holds_the_images_embeddings(pair: Pair, photos: Path) -> None:
    index = index_of(pair, photos)
    assert index.files == ["a.png", "b.png", "e.png", "sub/c.png", "sub/deep/d.png"]
    assert index.skipped == {}
    expected = Encoder(*pair).encode_images([photos / name for name in index.files], progress=False)
    np.testing.assert_allclose(vectors_of(index), expected.numpy(), atol=1e-6)


def test_search_ranks_as_the_naive_way(pair: Pair, photos: Path) -> None:
    text = "A tram waits. Two passengers are getting on."
    index = index_of(pair, photos)
    scores = Encoder(*pair).encode_images([photos / name for name in index.files], progress=False) @ Encoder(
        *pair
    ).encode_texts([text], progress=False).squeeze(0)
    expected = sorted(zip(scores.tolist(), index.files, strict=True), reverse=True)
    for top in (1, 3, 5, 50):
        results = search_folder(pair, photos, text, top=top)
        assert [result.path for result in results] == [photos / name for _, name in expected[:top]]
        np.testing.assert_allclose(
            [result.score for result in results], [score for score, _ in expected[:top]], atol=1e-5
        )


def test_equal_images_come_by_name(pair: Pair, photos: Path) -> None:
    for name in ("z.png", "sub/z.png", "0.png"):
        shutil.copy(photos / "a.png", photos / name)
    results = search_folder(pair, photos, "anything", top=8)
    copies = [
        result.path.relative_to(photos).as_posix() for result in results if result.path.name in "a.png z.png 0.png"
    ]
    assert copies == ["0.png", "a.png", "sub/z.png", "z.png"]


def test_the_second_search_embeds_nothing(pair: Pair, photos: Path, embedded: list[str], capsys: Any) -> None:
    first = search_folder(pair, photos, "a dog", progress=True)
    assert sorted(embedded) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert "Encoding images: 100%" in capsys.readouterr().err
    embedded.clear()
    assert search_folder(pair, photos, "a dog", progress=True) == first
    assert embedded == []
    assert "Encoding images" not in capsys.readouterr().err


def test_only_new_and_changed_files_are_embedded_again(pair: Pair, photos: Path, embedded: list[str]) -> None:
    index_of(pair, photos)
    embedded.clear()
    save_image(photos / "new.png", 10)
    save_image(photos / "b.png", 11)
    (photos / "e.png").unlink()
    os.utime(photos / "sub" / "c.png", ns=(1, 1))  # another time, the same contents
    index = index_of(pair, photos)
    assert sorted(embedded) == ["b.png", "c.png", "new.png"]
    assert index.files == ["a.png", "b.png", "new.png", "sub/c.png", "sub/deep/d.png"]
    expected = Encoder(*pair).encode_images([photos / name for name in index.files], progress=False)
    np.testing.assert_allclose(vectors_of(index), expected.numpy(), atol=1e-6)
    # A deleted file is not found; when it is back it is not embedded again.
    embedded.clear()
    shutil.move(photos / "a.png", photos.parent / "a.png")
    assert "a.png" not in index_of(pair, photos).files
    shutil.move(photos.parent / "a.png", photos / "a.png")
    assert "a.png" in index_of(pair, photos).files
    assert embedded == []


def test_the_index_is_of_the_model(
    pair: Pair, photos: Path, embedded: list[str], official_checkpoint: Path, tmp_path: Path
) -> None:
    model, processor = pair
    index_of(pair, photos)
    embedded.clear()
    # The same weights from elsewhere: nothing to do.
    elsewhere = shutil.copytree(official_checkpoint, tmp_path / "elsewhere")
    index_of(load_model(elsewhere, device="cpu"), photos)
    assert embedded == []
    # Another text tower makes no difference to images, another image tower does.
    other, _ = load_model(elsewhere, device="cpu")
    with torch.no_grad():
        other.text_projection.weight += 1
    index_of((other, processor), photos)
    assert embedded == []
    with torch.no_grad():
        other.vision_model.backbone.layernorm.bias[0] += 1e-3
    index = index_of((other, processor), photos)
    assert len(embedded) == 5
    expected = Encoder(other, processor).encode_images([photos / name for name in index.files], progress=False)
    np.testing.assert_allclose(vectors_of(index), expected.numpy(), atol=1e-6)
    # Both are kept.
    embedded.clear()
    index_of(pair, photos)
    assert embedded == []


@pytest.mark.slow
def test_fingerprints(pair: Pair, official_checkpoint: Path) -> None:
    model, processor = pair
    image, text = Encoder(model, processor).fingerprint("image"), Encoder(model, processor).fingerprint("text")
    assert len({image, text}) == 2
    assert len(image) == len(text) == 32

    def changed(change: Any) -> tuple[bool, bool]:
        other_model, other_processor = load_model(official_checkpoint, device="cpu")
        with torch.no_grad():
            other_model = change(other_model, other_processor) or other_model
        return (
            Encoder(other_model, other_processor).fingerprint("image") != image,
            Encoder(other_model, other_processor).fingerprint("text") != text,
        )

    assert changed(lambda model, processor: None) == (False, False)
    assert changed(lambda model, processor: model.train()) == (False, False)
    assert changed(lambda model, processor: processor.tokenizer(["used"], truncation=True, padding=True) and None) == (
        False,
        False,
    )
    assert changed(lambda model, processor: model.logit_scale.add_(1) and None) == (False, False)
    assert changed(lambda model, processor: model.to(torch.bfloat16)) == (True, True)
    assert changed(lambda model, processor: setattr(model.config.vision_config, "pooling", "mean")) == (True, False)
    assert changed(lambda model, processor: setattr(processor.image_processor, "image_mean", [0, 0, 0])) == (
        True,
        False,
    )
    assert changed(lambda model, processor: setattr(processor.tokenizer, "model_max_length", 20)) == (False, True)
    assert changed(lambda model, processor: processor.tokenizer.add_tokens(["lotlip"]) and None) == (False, True)
    weight = "backbone.encoder.layer.1.output.dense.weight"
    assert changed(lambda model, processor: model.text_model.get_parameter(weight)[0, 0].add_(1) and None) == (
        False,
        True,
    )


def test_bad_images_are_skipped_named_and_not_read_again(pair: Pair, photos: Path, embedded: list[str]) -> None:
    (photos / "text.jpg").write_text("no image")
    (photos / "sub" / "empty.png").touch()
    (photos / "broken.png").symlink_to("nowhere")
    expected = {"broken.png", "sub/empty.png", "text.jpg"}
    index = index_of(pair, photos)
    assert index.skipped.keys() == expected
    assert len(index.files) == 5
    embedded.clear()
    assert index_of(pair, photos).skipped.keys() == expected
    assert embedded == []
    save_image(photos / "sub" / "empty.png", 20)
    index = index_of(pair, photos)
    assert embedded == ["empty.png"]
    assert "sub/empty.png" in index.files
    assert sorted(index.skipped) == ["broken.png", "text.jpg"]


def test_what_cannot_be_read_now_is_tried_again(
    pair: Pair, photos: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> BinaryIO:
        if path.endswith("b.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_regular(path)

    with monkeypatch.context() as context:
        context.setattr("lotlip_hf.images.open_regular", refuse)
        assert index_of(pair, photos).skipped == {"b.png": "cannot be opened (Permission denied)"}
    embedded.clear()
    index = index_of(pair, photos)
    assert embedded == ["b.png"]
    assert index.skipped == {}


def test_folders_without_images(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match="empty"):
        index_of(pair, tmp_path / "empty")
    assert not (tmp_path / "empty" / ".lotlip").exists()
    with pytest.raises(NotADirectoryError, match="missing"):
        index_of(pair, tmp_path / "missing")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match="a.jpg"):
        index_of(pair, tmp_path / "bad")


def test_an_index_elsewhere(pair: Pair, photos: Path, embedded: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other" / "photos"
    save_image(other / "a.png", 30)
    first = index_of(pair, photos, index_folder=tmp_path / "indexes")
    second = index_of(pair, other, index_folder=tmp_path / "indexes")
    assert not (photos / ".lotlip").exists()
    assert len(embedded) == 6
    embedded.clear()
    assert index_of(pair, photos, index_folder=tmp_path / "indexes").files == first.files
    assert index_of(pair, other, index_folder=tmp_path / "indexes").files == second.files == ["a.png"]
    assert embedded == []


def test_a_folder_that_cannot_be_written_to(pair: Pair, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def read_only(path: Path, *arguments: Any, **keywords: Any) -> None:
        if ".lotlip" in path.parts:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OSError, match="--index"):
        index_of(pair, photos)
    assert len(index_of(pair, photos, index_folder=photos.parent / "index").files) == 5


def test_wrong_queries_are_named(pair: Pair, photos: Path) -> None:
    index = index_of(pair, photos)
    with pytest.raises(ValueError, match="top"):
        index.search(torch.zeros(16), top=0)
    with pytest.raises(ValueError, match="query_embedding"):
        index.search(torch.zeros(1, 16))
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="description"):
            search_folder(pair, photos, text)


def test_an_interruption_keeps_what_was_embedded(
    pair: Pair, photos: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uninterrupted = index_of(pair, photos, index_folder=photos.parent / "whole")
    embedded.clear()
    iterate = Encoder.image_rows

    def interrupt(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        for number, item in enumerate(iterate(*arguments, **keywords)):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as context:
        context.setattr(Encoder, "image_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index_of(pair, photos)
    assert "3 embeddings" in caplog.text
    embedded.clear()
    index = index_of(pair, photos)
    assert len(embedded) == 2
    assert index.files == uninterrupted.files
    np.testing.assert_allclose(vectors_of(index), vectors_of(uninterrupted), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_large_indexes_are_searched_in_little_memory(tmp_path: Path) -> None:
    rows, width = 30_000, 512  # 61 MB
    generator = np.random.default_rng(0)
    store = EmbeddingStore(tmp_path, "made by", width)
    names = [str(number) for number in range(rows)]
    with store:
        for start in range(0, rows, 100):
            vectors = generator.standard_normal((100, width), dtype=np.float32)
            if start == 12_300:
                query = torch.from_numpy(vectors[45].copy())
            store.add(names[start : start + 100], vectors)
        locations = store.held(names).locations
    index = ImageIndex(tmp_path, names, [locations[name] for name in names], store)
    tracemalloc.start()
    try:
        results = index.search(query, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert results[0].path == tmp_path / "12345"
    assert peak < 8_000_000


def test_another_background_makes_another_index(pair: Pair, photos: Path, embedded: list[str]) -> None:
    model, processor = pair
    clip_art = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clip_art.paste((200, 30, 30, 255), (5, 15, 30, 30))
    clip_art.save(photos / "art.png")
    index_of(pair, photos)
    embedded.clear()
    black = AutoProcessor.from_pretrained(processor.tokenizer.name_or_path)
    black.background = None
    index = index_of((model, black), photos)
    assert len(embedded) == len(index.files) == 6
    assert Encoder(model, black).fingerprint("image") != Encoder(model, processor).fingerprint("image")
    assert Encoder(model, black).fingerprint("text") == Encoder(model, processor).fingerprint("text")
    stock = processor.image_processor(images=[clip_art.convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.get_image_features(**stock).pooler_output, dim=-1)[0]
    row = vectors_of(index)[index.files.index("art.png")]
    np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
