"""Aligning a BERT LoTLIP with a CLIP text encoder: what is matched, and `examples/align_text_encoder.py` as it is."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, CLIPTextModelWithProjection

import tiny_clip
from lotlip_hf import LoTLIPTextConfig, LoTLIPTextEncoder, LoTLIPTextModel, LoTLIPTokenizer
from lotlip_hf.diffusion.align import (
    END,
    FIRST_WORD,
    MEASURES,
    PADDING,
    START,
    Alignment,
    Batch,
    Scale,
    attention_readouts,
    closeness,
    distance,
    tokenize_words,
    word_means,
)
from lotlip_hf.diffusion.text_encoder import LoTLIPMLPAdapter
from scripts import load_script

pytestmark = pytest.mark.slow

ADAPTERS = ("linear", "mlp", "resampler")
LENGTH, TEACHER_LENGTH = 30, 24  # tokens that student and teacher take
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
    teacher = CLIPTextModelWithProjection(tiny_clip.clip_text_config(max_position_embeddings=TEACHER_LENGTH))
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

    def by_word(tokenizer: Any, text: str) -> list[str]:
        read = tokenize_words(tokenizer, text)
        assert read.input_ids == tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(read.input_ids) == len(read.word_ids) == 60
        found: dict[int, str] = {}
        for token, word_id in zip(tokenizer.convert_ids_to_tokens(read.input_ids), read.word_ids, strict=True):
            found[word_id] = found.get(word_id, "") + token.replace("</w>", "").removeprefix("##")
        assert sorted(found) == list(range(FIRST_WORD + len(words)))
        assert read.word_ids[0] == START
        assert read.word_ids.index(END) + 1 == read.word_ids.index(PADDING)
        assert set(read.word_ids[read.word_ids.index(PADDING) :]) == {PADDING}
        return [found[word_id] for word_id in sorted(found) if word_id >= FIRST_WORD]

    assert by_word(teacher, text) == words
    # the separator stands for the full stop, an apostrophe is a token of its own word
    assert by_word(student, text) == [*words[:5], "[SEP]", *words[6:]]


def test_texts_that_are_cut_or_not_clean_are_told(golden: Path) -> None:
    tokenizer = LoTLIPTokenizer.from_pretrained(golden / "tokenizer", model_max_length=6)
    assert tokenize_words(tokenizer, "a cat and a") is not None
    assert tokenize_words(tokenizer, "a cat and a dog") is None  # one token too many
    assert tokenize_words(tokenizer, "a  cat") is None  # cleaning drops a space: spans are not of this text
    assert tokenize_words(tiny_clip.clip_tokenizer(6), "a cat and a dog") is None


def test_word_means_against_a_loop() -> None:
    states, word_ids = torch.randn(3, 10, 4), torch.randint(7, (3, 10))
    means, found = word_means(states, word_ids, 9)
    for row in range(3):
        for word_id in range(9):
            members = states[row][word_ids[row] == word_id]
            assert found[row, word_id] == (len(members) > 0)
            expected = members.mean(0) if len(members) else torch.zeros(4)
            torch.testing.assert_close(means[row, word_id], expected, **CLOSE)


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

    def error_and_cosine(answers: torch.Tensor) -> tuple[float, float]:
        one, two = (closeness(answers[part], targets[part], mean) for part in (slice(2), slice(2, None)))
        square, mean_square, cosine, count = (one + two).tolist()
        assert count == 15
        assert mean_square == pytest.approx((targets - 2).square().sum().item(), rel=1e-5)
        return square / mean_square, cosine / count

    assert error_and_cosine(targets) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert error_and_cosine(mean.expand_as(targets)) == pytest.approx((1.0, 0.0), abs=1e-6)
    assert error_and_cosine(2 * mean - targets) == pytest.approx((4.0, -1.0), abs=1e-6)
    assert error_and_cosine((targets + mean) / 2) == pytest.approx((0.25, 1.0), abs=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_shared_tower_gives_what_each_encoder_gives(adapter: str, folders: Path) -> None:
    """The tower runs once for all encoders; an encoder by itself, run on the ids, must give the same states."""
    tower = LoTLIPTextModel.from_pretrained(folders / "student").eval()
    teacher = CLIPTextModelWithProjection.from_pretrained(folders / "teacher").eval()
    tokenizers = [AutoTokenizer.from_pretrained(folders / name) for name in ("teacher", "student")]
    texts = prompts(4) + ["A cat. The dog"]
    columns = zip(
        *((*tokenize_words(tokenizers[0], t), *tokenize_words(tokenizers[1], t)) for t in texts), strict=True
    )
    batch = Batch(*map(torch.tensor, columns))
    batch.student_word_ids[0][batch.student_word_ids[0] == FIRST_WORD] = FIRST_WORD + 1  # a word that only one has
    alignment = Alignment(teacher, tower, -2, [batch])
    encoder = LoTLIPTextEncoder.from_text_model(
        tower, adapter=adapter, hidden_size=32, num_queries=TEACHER_LENGTH, target_layer=-2
    )
    tower_states, teacher_states = alignment.tower_states(batch), alignment.teacher_states(batch)
    states = alignment.student_states(encoder, tower_states, teacher_states)
    with torch.no_grad():
        expected = encoder(batch.student_ids)
        hidden_states = teacher(batch.teacher_ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(states.sequence, expected.last_hidden_state, **CLOSE)
    torch.testing.assert_close(states.pooled, expected.pooler_output, **CLOSE)
    assert states.word_ids is (batch.teacher_word_ids if adapter == "resampler" else batch.student_word_ids)
    standardized = (hidden_states - hidden_states.mean((0, 1))) / hidden_states.flatten(0, 1).std(0)
    torch.testing.assert_close(teacher_states.sequence, standardized, rtol=0, atol=1e-4)
    # the loss, word by word or position by position
    answers, targets = states.sequence.detach(), teacher_states.sequence
    if adapter != "resampler":
        pairs = [
            (answers[row][mine].mean(0), targets[row][theirs].mean(0))
            for row in range(len(texts))
            for word_id in range(int(batch.teacher_word_ids.max()) + 1)
            if (mine := batch.student_word_ids[row] == word_id).any()
            and (theirs := batch.teacher_word_ids[row] == word_id).any()
        ]
        answers, targets = (torch.stack(part) for part in zip(*pairs, strict=True))
    loss = alignment.loss(encoder, tower_states, teacher_states)
    expected_loss = distance(answers, targets) + distance(states.pooled, teacher_states.pooled)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    # no gradient but the adapter's
    loss.backward()
    assert all(parameter.grad is None for parameter in (*tower.parameters(), *teacher.parameters()))
    assert all(parameter.grad.abs().max() > 0 for parameter in encoder.pooled_adapter.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in encoder.adapter.parameters())


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
    assert encoder.config.output_length == (TEACHER_LENGTH if adapter == "resampler" else None)
    # naively: each word's mean, among the teacher's own states and the projected ones
    answers, targets = [], []
    for row, (one, other) in enumerate(zip(read, expected_read, strict=True)):
        word_ids = other.word_ids if adapter == "resampler" else one.word_ids
        for word_id in range(FIRST_WORD, max(other.word_ids) + 1):
            mine, theirs = torch.tensor(word_ids) == word_id, torch.tensor(other.word_ids) == word_id
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


def test_a_slot_of_a_pipeline_is_read_as_its_pipeline_does(example: ModuleType, folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers, of the extra 'diffusion'")
    import tiny_diffusion
    from lotlip_hf.diffusion.swap import swap_text_encoder

    for kind, slot, target_layer, projection_dim in (
        ("sd", "text_encoder", -1, None),
        ("sdxl", "text_encoder", -2, None),
        ("sdxl", "text_encoder_2", -2, tiny_clip.PROJECTION_DIM),
        ("sd3", "text_encoder", -2, tiny_clip.PROJECTION_DIM),
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

    with pytest.raises(SystemExit, match="text_encoder_2"):  # T5
        align(example, folders, tmp_path / "none", "--slot", "text_encoder_2", teacher=tmp_path / "flux")


def test_prompts_of_a_jsonl_file(
    example: ModuleType, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = [*prompts(40), "", "a cat " * 30, "caf&eacute;  &amp; dog"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n", encoding="utf-8-sig")
    given = ("--prompts", str(file), "--adapter", "linear", "--held-out", "0.2")
    align(example, folders, tmp_path / "out", *given, "--field", "text", "--max-length", "20")
    distinct = len(set(prompts(40))) + 1
    printed = capsys.readouterr().out
    assert f"{distinct} of {distinct + 1} prompts" in printed  # one is too long
    assert "another prompt" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "linear").model_max_length == 20
    for line in (None, "a cat", '{"prompt": 3}'):
        if line is not None:
            file.write_text(f"{line}\n", encoding="utf-8")
        with pytest.raises(SystemExit, match="line 1"):
            align(example, folders, tmp_path / "none", *given)


def test_the_same_seed_gives_the_same_report(example: ModuleType, folders: Path, tmp_path: Path) -> None:
    first = align(example, folders, tmp_path / "one")
    assert align(example, folders, tmp_path / "two") == first
    assert align(example, folders, tmp_path / "three", "--seed", "1") != first


def test_prompts_that_are_read_alike_are_one(
    example: ModuleType, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = [*prompts(40), *(text.capitalize() for text in prompts(40)), "a cat,a dog", "a cat, a dog"]
    (tmp_path / "prompts.txt").write_text("\r\n".join(texts), encoding="utf-8-sig")  # as Windows saves it
    align(example, folders, tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt"), "--held-out", "0.2")
    distinct = len(set(prompts(40))) + 1
    assert f"{distinct} of " in capsys.readouterr().out
    counts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (counts["held_out"], counts["prompts"]) == (round(0.2 * distinct), distinct - round(0.2 * distinct))


def test_an_interruption_keeps_what_was_learnt(
    example: ModuleType,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    options = ("--num-epochs", "3", "--batch-size", "8", "--adapter", "linear")
    complete = align(example, folders, tmp_path / "complete", *options)
    counts = json.loads((tmp_path / "complete" / "report.json").read_text())
    num_steps = 3 * -(-counts["prompts"] // 8)
    assert (counts["steps"], counts["interrupted"]) == (num_steps, False)
    assert "Interrupted" not in capsys.readouterr().out

    loss, calls = Alignment.loss, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(Alignment, "loss", interrupted)
    report = align(example, folders, tmp_path / "interrupted", *options)
    assert f"Interrupted after 4 of {num_steps} steps" in capsys.readouterr().out
    written = json.loads((tmp_path / "interrupted" / "report.json").read_text())
    assert (written["steps"], written["interrupted"]) == (4, True)
    assert written["report"] == report
    assert report["linear"] != complete["linear"]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "interrupted" / "linear"), LoTLIPTextEncoder)


def test_without_matplotlib_only_the_picture_is_missing(
    example: ModuleType,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    align(example, folders, tmp_path / "out")
    assert "matplotlib" in capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mlp", "report.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-epochs", "0"), "--num-epochs"),
        (("--max-length", "2"), "--max-length"),
        (("--held-out", "nan"), "--held-out"),
        (("--learning-rate", "inf"), "--learning-rate"),
        (("--device", "nonsense"), "--device"),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
        (("--prompts", "short.txt"), "short.txt"),
        (("--max-length", "31"), "max_length"),
        (("--slot", "text_encoder_2"), "text_encoder_2"),
        (("--student", "nowhere"), "nowhere"),
        (("--student", "bert"), "bert: .*missing"),
        (("--student", "untold"), "untold: .*tokenizer"),
        (("--teacher", "untold-clip"), "untold-clip: .*tokenizer"),
        (("--teacher-tokenizer", "bert"), "bert: .*tokenizer"),
        (("--teacher", "bert"), "bert"),
        (("--output", "taken"), "--output"),
    ],
)
def test_arguments_that_do_not_fit(
    example: ModuleType, folders: Path, unfit: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        align(example, folders, Path("out"), *options)
    assert "\n" not in str(error.value)
    assert not Path("out").exists()  # nothing was trained


@pytest.fixture(scope="module")
def unfit_folder(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, students and teachers that cannot be used."""
    folder = tmp_path_factory.mktemp("unfit")
    (folder / "short.txt").write_text("a cat\na dog\n", encoding="utf-8")
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("mine")
    BertModel(BertConfig(**tiny_clip.SIZE, vocab_size=99)).save_pretrained(folder / "bert")
    for name, source in (("untold", "student"), ("untold-clip", "teacher")):
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(folders / source / file, folder / name / file)
    return folder


