"""Tune an image tower on pictures without labels, by descriptions of their classes.

    python examples/tune_without_labels.py --model checkpoint --images photos --class-descriptions classes.json \\
        --teacher facebook/dino-vitb16 --output tuning.safetensors

The method is NoLA's (https://arxiv.org/abs/2411.19346):

1. The descriptions give class embeddings, and these give each picture a class.
2. The most confident pictures of each class train a small MLP on the frozen features of another image encoder.
3. Visual prompts, the norms of the image tower and the class embeddings are trained on changed pictures with the
   classes that the MLP gives to the unchanged ones. The text tower and all other weights stay.

`lotlip_hf.image_tuning.load_tuning` reads the result. `--test` is a folder with one folder for each class, whose
accuracy before and after is printed.

NoLA's logits are products of class embeddings and features that are not normalised. Here they are cosines times the
model's logit scale, because the length of features differs between models.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from lotlip_hf.data.augment import Augment, crop_size, load_augmented, parse_augment
from lotlip_hf.encoder import Encoder, load_encoder
from lotlip_hf.engines.torch import evaluating
from lotlip_hf.evaluation.benchmarks.registry import load_benchmark
from lotlip_hf.evaluation.zero_shot import class_embeddings, class_texts, read_class_descriptions
from lotlip_hf.files import check_output
from lotlip_hf.image_tuning import ImageTuning, new_prompts, norm_parameters
from lotlip_hf.images import find_images, load_pixels
from lotlip_hf.loading import load_image_processor, load_strict
from lotlip_hf.terminal import printable_output, progress_bar

HIDDEN = 256  # width of the MLP
MLP_EPOCHS, MLP_BATCH = 50, 32
SHARE, FEWEST = 0.2, 16  # of the pictures of a class if all have as many, and at least


def confident(probabilities: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """
    Indices and classes of the most confident pictures of each class, given [N, C]. A class that no picture has as
    first choice takes those that have it as second, and so on. A picture stays with the first class that takes it.
    """
    values, choices = probabilities.sort(dim=1, descending=True, stable=True)
    found: dict[int, int] = {}
    for label in range(probabilities.shape[1]):
        rank = next(rank for rank in range(choices.shape[1]) if (choices[:, rank] == label).any())
        own = (choices[:, rank] == label).nonzero()[:, 0]
        best = values[own, rank].sort(descending=True, stable=True).indices[:number]
        for index in own[best].tolist():
            found.setdefault(index, label)
    return torch.tensor(list(found)), torch.tensor(list(found.values()))


def teacher_features(name: str, images: Sequence[Any], batch_size: int, device: torch.device) -> Tensor:
    """Class tokens [N, D] of a frozen image encoder."""
    model = load_strict(AutoModel, name, allow_missing="pooler", trust_remote_code=False, dtype="float32").to(device)
    processor, rows = load_image_processor(name), []
    for start in progress_bar(range(0, len(images), batch_size), desc="Reading features", unit="step"):
        batch = [load_pixels(one, image_processor=processor)["pixel_values"] for one in images[start:][:batch_size]]
        with torch.inference_mode():
            rows.append(model(pixel_values=torch.cat(batch).to(device)).last_hidden_state[:, 0].cpu())
    return torch.cat(rows).clone()


def train_mlp(features: Tensor, labels: Tensor, num_classes: int) -> nn.Module:
    """Trains the MLP on features [n, D] and classes [n]."""
    mlp = nn.Sequential(nn.Linear(features.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_classes))
    optimizer = torch.optim.Adam(mlp.parameters())
    for _ in range(MLP_EPOCHS):
        for rows in torch.randperm(len(features)).split(MLP_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(mlp(features[rows]), labels[rows]).backward()
            optimizer.step()
    return mlp


def tune(
    encoder: Encoder, images: Sequence[Path], labels: Tensor, tuning: ImageTuning, augment: Augment, args: Any
) -> ImageTuning:
    """Trains a tuning on pictures with classes [N]. The model is then as before."""
    engine, rng = encoder.engine, random.Random(args.seed)
    size = crop_size(engine.image_processor) if augment.crop else None
    settings = {"augment": augment, "image_processor": engine.image_processor, "background": engine.background}
    engine.model.requires_grad_(False)
    scale = engine.model.logit_scale.exp()
    trained = {**norm_parameters(encoder), "prompts": tuning.prompts, "head": tuning.classes}
    for one in trained.values():
        one.requires_grad_()
    groups = [
        {"params": [one for name, one in trained.items() if name.endswith("bias") == is_bias], "weight_decay": decay}
        for is_bias, decay in ((False, 0.01), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    with evaluating(engine.model), tuning.applied(encoder):
        for epoch in range(1, args.num_epochs + 1):
            batches, total = torch.randperm(len(images)).split(args.batch_size), 0.0
            for rows in progress_bar(batches, desc=f"Epoch {epoch}/{args.num_epochs}", unit="step"):
                read = [
                    load_augmented(images[row], images[row].name, rng=rng, size=size, **settings)[0] for row in rows
                ]
                pixels = {name: torch.cat([one[name] for one in read]).numpy() for name in read[0]}
                output = engine.model.get_image_features(**engine.on_device(pixels)).pooler_output
                logits = scale * F.normalize(output.float(), dim=-1) @ tuning.classes.T
                loss = F.cross_entropy(logits, labels[rows].to(logits.device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            print(f"epoch {epoch}: loss {total / len(images):.4f}")
        learnt = {name: one.detach().cpu().clone() for name, one in trained.items()}
    return ImageTuning(tuning.class_names, learnt.pop("head"), learnt.pop("prompts"), learnt)


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Writes the tuning. Returns the accuracies of `--test`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures; their labels are not read")
    parser.add_argument("--class-descriptions", type=Path, required=True, help="JSON file of texts for each class")
    parser.add_argument("--teacher", default="facebook/dino-vitb16", help="image encoder that the MLP reads")
    parser.add_argument("--test", type=Path, help="folder of labelled pictures, one folder for each class")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--num-prompts", type=int, default=50, help="visual prompts")
    parser.add_argument("--num-epochs", type=int, default=50, help="epochs of the tuning")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures in a batch")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="NoLA's is 4e-3 for batches of 512")
    parser.add_argument("--augment", nargs="+", default=["crop:0.2", "flip:0.5", "jitter:0.4"], help="changes")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--device", help="device, such as cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args(argv)
    try:
        check_output(args.output, overwrite=args.overwrite)
        descriptions, augment = read_class_descriptions(args.class_descriptions), parse_augment(args.augment)
        test = args.test and load_benchmark("classification", args.test)
        class_texts(test.class_names if test else list(descriptions), descriptions=descriptions)
        images = [args.images / name for name in find_images(args.images)[0]]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not images:
        parser.error(f"--images {args.images} has no pictures. Pass another folder.")
    torch.manual_seed(args.seed)
    encoder, names = load_encoder(args.model, device=args.device, dtype="float32"), list(descriptions)
    norms = {name: one.detach().clone() for name, one in norm_parameters(encoder).items()}
    classes = class_embeddings(encoder, names, descriptions=descriptions)
    scores = encoder.encode_images(images, batch_size=args.batch_size) @ classes.T
    probabilities = (encoder.engine.model.logit_scale.exp().item() * scores).softmax(1)
    chosen, labels = confident(probabilities, max(FEWEST, int(SHARE * len(images) / len(names))))
    features = teacher_features(args.teacher, images, args.batch_size, encoder.device)
    mlp = train_mlp(features[chosen], labels, len(names))
    labels = mlp(features).argmax(1)
    same = (labels == scores.argmax(1)).double().mean()
    print(f"{len(chosen)} of {len(images)} pictures train the MLP. It gives {same:.1%} the class of the descriptions.")
    prompts = new_prompts(encoder, args.num_prompts, torch.Generator().manual_seed(args.seed)).to(encoder.device)
    start = ImageTuning(names, classes.to(encoder.device, copy=True), prompts, norms)
    tuning = tune(encoder, images, labels, start, augment or Augment(), args)
    tuning.save(args.output, encoder)
    if not test:
        return {}
    truth = torch.tensor([names.index(test.class_names[label]) for label in test.labels])
    before = encoder.encode_images(test.images) @ classes.T
    with tuning.applied(encoder):
        after = encoder.encode_images(test.images) @ tuning.classes.T
    of_mlp = mlp(teacher_features(args.teacher, list(test.images), args.batch_size, encoder.device))
    found = {"descriptions": before, "MLP": of_mlp, "tuned": after}
    accuracies = {name: (one.argmax(1) == truth).double().mean().item() for name, one in found.items()}
    print(f"{len(truth)} pictures: " + ", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()))
    return accuracies


if __name__ == "__main__":
    main()
