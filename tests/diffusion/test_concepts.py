"""Directions and words that are learnt: what their losses compute, that they learn, and that their files are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lotlip_hf.diffusion.denoising import Noise, denoise, draw_noise, encode_prompts
from lotlip_hf.diffusion.transforms import direction, load_direction, save_direction, steer, transformed
from lotlip_hf.scenes.dataset import scenes_dataset
from scripts import load_script
from tiny_diffusion import SIZE, picture, pipeline, same

PREFIXES = ["a photo of a", "the", "a photo of the", "a car and the", "the house and a", "the dog and the"]


def test_a_direction_is_saved(tmp_path: Path) -> None:
    file = tmp_path / "direction.safetensors"
    found = direction(pipeline("sdxl"), [("red cat", "cat")])
    save_direction(found, file)
    again = load_direction(file)
    assert again.keys() == found.keys()
    assert all(torch.equal(again[name], one) for name, one in found.items())
    vector = torch.ones(8)
    for wrong in ({"unet": vector}, {"text_encoder": vector[None]}, {"text_encoder": vector / 0}, {}):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=file.name):
            load_direction(file)
    for content in (b"\x80\x04pickle", bytes(1 << 21)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=file.name):
            load_direction(file)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_the_matching_loss_by_hand(kind: str) -> None:
    example, pipe = load_script("examples/learn_direction.py"), pipeline(kind)
    vectors = direction(pipe, [("red cat", "cat")])
    prompts = [
        example.Prompts("cat", "a cat", "a red cat", "the cat"),
        example.Prompts("dog", "the dog", "red dog", "a dog"),
    ]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1 if kind == "flux" else 4, SIZE // 2, SIZE // 2, generator=generator)
    noise = draw_noise(latents, generator)
    scales, losses = example.random_scales(noise), []
    assert ((scales.abs() >= 0.1) & (scales.abs() <= 5)).all()
    with torch.no_grad():
        loss = example.matching_loss(vectors, pipe, latents, example.encode_triples(pipe, prompts, SIZE), noise)
        for index, one in enumerate(prompts):
            own = Noise(noise.noise[index : index + 1], noise.times[index : index + 1])

            def predicted(prompt: str, own: Noise = own, index: int = index) -> torch.Tensor:
                return denoise(pipe, latents[index : index + 1], encode_prompts(pipe, [prompt], SIZE), own)[0]

            wanted = predicted(one.target)
            wanted += scales[index] * (predicted(one.positive) - predicted(one.negative))
            with transformed(pipe, steer(one.word, vectors, float(scales[index]))):
                losses.append((predicted(one.target) - wanted).square().mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.same_bits
# The loss of Stable Diffusion XL does not fall in these few steps.
@pytest.mark.parametrize(("kind", "steps", "share"), [("sd", 40, 0.9), ("sdxl", 3, 1.01)])
def test_a_direction_is_learnt(kind: str, steps: int, share: float, tmp_path: Path) -> None:
    pipeline(kind).save_pretrained(tmp_path / kind)
    options = f"--pipeline {tmp_path / kind} --targets cat --negatives cat --size {SIZE} --drawing-steps 2".split()
    options += ["--positives", "red cat", "--prefixes", *PREFIXES, "--num-pictures", "3"]
    output = tmp_path / "red"
    report = load_script("examples/learn_direction.py").main(
        [*options, "--num-steps", str(steps), "--output", str(output)]
    )
    assert report["loss_after"] < share * report["loss_before"]
    assert json.loads((output / "report.json").read_text()) == report
    pipe = pipeline(kind)
    red, plain = load_direction(output / "direction.safetensors"), picture(pipe)
    start = direction(pipe, [("red cat", "cat")], PREFIXES[:-1])
    assert start.keys() == red.keys()
    assert not any(torch.allclose(red[name], one, atol=1e-3) for name, one in start.items())
    with transformed(pipe, steer("cat", red, 0.0)):
        assert torch.equal(picture(pipe), plain)
    with transformed(pipe, steer("cat", red)):
        assert not same(picture(pipe), plain)


def concept_pipeline() -> tuple[Any, DiffusionPipeline]:
    """The example, and a pipeline whose <toy> starts as `cat`."""
    pipe = pipeline("sd")
    start = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.encode("cat", add_special_tokens=False)]
    pipe.load_textual_inversion({"<toy>": start.detach()})
    return load_script("examples/invert_concept.py"), pipe


def test_the_terms_of_the_words_around_it() -> None:
    example, pipe = concept_pipeline()
    latents = torch.randn(2, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(0))
    noise = draw_noise(latents, torch.Generator().manual_seed(0))
    contexts = ["the {} and a dog", "a {} of the red house"]
    assert example.context_tokens(pipe, [one.format("<toy>") for one in contexts], "<toy>").sum(1).tolist() == [4, 5]
    assert max(example.context_losses(pipe, latents, contexts, noise, "<toy>", "cat")) < 1e-10
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with example.word_vector(pipe, "<toy>", vector):
        states, attention = example.context_losses(pipe, latents, contexts, noise, "<toy>", "cat")
        prompts = [one.format("<toy>") for one in contexts]
        new = encode_prompts(pipe, prompts, SIZE)["encoder_hidden_states"]
    old = encode_prompts(pipe, [one.format("cat") for one in contexts], SIZE)["encoder_hidden_states"]
    places = ([0, 0, 0, 0, 1, 1, 1, 1, 1], [1, 3, 4, 5, 1, 3, 4, 5, 6])
    torch.testing.assert_close(states, (new - old)[places].square().mean())
    for term in (states, attention):
        (gradient,) = torch.autograd.grad(term, vector, retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["sd", "sd2"])
def test_the_attention_is_that_of_the_unet(kind: str) -> None:
    example, pipe = load_script("examples/invert_concept.py"), pipeline(kind)
    latents = torch.randn(1, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(0))
    calls: list[tuple[Any, torch.Tensor]] = []  # in the order in which the UNet calls them
    layers = [one for name, one in pipe.unet.named_modules() if name.endswith(".attn2")]
    handles = [
        one.register_forward_hook(lambda module, args, output: calls.append((module, output))) for one in layers
    ]
    with torch.no_grad(), example.attention_maps(pipe) as maps:
        conditions = encode_prompts(pipe, ["a cat"], SIZE)
        denoise(pipe, latents, conditions, draw_noise(latents))
        assert len(maps) == len(layers)
        for (layer, output), weights in zip(calls, maps, strict=True):
            values = layer.to_v(conditions["encoder_hidden_states"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            attended = (weights @ values).transpose(1, 2).flatten(2)
            torch.testing.assert_close(layer.to_out[0](attended), output, atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()


@pytest.mark.slow
def test_a_word_is_learnt(tmp_path: Path) -> None:
    example, pipe = concept_pipeline()
    pipeline("sd").save_pretrained(tmp_path / "sd")
    (tmp_path / "toy").mkdir()
    for number, record in enumerate(scenes_dataset(4)):
        record["image"].save(tmp_path / "toy" / f"{number}.png")
    options = f"--pipeline {tmp_path / 'sd'} --pictures {tmp_path / 'toy'} --token <toy> --word cat".split()
    options += f"--size {SIZE} --num-steps 40 --learning-rate 0.05".split()
    latents = torch.randn(2, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(0))
    noise, distances = draw_noise(latents, torch.Generator().manual_seed(0)), []
    for name, weight in (("plain", "0"), ("regularised", "0.1")):
        output = tmp_path / name
        weights = ["--states-weight", weight, "--attention-weight", weight]
        report = example.main([*options, *weights, "--output", str(output)])
        assert report["loss_after"] < report["loss_before"] - 0.002
        assert json.loads((output / "report.json").read_text()) == report
        file = output / "learned_embeds.safetensors"
        (vector,) = load_file(file).values()
        with torch.no_grad(), example.word_vector(pipe, "<toy>", vector[0]):
            distances.append(example.context_losses(pipe, latents, example.CONTEXTS[5:7], noise, "<toy>", "cat")[0])
            expected = picture(pipe, "a photo of a <toy>")
        other = pipeline("sd")
        other.load_textual_inversion(str(file))
        assert same(picture(other, "a photo of a <toy>"), expected)
        assert not same(picture(other, "a photo of a cat"), expected)
    assert 0 < distances[1] < 0.7 * distances[0]
