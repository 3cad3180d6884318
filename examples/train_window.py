"""Train WiCLP's window map: prompts whose attributes stay with their things, by a small linear map of prompt states.

    lotlip convert clip --clip stable-diffusion --subfolder text_encoder --output lotlip-clip
    python examples/train_window.py --pipeline stable-diffusion --model lotlip-clip --data pictures --output window
    python examples/swap_text_encoder.py --pipeline stable-diffusion --model window --prompt "a red car, a house"

The map adds to the state of each token a linear function of five neighbouring states, and starts as no change
(https://arxiv.org/abs/2406.07844). Only the map is trained, by the denoising loss of the frozen pipeline. A picture's
prompt is its first long caption. The loss on held-out pictures, before and after, is printed and written to
report.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import set_seed

from lotlip_hf import LoTLIPTextEncoder, LoTLIPTextModel, LoTLIPTextModelWithProjection
from lotlip_hf.diffusion.denoising import fit, read_pictures
from lotlip_hf.diffusion.swap import swap_text_encoder
from lotlip_hf.diffusion.text_encoder import pipeline_target_layer
from lotlip_hf.files import write_json
from lotlip_hf.terminal import printable_output


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of a pipeline")
    parser.add_argument(
        "--model", required=True, help="LoTLIP of the text encoder in the slot, by `lotlip convert clip`"
    )
    parser.add_argument("--slot", default="text_encoder", help="slot of the text encoder in the pipeline")
    parser.add_argument(
        "--data", required=True, help="pictures with long captions, as for `lotlip train`; or 'scenes'"
    )
    parser.add_argument("--num-pictures", type=int, default=1000, help="pictures to read")
    parser.add_argument("--num-steps", type=int, default=20000, help="steps of the training, 20000 in WiCLP")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="learning rate of AdamW")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of order and noise")
    parser.add_argument("--output", type=Path, default=Path("window"), help="new folder of the text encoder")
    return parser.parse_args(argv)


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains a window map, saves the text encoder, and returns the report."""
    args = parse_arguments(argv)
    set_seed(args.seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(device)
    projection = getattr(getattr(pipe, args.slot), "text_projection", None)
    tower = (LoTLIPTextModel if projection is None else LoTLIPTextModelWithProjection).from_pretrained(args.model)
    encoders = [one for name, one in pipe.components.items() if name.startswith("text_encoder")]
    encoder = LoTLIPTextEncoder.from_text_model(
        tower,
        adapter="window",
        projection_dim=None if projection is None else projection.out_features,
        target_layer=pipeline_target_layer(getattr(one, "text_projection", None) is not None for one in encoders),
    )
    swap_text_encoder(pipe, encoder, args.slot)
    swapped = getattr(pipe, args.slot)
    pictures, prompts = read_pictures(args.data, args.num_pictures)
    before, after, steps = fit(
        pipe,
        swapped.adapter.parameters(),
        pictures,
        prompts,
        size=args.size,
        num_steps=args.num_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    swapped.save_pretrained(args.output)
    getattr(pipe, args.slot.replace("text_encoder", "tokenizer")).save_pretrained(args.output)
    report = {"pictures": len(pictures), "steps": steps, "loss_before": before, "loss_after": after}
    write_json(args.output / "report.json", report)
    print(f"Loss on held-out pictures: {before:.4f} before, {after:.4f} after {steps} steps. Saved in {args.output}.")
    return report


if __name__ == "__main__":
    main()
