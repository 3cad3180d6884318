"""The denoising loss is that of a pipeline's own denoiser, and what is trained by it learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_diffusion import bert, bert_tokenizer

import tiny_diffusion
from lotlip_hf import LoTLIPTextModelWithProjection
from lotlip_hf.diffusion.denoising import Noise, denoising_loss, draw_noise, encode_pictures, encode_prompts
from lotlip_hf.diffusion.swap import swap_text_encoder
from lotlip_hf.diffusion.text_encoder import LoTLIPTextEncoder, LoTLIPWindowAdapter
from scripts import load_script
from tiny_diffusion import SIZE, picture, pipeline, same

KINDS = list(tiny_diffusion.BUILDERS)
SLOTS = [("sd", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")]
PROMPTS = ["a photo of a cat", "the red house"]


def pictures() -> list[Image.Image]:
    return [Image.effect_noise((3 * SIZE, 2 * SIZE), 60 + 20 * number).convert("RGB") for number in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_gets_what_it_gets_from_its_pipeline(kind: str) -> None:
    pipe = pipeline(kind)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    calls: list[dict[str, Any]] = []
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({**kwargs, "args": args}), with_kwargs=True
    )
    own = {"max_sequence_length": {"sd3": 77, "flux": 256}[kind]} if kind in ("sd3", "flux") else {}
    pipe(PROMPTS, num_inference_steps=1, height=SIZE, width=SIZE, guidance_scale=1.0, output_type="latent", **own)
    latents = encode_pictures(pipe, pictures(), SIZE)
    with torch.no_grad():
        conditions = encode_prompts(pipe, PROMPTS, SIZE)
        denoising_loss(pipe, latents, conditions, draw_noise(latents))
    handle.remove()
    theirs, ours = calls
    for name in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"):
        if theirs.get(name) is not None:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)
    for name, expected in (theirs.get("added_cond_kwargs") or {}).items():
        torch.testing.assert_close(ours["added_cond_kwargs"][name], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(kind: str) -> None:
    pipe = pipeline(kind)
    latents = encode_pictures(pipe, pictures(), SIZE)
    with torch.no_grad():
        conditions = encode_prompts(pipe, PROMPTS, SIZE)
        noise = draw_noise(latents, torch.Generator().manual_seed(0))
        loss = denoising_loss(pipe, latents, conditions, noise)
        losses = []
        for index in range(len(latents)):  # each picture alone
            alone = {
                name: {key: one[index : index + 1] for key, one in value.items()} if isinstance(value, dict) else value
                for name, value in conditions.items()
            }
            alone |= {
                name: value[index : index + 1]
                for name, value in conditions.items()
                if name in ("encoder_hidden_states", "pooled_projections")
            }
            part = Noise(*(one[index : index + 1] for one in noise))
            losses.append(denoising_loss(pipe, latents[index : index + 1], alone, part))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    if hasattr(pipe, "unet"):
        scheduler = pipe.scheduler
        timestep = int(noise.times[0] * 1000)
        share = scheduler.alphas_cumprod[timestep]
        noisy = share.sqrt() * latents[:1] + (1 - share).sqrt() * noise.noise[:1]
        with torch.no_grad():
            own = {"encoder_hidden_states": conditions["encoder_hidden_states"][:1]}
            if kind == "sdxl":
                own["added_cond_kwargs"] = {name: one[:1] for name, one in conditions["added_cond_kwargs"].items()}
            predicted = pipe.unet(noisy, timestep, **own).sample
        torch.testing.assert_close(losses[0], (predicted - noise.noise[:1]).square().mean(), atol=1e-5, rtol=1e-5)
        pipe.scheduler = type(scheduler).from_config(
            {**scheduler.config, "_use_default_values": []}, prediction_type="v_prediction"
        )
        velocity = share.sqrt() * noise.noise[:1] - (1 - share).sqrt() * latents[:1]
        with torch.no_grad():
            one = denoising_loss(pipe, latents[:1], own, Noise(noise.noise[:1], noise.times[:1]))
        torch.testing.assert_close(one, (predicted - velocity).square().mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_prompts(kind: str) -> None:
    pipe = pipeline(kind)
    latents = encode_pictures(pipe, pictures(), SIZE)
    slot = "text_encoder_2" if kind == "flux" else "text_encoder"
    weight = getattr(pipe, slot).get_input_embeddings().weight
    denoising_loss(pipe, latents, encode_prompts(pipe, PROMPTS, SIZE), draw_noise(latents)).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def windowed(kind: str = "sd", slot: str = "text_encoder") -> tuple[Any, Any]:
    """A pipeline with WiCLP's map behind one of its text encoders, and the same encoder without it."""
    pipe = pipeline(kind)
    tower = tiny_diffusion.lotlip(getattr(pipe, slot))
    options = {"target_layer": -2 if kind in ("sdxl", "sd3") else -1}
    if isinstance(tower, LoTLIPTextModelWithProjection):
        options["projection_dim"] = tower.text_projection.out_features
    encoders = [LoTLIPTextEncoder.from_text_model(tower, adapter=kind, **options) for kind in ("window", None)]
    swap_text_encoder(pipe, encoders[0], slot)
    return pipe, encoders[1]


