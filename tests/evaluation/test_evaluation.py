"""From a model and a data set to results: embeddings kept and shared out, the golden ranks, the command."""

import json
import signal
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lotlip_hf import Encoder, load_encoder
from lotlip_hf.cli import main
from lotlip_hf.evaluation import embeddings
from lotlip_hf.evaluation.benchmarks.registry import TASKS
from lotlip_hf.evaluation.embeddings import embed_images, embed_texts, image_digests
from lotlip_hf.evaluation.evaluate import evaluate, results_table, study, write_results
from lotlip_hf.evaluation.results import load_results
from lotlip_hf.evaluation.retrieval import ranks
from lotlip_hf.evaluation.tasks import ClassificationData, IncompleteDataError, RetrievalData
from processes import Started, finish

COLORS = ["red", "green", "blue", "white", "black", "gray"]


@pytest.fixture(scope="module")
def encoder(official_checkpoint: Path) -> Encoder:
    encoder = load_encoder(official_checkpoint, device="cpu")
    assert encoder.dim == 16  # and is not computed when texts are counted
    return encoder


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 32 + i, 3), dtype=np.uint8)) for i in range(count)]


def captions(count: int) -> list[str]:
    return [f"A {COLORS[i % 6]} house. " + f"It has {i} windows. " * (i % 5) for i in range(count)]


