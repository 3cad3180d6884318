"""Composed queries: the loss of RTD, an image as a word of a text, the file of a composer, and the search with it."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_clip
from lotlip_hf import Encoder, load_encoder
from lotlip_hf.cli import main
from lotlip_hf.compose import (
    FILE,
    Composer,
    composed_features,
    contrastive_loss,
    load_composer,
    text_features,
    torch_engine,
)
from lotlip_hf.scenes.changes import changes, triplets
from lotlip_hf.scenes.dataset import scene

CHANGE = "is x asleep, y and red"  # with the words that mark the position of the image's word


def test_the_loss_is_rtds(golden: Path) -> None:
    file = load_file(golden / "terms" / "rtd.safetensors")
    queries, targets = (file[name].requires_grad_() for name in ("queries", "targets"))
    loss = contrastive_loss(queries, targets)
    loss.backward()
    torch.testing.assert_close(loss, file["loss"], atol=1e-6, rtol=0)
    torch.testing.assert_close(queries.grad, file["gradient_of_queries"], atol=1e-6, rtol=0)
    torch.testing.assert_close(targets.grad, file["gradient_of_targets"], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def encoders(official_checkpoint: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    folder = tmp_path_factory.mktemp("models")
    tiny_clip.save_clip(folder / "clip")
    tiny_clip.save_siglip(folder / "siglip", golden / "tokenizer")
    paths = {"lotlip": official_checkpoint, "clip": folder / "clip", "siglip": folder / "siglip"}
    return {name: load_encoder(path, device="cpu") for name, path in paths.items()}


@pytest.mark.parametrize("family", ["lotlip", "clip", "siglip"])
def test_the_embedding_of_a_word_gives_the_plain_text(family: str, encoders: dict[str, Encoder]) -> None:
    encoder, engine = encoders[family], torch_engine(encoders[family])
    words = engine.model.text_model.get_input_embeddings()
    names = ["cat", "dog"]
    of_names, of_others = (engine.tokenize([f"a photo of {one}" for one in some], 20)[0] for some in (names, "xy"))
    pairs = zip(of_names["input_ids"], of_others["input_ids"], strict=True)
    ids = [(set(own) - set(other)).pop() for own, other in pairs]
    vectors = words(torch.tensor(ids)).detach().requires_grad_()
    found, cut = composed_features(engine, vectors, [CHANGE, None])
    expected = encoder.encode_texts([f"a photo of cat that {CHANGE}", "a photo of dog"], progress=False)
    assert cut == 0
    torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=0)
    found[:, 0].sum().backward()
    assert vectors.grad is not None
    assert (vectors.grad.norm(dim=-1) > 0).all()
    assert len(words._forward_hooks) == 0
    torch.testing.assert_close(text_features(engine, names).detach(), encoder.encode_texts(names), atol=1e-6, rtol=0)


def composer_of(encoder: Encoder) -> Composer:
    return Composer(encoder.dim, torch_engine(encoder).model.text_model.get_input_embeddings().embedding_dim, 8)


def test_a_composer_is_read_as_it_was_saved(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encoder = encoders["clip"]
    assert load_composer(tmp_path, encoder) is None
    composer = composer_of(encoder)
    composer.save(tmp_path)
    loaded = load_composer(tmp_path, encoder)
    assert loaded is not None
    image = torch.randn(encoder.dim)
    torch.testing.assert_close(loaded(image[None]), composer(7 * image[None]))
    query = loaded.query(encoder, image.numpy(), "is red")
    expected, _ = composed_features(torch_engine(encoder), composer(image[None]), ["is red"])
    np.testing.assert_allclose(query, expected[0].detach(), atol=1e-6)
    with pytest.raises(ValueError, match="empty"):
        loaded.query(encoder, image.numpy(), " \n")


def test_a_hostile_composer_is_refused(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encoder, path = encoders["clip"], tmp_path / FILE
    weights = composer_of(encoder).state_dict()
    for damage in (
        {"layers.0.bias": torch.tensor(1.0)},
        {"layers.0.bias": torch.zeros(0)},
        {"layers.4.weight": torch.zeros(encoder.dim, 8)},
        {"layers.4.bias": weights["layers.4.bias"] * float("nan")},
        {"more": torch.zeros(1)},
    ):
        save_file({**weights, **damage}, path)
        with pytest.raises(ValueError, match=FILE):
            load_composer(tmp_path, encoder)
    for content in (b"", pickle.dumps(weights), b"\xff" * 16, path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=FILE):
            load_composer(tmp_path, encoder)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="larger"):
        load_composer(tmp_path, encoder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="regular"):
        load_composer(tmp_path, encoder)


def test_search_with_an_image_and_a_change(
    official_checkpoint: Path, encoders: dict[str, Encoder], photos: Path, tmp_path: Path, capsys: Any
) -> None:
    encoder, folder = encoders["lotlip"], tmp_path / "composed"
    shutil.copytree(official_checkpoint, folder)
    composer = composer_of(encoder)
    composer.save(folder)
    (tmp_path / "queries.txt").write_text("is asleep\n\nis red\n")
    names = ["a.png", "b.png", "sub/c.png"]
    images = encoder.encode_images([photos / name for name in names], progress=False)

    def search(*words: object) -> list[dict[str, float]]:
        paths = ["--model", folder, "--images", photos, "--device", "cpu", "--json"]
        assert main(["search", *map(str, (*paths, *words))]) == 0
        answers = map(json.loads, capsys.readouterr().out.splitlines())
        return [{one["file"]: one["score"] for one in answer["results"]} for answer in answers]

    def scores(query: torch.Tensor) -> dict[str, Any]:
        found = (images @ (query / query.norm())).tolist()
        return {str(photos / name): pytest.approx(score, abs=2e-5) for name, score in zip(names, found, strict=True)}

    image, texts = ["--image", photos / "b.png"], encoder.encode_texts(["is asleep"], progress=False)
    asleep, red = (
        torch.from_numpy(composer.query(encoder, images[1].numpy(), text)) for text in ("is asleep", "is red")
    )
    assert search("is asleep", *image) == [scores(asleep)]
    assert search("--queries", tmp_path / "queries.txt", *image) == [scores(asleep), scores(red)]
    assert search("is asleep", *image, "--like", photos / "a.png") == [scores(asleep + images[0])]
    assert search(*image) == [scores(images[1])]
    assert search("is asleep") == [scores(texts[0])]


def test_a_change_of_a_scene_is_what_its_text_says() -> None:
    for number in range(40):
        one = scene(number)
        found = changes(one)
        assert len({change.scene.contents for change in found} | {one.contents}) == len(found) + 1
        assert [change.text for change in found] == [change.text for change in changes(one)]
        for change, (reference, text, target) in zip(found, triplets(one), strict=True):
            assert change.text == text
            assert reference != target
            changed = change.scene
            if changed.background != one.background:
                assert text == f"has a {changed.background} background"
                assert target == reference.replace(one.background, changed.background)
                assert changed.objects == one.objects
            else:
                ((old, new),) = ((a, b) for a, b in zip(one.objects, changed.objects, strict=True) if a != b)
                assert f"{new.colour} {new.shape}" in text
                assert f"{old.colour} {old.shape}" in text.partition("instead of the ")[2]
                assert new.pattern == old.pattern or new.pattern in text
