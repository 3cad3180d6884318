"""Aligning a BERT LoTLIP with a CLIP text encoder: what is matched, and `examples/align_text_encoder.py` as it is."""

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import tiny_clip
from lotlip_hf import LoTLIPTextConfig, LoTLIPTextEncoder, LoTLIPTextModel, LoTLIPTokenizer
from lotlip_hf.alignment import (
    END,
    FIRST_WORD,
    MEASURES,
    PADDING,
    START,
    Closeness,
    Scale,
    attention_readouts,
    tokenize_words,
    word_means,
)
from lotlip_hf.text_encoder import LoTLIPMLPAdapter
from scripts import load_script

ADAPTERS = ("linear", "mlp", "resampler")
LENGTH = 30  # of the student
CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script("examples/align_text_encoder.py")


def gently_random(model: nn.Module) -> nn.Module:
    """Random weights, small in the layers, so that a state says more of its own token than of all others together."""
    tiny_clip.random_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer" in name and parameter.dim() == 2:
                parameter.mul_(0.5)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """`student`, `teacher` (with a projection), `prompts.txt` and the shorter `few.txt`."""
    folder = tmp_path_factory.mktemp("alignment")
    teacher = CLIPTextModelWithProjection(tiny_clip.clip_text_config(max_position_embeddings=24))
    tiny_clip.save_clip(folder / "teacher", gently_random(teacher))
    tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=LENGTH)
    backbone = BertConfig(**tiny_clip.SIZE, vocab_size=len(tokenizer), max_position_embeddings=LENGTH + 2)
    student = gently_random(LoTLIPTextModel(LoTLIPTextConfig(backbone_config=backbone)))
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    for name, count in (("prompts.txt", 600), ("few.txt", 60)):
        (folder / name).write_text("\n".join(prompts(count)), encoding="utf-8")
    return folder


def prompts(count: int, seed: int = 0) -> list[str]:
    """Some of them twice."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(tiny_clip.WORDS, k=drawn.randint(2, 8))) for _ in range(count)]


def align(example: ModuleType, folders: Path, output: Path, *more: str, teacher: Path | None = None) -> Any:
    given = ["--student", str(folders / "student"), "--teacher", str(teacher or folders / "teacher")]
    given += ["--prompts", str(folders / "few.txt"), "--num-epochs", "1", "--device", "cpu"]
    return example.main([*given, "--output", str(output), *more])


@pytest.fixture(scope="module")
def aligned(example: ModuleType, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of all three adapters, and the report."""
    output = tmp_path_factory.mktemp("aligned")
    options = ["--prompts", str(folders / "prompts.txt"), "--held-out", "0.15", "--target-layer", "-2"]
    options += ["--num-epochs", "6", "--batch-size", "16", "--learning-rate", "1e-2"]
    return output, align(example, folders, output, "--adapter", *ADAPTERS, *options)


# What is matched


def test_texts_of_two_tokenizers_line_up_word_by_word(golden: Path) -> None:
    text = "The cats, all unbelievable. A red car's house"
    student = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=60)
    teacher = tiny_clip.clip_tokenizer(60)
    words = ["the", "cats", ",", "all", "unbelievable", ".", "a", "red", "car's", "house"]

    def by_place(tokenizer: Any, text: str) -> list[str]:
        read = tokenize_words(tokenizer, text)
        assert read.input_ids == tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(read.input_ids) == len(read.places) == 60
        found: dict[int, str] = {}
        for token, place in zip(tokenizer.convert_ids_to_tokens(read.input_ids), read.places, strict=True):
            found[place] = found.get(place, "") + token.replace("</w>", "").removeprefix("##")
        assert sorted(found) == list(range(FIRST_WORD + len(words)))
        assert read.places[0] == START
        assert read.places.index(END) + 1 == read.places.index(PADDING)
        assert set(read.places[read.places.index(PADDING) :]) == {PADDING}
        return [found[place] for place in sorted(found) if place >= FIRST_WORD]

    assert by_place(teacher, text) == words
    # the separator stands for the full stop, an apostrophe is a token of its own word
    assert by_place(student, text) == [*words[:5], "[SEP]", *words[6:]]


def test_texts_that_are_cut_or_not_clean_are_told(golden: Path) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=6)
    assert tokenize_words(tokenizer, "a cat and a") is not None
    assert tokenize_words(tokenizer, "a cat and a dog") is None  # one token too many
    assert tokenize_words(tokenizer, "a  cat") is None  # cleaning drops a space: spans are not of this text
    assert tokenize_words(tiny_clip.clip_tokenizer(6), "a cat and a dog") is None


def test_word_means_against_a_loop() -> None:
    states, places = torch.randn(3, 10, 4), torch.randint(7, (3, 10))
    means, found = word_means(states, places, 9)
    for row in range(3):
        for place in range(9):
            members = states[row][places[row] == place]
            assert found[row, place] == (len(members) > 0)
            expected = members.mean(0) if len(members) else torch.zeros(4)
            torch.testing.assert_close(means[row, place], expected, **CLOSE)


