"""The task `prompts`: the file, the pictures of a pipeline, the scores against naive ones, the command."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import tiny_diffusion
from lotlip_hf.cli import main as lotlip
from lotlip_hf.encoder import Encoder, load_encoder
from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
from lotlip_hf.evaluation.tasks import IncompleteDataError, Part, PromptData
from lotlip_hf.metrics import clip_score, composed_score, word_alignment
from lotlip_hf.pictures import draw_prompts, evaluate_prompts, pipeline_fingerprint
from lotlip_hf.scenes.dataset import regions, render, scene
from lotlip_hf.scenes.small import small_model
from lotlip_hf.words import find_phrase

PROMPTS = [
    {"prompt": "a red house, and a cat", "parts": ["red house", {"text": "a cat", "box": [0, 0, 0.5, 1]}]},
    {"prompt": "the dog", "parts": ["dog"]},
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(*small_model(hidden_size=32))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    tiny_diffusion.pipeline("sd").save_pretrained(folder)
    return folder


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def with_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("0.png", "1.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return write(folder, [{**row, "image": f"{number}.png"} for number, row in enumerate(PROMPTS)])


def load(file: Path, **options: Any) -> PromptData:
    data = load_benchmark("prompts", file, **options)
    assert isinstance(data, PromptData)
    return data


def test_the_file_is_read(tmp_path: Path) -> None:
    data = load(with_images(tmp_path))
    assert list(data.prompts) == [row["prompt"] for row in PROMPTS]
    assert data.parts == [[Part("red house"), Part("a cat", (0, 0, 0.5, 1))], [Part("dog")]]
    assert [Path(str(image)).name for image in data.images] == ["0.png", "1.png"]
    assert len(load(tmp_path / "prompts.jsonl", num_images=1).prompts) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"parts": ["blue house"]}, "parts"),
        ({"parts": []}, "parts"),
        ({"parts": "cat"}, "parts"),
        ({"parts": ["!"]}, "parts"),
        ({"parts": [{"text": "cat", "box": [0.5, 0, 0.5, 1]}]}, "box"),
        ({"parts": [{"text": "cat", "box": [0, 0, float("nan"), 1]}]}, "box"),
        ({"parts": [{"text": "cat", "box": "all"}]}, "box"),
        ({"parts": [3]}, "text"),
        ({"prompt": None}, "prompt"),
        ({"image": "missing.png"}, r"missing\.png"),
        ({"image": "../other.png"}, "outside"),
    ],
)
def test_wrong_rows_are_refused(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match=word):
        load(write(tmp_path / "folder", [{**PROMPTS[0], **change}]))


def test_prompts_without_images_need_a_pipeline(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(IncompleteDataError, match="--pipeline"):
        evaluate_prompts(encoder, load(write(tmp_path, PROMPTS)), progress=False)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("phrase", "found"),
    [("A Cat", "a cat"), ("cat a", "cat, a"), ("cats", None), ("a", "a"), ("", None), ("a dog that is", None)],
)
def test_phrases_are_found_by_their_words(phrase: str, found: str | None) -> None:
    span = find_phrase("See a cat, a dog.", phrase)
    assert (span and span.text) == found
    assert span is None or "See a cat, a dog."[span.start : span.end] == found


def test_scores_are_those_of_the_metrics(encoder: Encoder, tmp_path: Path) -> None:
    data = load(with_images(tmp_path))
    results = evaluate_prompts(encoder, data, progress=False)
    images, prompts = list(data.images), list(data.prompts)
    rows, metrics = results["rows"], results["metrics"]
    expected = clip_score(images, prompts, encoder)
    assert [row["clip_score"] for row in rows] == pytest.approx(expected.scores.tolist(), abs=1e-4)
    assert metrics["clip_score"] == pytest.approx(expected.mean, abs=1e-4)
    composed = composed_score(images[0], prompts[0], [("a cat", [[0, 0, 0.5, 1]])], encoder)
    assert rows[0]["composed_score"] == metrics["composed_score"] == pytest.approx(composed, abs=1e-5)
    assert "composed_score" not in rows[1]
    shorter = {
        "red house": "a , and a cat",
        "a cat": "a red house, and",
        "red": "a house, and a cat",
        "house": "a red , and a cat",
        "a": "a red house, and cat",
        "cat": "a red house, and a",
    }
    image = encoder.encode_images(images[:1], progress=False)[0]
    cosines = encoder.encode_texts([prompts[0], *shorter.values()], progress=False) @ image
    lost = dict(zip(shorter, (cosines[0] - cosines[1:]).tolist(), strict=True))
    entries = [*rows[0]["parts"], *rows[0]["words"]]
    assert [entry["text"] for entry in entries] == list(shorter)
    assert [entry["cosine_lost"] for entry in entries] == pytest.approx(list(lost.values()), abs=1e-5)
    signs = [value > 0 for value in lost.values()]
    assert rows[0]["supported_parts"] == sum(signs[:2]) / 2
    assert rows[0]["supported_words"] == sum(signs[2:]) / 4
    assert metrics["supported_parts"] == (rows[0]["supported_parts"] + rows[1]["supported_parts"]) / 2
    aligned = {word.start: word.value for word in word_alignment(images[:1], prompts[:1], encoder)[0]}
    values = [word["word_alignment"] for word in rows[0]["words"]]
    assert values == pytest.approx([aligned[start] for start in (2, 6, 17, 19)], abs=1e-5)


def test_words_that_the_model_does_not_read_are_not_supported(tmp_path: Path) -> None:
    encoder = Encoder(*small_model(hidden_size=16, max_text_length=8))
    with_images(tmp_path)
    row = {"prompt": "a red star, a blue circle, a green cross", "parts": ["green cross"], "image": "0.png"}
    results = evaluate_prompts(encoder, load(write(tmp_path, [row])), progress=False)
    assert results["metrics"]["supported_parts"] == results["metrics"]["supported_words"] == 0
    assert results["rows"][0]["words"][0]["word_alignment"] is None
    assert results["protocol"]["num_texts_cut"] == 1


def test_the_fingerprint_is_that_of_the_pictures(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "copy")
    pipe, copy = (StableDiffusionPipeline.from_pretrained(folder) for folder in (pipeline, tmp_path / "copy"))
    first = pipeline_fingerprint(pipe)
    assert pipeline_fingerprint(copy) == first
    copy.scheduler = type(copy.scheduler).from_config(copy.scheduler.config, prediction_type="v_prediction")
    assert pipeline_fingerprint(copy) != first
    with torch.no_grad():
        next(pipe.unet.parameters()).view(-1)[0] += 1
    assert pipeline_fingerprint(pipe) != first


def test_an_interrupted_run_continues(pipeline: Path, tmp_path: Path) -> None:
    data = load(write(tmp_path, PROMPTS))
    drawn = draw_prompts(data, pipeline, tmp_path / "drawn", progress=False)
    files = [Path(str(image)) for image in drawn.images]
    pixels = [file.read_bytes() for file in files]
    pipe = tiny_diffusion.pipeline("sd")
    expected = pipe(PROMPTS[1]["prompt"], generator=torch.Generator().manual_seed(1)).images[0]
    difference = np.asarray(expected).astype(int) - np.asarray(Image.open(files[1]))
    assert np.abs(difference).max() <= 1
    Image.new("RGB", (16, 16)).save(files[0])  # kept as it is
    files[1].unlink()
    again = draw_prompts(data, pipeline, tmp_path / "drawn", progress=False)
    assert [str(image) for image in again.images] == list(map(str, files))
    assert files[0].read_bytes() != pixels[0]
    assert np.abs(np.asarray(Image.open(files[1])).astype(int) - np.asarray(expected)).max() <= 1
    other = draw_prompts(
        load(tmp_path / "prompts.jsonl", num_images=1), pipeline, tmp_path / "drawn", seed=5, progress=False
    )
    assert not {str(image) for image in other.images} & set(map(str, files))
    assert other.protocol["seed"] == 5


@pytest.mark.parametrize("where", ["pipeline", "component", "weights"])
def test_a_pipeline_runs_no_code(where: str, pipeline: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    shutil.copytree(pipeline, tmp_path / "evil")
    index = json.loads((tmp_path / "evil" / "model_index.json").read_text())
    code = f"open({str(marker)!r}, 'w').close()\nfrom diffusers import StableDiffusionPipeline as Own\n"
    if where == "pipeline":
        index["_class_name"] = ["own", "Own"]
        (tmp_path / "evil" / "own.py").write_text(code)
    elif where == "component":
        index["unet"] = ["own", "Own"]
        (tmp_path / "evil" / "unet" / "own.py").write_text(code)
    else:
        (file,) = (tmp_path / "evil" / "unet").glob("*.safetensors")
        file.rename(file.with_suffix(".bin"))
    (tmp_path / "evil" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises((OSError, ValueError)):
        draw_prompts(load(write(tmp_path, PROMPTS)), tmp_path / "evil", tmp_path / "drawn", progress=False)
    assert not marker.exists()


def test_the_command(encoder: Encoder, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (encoder.engine.model, encoder.engine.processor):
        part.save_pretrained(tmp_path / "model")
    output = tmp_path / "results.json"
    words = ["evaluate", "--model", str(tmp_path / "model"), "--task", "prompts", "--no-cache"]
    words += ["--data", str(write(tmp_path, PROMPTS))]
    drawn = ["--pipeline", str(pipeline), "--pictures", str(tmp_path / "drawn")]
    assert lotlip([*words, *drawn, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "machinery" in printed
    assert "the dog" in printed
    results = json.loads(output.read_text())
    assert results["protocol"]["pipeline"] == str(pipeline)
    assert [Path(row["image"]).suffix for row in results["rows"]] == [".png", ".png"]
    assert lotlip(["report", str(output), "--model-index", str(tmp_path / "results.yaml")]) == 0
    assert "words (%)" in capsys.readouterr().out
    assert "supported_parts" in (tmp_path / "results.yaml").read_text()
    for wrong, name in (
        (drawn[:2], "--pictures"),
        (["--seed", "1"], "--seed"),
        (["--max-length", "8"], "--max-length"),
        (["--bootstrap", "0"], "--bootstrap"),
        (["--templates", "openai"], "--templates"),
    ):
        assert lotlip([*words, *wrong]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_pictures_that_have_the_parts_score_above_others(trained_on_scenes: Path, tmp_path: Path) -> None:
    scenes = [scene(index, split="test") for index in range(48)]
    for number, one in enumerate(scenes):
        render(one).save(tmp_path / f"{number}.png")
    metrics, encoder = {}, load_encoder(trained_on_scenes, device="cpu")
    for shift in (0, 7):  # the own picture, and one of another group
        rows = [
            {
                "prompt": ", ".join(region["text"] for region in regions(one)),
                "parts": regions(one),
                "image": f"{(number + shift) % len(scenes)}.png",
            }
            for number, one in enumerate(scenes)
        ]
        data = load(write(tmp_path, rows))
        metrics[shift] = evaluate_prompts(encoder, data, progress=False)["metrics"]
    assert metrics[0]["supported_parts"] > 0.8
    assert metrics[7]["supported_parts"] < 0.6
    for name, least in (("supported_words", 0.05), ("composed_score", 0.3), ("clip_score", 30)):
        assert metrics[0][name] > metrics[7][name] + least
