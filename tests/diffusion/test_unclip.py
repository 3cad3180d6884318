"""A frozen Stable unCLIP tunes the image tower whose embeddings it reads, and nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion import pipeline_stable_unclip_img2img
from PIL import Image

import tiny_clip
import tiny_diffusion
from lotlip_hf import load_encoder
from lotlip_hf.conversion.clip import convert
from lotlip_hf.diffusion.denoising import (
    denoising_loss,
    draw_noise,
    encode_image_prompts,
    encode_pictures,
    encode_prompts,
    fit,
)
from lotlip_hf.scenes.dataset import scenes_dataset
from scripts import load_script
from tiny_diffusion import SIZE

EXAMPLE = "examples/sharpen_image_tower.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Stable unCLIP, its CLIP, a LoTLIP converted from it, and a CLIP of others."""
    folder = tmp_path_factory.mktemp("unclip")
    clip = tiny_clip.save_clip(folder / "clip")
    tiny_clip.save_clip(folder / "other", tiny_clip.clip_model(seed=1))
    tiny_diffusion.unclip(clip).save_pretrained(folder / "unclip")
    tiny_diffusion.pipeline("sd").save_pretrained(folder / "sd")
    convert(folder / "clip", folder / "lotlip", max_positions=100)
    (folder / "photos").mkdir()
    for number, picture in enumerate(drawn(40)):
        picture.save(folder / "photos" / f"{number:02}.png")
    (folder / "empty").mkdir()
    return {name: folder / name for name in ("clip", "other", "unclip", "sd", "lotlip", "photos", "empty")}


def drawn(number: int) -> list[Image.Image]:
    return [record["image"] for record in scenes_dataset(number)]


def arguments(folders: dict[str, Path], output: Path, **options: Any) -> list[str]:
    values = {"pipeline": folders["unclip"], "model": folders["clip"], "data": folders["photos"]}
    values |= {"num-steps": 40, "size": SIZE, "learning-rate": 1e-3, "output": output, **options}
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def test_the_denoiser_gets_what_it_gets_from_its_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_diffusion.unclip(tiny_clip.clip_model())
    pipe.image_normalizer.mean.data.uniform_(-1, 1)
    pipe.image_normalizer.std.data.uniform_(0.5, 2)
    calls: list[dict[str, Any]] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    monkeypatch.setattr(
        pipeline_stable_unclip_img2img, "randn_tensor", lambda shape, **options: torch.zeros(tuple(shape))
    )
    pictures = drawn(3)
    pipe(pictures, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    latents = encode_pictures(pipe, pictures, SIZE)
    with torch.no_grad():
        conditions = encode_image_prompts(pipe, pictures, SIZE)
        denoising_loss(pipe, latents, conditions, draw_noise(latents))
    handle.remove()
    theirs, ours = calls
    for name in ("encoder_hidden_states", "class_labels"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


def test_an_image_and_its_latents_are_the_same_square() -> None:
    pipe = tiny_diffusion.unclip(tiny_clip.clip_model())
    (picture,) = drawn(1)
    wide = picture.resize((90, 30))
    square = wide.crop((30, 0, 60, 30))
    with torch.no_grad():
        first, second = (encode_image_prompts(pipe, [one], SIZE)["class_labels"] for one in (wide, square))
    torch.testing.assert_close(first, second)


def test_all_but_the_image_tower_stays(folders: dict[str, Path]) -> None:
    pipe = tiny_diffusion.unclip(tiny_clip.clip_model())
    modules = {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}
    before = {name: {key: value.clone() for key, value in one.state_dict().items()} for name, one in modules.items()}
    pictures = drawn(6)
    fit(pipe, pipe.image_encoder.parameters(), pictures, pictures, size=SIZE, num_steps=2, encode=encode_image_prompts)
    moved = {
        name
        for name, one in modules.items()
        if any(not torch.equal(value, before[name][key]) for key, value in one.state_dict().items())
    }
    assert moved == {"image_encoder"}


@pytest.mark.parametrize(("option", "name"), [("pipeline", "sd"), ("model", "other"), ("data", "empty")])
def test_what_does_not_belong_together_is_refused(
    folders: dict[str, Path], tmp_path: Path, option: str, name: str
) -> None:
    with pytest.raises(ValueError, match=f"--{option}"):
        load_script(EXAMPLE).main(arguments(folders, tmp_path / "sharper", **{option: folders[name]}))
    assert not (tmp_path / "sharper").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "lotlip"])
