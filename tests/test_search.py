"""The index of a folder: only what changed is embedded again, nothing embedded is lost, the best images come first."""

import errno
import json
import logging
import os
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from transformers import AutoProcessor

from lotlip_hf import Encoder, search
from lotlip_hf.files import open_regular
from lotlip_hf.grid import save_grid
from lotlip_hf.loading import load_model
from lotlip_hf.search import ImageIndex, SearchResult, build_index, search_folder
from lotlip_hf.store import EmbeddingStore

Pair = tuple[Any, Any]


@pytest.fixture(scope="module")
def pair(official_checkpoint: Path) -> Pair:
    return load_model(official_checkpoint, device="cpu")


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
    iterate = search.iterate_image_embeddings

    def spy(model: Any, processor: Any, images: list[Path], **keywords: Any) -> Iterator[Any]:
        names.extend(path.name for path in images)
        return iterate(model, processor, images, **keywords)

    monkeypatch.setattr(search, "iterate_image_embeddings", spy)
    return names


def index_of(pair: Pair, photos: Path, **keywords: Any) -> ImageIndex:
    return build_index(Encoder(*pair), photos, progress=False, **keywords)


def store_folder(photos: Path) -> Path:
    (folder,) = (photos / ".lotlip").iterdir()
    return folder


def test_an_index_holds_the_images_embeddings(pair: Pair, photos: Path) -> None:
    index = index_of(pair, photos)
    assert index.files == ["a.png", "b.png", "e.png", "sub/c.png", "sub/deep/d.png"]
    assert index.skipped == {}
    expected = Encoder(*pair).encode_images([photos / name for name in index.files], progress=False)
    np.testing.assert_allclose(index.embeddings[index.rows], expected.numpy(), atol=1e-6)
    assert isinstance(index.embeddings, np.memmap)


def test_search_ranks_as_the_naive_way(pair: Pair, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "A tram waits. Two passengers are getting on."
    index = index_of(pair, photos)
    scores = Encoder(*pair).encode_images([photos / name for name in index.files], progress=False) @ Encoder(
        *pair
    ).encode_texts([text], progress=False).squeeze(0)
    expected = sorted(zip(scores.tolist(), index.files, strict=True), reverse=True)
    monkeypatch.setattr(search, "SEARCH_BLOCK", 2)
    for top in (1, 3, 5, 50):
        results = search_folder(*pair, photos, text, top=top, progress=False)
        assert [result.path for result in results] == [photos / name for _, name in expected[:top]]
        np.testing.assert_allclose(
            [result.score for result in results], [score for score, _ in expected[:top]], atol=1e-5
        )


def test_equal_images_come_by_name(pair: Pair, photos: Path) -> None:
    for name in ("z.png", "sub/z.png", "0.png"):
        shutil.copy(photos / "a.png", photos / name)
    results = search_folder(*pair, photos, "anything", top=8, progress=False)
    copies = [
        result.path.relative_to(photos).as_posix() for result in results if result.path.name in "a.png z.png 0.png"
    ]
    assert copies == ["0.png", "a.png", "sub/z.png", "z.png"]


def test_the_second_search_embeds_nothing(pair: Pair, photos: Path, embedded: list[str], capsys: Any) -> None:
    first = search_folder(*pair, photos, "a dog", top=5)
    assert sorted(embedded) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert "Encoding images: 100%" in capsys.readouterr().err
    embedded.clear()
    assert search_folder(*pair, photos, "a dog", top=5) == first
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
    np.testing.assert_allclose(index.embeddings[index.rows], expected.numpy(), atol=1e-6)
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
    np.testing.assert_allclose(index.embeddings[index.rows], expected.numpy(), atol=1e-6)
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
    expected = {
        "broken.png": "cannot be opened (No such file or directory)",
        "sub/empty.png": "the file is empty",
        "text.jpg": "not an image in a format that PIL reads",
    }
    index = index_of(pair, photos)
    assert index.skipped == expected
    assert len(index.files) == 5
    embedded.clear()
    assert index_of(pair, photos).skipped == expected
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
    with pytest.raises(ValueError, match=r"empty: no images in this folder or below it \(files that end in .*\.jpg"):
        index_of(pair, tmp_path / "empty")
    assert not (tmp_path / "empty" / ".lotlip").exists()
    with pytest.raises(NotADirectoryError, match="missing: no such folder"):
        index_of(pair, tmp_path / "missing")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"bad: none of its 1 images can be read \(a.jpg: not an image"):
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
    with pytest.raises(OSError, match=r"photos/\.lotlip.* \(Read-only file system\); name a folder .* --index DIR"):
        index_of(pair, photos)
    assert len(index_of(pair, photos, index_folder=photos.parent / "index").files) == 5


