"""The denoising loss of a frozen pipeline, by which parts of it that read prompts or images are trained."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch.nn import functional as F
from transformers import get_constant_schedule_with_warmup

from ..data.records import load_records
from ..images import load_image
from ..scenes.dataset import scenes_dataset
from ..terminal import progress_bar

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Noise(NamedTuple):
    """What a denoising loss draws: noise in the shape of the latents, and for each sample a number in [0, 1)."""

    noise: torch.Tensor
    times: torch.Tensor


def draw_noise(latents: torch.Tensor, generator: torch.Generator | None = None) -> Noise:
    """Draws noise and times for latents [B, ...], on the CPU, so that they are the same on each device."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return Noise(noise, torch.rand(len(latents), generator=generator).to(latents.device))


def _square(picture: Image.Image) -> Image.Image:
    """The centre of a picture."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.convert("RGB").crop((left, top, left + side, top + side))


def read_pictures(data: str, number: int) -> tuple[list[Image.Image], list[str]]:
    """
    Reads pictures with prompts: their first long captions, or the short ones.

    Args:
        data (`str`): Records, as for `lotlip train --data`, or `"scenes"` for drawn pictures.
        number (`int`): Number of pictures to read, from the first.

    Returns:
        `tuple[list[PIL.Image.Image], list[str]]`: The pictures and their prompts.
    """
    records: Any = scenes_dataset(number) if data == "scenes" else load_records(data)
    chosen = [records[index] for index in range(min(number, len(records)))]
    prompts = [(record["long_captions"] or [record["short_caption"]])[0] for record in chosen]
    return [load_image(record["image"], f"record {record['id']}") for record in chosen], prompts


@torch.no_grad()
def encode_pictures(
    pipe: "DiffusionPipeline", pictures: Sequence[Image.Image], size: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Computes the latents of pictures.

    Args:
        pipe (`DiffusionPipeline`): The pipeline.
        pictures (`Sequence[PIL.Image.Image]`): B pictures. Their centre is cropped to a square.
        size (`int`): Side of the squares in pixels.
        generator (`torch.Generator`, *optional*): Draws a sample of the latents.

    Returns:
        `torch.Tensor`: Latents [B, channels, height, width], scaled as the pipeline needs them.
    """
    squares = [np.array(_square(picture).resize((size, size))) for picture in pictures]
    pixels = torch.stack([torch.from_numpy(square).permute(2, 0, 1) / 127.5 - 1 for square in squares])
    vae = pipe.vae
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample(generator)
    return (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def encode_prompts(pipe: "DiffusionPipeline", prompts: Sequence[str], size: int) -> dict[str, Any]:
    """
    Computes what the denoiser of a pipeline gets for prompts, with gradients.

    Args:
        pipe (`DiffusionPipeline`): Stable Diffusion 1.x, 2.x, XL or 3, Flux, or Stable unCLIP.
        prompts (`Sequence[str]`): B prompts.
        size (`int`): Side of the pictures in pixels, which Stable Diffusion XL reads.

    Returns:
        `dict[str, Any]`: Arguments of the denoiser, such as `encoder_hidden_states`.
    """
    options: dict[str, Any] = {"device": pipe.device, "num_images_per_prompt": 1}
    if hasattr(pipe, "unet"):
        options["do_classifier_free_guidance"] = False
    else:
        options |= {f"prompt_{number}": None for number in (2, 3) if hasattr(pipe, f"tokenizer_{number}")}
        options["max_sequence_length"] = min(256, pipe.tokenizer_2.model_max_length)
    if hasattr(pipe, "tokenizer_3"):
        options["do_classifier_free_guidance"] = False
    states, *others = pipe.encode_prompt(list(prompts), **options)
    if not hasattr(pipe, "unet"):
        is_flux = not hasattr(pipe, "tokenizer_3")
        rest = {"pooled_projections": others[0] if is_flux else others[1]}
        return {"encoder_hidden_states": states, **rest, **({"txt_ids": others[1]} if is_flux else {})}
    if not hasattr(pipe, "tokenizer_2"):
        return {"encoder_hidden_states": states}
    pooled = others[1]
    sizes = torch.tensor([[size, size, 0, 0, size, size]] * len(states), device=states.device, dtype=states.dtype)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}