def test_an_image_tower_learns_alone(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    output = tmp_path / "sharper"
    report = load_script(EXAMPLE).main(arguments(folders, output, model=folders[name]))
    assert report["pictures"] == 40
    assert report["loss_after"] < report["loss_before"] - 0.01  # on held-out pictures
    assert report["similarity_before"] == pytest.approx(1.0, abs=1e-5)
    assert report["similarity_after"] < 1.0
    assert json.loads((output / "report.json").read_text()) == report
    before, after = (load_encoder(folder) for folder in (folders[name], output))
    first, second = (encoder.engine.model.state_dict() for encoder in (before, after))
    moved = {name for name, one in first.items() if not torch.equal(one, second[name])}
    assert {name.split(".")[0] for name in moved} == {"vision_model", "visual_projection"}
    texts = tiny_clip.texts()
    assert np.array_equal(*(encoder.encode_texts(texts, progress=False) for encoder in (before, after)))
    images = [np.asarray(encoder.encode_images(drawn(2), progress=False)) for encoder in (before, after)]
    assert not np.allclose(*images, atol=1e-3)


def colours(
    pipe: Any, pictures: list[Image.Image], size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Latents of pictures of one colour: that colour and its brightness, of about unit variance."""
    values = torch.tensor([picture.getpixel((0, 0)) for picture in pictures]) / 127.5 - 1
    latents = 1.7 * torch.cat([values, values.mean(dim=1, keepdim=True)], dim=1)
    return latents[:, :, None, None].expand(-1, -1, size // 2, size // 2)


@pytest.mark.slow
def test_embeddings_tell_more_of_their_own_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lotlip_hf.diffusion.denoising.encode_pictures", colours)
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (120, 3), generator=generator).tolist()
    pictures = [Image.new("RGB", (32, 32), tuple(colour)) for colour in values]
    held_out = pictures[-12:]
    pipe = tiny_diffusion.unclip(tiny_clip.clip_model())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    latents = colours(pipe, held_out, SIZE)
    noises = [draw_noise(latents, generator) for _ in range(8)]

    def train(module: torch.nn.Module, num_steps: int, learning_rate: float) -> None:
        options = {"size": SIZE, "num_steps": num_steps, "batch_size": 16, "learning_rate": learning_rate}
        fit(pipe, module.parameters(), pictures, pictures, **options, encode=encode_image_prompts)

    @torch.no_grad()
    def measured() -> tuple[float, float]:
        """The loss with the embeddings of held-out pictures, and with those of other pictures."""
        embeds = encode_image_prompts(pipe, held_out, SIZE)["class_labels"]
        prompts = encode_prompts(pipe, [""] * len(held_out), SIZE)
        own, other = (
            sum(float(denoising_loss(pipe, latents, {**prompts, "class_labels": one}, noise)) for noise in noises)
            for one in (embeds, embeds.roll(1, 0))
        )
        return own / len(noises), other / len(noises)

    train(pipe.unet, 80, 1e-2)  # a Stable unCLIP of colours
    with torch.no_grad():  # a tower that tells less of them
        for parameter in pipe.image_encoder.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    own, other = measured()
    train(pipe.image_encoder, 50, 1e-3)
    new_own, new_other = measured()
    assert new_own < own - 0.05
    assert new_other - new_own > other - own + 0.1
