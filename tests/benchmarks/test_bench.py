"""`benchmarks/bench.py` and its peers: that they compute the same as this package, and what a run keeps and prints."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import bench
import peers
from lotlip_hf import Encoder
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.sampling import SubCaptions
from lotlip_hf.training.objective import Objective, batch_loss
from lotlip_hf.training.terms.infonce import InfoNCE

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ["A red star. It is big.", "two dogs &amp; a cat’s tail", "", "word. " * 90, "a sentence that is cut " * 40]
TINY = ["--size", "tiny", "--num-texts", "4", "--num-mixed", "12", "--batch-size", "2", "--loss-batch-size", "64"]


@pytest.fixture
def model():
    model = peers.make_model("tiny")
    with torch.no_grad():
        model.text_model.corner_embeds.normal_()
    return model


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_the_official_recipe_gives_the_same_features(model, attn_implementation: str) -> None:
    recipe = peers.OfficialRecipe(model, attn_implementation)
    expected = Encoder(model, peers.make_processor(model)).encode_texts(TEXTS, progress=False)
    torch.testing.assert_close(recipe.encode(TEXTS), expected, atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # what a swapped text would differ by


def test_the_official_recipe_trains_the_same(model) -> None:
    other = peers.make_model("tiny")
    other.load_state_dict(model.state_dict())
    recipe = peers.OfficialTraining(other)
    for one in (model, recipe):
        one.train()
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    records = [
        {
            "image": torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy(),
            "short_caption": short,
            "long_captions": [long],
            "id": long,
        }
        for short, long in (("a star", "A red star. It is big"), ("dogs", "Two dogs. A tail. One more sentence"))
    ]
    processor = peers.make_processor(model)
    batch = LoTLIPCollator(processor, SubCaptions(num_long_texts=1, num_sentences=None))(records)
    ours = batch_loss(model, batch, Objective({"infonce": InfoNCE()}))["loss"]
    ours.backward()

    short, long = (recipe.text.tokenize([record[name] for record in records]) for name in ("short_caption", "id"))
    loss = recipe(batch["pixel_values"], short, long[:, None])
    loss.backward()
    torch.testing.assert_close(loss, ours, atol=1e-5, rtol=0)
    words = recipe.text.bert.embeddings.word_embeddings.weight.grad
    tower = model.text_model
    torch.testing.assert_close(words[:-2], tower.backbone.embeddings.word_embeddings.weight.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(words[-2:], tower.corner_embeds.grad, atol=1e-5, rtol=0)
    assert words[-2:].abs().max() > 1e-3
    gradients = dict(tower.backbone.named_parameters())
    for name, parameter in recipe.text.bert.named_parameters():
        if name != "embeddings.word_embeddings.weight":
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=0, msg=name)


def test_the_stock_dual_encoder_gives_the_same_features_of_a_sentence(model) -> None:
    texts = ["a red star", "two dogs and a cat"]
    expected = Encoder(model, peers.make_processor(model)).encode_texts(texts, progress=False)
    torch.testing.assert_close(peers.vision_text_dual_encoder(model).encode(texts), expected, atol=1e-5, rtol=0)
    assert peers.clip("tiny").encode(texts).shape == (2, 512)


@pytest.mark.slow
def test_a_run_keeps_and_prints_every_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "photographs", partial(bench.photographs, count=2))
    monkeypatch.setattr(bench, "NUM_PICTURES", 16)
    results = tmp_path / "results" / "bench.jsonl"
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS if text))
    arguments = [*TINY, "--repeats", "1", "--captions", str(captions), "--results", str(results)]
    assert bench.main([*arguments, "--only", "tokenise"]) == 0
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert [entry["part"] for entry in entries] == ["tokenise", *bench.PARTS]
    for entry in entries:
        assert entry["captions"] == {"file": "captions.jsonl", "count": 4}
        assert entry["versions"]["torch"] == torch.__version__
        for values in entry["rows"]:
            row = bench.Row(**values)
            assert str(row) in printed
            assert row.holds == ((row.ratio <= row.target) if row.at_most else (row.ratio >= row.target))
            assert row.ratio > 0 or row.unit == "of difference"
    encoded = entries[1 + list(bench.PARTS).index("encode")]
    assert {"lotlip-hf", "official recipe", "sentence-transformers"} <= encoded["rates"]["long texts"].keys()
    missed = list((results.parent / "profiles").glob("*.txt"))
    assert all(str(path) in printed and "cumtime" in path.read_text() for path in missed)

    assert bench.main(["--table", "--results", str(results)]) == 0
    assert capsys.readouterr().out.strip() in printed


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"text": "A cat."}\n{"caption": "A dog."}\n', "line 2"),
        ('{"text": "A cat."}\nnothing\n', "line 2"),
        ('{"text": "..."}\n', "line 1"),
        ("", "no captions"),
    ],
)
def test_wrong_captions_are_named(content: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions, results = tmp_path / "captions.jsonl", tmp_path / "bench.jsonl"
    captions.write_text(content)
    assert bench.main(["--captions", str(captions), "--results", str(results)]) == 2
    error = capsys.readouterr().err
    assert word in error
    assert str(captions) in error
    assert not results.exists()


def test_the_page_shows_the_kept_results() -> None:
    assert bench.tables(bench.RESULTS) in (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