def test_attention_readouts_against_the_formula() -> None:
    states, queries = torch.randn(3, 10, 4), torch.randn(5, 4)
    weights = torch.einsum("qd,bld->bql", queries, states).div(2).softmax(-1)
    torch.testing.assert_close(attention_readouts(states, queries), weights @ states, **CLOSE)
    order = torch.randperm(10)
    torch.testing.assert_close(attention_readouts(states[:, order], queries), weights @ states, **CLOSE)


@pytest.mark.parametrize("adapter", [nn.Linear(4, 6), LoTLIPMLPAdapter(4, 5, 6)])
def test_a_scale_is_undone_by_the_last_layer(adapter: nn.Module) -> None:
    teacher = torch.randn(2, 50, 6) * torch.tensor([1.0, 100.0, 0.1, 1.0, 1.0, 7.0]) + 3
    scale = Scale.of(teacher)
    standardized = scale.standardize(teacher).flatten(0, 1)
    torch.testing.assert_close(standardized.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(standardized.std(0), torch.ones(6), rtol=0, atol=1e-4)
    states = torch.randn(3, 4)
    with torch.no_grad():
        before = adapter(states)
        scale.undo(adapter)
        torch.testing.assert_close(scale.standardize(adapter(states)), before, rtol=0, atol=1e-4)


def test_closeness_of_answers_that_are_known() -> None:
    targets, mean = torch.randn(5, 3, 4) + 2, torch.full((4,), 2.0)

    def closeness(answers: torch.Tensor) -> dict[str, float]:
        counted = Closeness(mean)
        counted.add(answers[:2], targets[:2])
        counted.add(answers[2:], targets[2:])
        return counted.result()

    assert closeness(targets) == pytest.approx({"error": 0.0, "cosine": 1.0}, abs=1e-6)
    assert closeness(mean.expand_as(targets)) == pytest.approx({"error": 1.0, "cosine": 0.0}, abs=1e-6)
    assert closeness(2 * mean - targets) == pytest.approx({"error": 4.0, "cosine": -1.0}, abs=1e-6)
    half = (targets + mean) / 2
    assert closeness(half) == pytest.approx({"error": 0.25, "cosine": 1.0}, abs=1e-6)


# The example


def test_the_report_shows_what_was_learnt(aligned: tuple[Path, Any]) -> None:
    output, report = aligned
    assert list(report) == ["mean", "another prompt", *ADAPTERS]
    written = json.loads((output / "report.json").read_text())
    assert written["report"] == report
    assert written["held_out"] == round(0.15 * (written["held_out"] + written["prompts"]))
    assert written["held_out"] + written["prompts"] == len(set(prompts(600)))
    with Image.open(output / "report.png") as picture:
        assert picture.size == (840, 420)
    for measure in MEASURES:
        assert report["mean"][measure] == pytest.approx({"error": 1.0, "cosine": 0.0}, abs=1e-5)
        assert report["another prompt"][measure]["error"] > 1.1
    for adapter in ADAPTERS:
        # a random teacher's pooled output says little of the text that a random student's says, too
        for measure, error, cosine in (("words", 0.45, 0.75), ("read_outs", 0.95, 0.45), ("pooled", 0.96, 0.25)):
            assert report[adapter][measure]["error"] < error, (adapter, measure)
            assert report[adapter][measure]["cosine"] > cosine, (adapter, measure)
    for adapter in ("mlp", "resampler"):  # which can do more than a linear map
        assert report[adapter]["words"]["error"] < report["linear"]["words"]["error"] - 0.05
        assert report[adapter]["read_outs"]["error"] < 0.65


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_was_saved_speaks_in_the_teachers_space(adapter: str, aligned: tuple[Path, Any], folders: Path) -> None:
    teacher = CLIPTextModelWithProjection.from_pretrained(folders / "teacher").eval()
    encoder = AutoModel.from_pretrained(aligned[0] / adapter)
    tokenizer = AutoTokenizer.from_pretrained(aligned[0] / adapter)
    assert isinstance(encoder, LoTLIPTextEncoder)
    assert (encoder.config.hidden_size, encoder.config.projection_dim, encoder.config.target_layer) == (32, 24, -2)
    assert tokenizer.model_max_length == LENGTH
    new = sorted(set(prompts(100, seed=1)) - set(prompts(600)))
    assert len(new) > 30
    with torch.no_grad():
        read = [tokenize_words(tokenizer, text) for text in new]
        outputs = encoder(torch.tensor([one.input_ids for one in read]), output_hidden_states=True)
        teacher_tokenizer = AutoTokenizer.from_pretrained(folders / "teacher")
        expected_read = [tokenize_words(teacher_tokenizer, text) for text in new]
        expected = teacher(torch.tensor([one.input_ids for one in expected_read]), output_hidden_states=True)
    assert encoder.config.output_length == (24 if adapter == "resampler" else None)
    # naively: each word's mean, among the teacher's own states and the projected ones
    answers, targets = [], []
    for row, (one, other) in enumerate(zip(read, expected_read, strict=True)):
        places = other.places if adapter == "resampler" else one.places
        for place in range(FIRST_WORD, max(other.places) + 1):
            mine, theirs = torch.tensor(places) == place, torch.tensor(other.places) == place
            answers.append(outputs.hidden_states[-2][row, mine].mean(0))
            targets.append(expected.hidden_states[-2][row, theirs].mean(0))
    for answer, target, least in (
        (torch.stack(answers), torch.stack(targets), 0.7),
        (outputs.text_embeds, expected.text_embeds, 0.2),
    ):
        mean = target.mean(0)
        assert (answer.mean(0) - mean).norm() < 0.3 * (target - mean).norm(dim=-1).mean()
        assert torch.cosine_similarity(answer - mean, target - mean, dim=-1).mean() > least
    # and the tower is the student's
    student = LoTLIPTextModel.from_pretrained(folders / "student")
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(encoder.text_model.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.slow
def test_a_slot_of_a_pipeline_is_read_as_its_pipeline_does(example: ModuleType, folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers, of the extra 'diffusion'")
    import tiny_diffusion
    from lotlip_hf.diffusion import swap_text_encoder

    for kind, slot, target_layer, projection_dim in (
        ("sd", "text_encoder", -1, None),
        ("sdxl", "text_encoder", -2, None),
        ("sdxl", "text_encoder_2", -2, tiny_clip.PROJECTION_DIM),
        ("flux", "text_encoder", -1, None),
    ):
        folder, output = tmp_path / kind, tmp_path / kind / slot / "aligned"
        pipe = tiny_diffusion.pipeline(kind)
        pipe.save_pretrained(folder)
        align(example, folders, output, "--slot", slot, teacher=folder)
        config = AutoModel.from_pretrained(output / "mlp").config
        assert (config.target_layer, config.projection_dim) == (target_layer, projection_dim), (kind, slot)
        swap_text_encoder(pipe, output / "mlp", slot=slot)
        one, two = (tiny_diffusion.picture(pipe, prompt) for prompt in ("a cat", "a red house " * 9))
        assert one.isfinite().all()
        assert (one - two).abs().max() > 1e-4

    with pytest.raises(SystemExit, match="text_encoder_2: no CLIP text encoder, which --teacher"):  # T5
        align(example, folders, tmp_path / "none", "--slot", "text_encoder_2", teacher=tmp_path / "flux")


def test_prompts_of_a_jsonl_file(
    example: ModuleType, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = [*prompts(40), "", "a cat " * 30, "caf&eacute;  &amp; dog"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n", encoding="utf-8")
    given = ("--prompts", str(file), "--adapter", "linear", "--held-out", "0.2")
    align(example, folders, tmp_path / "out", *given, "--field", "text", "--max-length", "20")
    distinct = len(set(prompts(40))) + 1
    printed = capsys.readouterr().out
    assert f"{distinct} prompts; 1 left out: longer than the teacher's 24 or the student's 20 tokens" in printed
    assert "another prompt" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "linear").model_max_length == 20
    for line in (None, "a cat", '["a cat"]', '{"text": 3}'):
        if line is not None:
            file.write_text(f"{line}\n", encoding="utf-8")
        with pytest.raises(SystemExit, match=r"prompts\.jsonl, line 1: no text in the field 'prompt'; see --field"):
            align(example, folders, tmp_path / "out", *given)


def test_the_same_seed_gives_the_same_report(example: ModuleType, folders: Path, tmp_path: Path) -> None:
    first = align(example, folders, tmp_path / "one")
    assert align(example, folders, tmp_path / "two") == first
    assert align(example, folders, tmp_path / "three", "--seed", "1") != first


def test_arguments_that_do_not_fit(example: ModuleType, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"--max-length 31: .*student takes {LENGTH} tokens"):
        align(example, folders, tmp_path, "--max-length", "31")
    (tmp_path / "few.txt").write_text("a cat\na dog\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"few\.txt: 0 of 2 prompts held out; give more prompts"):
        align(example, folders, tmp_path, "--prompts", str(tmp_path / "few.txt"))
    T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    for folder in (tmp_path / "t5", tmp_path / "nowhere", folders / "student"):
        with pytest.raises(SystemExit, match="no CLIP text encoder"):
            align(example, folders, tmp_path, teacher=folder)


def test_the_help_of_the_command_line(example: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    assert "--teacher-tokenizer" in capsys.readouterr().out