def test_wrong_queries_are_named(pair: Pair, photos: Path) -> None:
    index = index_of(pair, photos)
    with pytest.raises(ValueError, match="`top` must be at least 1, got 0"):
        index.search(torch.zeros(16), top=0)
    with pytest.raises(ValueError, match=r"`query_embedding` must have the shape \[16\] of the index, got \[1, 16\]"):
        index.search(torch.zeros(1, 16))
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="The description to search for is empty"):
            search_folder(*pair, photos, text, progress=False)


def test_an_interruption_keeps_what_was_embedded(
    pair: Pair, photos: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uninterrupted = index_of(pair, photos, index_folder=photos.parent / "whole")
    embedded.clear()
    iterate = search.iterate_image_embeddings

    def interrupt(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        for number, item in enumerate(iterate(*arguments, **keywords)):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as context:
        context.setattr(search, "iterate_image_embeddings", interrupt)
        with pytest.raises(KeyboardInterrupt):
            index_of(pair, photos, batch_size=1)
    assert "Interrupted: 3 embeddings are kept" in caplog.text
    embedded.clear()
    index = index_of(pair, photos)
    assert len(embedded) == 2
    assert index.files == uninterrupted.files
    np.testing.assert_allclose(
        index.embeddings[index.rows], uninterrupted.embeddings[uninterrupted.rows], atol=1e-6, rtol=0
    )


def test_an_index_is_compacted_when_most_of_it_is_out_of_date(
    pair: Pair, photos: Path, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "MIN_DEAD_ROWS", 2)
    index_of(pair, photos)
    (photos / "bad.png").write_text("no image")
    embeddings = store_folder(photos) / "embeddings-0.f32"
    assert embeddings.stat().st_size == 5 * 16 * 4
    for name in ("a.png", "b.png", "e.png"):
        (photos / name).unlink()
    index = index_of(pair, photos)
    assert index.files == ["sub/c.png", "sub/deep/d.png"]
    expected = Encoder(*pair).encode_images([photos / name for name in index.files], progress=False)
    np.testing.assert_allclose(index.embeddings[index.rows], expected.numpy(), atol=1e-6)
    assert not embeddings.exists()
    assert (store_folder(photos) / "embeddings-1.f32").stat().st_size == 2 * 16 * 4
    embedded.clear()
    assert index_of(pair, photos).skipped == {"bad.png": "not an image in a format that PIL reads"}
    assert embedded == []
    save_image(photos / "new.png", 40)
    index = index_of(pair, photos)
    expected = Encoder(*pair).encode_images([photos / name for name in index.files], progress=False)
    np.testing.assert_allclose(index.embeddings[index.rows], expected.numpy(), atol=1e-6)


@pytest.mark.slow
def test_large_indexes_are_searched_in_little_memory(tmp_path: Path) -> None:
    rows, width = 30_000, 512  # 61 MB
    generator = np.random.default_rng(0)
    with open(tmp_path / "embeddings.f32", "wb") as file:
        for _ in range(30):
            file.write(generator.standard_normal((1000, width), dtype=np.float32).tobytes())
    embeddings = np.memmap(tmp_path / "embeddings.f32", np.float32, "r", shape=(rows, width))
    index = ImageIndex(tmp_path, [str(number) for number in range(rows)], np.arange(rows), embeddings)
    query = torch.from_numpy(embeddings[12_345].copy())
    tracemalloc.start()
    try:
        results = index.search(query, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert results[0].path == tmp_path / "12345"
    assert peak < 4_000_000


# The store.


def filled_store(folder: Path) -> None:
    with EmbeddingStore(folder) as store:
        store.append("bad", None, error="no image")
        for number in range(4):
            store.append(f"file {number}", np.full(3, number, dtype=np.float32), size=number)
        store.append("file 0", np.full(3, 9, dtype=np.float32), size=9)


def test_a_store_keeps_the_latest_entry_of_each_key(tmp_path: Path) -> None:
    filled_store(tmp_path)
    with EmbeddingStore(tmp_path) as store:
        assert store.entries["bad"] == {"error": "no image"}
        assert store.entries["file 0"] == {"size": 9, "row": 4}
        assert store.entries["file 3"] == {"size": 3, "row": 3}
        rows = store.embeddings()
    assert rows.tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3, [3.0] * 3, [9.0] * 3]
    with EmbeddingStore(tmp_path) as store, pytest.raises(ValueError, match=r"expected an embedding of shape \[3\]"):
        store.append("wide", np.zeros(4, dtype=np.float32))
    with pytest.raises(RuntimeError, match="enter the store first"):
        EmbeddingStore(tmp_path).append("a", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["entries.jsonl", "embeddings-0.f32"])
def test_a_store_cut_off_anywhere_keeps_what_is_whole(name: str, tmp_path: Path) -> None:
    filled_store(tmp_path / "whole")
    data = (tmp_path / "whole" / name).read_bytes()
    for length in range(len(data)):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "cut"))
        (folder / name).write_bytes(data[:length])
        with EmbeddingStore(folder) as store:
            if name.endswith(".f32"):
                assert store.rows == length // 12
            else:
                whole = [json.loads(line) for line in data[:length].splitlines(keepends=True) if line.endswith(b"\n")]
                assert store.rows == sum("row" in entry for entry in whole)
                assert set(store.entries) == {entry["key"] for entry in whole if "key" in entry}
            store.append("after", np.full(3, 7, dtype=np.float32))
        with EmbeddingStore(folder) as store:
            assert store.embeddings()[store.entries["after"]["row"]].tolist() == [7, 7, 7]
            for key, entry in store.entries.items():
                if key.startswith("file"):
                    assert store.embeddings()[entry["row"]].tolist() == [entry["size"]] * 3
        shutil.rmtree(folder)


