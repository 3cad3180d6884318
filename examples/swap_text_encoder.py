"""Put a LoTLIP text encoder into a diffusion pipeline, and draw a prompt with both, side by side.

    python examples/swap_text_encoder.py --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 --model lotlip-clip \\
        --prompt "A long description ..." --output picture.png

`--model` is what `python -m lotlip_hf.conversion.clip` or `examples/align_text_encoder.py` leave; without it, the
pipeline's own text encoder is given more positions. `--save` keeps the pipeline, which any program that imports
`lotlip_hf` loads with `DiffusionPipeline.from_pretrained`. Without `--pipeline` a tiny random one is made, to try it
out (its pictures are noise).
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lotlip_hf.diffusion.stretch import stretch_text_model
from lotlip_hf.diffusion.swap import TextEncoder, swap_text_encoder
from lotlip_hf.loading import naming_damage
from lotlip_hf.terminal import printable_output

PROMPT = (
    "A wooden table in front of a window. On its left stands a blue vase with seven yellow tulips, and beside it lies "
    "an open book whose pages are held down by a pair of glasses. A grey cat sleeps on a folded newspaper. Behind the "
    "window it is raining, and a woman with a red umbrella crosses the street towards a bakery with a green door."
)
STRETCHED = 248  # positions, as in Long-CLIP


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", help="folder or Hub id of the pipeline; by default a tiny random one")
    parser.add_argument("--model", help="folder or Hub id of the LoTLIP; by default the slot's own encoder, stretched")
    parser.add_argument("--slot", default="text_encoder", help="text encoder to replace, such as 'text_encoder_2'")
    parser.add_argument("--max-length", type=int, help="longest prompt in tokens; by default what the model takes")
    parser.add_argument("--prompt", default=PROMPT, help="what to draw")
    parser.add_argument("--negative-prompt", help="what not to draw")
    parser.add_argument("--num-steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise that both pictures start from")
    parser.add_argument("--output", type=Path, default=Path("picture.png"), help="both pictures, before and after")
    parser.add_argument("--save", type=Path, help="folder to save the pipeline to")
    return parser.parse_args(argv)


def tiny_pipeline() -> StableDiffusionPipeline:
    """A Stable Diffusion of random weights, whose tokenizer has a token for each byte."""
    torch.manual_seed(0)
    byte_tokens = list(bytes_to_unicode().values())
    tokens = [*byte_tokens, *(token + "</w>" for token in byte_tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    text_config = CLIPTextConfig(
        vocab_size=len(tokens),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_factor=10.0,  # else texts hardly differ
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_num_groups=2,
        ),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=2,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipe: DiffusionPipeline, args: argparse.Namespace) -> Image.Image:
    """The prompt's picture, from the same noise each time."""
    settings: dict[str, Any] = {"num_inference_steps": args.num_steps}
    if args.negative_prompt is not None:
        settings["negative_prompt"] = args.negative_prompt
    return pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed), **settings).images[0]


def load(args: argparse.Namespace) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    """The pipeline as it is, and one after the swap, which shares all other models with it."""
    if args.pipeline is None:
        pipe = tiny_pipeline()
    else:
        has_accelerator = torch.accelerator.is_available()
        dtype = torch.float16 if has_accelerator else torch.float32
        with naming_damage(args.pipeline):
            pipe = DiffusionPipeline.from_pretrained(args.pipeline, dtype=dtype)
        pipe.to(torch.accelerator.current_accelerator() if has_accelerator else "cpu")
    swapped = type(pipe).from_pipe(pipe, dtype=pipe.dtype)

    model = args.model
    if model is None:
        model = copy.deepcopy(getattr(pipe, args.slot, None))
        length = args.max_length or STRETCHED
        # of what is no CLIP, the swap says what it is
        if isinstance(model, TextEncoder) and length > model.config.max_position_embeddings:
            stretch_text_model(model, length)
    swap_text_encoder(swapped, model, args.slot, max_length=args.max_length)
    return pipe, swapped


def check_files(args: argparse.Namespace) -> None:
    """Before hours of drawing, what would go wrong at their end."""
    for option, value, least in (("--num-steps", args.num_steps, 1), ("--seed", args.seed, 0)):
        if not least <= value < 2**63:
            raise ValueError(f"{option} {value}: expected {least} or more.")
    if args.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {args.output}: not the name of a picture; take one that ends in .png.")
    if args.save is not None and args.save.exists() and (not args.save.is_dir() or any(args.save.iterdir())):
        raise ValueError(f"--save {args.save}: exists already; choose another name or remove it.")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {args.output}: its folder cannot be made ({error}).") from error


@printable_output()
def main(argv: Sequence[str] | None = None) -> Path:
    """Draws before the swap and after it as the command line says; answers with the picture's path."""
    args = parse_arguments(argv)
    try:
        check_files(args)
        pipe, swapped = load(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error

    tokenizer = getattr(swapped, args.slot.replace("text_encoder", "tokenizer"))
    length = len(tokenizer(args.prompt).input_ids)
    print(f"The prompt has {length} tokens, and `{args.slot}` now reads {tokenizer.model_max_length}.")
    before, after = draw(pipe, args), draw(swapped, args)
    picture = Image.new("RGB", (before.width + after.width, before.height))
    picture.paste(before, (0, 0))
    picture.paste(after, (before.width, 0))
    picture.save(args.output)
    print(f"Before and after the swap, from the same noise: {args.output}")
    if args.save is not None:
        swapped.save_pretrained(args.save)
        print(f"The pipeline: {args.save}")
    return args.output


if __name__ == "__main__":
    main()