def dataset(count: int = 7, texts_of_an_image: int = 1) -> RetrievalData:
    texts = captions(count * texts_of_an_image)
    return RetrievalData(
        id="me/houses",
        name="Houses",
        images=pictures(count),
        image_names=[f"{i}.png" for i in range(count)],
        texts=texts,
        text_to_image=[i // texts_of_an_image for i in range(len(texts))],
        split="test",
        protocol={"normalized": False},
    )


def count(monkeypatch: pytest.MonkeyPatch, encoder: Encoder, name: str) -> list[int]:
    """How many items each call of a method gets from now on."""
    sizes: list[int] = []
    method = getattr(encoder, name)

    def counted(items: Sequence[Any], **kwargs: Any) -> Any:
        sizes.append(len(items))
        return method(items, **kwargs)

    monkeypatch.setattr(encoder, name, counted)
    return sizes


# --- embeddings


def test_texts_are_those_of_encode_texts(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 4)
    texts = [*captions(9), *captions(3), "word " * 300]
    expected = encoder.encode_texts(texts, progress=False)
    sizes = count(monkeypatch, encoder, "iterate_texts")
    embeds, was_cut = embed_texts(encoder, texts, progress=False)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    assert was_cut.tolist() == [False] * 12 + [True]
    assert sizes == [4, 4, 2]  # each text once


def test_texts_are_cut_where_asked(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    embeds, was_cut = embed_texts(encoder, captions(5), max_length=12, progress=False)
    expected = encoder.encode_texts(captions(5), max_length=12, progress=False)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-6)
    assert was_cut.tolist() == [False, False, True, True, True]
    assert "3 of 5 texts were cut at 12 tokens" in caplog.text
    whole = encoder.encode_texts(captions(5), progress=False)
    assert torch.allclose(expected[:2], whole[:2], atol=1e-6)
    assert not torch.allclose(expected[2:], whole[2:], atol=1e-3)
    for length in (2, 1000):
        with pytest.raises(ValueError, match="`max_length`"):
            embed_texts(encoder, captions(1), max_length=length, progress=False)


def test_images_are_those_of_encode_images(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 2)
    images: list[Any] = pictures(5)
    images[1].save(tmp_path / "1.png")
    expected = encoder.encode_images(images, progress=False)
    images[1], images[3] = tmp_path / "1.png", (tmp_path / "1.png").read_bytes()
    expected[3] = expected[1]
    torch.testing.assert_close(embed_images(encoder, images, progress=False), expected, rtol=0, atol=1e-6)
    digests = image_digests(images, progress=False)
    assert digests[1] == digests[3]
    assert len(set(digests)) == 4


@pytest.mark.slow
def test_what_was_computed_is_kept(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 3)
    texts, images = captions(8), pictures(5)
    settings = {"cache": tmp_path / "cache", "progress": False}
    first = embed_texts(encoder, texts, **settings), embed_images(encoder, images, **settings)
    of_texts, of_images = (count(monkeypatch, encoder, f"iterate_{kind}s") for kind in ("text", "image"))
    again = embed_texts(encoder, texts[::-1], **settings), embed_images(encoder, images, **settings)
    assert torch.equal(again[0].embeds, first[0].embeds.flip(0))
    assert torch.equal(again[0].was_cut, first[0].was_cut.flip(0))
    assert torch.equal(again[1], first[1])
    assert of_texts == of_images == []

    # Another text or image, another limit, other weights: nothing is taken for the same.
    embed_texts(encoder, [*texts[:-1], "another"], **settings)
    embed_images(encoder, [*images, *pictures(6)[5:]], **settings)
    assert of_texts
    assert of_images == [3]
    of_texts.clear()
    embed_texts(encoder, texts, max_length=12, **settings)
    assert of_texts == [3, 3, 2]
    other = load_encoder(encoder.name, device="cpu")
    with torch.no_grad():
        other.engine.model.text_projection.weight[0, 0] += 1
    assert not torch.allclose(embed_texts(other, texts, **settings).embeds, first[0].embeds)


def test_an_interruption_keeps_what_is_whole(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 2)
    texts = captions(7)
    undisturbed = embed_texts(encoder, texts, progress=False).embeds
    iterate, calls = encoder.iterate_texts, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return iterate(*args, **kwargs)

    monkeypatch.setattr(encoder, "iterate_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_texts(encoder, texts, cache=tmp_path, progress=False)
    assert torch.equal(embed_texts(encoder, texts, cache=tmp_path, progress=False).embeds, undisturbed)
    assert len(calls) == 3 + 2


def test_a_damaged_cache_is_computed_again(encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"cache": tmp_path, "progress": False}
    first = embed_texts(encoder, captions(3), **settings).embeds
    (file,) = tmp_path.glob("*.sqlite3")
    file.write_bytes(b"no database")
    assert torch.equal(embed_texts(encoder, captions(3), **settings).embeds, first)
    assert f"{file}: " in caplog.text
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE blocks SET vectors = randomblob(7)")
    with pytest.raises(OSError, match="sqlite3"):
        embed_texts(encoder, captions(3), **settings)
    assert torch.equal(embed_texts(encoder, captions(3), **settings).embeds, first)


def test_a_cache_that_cannot_be_written_is_named(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file.*--cache"):
        embed_texts(encoder, captions(2), cache=tmp_path / "file", progress=False)


def test_unreadable_images_are_all_named_and_nothing_is_scored(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "UNIT_SIZE", 2)
    files = [tmp_path / f"{index}.png" for index in range(6)]
    for file, picture in zip(files, pictures(6), strict=True):
        picture.save(file)
    whole = {index: files[index].read_bytes() for index in (1, 4)}
    for index, content in whole.items():
        files[index].write_bytes(content[:100])
    settings: dict[str, Any] = {"names": [f"houses/{index}" for index in range(6)], "progress": False}
    settings["cache"] = tmp_path / "cache"
    with pytest.raises(IncompleteDataError, match=r"2 of 6 images(.|\n)*houses/1: (.|\n)*houses/4: "):
        embed_images(encoder, files, **settings)
    for index, content in whole.items():
        files[index].write_bytes(content)
    sizes = count(monkeypatch, encoder, "iterate_images")
    embed_images(encoder, files, **settings)
    assert sizes == [2, 2]  # the others were kept
    files[2].unlink()
    with pytest.raises(IncompleteDataError, match=r"1 of 6 images(.|\n)*houses/2: .*No such file"):
        embed_images(encoder, files, **settings)


# --- evaluations


class GoldenImages:
    """An image processor that gives the official code's pixels: the red value of an image's first pixel says whose."""

    def __init__(self, pixel_values: torch.Tensor) -> None:
        self.pixel_values = pixel_values

    def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": torch.stack([self.pixel_values[image.getpixel((0, 0))[0]] for image in images])}

    def to_dict(self) -> dict[str, Any]:
        return {"image_processor_type": "GoldenImages"}


@pytest.mark.parametrize("kind", ["short", "long"])
def test_golden_ranks(encoder: Encoder, golden: Path, kind: str) -> None:
    expected = load_file(golden / "official-corners2" / "expected.safetensors")
    texts = json.loads((golden / "official-corners2" / "texts.json").read_text())[kind]
    images = [Image.new("RGB", (4, 4), (index, 0, 0)) for index in range(len(texts))]
    image_processor = GoldenImages(expected["pixel_values"])
    processor = SimpleNamespace(tokenizer=encoder.engine.tokenizer, image_processor=image_processor)
    encoder = Encoder(encoder.engine.model, processor)
    names = [str(index) for index in range(len(images))]
    results = evaluate(
        encoder, RetrievalData("golden", "Golden", images, names, texts, range(len(texts))), progress=False
    )
    image_features = torch.nn.functional.normalize(expected["image_features"], dim=-1)
    similarities = image_features @ expected[f"{kind}_text_features_normalized"].T  # [images, texts]
    own = similarities.diagonal()
    image_ranks = 1 + (similarities > own[:, None]).sum(1)
    text_ranks = 1 + (similarities > own[None, :]).sum(0)
    ours = ranks(embed_images(encoder, images, progress=False), embed_texts(encoder, texts, progress=False).embeds)
    assert ours.image_to_text.tolist() == image_ranks.tolist()
    assert ours.text_to_image.tolist() == text_ranks.tolist()
    assert len(set(text_ranks.tolist())) > 2
    for direction, expected_ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in (1, 5):
            recall = (expected_ranks <= k).double().mean().item()
            assert results["metrics"][f"{direction}_r{k}"] == pytest.approx(recall, abs=1e-12)
        assert f"{direction}_r10" not in results["metrics"]  # of six
        assert results["metrics"][f"{direction}_median_rank"] == expected_ranks.double().quantile(0.5).item()


def test_results_say_what_was_measured(encoder: Encoder, tmp_path: Path, official_checkpoint: Path) -> None:
    data = dataset(7, texts_of_an_image=2)
    results = evaluate(encoder, data, benchmark="houses", progress=False, bootstrap=50)
    assert results["model"] == str(official_checkpoint)
    assert results["model_revision"] is None
    assert set(results["model_fingerprint"]) == {"image", "text"}
    assert results["dataset"] == {"id": "me/houses", "name": "Houses", "split": "test", "revision": None}
    protocol = results["protocol"]
    assert protocol["normalized"] is False
    assert (protocol["num_images"], protocol["num_texts"], protocol["num_texts_cut"]) == (7, 14, 0)
    assert (protocol["max_length"], protocol["search"], protocol["bootstrap"]) == (126, "exact", 50)
    assert {"python", "torch", "transformers", "lotlip-hf"} <= set(results["versions"])
    assert results["date"].endswith("+00:00")

    write_results(results, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    recorded = {result.metric_type: result.metric_value for result in load_results(tmp_path / "results.json").entries}
    assert recorded == results["metrics"]
    table = results_table(results)
    assert "Houses (test): 7 images, 14 texts (0 cut at 126 tokens)" in table
    assert f"{100 * results['metrics']['image_to_text_r1']:.2f}" in table

    # The same again is the same; one text, one pixel or one pairing more or less is another data set.
    assert evaluate(encoder, data, progress=False, bootstrap=50)["data_fingerprint"] == results["data_fingerprint"]
    others = [
        replace(data, texts=[*data.texts[:-1], "Another."]),
        replace(data, images=[*pictures(7)[:-1], Image.new("RGB", (8, 8))]),
        replace(data, text_to_image=[1, 0, *data.text_to_image[2:]]),
    ]
    fingerprints = {evaluate(encoder, other, progress=False, bootstrap=0)["data_fingerprint"] for other in others}
    assert len(fingerprints | {results["data_fingerprint"]}) == 4


def test_classification_is_scored_against_the_prompts(encoder: Encoder) -> None:
    data = ClassificationData(
        "me/colors", "Colors", pictures(6), [str(i) for i in range(6)], [0, 1, 2, 0, 1, 2], COLORS
    )
    templates = ["a {} house.", "{}"]
    results = evaluate(encoder, data, templates=templates, progress=False)
    texts = [
        encoder.encode_texts([template.format(color) for color in COLORS], progress=False) for template in templates
    ]
    classes = torch.nn.functional.normalize(torch.stack(texts).mean(0), dim=-1)
    scores = encoder.encode_images(data.images, progress=False) @ classes.T
    for k in (1, 5):
        hits = [label in score.topk(k).indices for label, score in zip(data.labels, scores, strict=True)]
        assert results["metrics"][f"accuracy_top{k}"] == pytest.approx(sum(hits) / 6)
    assert results["task"] == "zero-shot-image-classification"
    assert (results["protocol"]["num_classes"], results["protocol"]["templates"]) == (6, templates)
    assert "6 images, 6 classes" in results_table(results)


# --- the command


def urban(folder: Path, count: int = 6) -> Path:
    """A miniature of Urban1k."""
    for name in ("image", "caption"):
        (folder / name).mkdir(parents=True)
    for number, (picture, caption) in enumerate(zip(pictures(count), captions(count), strict=True), 1):
        picture.save(folder / "image" / f"{number}.jpg")
        (folder / "caption" / f"{number}.txt").write_text(caption + "\n")
    return folder


def test_the_command(
    official_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: Encoder
) -> None:
    command = ["evaluate", "--model", str(official_checkpoint), "--task", "urban1k"]
    command += ["--data", str(urban(tmp_path / "u"))]
    command += ["--device", "cpu", "--num-images", "6", "--cache", str(tmp_path / "cache"), "--bootstrap", "20"]
    output = tmp_path / "results.json"
    assert main([*command, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "image to text" in printed
    results = json.loads(output.read_text())
    assert results["benchmark"] == "urban1k"
    assert results["protocol"]["bootstrap"] == 20
    assert list((tmp_path / "cache").glob("*.sqlite3"))

    assert main([*command, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--output", str(output), "--overwrite"]) == 0
    again = json.loads(output.read_text())
    assert again["metrics"] == results["metrics"]
    assert main(["report", str(output)]) == 0
    assert "Urban" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "iiw"], "--benchmark"),
        (["--plot", "p.png"], "--plot"),
        (["--limits", "16"], "--limits"),
        (["--templates", "default"], "--templates"),
        (["--overwrite"], "--overwrite"),
        (["--output", "missing/r.json"], "r.json"),
        (["--split", "test"], "`split`"),
        (["--max-length", "1000"], "`max_length`"),
        (["--bootstrap", "-1"], "`bootstrap`"),
        (["--task", "length-study"], "--benchmark"),
        (["--task", "length-study", "--benchmark", "urban1k", "--plot", "p.xyz"], "p.xyz"),
        (
            ["--task", "length-study", "--benchmark", "urban1k", "--plot", "p.png", "--output", "./p.png"],
            "--plot and --output",
        ),
        (["--revision", "main"], "`revision`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_said_before_anything_is_encoded(
    words: list[str],
    message: str,
    official_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    urban(tmp_path / "u", count=2)
    monkeypatch.chdir(tmp_path)
    for function in ("embed_images", "embed_texts"):
        monkeypatch.setattr(f"lotlip_hf.evaluation.evaluate.{function}", None)
    command = ["evaluate", "--model", str(official_checkpoint), "--task", "urban1k"]
    command += ["--data", "u", "--num-images", "2"]
    assert main([*command, "--device", "cpu", "--no-cache", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["u"]


def test_what_can_be_measured_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--list-tasks"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    assert all(task in listed for task in [*TASKS, "length-study", "sentence-ablation"])


def test_images_that_look_different_have_different_digests() -> None:
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    turned = upright.copy()
    turned.getexif()[0x0112] = 6
    digests = image_digests([red, blue, upright, turned], progress=False)
    assert len(set(digests)) == 4
    with pytest.raises(TypeError, match=r"images\[1\]"):
        image_digests([red, None], progress=False)  # pyright: ignore[reportArgumentType]


def test_data_that_does_not_fit_is_refused(encoder: Encoder) -> None:
    data = dataset(3)
    for wrong in ([0, 1], [0, 1, 3], [0, 1, -1]):
        with pytest.raises(ValueError, match="`data.text_to_image`"):
            evaluate(encoder, replace(data, text_to_image=wrong), progress=False)
    classes = ClassificationData("me/colors", "Colors", data.images, data.image_names, [0, 6, 1], COLORS)
    with pytest.raises(ValueError, match="`data.labels`"):
        evaluate(encoder, classes, progress=False)
    with pytest.raises(ValueError, match="study"):
        study(encoder, replace(classes, labels=[0, 1, 2]), "length", progress=False)


def num_kept(cache: Path) -> int:
    """How many embeddings are kept, as another process sees it."""
    try:
        with closing(sqlite3.connect(f"file:{cache}/embeddings.sqlite3?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT count(*) FROM entries").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


@pytest.mark.slow
def test_killed_and_resumed_processes_agree_with_one_to_the_last_digit(
    official_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = urban(tmp_path / "u", count=600), tmp_path / "cache"  # three units for two processes

    def command(output: str, *words: str) -> list[str]:
        words = ("--data", str(data), "--num-images", "600", "--output", str(tmp_path / output), *words)
        return ["evaluate", "--model", str(official_checkpoint), "--task", "urban1k", *words]

    assert main(command("one.json", "--no-cache")) == 0
    printed = capsys.readouterr().out
    together = command("two.json", "--cache", str(cache))
    started = Started("lotlip_hf.cli", together, tmp_path, num_processes=2)
    started.wait_until(lambda: num_kept(cache) > 0)
    started.send_signal(signal.SIGKILL)
    assert started.wait().codes == [-signal.SIGKILL] * 2
    assert 0 < num_kept(cache) < 1200
    ran = finish("lotlip_hf.cli", together, tmp_path, num_processes=2)
    assert ran.stdout == printed  # once
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert {**first, "date": ""} == {**second, "date": ""}
