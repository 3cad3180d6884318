"""Tune the image tower of a CLIP or LoTLIP by a Stable unCLIP, so that its embeddings hold more detail of the picture.

    lotlip convert clip --clip openai/clip-vit-large-patch14 --output lotlip-clip
    python examples/sharpen_image_tower.py --pipeline stable-unclip --model lotlip-clip --data photos --output sharper

A Stable unCLIP draws pictures from the image embeddings of one CLIP. Here it stays frozen, and the image tower learns
to give embeddings from which it restores the picture (un2CLIP, https://arxiv.org/abs/2505.24517). The text tower keeps
its weights. The model must be the CLIP of the pipeline, or a LoTLIP converted from it. A useful tower needs a GPU and
many pictures; the defaults are guesses, as the authors' learning rate and number of steps are not known here. The loss
on held-out pictures before and after, and how close the embeddings stay to the pipeline's, are printed and written to
report.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableUnCLIPImg2ImgPipeline
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPVisionModelWithProjection

from lotlip_hf import LoTLIPModel, LoTLIPVisionModelWithProjection
from lotlip_hf.diffusion.denoising import encode_image_prompts, fit
from lotlip_hf.files import check_output, write_json
from lotlip_hf.images import find_images, load_image
from lotlip_hf.loading import load_model
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.terminal import printable_output

TOWERS: dict[type, Any] = {CLIPModel: CLIPVisionModelWithProjection, LoTLIPModel: LoTLIPVisionModelWithProjection}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of a Stable unCLIP that reads images")
    parser.add_argument("--model", required=True, help="the pipeline's CLIP, or a LoTLIP converted from it")
    parser.add_argument("--data", required=True, help="folder of pictures; or 'scenes'")
    parser.add_argument("--num-pictures", type=int, default=1000, help="pictures to read")
    parser.add_argument("--num-steps", type=int, default=1000, help="steps of the training")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-6, help="learning rate of AdamW")
    parser.add_argument("--size", type=int, default=768, help="side of the pictures of the pipeline in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of order and noise")
    parser.add_argument("--output", type=Path, default=Path("sharper"), help="new folder of the tuned model")
    return parser.parse_args(argv)


def read_pictures(data: str, number: int) -> list[Image.Image]:
    """Reads the first pictures of a folder, or draws scenes."""
    if data == "scenes":
        return [record["image"] for record in scenes_dataset(number)]
    return [load_image(Path(data, name)) for name in list(find_images(data)[0])[:number]]


def share_image_tower(model: CLIPModel | LoTLIPModel) -> Any:
    """Returns the image tower of a model, with its weights, as the image encoder of a pipeline."""
    with torch.device("meta"):
        tower = TOWERS[type(model)](model.config.vision_config)
    tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection
    return tower.eval()


@torch.no_grad()
def embed(pipe: StableUnCLIPImg2ImgPipeline, pictures: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Image embeddings [N, D], as the pipeline reads them."""
    labels = [encode_image_prompts(pipe, [picture], size)["class_labels"] for picture in pictures]
    return torch.cat(labels).chunk(2, dim=-1)[0]


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Tunes an image tower, saves the whole model, and returns the report."""
    args = parse_arguments(argv)
    check_output(args.output, folder=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model, processor = load_model(args.model, device=device, dtype="float32")
    if type(model) not in TOWERS:
        raise ValueError(f"--model {args.model} is a {type(model).__name__}. Pass a CLIP or a LoTLIP.")
    pipe: Any = DiffusionPipeline.from_pretrained(args.pipeline, feature_extractor=processor.image_processor)
    if not isinstance(pipe, StableUnCLIPImg2ImgPipeline):
        raise ValueError(
            f"--pipeline {args.pipeline} is a {type(pipe).__name__}. Pass a StableUnCLIPImg2ImgPipeline, which draws "
            "pictures from image embeddings."
        )
    pipe.to(device)
    pictures = read_pictures(args.data, args.num_pictures)
    if len(pictures) < 2:
        raise ValueError(f"--data {args.data} has {len(pictures)} pictures. Pass a folder with two or more.")
    sample = pictures[-16:]
    own, tower = embed(pipe, sample, args.size), share_image_tower(model)
    pipe.register_modules(image_encoder=tower)

    def similarity() -> float:
        return float(F.cosine_similarity(embed(pipe, sample, args.size), own).mean())

    start = similarity() if model.projection_dim == own.shape[-1] else 0.0
    if start < 0.5:  # the training would hide it, and the texts would no longer fit
        raise ValueError(
            f"--model {args.model} gives other image embeddings than the CLIP of --pipeline {args.pipeline} (cosine "
            f"{start:.2f}). Pass that CLIP, or a LoTLIP converted from it."
        )
    before, after, steps = fit(
        pipe,
        tower.parameters(),
        pictures,
        pictures,  # all that the pipeline knows of a picture is its embedding
        size=args.size,
        num_steps=args.num_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        encode=encode_image_prompts,
    )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    report = {"pictures": len(pictures), "steps": steps, "loss_before": before, "loss_after": after}
    report |= {"similarity_before": start, "similarity_after": similarity()}
    write_json(args.output / "report.json", report)
    print(
        f"Loss on held-out pictures: {before:.4f} before, {after:.4f} after {steps} steps. Cosine of image embeddings "
        f"with the pipeline's: {start:.3f} before, {report['similarity_after']:.3f} after. Saved in {args.output}."
    )
    return report


if __name__ == "__main__":
    main()
