"""ELLA's connector: equal to the authors', read by a pipeline's UNet in each step, trained and saved."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from test_diffusion import bert, bert_tokenizer

import tiny_clip
import tiny_diffusion
import tiny_families
from lotlip_hf import LoTLIPTextConfig, LoTLIPTextModel
from lotlip_hf.diffusion.ella import ELLA, connected, load_ella, save_ella
from tiny_diffusion import picture, pipeline, same

WIDTH = tiny_diffusion.WIDTH


def ella(text_width: int = WIDTH, width: int = WIDTH) -> ELLA:
    """A small connector, whose states depend on every one of its random weights."""
    connector = ELLA(text_width, width, 2, 4, num_latents=5, time_channels=16, time_width=24)
    tiny_clip.random_weights(connector)
    return connector.eval()


def test_the_states_are_those_of_the_authors(repository: Path, tmp_path: Path) -> None:
    golden = load_file(repository / "tests" / "golden" / "diffusion" / "ella.safetensors")
    weights = {name.removeprefix("weights."): one for name, one in golden.items() if name.startswith("weights.")}
    save_file(weights, tmp_path / "theirs.safetensors")  # without the number of heads, as theirs
    connector = load_ella(tmp_path / "theirs.safetensors", num_heads=4)
    for number, timestep in enumerate(golden["timesteps"]):
        found = connector(golden["states"], timestep)
        torch.testing.assert_close(found, golden[f"output_{number}"], atol=1e-9, rtol=0)
    both = connector(golden["states"], golden["timesteps"])
    torch.testing.assert_close(both[1], golden["output_1"][1], atol=1e-9, rtol=0)
    save_ella(connector, tmp_path / "ours.safetensors")
    again = load_ella(tmp_path / "ours.safetensors")
    torch.testing.assert_close(again(golden["states"], golden["timesteps"]), both, atol=1e-9, rtol=0)


def test_masked_padding_does_not_matter() -> None:
    connector, states = ella(), torch.randn(1, 7, WIDTH)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    other = torch.where(mask.bool().unsqueeze(-1), states, torch.randn(1, 7, WIDTH))
    timestep = torch.tensor(500)
    torch.testing.assert_close(connector(states, timestep, mask), connector(other, timestep, mask))
    torch.testing.assert_close(connector(states, timestep, mask), connector(states[:, :4], timestep))
    assert not torch.allclose(connector(states, timestep), connector(other, timestep), atol=1e-3)


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_a_pipeline_reads_prompts_by_another_tower(kind: str) -> None:
    pipe, connector = pipeline(kind), ella()
    plain = picture(pipe, "a photo of a cat")
    tower, tokenizer = bert(), bert_tokenizer()
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with connected(pipe, connector, tower, tokenizer, max_length=30):
        first, second = (picture(pipe, f"the {word} and a red house") for word in ("cat", "dog"))
        guided = picture(pipe, "the cat and a red house", negative_prompt="a car")
        assert same(first, picture(pipe, "the cat and a red house"))
    assert not same(first, second)
    assert not same(first, guided)
    assert same(picture(pipe, "a photo of a cat"), plain)
    assert not pipe.unet._forward_pre_hooks.keys() - {next(iter(pipe.unet._forward_pre_hooks))}


def test_states_in_the_unet_are_the_connectors() -> None:
    pipe, connector, tower, tokenizer = pipeline("sd"), ella(), bert(), bert_tokenizer()
    seen = []

    def listed(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args[1], kwargs["encoder_hidden_states"]))

    text = "the cat and a red house"
    with connected(pipe, connector, tower, tokenizer, max_length=30):
        handle = pipe.unet.register_forward_pre_hook(listed, with_kwargs=True)
        picture(pipe, text, guidance_scale=1.0)
        handle.remove()
    states = tower(**tokenizer(text, return_tensors="pt")).last_hidden_state
    assert len({float(timestep) for timestep, _ in seen}) == 2
    for timestep, found in seen:
        torch.testing.assert_close(found, connector(states, timestep), atol=1e-4, rtol=0)
    assert not torch.allclose(seen[0][1], seen[1][1], atol=1e-3)


def test_a_decoder_is_a_text_tower() -> None:
    pipe = pipeline("sd")
    config = LoTLIPTextConfig(backbone_config=tiny_families.FAMILIES["qwen3"].stock_config())
    tower = tiny_families.spread(LoTLIPTextModel(config))
    seen, text = [], "the cat and a red house"
    with connected(pipe, ella(config.hidden_size), tower, bert_tokenizer(), max_length=30):
        pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        assert not same(picture(pipe, text), picture(pipe, "the dog"))
    states = tower(**bert_tokenizer()(text, return_tensors="pt")).last_hidden_state
    expected = ella(config.hidden_size)(states, torch.tensor(501))
    assert min((one["encoder_hidden_states"][1] - expected[0]).abs().max() for one in seen) < 1e-3


def test_t5_is_a_text_tower() -> None:
    pipe = pipeline("sd")
    with connected(pipe, ella(2 * WIDTH), tiny_diffusion.t5_encoder().eval(), tiny_diffusion.t5_tokenizer(), 20):
        assert not same(picture(pipe, "the cat"), picture(pipe, "the dog"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tower, tokenizer = bert(), bert_tokenizer()
    cases: list[tuple[DiffusionPipeline, ELLA, str]] = [
        (pipeline("sdxl"), ella(), "pipe"),
        (pipeline("flux"), ella(), "pipe"),
        (pipeline("sd"), ella(width=2 * WIDTH), "ella"),
        (pipeline("sd"), ella(text_width=8), "ella"),
    ]
    for pipe, connector, name in cases:
        with pytest.raises(ValueError, match=name), connected(pipe, connector, tower, tokenizer):
            pass
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    weights = ella().state_dict()
    latents = {
        "nan": torch.full_like(weights["connector.latents"], torch.nan),
        "double": weights["connector.latents"].double(),
        "scalar": torch.tensor(1.0),
    }
    for name, changed in latents.items():
        save_file({**weights, "connector.latents": changed}, tmp_path / f"{name}.safetensors")
    for name in ("other", "broken", *latents):
        with pytest.raises(ValueError, match=name):
            load_ella(tmp_path / f"{name}.safetensors")
    with pytest.raises(OSError, match="none"):
        load_ella(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="pipe"):
        load_ella(tmp_path / "pipe.safetensors")