def encode_image_prompts(pipe: "DiffusionPipeline", pictures: Sequence[Image.Image], size: int) -> dict[str, Any]:
    """
    Computes what the denoiser of a Stable unCLIP gets for pictures and empty prompts, with gradients for the image
    tower.

    Args:
        pipe (`DiffusionPipeline`): A `StableUnCLIPImg2ImgPipeline`.
        pictures (`Sequence[PIL.Image.Image]`): B pictures. Their centre is cropped to a square.
        size (`int`): Side of the pictures in pixels.

    Returns:
        `dict[str, Any]`: Arguments of the denoiser, with `class_labels` [B, 2 * projection_dim]: the image embeddings
            and those of the noise level 0. No noise is added, so that a picture always gives the same numbers.
    """
    tower = pipe.image_encoder
    pixels = pipe.feature_extractor(
        images=[_square(picture) for picture in pictures], return_tensors="pt"
    ).pixel_values
    embeds = tower(pixels.to(tower.device, tower.dtype)).image_embeds
    labels = pipe.noise_image_embeddings(embeds, noise_level=0, noise=torch.zeros_like(embeds))
    return {**encode_prompts(pipe, [""] * len(pictures), size), "class_labels": labels}


def denoise(
    pipe: "DiffusionPipeline", latents: torch.Tensor, conditions: dict[str, Any], noise: Noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes what a pipeline's denoiser predicts for noisy latents, and what it should predict: the noise, the
    velocity, or the flow.

    Args:
        pipe (`DiffusionPipeline`): Stable Diffusion 1.x, 2.x, XL or 3, or Flux.
        latents (`torch.Tensor`): Latents [B, channels, height, width], from [`encode_pictures`].
        conditions (`dict[str, Any]`): Arguments of the denoiser, from [`encode_prompts`].
        noise (`Noise`): Noise and times, from [`draw_noise`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The prediction and its target, of equal shapes. Those of Flux are packed.
    """
    if hasattr(pipe, "unet"):
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        count = scheduler.config.num_train_timesteps
        timesteps = (noise.times * count).long().clamp(max=count - 1)
        noisy = scheduler.add_noise(latents, noise.noise, timesteps)
        targets = {"epsilon": noise.noise, "sample": latents}
        kind = scheduler.config.prediction_type
        target = scheduler.get_velocity(latents, noise.noise, timesteps) if kind == "v_prediction" else targets[kind]
        predicted = pipe.unet(noisy, timesteps, **conditions).sample
        return predicted.float(), target.float()
    times = noise.times.to(latents).reshape(-1, 1, 1, 1)
    noisy, target = (1 - times) * latents + times * noise.noise, noise.noise - latents
    if hasattr(pipe, "tokenizer_3"):
        predicted = pipe.transformer(noisy, timestep=1000 * noise.times.to(latents), **conditions).sample
        return predicted.float(), target.float()
    shape = (len(latents), *latents.shape[1:])
    noisy, target = (pipe._pack_latents(one, *shape) for one in (noisy, target))
    ids = pipe._prepare_latent_image_ids(len(latents), shape[2] // 2, shape[3] // 2, latents.device, latents.dtype)
    guidance = latents.new_ones(len(latents)) if pipe.transformer.config.guidance_embeds else None
    predicted = pipe.transformer(
        noisy, timestep=noise.times.to(latents), guidance=guidance, img_ids=ids, **conditions
    ).sample
    return predicted.float(), target.float()


def denoising_loss(
    pipe: "DiffusionPipeline", latents: torch.Tensor, conditions: dict[str, Any], noise: Noise
) -> torch.Tensor:
    """
    Computes the mean squared error of a pipeline's denoiser: of the noise, or of the velocity for a pipeline that
    predicts it (Salimans and Ho, https://arxiv.org/abs/2202.00512), and of the flow for Stable Diffusion 3 and Flux
    (https://arxiv.org/abs/2403.03206, section 3.1).

    Args:
        pipe (`DiffusionPipeline`): Stable Diffusion 1.x, 2.x, XL or 3, Flux, or Stable unCLIP.
        latents (`torch.Tensor`): Latents [B, channels, height, width], from [`encode_pictures`].
        conditions (`dict[str, Any]`): Arguments of the denoiser, from [`encode_prompts`], or for Stable unCLIP
            from [`encode_image_prompts`].
        noise (`Noise`): Noise and times, from [`draw_noise`].

    Returns:
        `torch.Tensor`: The loss, a scalar with a gradient for the conditions.

    Example:

    ```python
    >>> from diffusers import DiffusionPipeline
    >>> from lotlip_hf.diffusion.denoising import denoising_loss, draw_noise, encode_pictures, encode_prompts
    >>> from PIL import Image

    >>> pipe = DiffusionPipeline.from_pretrained("stable-diffusion")
    >>> latents = encode_pictures(pipe, [Image.new("RGB", (64, 64))], size=16)
    >>> loss = denoising_loss(pipe, latents, encode_prompts(pipe, ["a cat"], 16), draw_noise(latents))
    >>> loss.requires_grad
    True
    ```
    """
    return F.mse_loss(*denoise(pipe, latents, conditions, noise))


def fit(
    pipe: "DiffusionPipeline",
    parameters: Iterable[torch.nn.Parameter],
    pictures: Sequence[Image.Image],
    prompts: Sequence[Any],
    *,
    size: int,
    num_steps: int,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    held_out: float = 0.1,
    seed: int = 0,
    loss: Callable[..., torch.Tensor] = denoising_loss,
    encode: Callable[..., Any] = encode_prompts,
) -> tuple[float, float, int]:
    """
    Trains parameters by the denoising loss on pictures with prompts. All others stay frozen. Ctrl-C ends the training
    early.

    Args:
        pipe (`DiffusionPipeline`): The pipeline, whose encoders or denoiser use the parameters.
        parameters (`Iterable[torch.nn.Parameter]`): The parameters to train.
        pictures (`Sequence[PIL.Image.Image]`): N pictures.
        prompts (`Sequence`): N prompts, or what `encode` takes instead.
        size (`int`): Side of the pictures in pixels.
        num_steps (`int`): Steps of AdamW.
        batch_size (`int`, *optional*, defaults to 8): Pictures in a step.
        learning_rate (`float`, *optional*, defaults to 1e-4): Learning rate, after a warm-up in a tenth of the steps.
        weight_decay (`float`, *optional*, defaults to 0.01): Weight decay of AdamW.
        held_out (`float`, *optional*, defaults to 0.1): Share of the pictures, the last ones, that are only measured.
        seed (`int`, *optional*, defaults to 0): Seed of the order and the noise.
        loss (`Callable`, *optional*): Loss with the arguments of [`denoising_loss`].
        encode (`Callable`, *optional*): Function with the arguments of [`encode_prompts`] that returns the
            `conditions` of `loss`.

    Returns:
        `tuple[float, float, int]`: The loss on held-out pictures with the same noise before and after the training,
        and the number of steps.

    Raises:
        `ValueError`: If there are fewer than two pictures, or the loss is not finite.
    """
    if len(pictures) < 2 or len(pictures) != len(prompts):
        raise ValueError(f"`pictures` has {len(pictures)}, `prompts` {len(prompts)}. Pass two or more, and as many.")
    trained = list(parameters)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.cat([encode_pictures(pipe, [picture], size, generator) for picture in pictures])
    rest = max(1, round(held_out * len(latents)))
    number = len(latents) - rest
    noise = [draw_noise(latents[number:], generator) for _ in range(4)]

    def losses(indices: Sequence[int], noise: Noise) -> torch.Tensor:
        conditions = encode(pipe, [prompts[index] for index in indices], size)
        return loss(pipe, latents[list(indices)], conditions, noise)

    @torch.no_grad()
    def measured() -> float:
        return float(torch.stack([losses(range(number, len(latents)), one) for one in noise]).mean())

    before, steps = measured(), 0
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay)
    schedule = get_constant_schedule_with_warmup(optimizer, num_steps // 10)
    with contextlib.suppress(KeyboardInterrupt), progress_bar(range(num_steps), unit="step", desc="Training") as bar:
        for _ in bar:
            indices = torch.randint(number, (batch_size,), generator=generator).tolist()
            step_loss = losses(indices, draw_noise(latents[indices], generator))
            if not step_loss.isfinite():
                raise ValueError(f"The loss is {step_loss.item()} after {steps} steps. Reduce `learning_rate`.")
            step_loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            steps += 1
            bar.set_postfix(loss=f"{step_loss.item():.4f}", refresh=False)
    return before, measured(), steps