def test_a_damaged_line_ends_what_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled_store(tmp_path)
    lines = (tmp_path / "entries.jsonl").read_bytes().splitlines(keepends=True)
    for damage in (b"\x00\xff\n", b"[]\n", b"{}\n", b'{"key": "file 2", "row": 7}\n'):
        (tmp_path / "entries.jsonl").write_bytes(b"".join([*lines[:4], damage, *lines[4:]]))
        caplog.clear()
        with EmbeddingStore(tmp_path) as store:
            assert list(store.entries) == ["bad", "file 0", "file 1"]
            assert store.rows == 2
        assert "bytes at the end are incomplete" in caplog.text


def test_compaction_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_store(tmp_path)
    replace = os.replace

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context, EmbeddingStore(tmp_path) as store:
        context.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            store.compact(["file 0"])
    with EmbeddingStore(tmp_path) as store:
        assert len(store.entries) == 5
        assert store.embeddings()[store.entries["file 0"]["row"]].tolist() == [9, 9, 9]

    def replace_and_stop(*arguments: Any) -> None:
        replace(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as context, EmbeddingStore(tmp_path) as store:
        context.setattr(os, "replace", replace_and_stop)
        with pytest.raises(KeyboardInterrupt):
            store.compact(["file 0", "bad"])
    with EmbeddingStore(tmp_path) as store:
        assert store.entries == {"file 0": {"size": 9, "row": 0}, "bad": {"error": "no image"}}
        assert store.embeddings().tolist() == [[9, 9, 9]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings-1.f32", "entries.jsonl", "lock"]


def test_a_second_writer_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled_store(tmp_path)
    lock = FileLock(tmp_path / "lock")
    lock.acquire()
    entered: list[int] = []

    def write() -> None:
        with EmbeddingStore(tmp_path) as store:
            entered.append(store.rows)

    thread = threading.Thread(target=write)
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join(timeout=1.5)
        assert thread.is_alive()
        assert "Waiting for another process" in caplog.text
    lock.release()
    thread.join(timeout=20)
    assert entered == [5]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    filled_store(tmp_path / "store")
    with EmbeddingStore(tmp_path / "store") as store:
        monkeypatch.setattr(store, "_embeddings_file", Full())
        with pytest.raises(OSError, match=r"store: cannot write \(No space left on device\)"):
            store.append("a", np.zeros(3, dtype=np.float32))
    with EmbeddingStore(tmp_path / "store") as store:
        assert store.rows == 5


# The picture.


@pytest.mark.slow
def test_the_grid_shows_every_result(tmp_path: Path) -> None:
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "orange"]
    results = []
    for number, colour in enumerate(colours):
        name = "a very long name " * 8 if number == 1 else str(number)
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (1, 500) if number == 2 else (40, 30), colour).save(path)
        results.append(SearchResult(path, 0.5 - number / 10))
    results.append(SearchResult(tmp_path / "gone.png", -0.5))
    long_text = "A long description with 猫 and é. " * 60
    for count in (1, 4, 8):
        output = tmp_path / f"grid{count}.png"
        save_grid(results[:count], output, long_text)
        with Image.open(output) as grid:
            shown = {colour for _, colour in grid.convert("RGB").getcolors(1 << 24) or []}
            assert grid.width < 2000
        assert {(255, 0, 0)} <= shown
        assert ((255, 165, 0) in shown) == (count == 8)