@pytest.mark.same_bits
@pytest.mark.parametrize(
    ("kind", "slot"), [("sd", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")]
)
def test_a_new_window_changes_no_bit(kind: str, slot: str) -> None:
    pipe, plain = windowed(kind, slot)
    first = picture(pipe, PROMPTS[0])
    pipe.register_modules(**{slot: plain})
    assert torch.equal(picture(pipe, PROMPTS[0]), first)


def test_the_window_by_hand() -> None:
    adapter = LoTLIPWindowAdapter(3)
    assert torch.equal(adapter(torch.eye(3)[None]), torch.eye(3)[None]) == (adapter.conv.weight.abs().max() == 0)
    weight = torch.randn(3, 3, 5)
    adapter.conv.load_state_dict({"weight": weight, "bias": torch.zeros(3)})
    states = torch.randn(1, 7, 3)
    expected = states.clone()
    for place in range(7):
        for offset in range(-2, 3):
            if 0 <= place + offset < 7:
                expected[0, place] += weight[:, :, offset + 2] @ states[0, place + offset]
    torch.testing.assert_close(adapter(states), expected)


@pytest.mark.slow
def test_a_window_learns_alone(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    pipe.save_pretrained(tmp_path / "sd")
    tower = tiny_diffusion.lotlip(pipe.text_encoder)
    tower.save_pretrained(tmp_path / "tower")
    options = (
        f"--data scenes --num-pictures 60 --num-steps 60 --batch-size 8 --learning-rate 1e-2 --size {SIZE}".split()
    )
    paths = ["--pipeline", str(tmp_path / "sd"), "--model", str(tmp_path / "tower"), "--output", str(tmp_path / "new")]
    report = load_script("examples/train_window.py").main([*paths, *options, "--batch-size", "8"])
    assert report["steps"] == 60
    assert report["loss_after"] < report["loss_before"] - 0.005
    plain = picture(pipe, PROMPTS[0])
    swap_text_encoder(pipe, tmp_path / "new")
    assert not same(picture(pipe, PROMPTS[0]), plain)
    trained, before = pipe.text_encoder.state_dict(), tower.state_dict()
    assert all(torch.equal(one, trained[f"text_model.{name}"]) for name, one in before.items())
    assert trained.keys() - {f"text_model.{name}" for name in before} == {"adapter.conv.weight", "adapter.conv.bias"}


@pytest.mark.slow
def test_a_connector_learns_from_pictures(tmp_path: Path) -> None:
    example = load_script("examples/train_ella.py")
    pipeline("sd").save_pretrained(tmp_path / "sd")
    bert().save_pretrained(tmp_path / "tower")
    bert_tokenizer().save_pretrained(tmp_path / "tower")
    common = ["--pipeline", str(tmp_path / "sd"), "--text-encoder", str(tmp_path / "tower"), "--max-length", "38"]
    options = f"--data scenes --num-pictures 40 --learning-rate 2e-3 --num-layers 1 --size {SIZE}".split()
    output = tmp_path / "ella"
    report = example.main([*common, *options, "--num-steps", "40", "--output", str(output)])
    assert report["loss_after"] < report["loss_before"] - 0.005
    assert json.loads((output / "report.json").read_text()) == report
    weights = str(output / "ella.safetensors")
    again = example.main([*common, *options, "--num-steps", "1", "--output", str(output), "--start", weights])
    assert again["loss_before"] == pytest.approx(report["loss_after"], abs=1e-4)
    drawn_with = example.main([*common, "--draw", weights, "--prompt", "a red house", "--output", str(output)])
    with Image.open(drawn_with["picture"]) as image:
        assert image.size == (SIZE, SIZE)
