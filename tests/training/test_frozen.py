"""Frozen towers: computed once, with the losses of towers that are computed in every step."""

import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_training import Moment, Training, arguments, at, config, die, finish, log_of, make_checkpoint, make_folder
from transformers import AutoModel, AutoProcessor, BertModel, ViTModel

import tiny
from lotlip_hf import Encoder, LoTLIPModel, from_backbones
from lotlip_hf.cli import main
from lotlip_hf.images import ImageError
from lotlip_hf.loading import load_model
from lotlip_hf.states import FrozenStates
from lotlip_hf.store import FILE, EmbeddingStore
from lotlip_hf.training.checkpoint import list_checkpoints
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.frozen import frozen_states
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import Objective, batch_loss, make_objective
from lotlip_hf.training.optim import freeze, set_training_mode
from lotlip_hf.training.terms.infonce import InfoNCE

BOTH = {"lock_vision": True, "lock_text": True}


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`corners`, with corner tokens and two layers of `cls+mean`, `plain`, without; both with dropout. Read-only."""
    folder = tmp_path_factory.mktemp("frozen")
    make_checkpoint(folder / "corners", dropout=0.2, pooling="cls+mean", pooled_layers=2)
    make_checkpoint(folder / "plain", dropout=0.2, corners=0)
    make_folder(folder / "records", 27)
    return folder


def run(output: Path, start: Path, **options: Any) -> tuple[LoTLIPModel, list[dict[str, Any]], dict[str, int]]:
    """A run in this process: its model and log, and how many inputs each tower got."""
    options = {"model": "plain", "data": "records", **options}
    options |= {name: str(start / options[name]) for name in ("model", "data", "eval_data") if name in options}
    made = config(output, **options)
    model, processor = load_or_start_model(made)
    seen = {"image": 0, "text": 0}

    backbones = {"image": model.vision_model.backbone, "text": model.text_model.backbone}
    rows = {"image": "pixel_values", "text": "inputs_embeds"}
    for name, backbone in backbones.items():
        backbone.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.__setitem__(
                name, seen[name] + len(args[0] if args else kwargs[rows[name]])
            ),
            with_kwargs=True,
        )
    records, eval_records = load_data(made)
    train(model, processor, records, made, eval_records)
    return model, log_of(output), seen


def assert_same_losses(one: list[dict[str, Any]], two: list[dict[str, Any]], tolerance: float = 1e-6) -> None:
    assert len(one) == len(two)
    for lines in zip(one, two, strict=True):
        # the parameter is the logarithm of the scale
        expected, line = (one | {"logit_scale": math.log(one.get("logit_scale", 1))} for one in lines)
        assert line == pytest.approx(expected, abs=tolerance, rel=0)


RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "images": ({"model": "corners", "lock_vision": True, "grad_cache_chunk": 3}, {"image"}),
    "texts": ({"lock_text": True}, {"text"}),
    "locked corner tokens": ({"model": "corners", "lock_text": True, "lock_corner_tokens": True}, {"text"}),
    "short texts": ({"model": "corners", "lock_text": True, "num_long_texts": 0}, {"text"}),
    "both": (
        {**BOTH, "learning_rate": 1e-2, "num_workers": 2, "num_sentences": 1, "ema_decay": 0.9},
        {"image", "text"},
    ),
    "both, gradient caching": ({**BOTH, "grad_cache_chunk": 3, "gradient_accumulation_steps": 2}, {"image", "text"}),
}


@pytest.mark.parametrize(
    "kind",
    [
        *("images", "texts", "locked corner tokens", "both"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("short texts", "both, gradient caching")),
    ],
)
def test_kept_states_give_the_losses_of_computed_ones(kind: str, start: Path, tmp_path: Path) -> None:
    options, frozen = RUNS[kind]
    options = {"max_steps": 8, "eval_data": "records", "eval_samples": 9, **options}
    computed, expected, _ = run(tmp_path / "computed", start, no_cache=True, **options)
    cache = str(tmp_path / "cache")
    kept, log, first = run(tmp_path / "kept", start, cache=cache, **options)
    _, again, second = run(tmp_path / "again", start, cache=cache, **options)
    assert_same_losses(expected, log)
    assert_same_losses(log, again)
    assert kept.logit_scale.item() == pytest.approx(computed.logit_scale.item(), abs=1e-6)
    if "image" in frozen:
        assert first["image"] == 27
    for name in frozen:
        assert first[name]
        assert not second[name]


def test_a_step_on_states_is_the_step_on_inputs() -> None:
    """Neighbours' check of LLM2CLIP: with its residual MLP, losses and gradients are the same."""
    torch.manual_seed(0)
    text = BertModel(tiny.text_config().backbone_config)
    image = ViTModel(tiny.vision_config().backbone_config)
    model = from_backbones(
        text,
        image,
        0,
        text_pooling="mean",
        projection_dim=24,
        text_projection="residual_mlp",
        text_projection_layers=3,
    ).double()  # the gradients of another CPU differ by more than 1e-6 in float32
    made = TrainingConfig(model="x", data="x", **BOTH)
    objective = Objective({"infonce": InfoNCE()})
    freeze(model, made, objective.needs)
    set_training_mode(model)
    assert len(model.text_projection.blocks) == 3
    pixel_values = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    ids = torch.randint(7, 99, (4, 3, 9))
    inputs = {"pixel_values": pixel_values, "input_ids": ids[:, 0], "long_input_ids": ids[:, 1:]}
    mask = {"attention_mask": torch.ones(4, 9), "long_attention_mask": torch.ones(4, 2, 9)}
    with torch.no_grad():
        states = {
            "image_states": model.vision_model(pixel_values).pooler_output,
            "text_states": model.text_model(ids, torch.ones(4, 3, 9)).pooler_output,
        }
    results = []
    for batch in (inputs | mask, states):
        model.zero_grad()
        loss = batch_loss(model, batch, objective)["loss"]
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (other, others) = results
    torch.testing.assert_close(other, loss, atol=1e-6, rtol=0)
    assert gradients.keys() == others.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("text_projection.blocks") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-9, rtol=0, msg=name)


