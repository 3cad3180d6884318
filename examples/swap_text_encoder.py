"""Replace the text encoder of a diffusion pipeline by LoTLIP's, and draw a prompt with both, side by side.

    python examples/swap_text_encoder.py --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 --model lotlip-clip \\
        --prompt "A long description ..." --output picture.png

`lotlip convert clip` and `examples/align_text_encoder.py` write folders for `--model`. Without `--model`, the
pipeline's own text encoder gets more positions. `--save` saves the pipeline for `DiffusionPipeline.from_pretrained`,
in any program that imports `lotlip_hf`. Without `--pipeline`, the example uses a tiny random pipeline, whose pictures
are noise.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lotlip_hf.diffusion.stretch import stretch_text_model
from lotlip_hf.diffusion.swap import TextEncoder, swap_text_encoder
from lotlip_hf.files import check_output
from lotlip_hf.grid import check_picture
from lotlip_hf.loading import naming_damage
from lotlip_hf.options import check, make_parser, option, parse
from lotlip_hf.terminal import printable_output

PROMPT = (
    "A wooden table in front of a window. On its left stands a blue vase with seven yellow tulips, and beside it lies "
    "an open book whose pages are held down by a pair of glasses. A grey cat sleeps on a folded newspaper. Behind the "
    "window it is raining, and a woman with a red umbrella crosses the street towards a bakery with a green door."
)
STRETCHED = 248  # positions, as in Long-CLIP


@dataclass
class Options:
    """The options of the command line."""

    pipeline: str | None = option("folder or Hub id of the pipeline; by default a tiny random one", None)
    model: str | None = option("folder or Hub id of LoTLIP; by default the stretched encoder of the slot", None)
    slot: str = option("slot of the text encoder to replace, such as 'text_encoder_2'", "text_encoder")
    max_length: int | None = option("maximum length of a prompt in tokens; by default that of the model", None)
    prompt: str = option("description of the picture", PROMPT)
    negative_prompt: str | None = option("description of things to avoid", None)
    num_steps: int = option("number of denoising steps", 30, at_least=1)
    seed: int = option("seed of the noise of both pictures", 0, at_least=0, below=2**63)
    output: Path = option("file for both pictures, before and after", Path("picture.png"))
    save: Path | None = option("folder for the pipeline with the new text encoder", None)

    def __post_init__(self) -> None:
        check(self)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        check_picture(self.output)  # fails before drawing, not after it
        if self.save is not None:
            check_output(self.save, folder=True)


def tiny_pipeline() -> StableDiffusionPipeline:
    """Creates a Stable Diffusion pipeline with random weights and a byte tokenizer."""
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
        initializer_factor=10.0,  # with smaller weights, hidden states of different texts hardly differ
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


def draw(pipe: DiffusionPipeline, args: Options) -> Image.Image:
    """Draws the prompt, from the same noise in every call."""
    settings: dict[str, Any] = {"num_inference_steps": args.num_steps}
    if args.negative_prompt is not None:
        settings["negative_prompt"] = args.negative_prompt
    return pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed), **settings).images[0]


def load(args: Options) -> tuple[DiffusionPipeline, DiffusionPipeline]:
    """Loads the pipeline. Returns it and a copy with the new text encoder, which shares all other models."""
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
        # For an encoder that is not CLIP, `swap_text_encoder` raises an error.
        if isinstance(model, TextEncoder) and length > model.config.max_position_embeddings:
            stretch_text_model(model, length)
    swap_text_encoder(swapped, model, args.slot, max_length=args.max_length)
    return pipe, swapped


@printable_output()
def main(argv: Sequence[str] | None = None) -> Path:
    """Draws a prompt before and after the swap and returns the path of the picture."""
    try:
        args = parse(Options, argv, make_parser(Options, description=(__doc__ or "").split("\n")[0]))
        pipe, swapped = load(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error

    tokenizer = getattr(swapped, args.slot.replace("text_encoder", "tokenizer"))
    length = len(tokenizer(args.prompt).input_ids)
    print(f"The prompt has {length} tokens. `{args.slot}` now reads up to {tokenizer.model_max_length}.")
    before, after = draw(pipe, args), draw(swapped, args)
    picture = Image.new("RGB", (before.width + after.width, before.height))
    picture.paste(before, (0, 0))
    picture.paste(after, (before.width, 0))
    picture.save(args.output)
    print(f"Saved the pictures before and after the swap, drawn from the same noise, in {args.output}")
    if args.save is not None:
        swapped.save_pretrained(args.save)
        print(f"Saved the pipeline in {args.save}")
    return args.output


if __name__ == "__main__":
    main()
