"""Train a composer, so that `lotlip search` finds an image like another one with a change in words (RTD).

    python examples/compose_queries.py --model checkpoint --data triplets.jsonl --output composed
    lotlip search --model composed --images photos --image cat.jpg "is asleep"

Training needs texts alone. A line of `triplets.jsonl` has the texts `reference`, `change` and `target`, such as "a cat
on a sofa", "is asleep" and "a sleeping cat on a sofa". `--data scenes` makes them from the drawn pictures of Scenes.

First the composer, an MLP, learns to make a word of an embedding: "a photo of [$]" has to have the embedding of the
text that the word was made of. Noise makes embeddings of texts as different as those of images are. Then the text
tower learns "a photo of [$] that CHANGE" by RTD's loss; targets are embeddings before training. Plain texts keep their
embeddings, which is not in RTD, so that the checkpoint still finds images by descriptions. The image tower stays as it
is, and an index of images stays valid. Ctrl-C ends a stage early, and the checkpoint is still written.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from lotlip_hf import Encoder, load_encoder
from lotlip_hf.compose import Composer, composed_features, contrastive_loss, text_features, torch_engine
from lotlip_hf.files import all_or_nothing, check_output, parse_json, read_regular, write_json
from lotlip_hf.scenes.changes import changes, triplets
from lotlip_hf.scenes.dataset import GROUP_SIZE, long_captions, render, scene
from lotlip_hf.terminal import printable_output, progress_bar, text_table

Triplet = tuple[str, str, str]  # reference, change, target
KEYS = ("reference", "change", "target")
Query = tuple[int, str, int, str]  # a reference and a target of the gallery, the change, a description of the target
Gallery = tuple[torch.Tensor, list[Query]]  # embeddings [G, P]
Batches = Iterator[list[int]]
MAX_BYTES = 1 << 32  # of a file of triplets
TEXT_WEIGHTS = ("text_model.", "text_projection.")


def read_triplets(path: str) -> list[Triplet]:
    """Reads triplets from JSON lines."""
    found = []
    for number, line in enumerate(read_regular(path, MAX_BYTES).splitlines(), 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}).") from error
        texts = [row.get(key) if isinstance(row, dict) else None for key in KEYS]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}, line {number}: write texts for {', '.join(KEYS)}.")
        found.append(tuple(texts))
    return found


def batches_of(number: int, batch_size: int) -> Batches:
    """Yields batches of row numbers without end: all rows, in a new order each time, and the rest is left out."""
    while True:
        order = torch.randperm(number).tolist()
        yield from (order[start : start + batch_size] for start in range(0, number - batch_size + 1, batch_size))


def noisy(embeddings: torch.Tensor, scale: float) -> torch.Tensor:
    """Embeddings [B, P] with components of size 1, and the noise of RTD: `scale` * uniform (one a row) * normal."""
    embeddings = F.normalize(embeddings, dim=-1) * embeddings.shape[-1] ** 0.5
    strength = scale * torch.rand(len(embeddings), 1, device=embeddings.device)
    return embeddings + strength * torch.randn_like(embeddings)


def train(
    name: str,
    module: nn.Module,
    steps: int,
    rate: float,
    loss_of: Callable[[list[int]], torch.Tensor],
    batches: Batches,
) -> list[float]:
    """Minimises the loss of batches by AdamW. Returns the loss of each step."""
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], lr=rate)
    losses: list[float] = []
    with progress_bar(total=steps, desc=name, unit="step") as bar:
        try:
            for _, rows in zip(range(steps), batches, strict=False):
                loss = loss_of(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            print(f"{name}: interrupted after {len(losses)} of {steps} steps.")
    return losses


def scene_gallery(encoder: Encoder, number: int) -> Gallery:
    """Images of test scenes and of their changes. Each change is a query for one of them."""
    images, queries = [], []
    for index in range(0, number * GROUP_SIZE, GROUP_SIZE):  # the scenes of a group resemble each other
        one, reference = scene(index, split="test"), len(images)
        images.append(render(one))
        for change in changes(one):
            queries.append((reference, change.text, len(images), long_captions(change.scene)[0]))
            images.append(render(change.scene))
    return encoder.encode_images(images, progress=False), queries


def text_gallery(encoder: Encoder, held_out: Sequence[Triplet]) -> Gallery:
    """The references and targets of triplets, as texts in place of images. Each change is a query for its target."""
    texts = list(dict.fromkeys(text for reference, _, target in held_out for text in (reference, target)))
    numbers = {text: number for number, text in enumerate(texts)}
    queries = [(numbers[reference], change, numbers[target], target) for reference, change, target in held_out]
    return encoder.encode_texts(texts, progress=False), queries


def recalls(encoder: Encoder, gallery: Gallery, composer: Composer | None = None) -> dict[str, float]:
    """R@1 of each kind of query. The reference of a query is not ranked."""
    embeddings, queries = gallery
    references, changes, targets, descriptions = zip(*queries, strict=True)
    images = embeddings[[*references]]
    texts = encoder.encode_texts(changes, progress=False)
    found = {"image": images, "change": texts, "sum of image and change": images + texts}
    found["whole description"] = encoder.encode_texts(descriptions, progress=False)
    if composer is not None:
        rows = [composer.query(encoder, image.numpy(), change) for image, change in zip(images, changes, strict=True)]
        found["composed"] = torch.from_numpy(np.stack(rows))
    result = {}
    for name, query in found.items():
        scores = query @ embeddings.T
        scores[range(len(queries)), references] = -float("inf")
        result[name] = (scores.argmax(1) == torch.tensor(targets)).double().mean().item()
    return result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="LoTLIP, CLIP or SigLIP: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="JSON lines of triplets, or 'scenes'")
    parser.add_argument("--num-scenes", type=int, default=1000, help="number of scenes for '--data scenes'")
    parser.add_argument("--output", type=Path, default=Path("composed"), help="new folder for the checkpoint")
    parser.add_argument("--composer-steps", type=int, default=500, help="steps of the composer")
    parser.add_argument("--composer-learning-rate", type=float, default=1e-3, help="learning rate of the composer")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the text tower")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="learning rate of the text tower")
    parser.add_argument("--batch-size", type=int, default=128, help="triplets in a batch")
    parser.add_argument("--noise", type=float, default=0.5, help="scale of the noise of embeddings")
    parser.add_argument("--held-out", type=int, default=100, help="triplets, or scenes, for the report")
    parser.add_argument("--device", help="device of the computation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the composer, the noise and the order")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Checks the options before the model is loaded."""
    counts = ("num_scenes", "composer_steps", "steps", "batch_size", "held_out")
    for name in (*counts, "composer_learning_rate", "learning_rate", "noise"):
        value, least = getattr(args, name), 1 if name in counts else 0
        if not least <= value < inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {least} or more.")
    check_output(args.output, folder=True)


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains and saves the checkpoint, and returns the recalls before and after training."""
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        set_seed(args.seed)
        if args.data == "scenes":
            data = [triplet for index in range(args.num_scenes) for triplet in triplets(scene(index))]
        else:
            data = random.sample(rows := read_triplets(args.data), len(rows))
        if len(data) < args.batch_size + (args.held_out if args.data != "scenes" else 0):
            raise ValueError(f"{args.data} has {len(data)} triplets. Use a smaller --batch-size and --held-out.")
        encoder = load_encoder(args.model, device=args.device, dtype="float32")
        engine = torch_engine(encoder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.data == "scenes":
        gallery = scene_gallery(encoder, args.held_out)
    else:
        held_out, data = data[: args.held_out], data[args.held_out :]
        gallery = text_gallery(encoder, held_out)
    report = {"before": recalls(encoder, gallery)}

    model, device = engine.model, engine.device
    references, edits, targets = zip(*data, strict=True)
    reference_rows = encoder.encode_texts(references).to(device)
    target_rows = encoder.encode_texts(targets).to(device)
    composer = Composer(encoder.dim, model.text_model.get_input_embeddings().embedding_dim).to(device)

    def composer_loss(rows: list[int]) -> torch.Tensor:
        found, _ = composed_features(engine, composer(noisy(reference_rows[rows], args.noise)), [None] * len(rows))
        return 1 - F.cosine_similarity(found, reference_rows[rows]).mean()

    model.requires_grad_(False)
    batches = batches_of(len(data), args.batch_size)
    rate = args.composer_learning_rate
    losses = {"composer": train("composer", composer, args.composer_steps, rate, composer_loss, batches)}

    def text_loss(rows: list[int]) -> torch.Tensor:
        words = composer(noisy(reference_rows[rows], args.noise))
        prompts = [*(edits[row] for row in rows), *([None] * len(rows))]
        found, _ = composed_features(engine, torch.cat([words, words]), prompts)
        loss = contrastive_loss(found, torch.cat([target_rows[rows], reference_rows[rows]]))
        some = rows[: max(1, len(rows) // 4)]  # of which plain texts keep their embeddings
        kept = text_features(engine, [targets[row] for row in some])
        return loss + 1 - F.cosine_similarity(kept, target_rows[some]).mean()

    composer.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(TEXT_WEIGHTS))
    losses["text tower"] = train("text tower", model, args.steps, args.learning_rate, text_loss, batches)
    model.requires_grad_(True)

    report["after"] = recalls(encoder, gallery, composer)
    with all_or_nothing(args.output) as folder:
        model.save_pretrained(folder)
        engine.processor.save_pretrained(folder)
        composer.save(folder)
        write_json(folder / "compose.json", {"recall_at_1": report, "losses": losses})
    rows = [
        [name, *(f"{one[name]:.3f}" if name in one else "" for one in report.values())] for name in report["after"]
    ]
    print(f"R@1 of {len(gallery[1])} queries before and after training, without the reference itself:")
    print(text_table([["query", *report]], rows))
    print(f'Saved in {args.output}. Search with: lotlip search --model {args.output} --image FILE "is ..."')
    return report


if __name__ == "__main__":
    main()