@pytest.fixture
def unfit(unfit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(unfit_folder)
    return unfit_folder


def test_slots_of_a_pipeline(
    example: ModuleType, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pipeline = tmp_path / "pipeline"
    for slot in ("text_encoder", "text_encoder_2"):
        shutil.copytree(folders / "teacher", pipeline / slot)
        shutil.copytree(folders / "teacher", pipeline / slot.replace("text_encoder", "tokenizer"))
    clip, t5 = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "T5EncoderModel"]

    def run(slot: str, output: str, *adapters: str, **index: Any) -> None:
        (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "Some", "unet": ["a", "b"], **index}))
        align(example, folders, tmp_path / output, "--slot", slot, "--adapter", *adapters, teacher=pipeline)

    run("text_encoder_2", "joined", "linear", "resampler", text_encoder=clip, text_encoder_2=clip, text_encoder_3=t5)
    assert "Warning" in capsys.readouterr().out
    run("text_encoder", "alone", "mlp", text_encoder=clip, text_encoder_2=t5, text_encoder_3=[None, None])
    assert "Warning" not in capsys.readouterr().out
    for output in ("joined/linear", "alone/mlp"):
        assert AutoModel.from_pretrained(tmp_path / output).config.target_layer == -2
    with pytest.raises(SystemExit, match="unet.*text_encoder, text_encoder_2"):
        run("unet", "none", "mlp", text_encoder=clip, text_encoder_2=t5, text_encoder_3=[None, None])
    with pytest.raises(SystemExit, match="text_encoder.*none"):
        run("text_encoder", "none", "mlp")
    with pytest.raises(SystemExit, match="model_index"):
        run("text_encoder", "none", "mlp", text_encoder=3)
