"""Train ELLA's connector: a text tower of your choice reads the prompts of Stable Diffusion 1.x or 2.x.

    python examples/train_ella.py --pipeline stable-diffusion --text-encoder checkpoint --data pictures --output ella
    python examples/train_ella.py --pipeline stable-diffusion --draw ella/ella.safetensors \\
        --text-encoder checkpoint --prompt "A wooden table in front of a window. On its left stands a blue vase."

Only the connector is trained, by the denoising loss of the frozen pipeline (https://arxiv.org/abs/2403.05135). A
picture's prompt is its first long caption. A useful connector needs a GPU, millions of pictures and days; a few
thousand steps on your pictures start from a connector of before (--start). The loss on held-out pictures, before and
after, is printed and written to report.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoTokenizer, set_seed

import lotlip_hf
from lotlip_hf.diffusion.denoising import fit, read_pictures
from lotlip_hf.diffusion.ella import ELLA, connected, load_ella, save_ella
from lotlip_hf.files import write_json
from lotlip_hf.terminal import printable_output


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of a Stable Diffusion pipeline")
    parser.add_argument("--text-encoder", required=True, help="folder or Hub id of a LoTLIP or another text encoder")
    parser.add_argument("--data", help="pictures with long captions, as for `lotlip train`; or 'scenes'")
    parser.add_argument("--num-pictures", type=int, default=1000, help="pictures to read")
    parser.add_argument("--start", type=Path, help="connector to train further")
    parser.add_argument("--max-length", type=int, default=128, help="length of prompts in tokens")
    parser.add_argument("--num-steps", type=int, default=1000, help="steps of the training")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="learning rate of AdamW")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--num-layers", type=int, default=6, help="layers of a new connector")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and noise")
    parser.add_argument("--output", type=Path, default=Path("ella"), help="new folder")
    parser.add_argument("--draw", type=Path, help="draw a picture with this connector instead of training")
    parser.add_argument("--prompt", default="A red house by a lake.", help="prompt of the picture")
    args = parser.parse_args(argv)
    if (args.draw is None) == (args.data is None):
        parser.error("pass either --data, to train, or --draw, for a picture")
    return args


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains a connector, or draws a picture, and returns the report."""
    args = parse_arguments(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(device)
    model = (
        AutoModel.from_pretrained(args.text_encoder, trust_remote_code=False, use_safetensors=True).to(device).eval()
    )
    tower = model if isinstance(model, lotlip_hf.LoTLIPModel) else getattr(model, "text_model", model)
    tokenizer = AutoTokenizer.from_pretrained(args.text_encoder, trust_remote_code=False)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.draw is not None:
        with connected(pipe, load_ella(args.draw).to(device), tower, tokenizer, args.max_length):
            file = args.output / "picture.png"
            pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed)).images[0].save(file)
        print(f"Drawn in {file}.")
        return {"picture": str(file)}
    set_seed(args.seed)
    width = getattr(model.config, "text_config", model.config).hidden_size
    ella = load_ella(args.start) if args.start else ELLA(width, pipe.unet.config.cross_attention_dim, args.num_layers)
    ella = ella.to(device).train()
    pictures, prompts = read_pictures(args.data, args.num_pictures)
    with connected(pipe, ella, tower, tokenizer, args.max_length):
        before, after, steps = fit(
            pipe,
            ella.parameters(),
            pictures,
            prompts,
            size=args.size,
            num_steps=args.num_steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            seed=args.seed,
        )
    save_ella(ella, args.output / "ella.safetensors")
    report = {"pictures": len(pictures), "steps": steps, "loss_before": before, "loss_after": after}
    write_json(args.output / "report.json", report)
    print(f"Loss on held-out pictures: {before:.4f} before, {after:.4f} after {steps} steps. Saved in {args.output}.")
    return report


if __name__ == "__main__":
    main()
