"""Learn the direction of an attribute, such as age, from what a diffusion pipeline predicts with and without it.

    python examples/learn_direction.py --pipeline stable-diffusion --targets man woman \\
        --positives "old man" "old woman" --negatives "young man" "young woman" \\
        --prefixes "a photo of a" "a painting of a" "a film still of a" --output age

It starts from the mean difference of prompt states (`direction`) and is trained as attribute control
(https://arxiv.org/abs/2403.17064): with the target moved by s times the direction, the frozen pipeline should predict
what it predicts for the target, plus s times the difference of its predictions for the positive and the negative
phrase. The pipeline draws the pictures itself. Prompts with the last prefix are held out: the loss on them, before and
after, is printed and written to report.json. `load_direction("age/direction.safetensors")` reads the file for `steer`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from lotlip_hf.diffusion.denoising import Noise, denoise, encode_prompts, fit
from lotlip_hf.diffusion.transforms import direction, save_direction, steer, transformed
from lotlip_hf.files import write_json
from lotlip_hf.terminal import printable_output, progress_bar

MIN_SCALE, MAX_SCALE = 0.1, 5.0  # the authors'


class Prompts(NamedTuple):
    """The prompts of an example: without the attribute, with it, and with its opposite; `word` is moved."""

    word: str
    target: str
    positive: str
    negative: str


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of a diffusion pipeline")
    parser.add_argument("--targets", nargs="+", required=True, help="words that are moved, such as 'man'")
    parser.add_argument("--positives", nargs="+", required=True, help="phrase with the attribute for each target")
    parser.add_argument("--negatives", nargs="+", required=True, help="phrase with its opposite, or without it")
    parser.add_argument("--prefixes", nargs="+", default=["a photo of a", "a painting of a"], help="texts in front")
    parser.add_argument("--num-pictures", type=int, default=1, help="pictures to draw for each prompt")
    parser.add_argument("--drawing-steps", type=int, default=30, help="denoising steps of a picture")
    parser.add_argument("--num-steps", type=int, default=1000, help="steps of the training")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in a step")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="learning rate of AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.333, help="weight decay of AdamW")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, order, noise and scales")
    parser.add_argument("--output", type=Path, default=Path("direction"), help="new folder")
    args = parser.parse_args(argv)
    if not len(args.targets) == len(args.positives) == len(args.negatives):
        parser.error("pass as many --positives and --negatives as --targets")
    if len(args.prefixes) < 2:
        parser.error("pass two --prefixes or more: the last one is only measured")
    return args


def encode_triples(pipe: DiffusionPipeline, prompts: Sequence[Prompts], size: int) -> dict[str, Any]:
    """Computes what the denoiser gets for the prompts, without a direction."""
    kinds = ("target", "positive", "negative")
    return {kind: encode_prompts(pipe, [getattr(one, kind) for one in prompts], size) for kind in kinds} | {
        "prompts": prompts,
        "size": size,
    }


def random_scales(noise: Noise) -> torch.Tensor:
    """Scales [B] from 0.1 to 5 with a random sign, a function of the noise: held-out losses have the same scales."""
    first, second = noise.noise.float().flatten(1)[:, :2].unbind(1)
    return (MIN_SCALE + (MAX_SCALE - MIN_SCALE) * torch.special.ndtr(first)) * second.sign()


def joined(conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Conditions of single prompts as those of a batch. Flux has one `txt_ids` for all."""
    first = conditions[0]
    return {
        name: joined([one[name] for one in conditions])
        if isinstance(value, dict)
        else value
        if name == "txt_ids"
        else torch.cat([one[name] for one in conditions])
        for name, value in first.items()
    }


def matching_loss(
    vectors: dict[str, torch.nn.Parameter],
    pipe: DiffusionPipeline,
    latents: torch.Tensor,
    conditions: dict[str, Any],
    noise: Noise,
) -> torch.Tensor:
    """Mean squared difference of the predictions for moved targets and those for positive and negative phrases."""
    scales, moved = random_scales(noise), []
    for prompts, scale in zip(conditions["prompts"], scales, strict=True):
        with transformed(pipe, steer(prompts.word, dict(vectors), float(scale)), list(vectors)):
            moved.append(encode_prompts(pipe, [prompts.target], conditions["size"]))
    with torch.no_grad():
        target, positive, negative = (
            denoise(pipe, latents, conditions[kind], noise)[0] for kind in ("target", "positive", "negative")
        )
    wanted = target + scales.reshape(-1, *[1] * (target.dim() - 1)).to(target) * (positive - negative)
    return F.mse_loss(denoise(pipe, latents, joined(moved), noise)[0], wanted)


def draw_pictures(pipe: DiffusionPipeline, prompts: Sequence[str], args: argparse.Namespace) -> list[Image.Image]:
    """Draws a picture for each prompt."""
    pipe.set_progress_bar_config(disable=True)
    options = {"height": args.size, "width": args.size, "num_inference_steps": args.drawing_steps}
    generator = torch.Generator().manual_seed(args.seed)
    return [
        pipe(prompt, generator=generator, **options).images[0]
        for prompt in progress_bar(prompts, unit="picture", desc="Drawing")
    ]


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Learns a direction, and returns the report."""
    args = parse_arguments(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(device)
    args.output.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(args.positives, args.negatives, strict=True))
    start = direction(pipe, pairs, args.prefixes[:-1])
    vectors = {name: torch.nn.Parameter(one.float()) for name, one in start.items()}
    prompts = [
        Prompts(target, *(f"{prefix} {one}".strip() for one in (target, positive, negative)))
        for prefix in args.prefixes  # the last one is held out
        for target, (positive, negative) in zip(args.targets, pairs, strict=True)
        for _ in range(args.num_pictures)
    ]
    before, after, steps = fit(
        pipe,
        vectors.values(),
        draw_pictures(pipe, [one.target for one in prompts], args),
        prompts,
        size=args.size,
        num_steps=args.num_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        held_out=1 / len(args.prefixes),
        seed=args.seed,
        loss=lambda *inputs: matching_loss(vectors, *inputs),
        encode=encode_triples,
    )
    save_direction(vectors, args.output / "direction.safetensors")
    report = {"prompts": len(prompts), "steps": steps, "loss_before": before, "loss_after": after}
    write_json(args.output / "report.json", report)
    print(f"Loss on held-out prompts: {before:.4f} before, {after:.4f} after {steps} steps. Saved in {args.output}.")
    return report


if __name__ == "__main__":
    main()