def test_the_grid_shows_transparent_pictures_on_the_background(tmp_path: Path) -> None:
    clip_art = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    clip_art.paste((255, 0, 0, 255), (10, 10, 30, 30))
    clip_art.save(tmp_path / "art.png")
    for background, shown in (("white", (255, 255, 255)), ("#00ff00", (0, 255, 0)), (None, (0, 0, 0))):
        save_grid([SearchResult(tmp_path / "art.png", 0.5)], tmp_path / "grid.png", "", background)
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.getpixel((60, 60)) == shown


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
    row = index.embeddings[index.rows[index.files.index("art.png")]]
    np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    result = SearchResult(tmp_path / "a.png", 0.5)
    with pytest.raises(ValueError, match="`results` is empty"):
        save_grid([], tmp_path / "grid.png", "text")
    for name in ("grid", "grid.xyz", "grid.psd"):
        with pytest.raises(ValueError, match=f"{name}: expected a picture that ends in .png"):
            save_grid([result], tmp_path / name, "text")
    with pytest.raises(NotADirectoryError, match="missing: no such folder to write grid.png in"):
        save_grid([result], tmp_path / "missing" / "grid.png", "text")


@pytest.mark.parametrize("name", [b"two\nlines.png", b"no text \xff.png"])
def test_the_grid_takes_any_file_name(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    save_image(path, 0)
    save_grid([SearchResult(path, 0.5)], tmp_path / "grid.png", "a description")
    assert Image.open(tmp_path / "grid.png").height > 300


def test_a_disk_that_is_still_full_on_leaving_is_named(tmp_path: Path) -> None:
    class FullFile:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            self.file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = EmbeddingStore(tmp_path)
    with pytest.raises(OSError, match=f"{tmp_path}: cannot write"), store:
        store.append("a", np.zeros(3, dtype=np.float32))
        store._entries_file = FullFile(store._entries_file)  # pyright: ignore[reportAttributeAccessIssue]
        store.append("b", np.zeros(3, dtype=np.float32))
    with EmbeddingStore(tmp_path) as again:  # the lock is released
        assert list(again.entries) == ["a"]