def test_a_new_model_with_a_residual_mlp(start: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(start / "plain")
    for name, part in (("text", model.text_model.backbone), ("image", model.vision_model.backbone)):
        part.save_pretrained(tmp_path / name)
        AutoProcessor.from_pretrained(start / "plain").save_pretrained(tmp_path / name)
        AutoProcessor.from_pretrained(start / "plain").image_processor.save_pretrained(tmp_path / name)
    towers = {"text_model": str(tmp_path / "text"), "image_model": str(tmp_path / "image")}
    options = {
        "text_projection": "residual_mlp",
        "text_projection_layers": 2,
        "num_corner_tokens": 0,
        **towers,
        **BOTH,
    }
    made = config(tmp_path / "run", data=str(start / "records"), cache=str(tmp_path / "cache"), max_steps=2, **options)
    new, processor = load_or_start_model(made)
    again, _ = load_or_start_model(made)  # the seed of the run draws the new weights
    for weight, other in zip(new.text_projection.parameters(), again.text_projection.parameters(), strict=True):
        assert torch.equal(weight, other)
    checkpoint = train(new, processor, load_data(made)[0], made)
    loaded = AutoModel.from_pretrained(checkpoint)
    assert loaded.config.text_config.projection_layers == 2
    assert len(loaded.text_projection.blocks) == 2
    for modality in ("image", "text"):  # a run from the checkpoint reads the same states
        kept = [
            Encoder(*each).fingerprint(modality, pooled=True) for each in ((new, processor), load_model(checkpoint))
        ]
        assert kept[0] == kept[1]
    with pytest.raises(ValueError, match="text_projection"):
        load_or_start_model(config(tmp_path / "no", model=str(start / "plain"), text_projection="residual_mlp"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_locked_text_tower(dtype: str, start: Path, tmp_path: Path) -> None:
    """Its encoder keeps its bits and is in evaluation mode; corner tokens, projection and logit scale train."""
    before = LoTLIPModel.from_pretrained(start / "corners")
    options = {"model": "corners", "lock_text": True, "text_dtype": dtype, "max_steps": 4, "save_steps": 2}
    trained, log, _ = run(tmp_path / "run", start, cache=str(tmp_path / "cache"), **options)
    assert trained.text_model.training
    assert not any(module.training for module in trained.text_model.backbone.modules())
    assert {p.dtype for p in trained.text_model.backbone.parameters()} == {getattr(torch, dtype)}
    after = AutoModel.from_pretrained(list_checkpoints(tmp_path / "run")[-1])
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    weights = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        is_kept = name.startswith("text_model.backbone")
        expected = weight.to(getattr(torch, dtype)).float() if is_kept else weight
        assert torch.equal(weights[name], expected) == (is_kept or "mask_token" in name), name
    first, _ = list_checkpoints(tmp_path / "run")
    assert load_file(first / "state" / "model.safetensors")["text_model.corner_embeds"].dtype == torch.float32
    # a resumed run
    list_checkpoints(tmp_path / "run")[-1].rename(tmp_path / "last")
    resumed, again, _ = run(tmp_path / "run", start, cache=str(tmp_path / "cache"), resume=True, **options)
    assert again[-2:] == log[-2:]
    assert all(torch.equal(one, other) for one, other in zip(resumed.parameters(), trained.parameters(), strict=True))


def test_kept_states_in_bfloat16(start: Path, tmp_path: Path) -> None:
    encoder = Encoder(LoTLIPModel.from_pretrained(start / "plain"), AutoProcessor.from_pretrained(start / "plain"))
    read = []
    for dtype in ("float32", "bfloat16"):
        states = FrozenStates(encoder, "text", tmp_path, dtype)
        read.append(states.read(states.fill_texts(["a red cup", "a tree"])))
        assert states.row_bytes == 32 * (4 if dtype == "float32" else 2)
    assert torch.equal(read[0].bfloat16().float(), read[1])
    expected = encoder.engine.model.text_model(**encoder.engine.processor(text=["a red cup"], return_tensors="pt"))
    torch.testing.assert_close(read[0][:1], expected.pooler_output, atol=1e-6, rtol=0)


def test_states_belong_to_the_tower_and_not_to_its_projection(start: Path, tmp_path: Path) -> None:
    model = LoTLIPModel.from_pretrained(start / "corners")
    processor = AutoProcessor.from_pretrained(start / "corners")

    def fingerprints() -> list[str]:
        return [Encoder(model, processor).fingerprint(name, pooled=True) for name in ("image", "text")]

    first = fingerprints()
    with torch.no_grad():
        for part in (model.text_projection, model.visual_projection):
            for weight in part.parameters():
                weight.add_(1)
        model.text_model.corner_embeds.add_(1)
        model.logit_scale.add_(1)
        assert fingerprints() == first
        next(model.vision_model.parameters()).add_(1)
        next(model.text_model.backbone.parameters()).add_(1)
    assert not set(fingerprints()) & set(first)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert fingerprints()[0] != first[0]
    second = fingerprints()[1]
    for name, value in (("prompt_template", "query: {}"), ("clean_text", False), ("cleaning", "sentences")):
        before = getattr(processor.tokenizer, name)
        setattr(processor.tokenizer, name, value)
        assert fingerprints()[1] != second
        setattr(processor.tokenizer, name, before)
    assert fingerprints()[1] == second


DECISIONS: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "nothing locked": ({}, set(), ""),
    "no cache": ({**BOTH, "no_cache": True}, set(), "no_cache"),
    "both": (BOTH, {"image", "text"}, "computed once"),
    "corner tokens": ({**BOTH, "model": "corners"}, {"image"}, "corner tokens"),
    "patch dropout": ({**BOTH, "patch_dropout": 0.5}, {"text"}, "patch_dropout"),
    "locked corner tokens": ({**BOTH, "model": "corners", "lock_corner_tokens": True}, {"image", "text"}, "once"),
    "unlocked layers": ({**BOTH, "unlocked_vision_layers": 1, "unlocked_text_layers": 1}, set(), ""),
    "a stream": ({**BOTH, "streaming": True}, {"text"}, "stream"),
}


@pytest.mark.parametrize("kind", DECISIONS)
def test_which_towers_are_computed_once(
    kind: str, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected, word = DECISIONS[kind]
    options = {**options, "model": str(start / options.get("model", "plain")), "data": str(start / "records")}
    if not options.get("no_cache"):
        options["cache"] = str(tmp_path / "cache")
    made = config(tmp_path / "run", max_steps=2, **options)
    model, processor = load_or_start_model(made)
    freeze(model, made, make_objective(made, model.config).needs)
    capsys.readouterr()
    states = frozen_states(model, processor, load_data(made)[0], made, Accelerator(cpu=True))
    assert states.keys() == expected
    printed = capsys.readouterr().out
    assert word in printed if word else not printed
    if expected:
        assert str(tmp_path / "cache" / FILE) in printed
    train(model, processor, load_data(made)[0], made)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_broken_images(on_error: str, start: Path, tmp_path: Path) -> None:
    """They are named before the first step, or left out and counted as without the cache."""
    data = make_folder(tmp_path / "records", 12)
    (data / "r003.png").write_bytes(b"no image")
    (data / "r007.png").unlink()
    options = {"data": str(data), "on_error": on_error, "max_steps": 6, **BOTH}
    if on_error == "raise":
        with pytest.raises(ImageError, match="record r00"):
            run(tmp_path / "run", start, cache=str(tmp_path / "cache"), **options)
        return
    _, expected, _ = run(tmp_path / "computed", start, no_cache=True, **options)
    _, log, seen = run(tmp_path / "kept", start, cache=str(tmp_path / "cache"), **options)
    assert seen["image"] == 10
    assert log[-1]["broken_images"] == 4
    assert_same_losses(expected, log)


def test_embed_pooled_fills_the_cache_of_training(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(tmp_path / "cache")
    argv = ["embed", "--pooled", "--model", str(start / "plain"), "--device", "cpu", "--cache", cache]
    data = start / "records"
    assert main([*argv, "--images", str(data)]) == 0
    assert "27 images" in capsys.readouterr().out
    for column in ("short_caption", "long_captions"):
        assert main([*argv, "--texts", str(data / "metadata.jsonl"), "--column", column]) == 0
    assert "54 texts" in capsys.readouterr().out
    options = {"captions": "whole_captions", "max_steps": 8, "cache": cache, **BOTH}
    _, _, seen = run(tmp_path / "run", start, **{**options, "num_long_texts": 3})
    assert seen == {"image": 0, "text": 0}


# Real processes


def die_at_add(number: int) -> None:
    add, calls = EmbeddingStore.add, [0]

    def counted(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            die()
        add(*args, **kwargs)

    EmbeddingStore.add = counted  # pyright: ignore[reportAttributeAccessIssue]


def states_in(cache: Path) -> list[str]:
    with sqlite3.connect(cache / FILE) as connection:
        return [key.decode() for (key,) in connection.execute("SELECT key FROM entries ORDER BY key")]


@pytest.mark.slow
def test_a_killed_fill_keeps_its_states(start: Path, tmp_path: Path) -> None:
    data, cache = make_folder(tmp_path / "records", 70), tmp_path / "cache"
    options = {"model": start / "plain", "data": data, "lock_vision": True, "cache": cache, "max_steps": 3}
    killed = Training(arguments(tmp_path / "killed", **options), tmp_path, 1, die_at_add, 3).wait()
    assert killed.codes == [-9], killed.text
    first = states_in(cache)
    assert len(first) == 64
    text = finish(arguments(tmp_path / "again", **options), tmp_path)
    assert "6/6 images" in text
    assert len(states_in(cache)) == 70
    finish(arguments(tmp_path / "computed", **{**options, "cache": None}, no_cache=True), tmp_path)
    assert_same_losses(log_of(tmp_path / "computed"), log_of(tmp_path / "again"))


@pytest.mark.slow
def test_a_killed_run_with_kept_states_resumes(start: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, with the losses of a computed run."""
    options = {
        "model": start / "plain",
        "data": start / "records",
        "max_steps": 12,
        "save_steps": 3,
        **dict.fromkeys(BOTH, True),
    }
    finish(arguments(tmp_path / "computed", no_cache=True, **options), tmp_path)
    options["cache"] = tmp_path / "cache"
    argv = arguments(tmp_path / "killed", **options)
    killed = Training(argv, tmp_path, 1, at, Moment("step", 11)).wait()
    assert killed.codes == [-9], killed.text
    finish(["--output", str(tmp_path / "killed"), "--resume"], tmp_path)
    expected = {line["step"]: line for line in log_of(tmp_path / "computed")}
    log = log_of(tmp_path / "killed")
    assert log[-1]["step"] == 12
    for line in log:
        assert line == pytest.approx(expected[line["step"]], abs=1e-6, rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("grad_cache_chunk", [None, 3])
def test_two_processes_share_the_work(grad_cache_chunk: int | None, start: Path, tmp_path: Path) -> None:
    options = {"model": start / "plain", "data": start / "records", "max_steps": 9, **dict.fromkeys(BOTH, True)}
    options |= {"grad_cache_chunk": grad_cache_chunk, "eval_data": start / "records", "eval_steps": 5}
    finish(arguments(tmp_path / "computed", no_cache=True, **options), tmp_path, 2)
    cache = tmp_path / "cache"
    for name in ("kept", "again"):
        text = finish(arguments(tmp_path / name, cache=cache, **options), tmp_path, 2)
        assert ("14/14 images" in text) == (name == "kept")
        assert_same_losses(log_of(tmp_path / "computed"), log_of(tmp_path / name))


def test_a_foreign_file_is_set_aside(start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / FILE).write_bytes(b"not a database" * 100)
    _, _, seen = run(tmp_path / "run", start, cache=str(cache), max_steps=2, lock_vision=True)
    assert seen["image"] == 27
    assert any("renamed" in message for message in caplog.messages)
