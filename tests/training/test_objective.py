"""The objective over processes, in tiles and with cached gradients, against the plain loss of the whole batch."""

import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scipy.optimize import linear_sum_assignment
from test_new_term import Guess
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, ViTConfig

import tiny
from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPTextConfig, LoTLIPVisionConfig
from lotlip_hf.data.collator import ModelInputs, group_key
from lotlip_hf.data.record import texts_digest
from lotlip_hf.distributed import rank
from lotlip_hf.training.grad_cache import cached_backward
from lotlip_hf.training.objective import Objective, batch_loss, embed
from lotlip_hf.training.terms import TERMS, pairs
from lotlip_hf.training.terms.distribution import Distribution
from lotlip_hf.training.terms.heads import BatchNorm
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.primary_components import primary_components
from lotlip_hf.training.terms.sigmoid import Sigmoid
from lotlip_hf.training.terms.soft_labels import SoftLabels
from processes import run_processes

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
WEIGHTS = {"short_loss_weight": 0.5, "long_loss_weight": 2.0}

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
TAGGED = {"vocabulary": VOCABULARY, "projection_dim": 5}
CLASSES = Path(__file__).with_name("classes.txt")
CLASSED = {"classes": CLASSES, "margin": 0.3, "scale": 4.0, "projection_dim": 5}
MASKED = {"num_layers": 1, "projection_dim": 5, "vocab_size": 9}
REGIONS = {
    "region_text": {"grounding": 0.5, "width": 8, "projection_dim": 5},
    "regions": {"queries": 4, "layers": 1, "width": 8, "l1": 2.0, "description": 0.5, "projection_dim": 5},
}
HEADS = {"width": 8, "output": 4, "projection_dim": 5}
# Terms and their options.
OBJECTIVES: list[dict[str, dict[str, Any]]] = [
    {"infonce": {}},
    {"infonce": {"label_smoothing": 0.1}},
    {"infonce": {"equal_positives": True}},
    {"primary_components": {"num_components": 2, "label_smoothing": 0.2, "equal_positives": True}},
    {"sigmoid": {}},
    {"instance": {}, "structure": {}},
    {"infonce": {}, "structure": {"distance": "squared", "of": "both"}},
    {"soft_labels": {"share": 0.3}, "instance": {"of": "image"}},
    {"hard_negatives": {"number": 3, "temperature": 0.2}, "cosine": {"of": "both"}},
    {"hard_negatives": {"directions": "image"}, "similarities": {"temperature": 0.3, "of": "both"}},
    {"negatives": {}, "tags": TAGGED},
    {"distribution": {}, "masked_words": MASKED},
    {"margin": CLASSED, "caption_margin": {"margin": 0.2, "scale": 5.0}},
    {"groups": {}},
    {"infonce": {}, "groups": {"image_weight": 0.6, "temperature": 0.3, "hard_negatives": 3}},
    REGIONS,
    {"infonce": {}, "guess": {}, "sigmoid": {}, "hard_negatives": {}, "negatives": {}, "tags": TAGGED, "cosine": {}},
    {"infonce": {}, **REGIONS, "negatives": {}},
    {"two_views": {"label_smoothing": 0.1}, "simclr": HEADS, "byol": HEADS},
]
TILE_SIZES = (3, 100)  # the one divides no batch here, the other holds each of them
# Equal texts of 13 samples: short ones in groups of 1 to 5, all of the second kind, and none of the third.
KEYS = torch.stack([torch.tensor([0, 1, 0, 2, 0, 3, 1, 4, 0, 5, 6, 4, 0]), torch.full([13], 7), torch.arange(13)], 1)
# Of those of the last two groups the file of classes has none.
GROUPS = torch.tensor([group_key({"group": str(key)}) for key in KEYS[:, 0].tolist()])
# Digests of the tags of 13 samples: some have none, and some have one that is not in the vocabulary.
TAGS = torch.tensor([[texts_digest([tag]) if tag else 0 for tag in tags] for tags in 13 * [["BLUE", "red"]]])
TAGS[::3] = torch.tensor([texts_digest(["large square"]), 0])
TAGS[::4] = torch.tensor([texts_digest(["green"]), texts_digest(["small"])])
TAGS[1], TAGS[2] = 0, torch.tensor([texts_digest(["green"]), 0])
# Labels of the tokens of 13 samples; of the first, and of the whole second process of four, none is predicted.
LABELS = torch.arange(13 * 4).view(13, 1, 4) % 9
LABELS[torch.arange(13 * 4).view(13, 1, 4) % 3 > 0] = -100
LABELS[:6] = LABELS[:6].masked_fill(torch.arange(6)[:, None, None] != 3, -100)
FACTORS = {"guess": 0.5, "structure": 2.0}  # of the terms


def make(terms: dict[str, dict[str, Any]]) -> Objective:
    torch.manual_seed(5)
    known = {**TERMS, "guess": Guess}
    made = {
        name: known[name](**(WEIGHTS if issubclass(known[name], pairs.Pairs) else {}), **options)
        for name, options in terms.items()
    }
    return Objective(made, {name: FACTORS.get(name, 1.0) for name in terms})


class Towers(nn.Module):
    """A linear map a modality, for gradients of parameters; 13 samples with two long texts and two corners each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.image_map, self.text_map = nn.Parameter(random(6, 5)), nn.Parameter(random(7, 5))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.images, self.texts, self.corners = random(13, 6), random(13, 3, 7), random(13, 2, 2, 7)
        self.labels, self.targets = torch.arange(13) % 4, F.normalize(random(13, 3, 5), dim=-1)
        self.text_keys, self.tags = KEYS, TAGS
        self.negatives, self.image_targets = random(13, 2, 7), F.normalize(random(13, 5), dim=-1)
        self.mask = torch.arange(26).view(13, 2) % 3 > 0
        self.mask[4] = self.mask[7] = False
        self.patches, self.phrases, self.second = random(13, 4, 6), random(13, 3, 7), random(13, 6)
        corners = torch.rand(13, 3, 2, 2, generator=generator).sort(dim=2).values
        self.boxes, self.phrase_keys = corners.flatten(2), torch.arange(39).view(13, 3) % 17
        self.box_mask = torch.arange(39).view(13, 3) % 4 > 0
        self.box_mask[0] = self.box_mask[3] = self.box_mask[12] = False
        self.tokens, self.token_mask = random(13, 4, 7), torch.arange(4) < torch.tensor([4, 2, 3] * 4 + [4])[:, None]
        self.masked_labels = LABELS.masked_fill(~self.token_mask.unsqueeze(1), -100)

    def forward(self, samples: slice = slice(None)) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        embeds = {
            "image_embeds": F.normalize(self.images[samples] @ self.image_map, dim=-1),
            "image_embeds_2": F.normalize(self.second[samples] @ self.image_map, dim=-1),
            "text_embeds": F.normalize(self.texts[samples] @ self.text_map, dim=-1),
            "corner_embeds": F.normalize(self.corners[samples] @ self.text_map, dim=-1),
            "negative_embeds": F.normalize(self.negatives[samples] @ self.text_map, dim=-1),
            "negative_mask": self.mask[samples],
            "patch_embeds": F.normalize(self.patches[samples] @ self.image_map, dim=-1),
            "masked_token_embeds": F.normalize(self.tokens[samples] @ self.text_map, dim=-1),
            "masked_token_mask": self.token_mask[samples],
            "masked_labels": self.masked_labels[samples],
            "groups": GROUPS[samples],
            "region_embeds": F.normalize(self.phrases[samples] @ self.text_map, dim=-1),
            "region_keys": self.phrase_keys[samples],
            "boxes": self.boxes[samples],
            "box_mask": self.box_mask[samples],
            "labels": self.labels[samples],
            "tags": self.tags[samples],
            "text_keys": self.text_keys[samples],
            "teacher_text_embeds": self.targets[samples],
            "teacher_image_embeds": self.image_targets[samples],
        }
        return embeds, self.logit_scale.exp()


def sigmoid_loss(logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's, as its paper writes it."""
    labels = 2 * torch.eye(len(logits)) - 1
    return -F.logsigmoid(labels * (logits + bias)).sum() / len(logits)


def taught(term: Any, embeds: dict[str, torch.Tensor]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The embeddings and the teacher's: of images, and of each kind of text."""
    if "teacher_image_embeds" in term.needs:
        yield [(embeds["image_embeds"], embeds["teacher_image_embeds"])]
    if "teacher_text_embeds" in term.needs:
        yield [*zip(embeds["text_embeds"].unbind(1), embeds["teacher_text_embeds"].unbind(1), strict=False)]


def guess(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    guesses = term.map(embeds["image_embeds"] - embeds["image_embeds"].mean(0))
    distances = (guesses - embeds["text_embeds"][:, 0]).square().sum(1)
    return FACTORS["guess"] * (embeds["labels"] * distances).mean()


def instance(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """ProCLIP's instance loss of the short texts, and of the long ones."""
    pairs = [pair for kind in taught(term, embeds) for pair in kind]
    return sum(F.mse_loss(*pair, reduction="sum") for pair in pairs) / len(pairs[0][0])


def structure(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """ProCLIP's structure loss, of the short texts."""
    sums = [term.loss(*map(torch.pdist, kind[0]), reduction="sum") for kind in taught(term, embeds)]
    return FACTORS["structure"] * sum(sums) / len(embeds["text_embeds"])


def cosine(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    return sum(
        torch.stack([1 - (student * teacher).sum(1).mean() for student, teacher in kind]).mean()
        for kind in taught(term, embeds)
    )


def similarities(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """The divergence by its definition."""
    means = []
    for kind in taught(term, embeds):
        each = []
        for pair in kind:
            student, teacher = ((one @ one.t() / term.temperature).softmax(1) for one in pair)
            each.append((teacher * (teacher / student).log()).sum(1).mean())
        means.append(torch.stack(each).mean())
    return sum(means)


def hard_negatives(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """UniME's loss, negative by negative."""
    losses = []
    for texts in embeds["text_embeds"].unbind(1):
        both = {"image": embeds["image_embeds"] @ texts.t(), "text": texts @ embeds["image_embeds"].t()}
        for cosines in (both[direction] for direction in term.directions):
            for i, row in enumerate(cosines):
                others = [one for j, one in enumerate(row) if j != i and one <= row[i] + term.margin]
                hardest = sorted(others, key=torch.Tensor.item, reverse=True)[: term.number]
                losses.append(F.cross_entropy(torch.stack([row[i], *hardest]) / term.temperature, torch.tensor(0)))
    return torch.stack(losses).mean()


def negatives(term: Any, embeds: dict[str, torch.Tensor], logit_scale: torch.Tensor) -> torch.Tensor:
    """HQ-CLIP's loss of the long texts, of the samples that have negatives."""
    losses = []
    rows = zip(
        *(embeds[name] for name in ("image_embeds", "text_embeds", "negative_embeds", "negative_mask")), strict=True
    )
    for image, texts, others, mask in rows:
        for text in texts[1:] if mask.any() else ():
            logits = logit_scale * torch.stack([text, *others[mask]]) @ image
            losses.append(F.cross_entropy(logits, torch.tensor(0)))
    return torch.stack(losses).mean()


def tags(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    losses = []
    for image, of_image in zip(embeds["image_embeds"], embeds["tags"].tolist(), strict=True):
        if any(of_image):
            targets = [float(texts_digest([tag]) in of_image) for tag in ("red", "blue", "large square", "small")]
            losses.append(F.binary_cross_entropy(term.head(image).sigmoid(), torch.tensor(targets)))
    return torch.stack(losses).mean()


def masked_words(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """Text by text, without padding."""
    names = ("patch_embeds", "masked_token_embeds", "masked_token_mask", "masked_labels")
    losses = []
    for patches, tokens, mask, (labels,) in zip(*(embeds[name] for name in names), strict=True):
        patches, tokens = term.patch_norm(patches), term.token_norm(tokens[mask])
        seen = tokens + term.attention(tokens, patches, patches)[0]
        logits = term.head(term.layers(seen.unsqueeze(0)))[0]
        losses += [-row.log_softmax(0)[label] for row, label in zip(logits, labels[mask], strict=True) if label >= 0]
    return torch.stack(losses).mean()


def turned(cosine: torch.Tensor, angle: float) -> torch.Tensor:
    return (cosine.acos() + angle).cos()


def margin(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """Image by image, of those with a known class."""
    keys, losses = [group_key({"group": name}) for name in "01234"], []
    prototypes = F.normalize(term.prototypes[[term.digests.tolist().index(key) for key in keys]], dim=1)
    for image, group in zip(embeds["image_embeds"], embeds["groups"].tolist(), strict=True):
        if group in keys:
            cosines = [*(prototypes @ image)]
            target = keys.index(group)
            cosines[target] = turned(cosines[target], term.margin)
            losses.append(F.cross_entropy(term.scale * torch.stack(cosines), torch.tensor(target)))
    return torch.stack(losses).mean()


def caption_margin(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """Caption by caption."""
    losses = []
    for i, (image, own) in enumerate(zip(embeds["image_embeds"], embeds["text_embeds"], strict=True)):
        others = embeds["text_embeds"][embeds["groups"] != embeds["groups"][i]].flatten(0, 1) @ image
        for text in own:
            logits = term.scale * torch.stack([turned(text @ image, term.margin), *others])
            losses.append(F.cross_entropy(logits, torch.tensor(0)))
    return torch.stack(losses).mean()


def groups(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """Equation 2 of https://arxiv.org/abs/2004.11362 with the mean over the anchors that have positives."""
    keys, losses = embeds["groups"].tolist(), []
    for texts in embeds["text_embeds"].unbind(1):
        mixed = term.image_weight * embeds["image_embeds"] + (1 - term.image_weight) * texts
        pooled = mixed / mixed.norm(dim=1, keepdim=True)
        for i, row in enumerate(pooled @ pooled.t() / term.temperature):
            positives = [row[j] for j in range(len(row)) if j != i and keys[j] == keys[i]]
            others = sorted((row[j] for j in range(len(row)) if keys[j] != keys[i]), key=torch.Tensor.item)
            compared = torch.stack(positives + others[-term.hard_negatives :]) if positives else None
            if compared is not None:
                losses.append(torch.stack([-(each.exp() / compared.exp().sum()).log() for each in positives]).mean())
    return torch.stack(losses).mean()


def cross_entropy(rows: list[torch.Tensor], columns: list[torch.Tensor], keys: list[int]) -> torch.Tensor:
    """Of each row against its column and those with other keys."""
    losses = []
    for i, row in enumerate(rows):
        others = [column for column, key in zip(columns, keys, strict=True) if key != keys[i]]
        losses.append(F.cross_entropy(torch.stack([columns[i], *others]) @ row, torch.tensor(0)))
    return torch.stack(losses).mean()


def box_losses(box: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """L1 and 1 - generalised intersection over union of a box (centre, width, height) and one of corners."""
    (x, y, w, h), (x0, y0, x1, y1) = box, known
    a0, b0, a1, b1 = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    l1 = (x - (x0 + x1) / 2).abs() + (y - (y0 + y1) / 2).abs() + (w - (x1 - x0)).abs() + (h - (y1 - y0)).abs()
    zero = torch.tensor(0.0)
    shared = torch.max(torch.min(a1, x1) - torch.max(a0, x0), zero) * torch.max(
        torch.min(b1, y1) - torch.max(b0, y0), zero
    )
    union = w * h + (x1 - x0) * (y1 - y0) - shared
    hull = (torch.max(a1, x1) - torch.min(a0, x0)) * (torch.max(b1, y1) - torch.min(b0, y0))
    return torch.stack([l1, 1 - shared / union + (hull - union) / hull])


def region_text(term: Any, embeds: dict[str, torch.Tensor], logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Region by region, each alone with its image."""
    regions, texts, keys, losses = [], [], [], []
    for i, j in embeds["box_mask"].nonzero().tolist():
        patches, box, text = embeds["patch_embeds"][i, None], embeds["boxes"][i, j], embeds["region_embeds"][i, j]
        regions.append(logit_scale * term.pooler(patches, box[None, None])[0, 0])
        texts.append(text)
        keys.append(embeds["region_keys"][i, j].item())
        losses.append(box_losses(term.pooler.locate(patches, text[None, None])[0, 0], box).sum())
    contrast = (cross_entropy(regions, texts, keys) + cross_entropy(texts, regions, keys)) / 2
    return {"contrast": contrast, "grounding": term.grounding * torch.stack(losses).mean()}


def regions(term: Any, embeds: dict[str, torch.Tensor], logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Image by image, matched by scipy."""
    found, texts, keys, losses = [], [], [], []
    for i, mask in enumerate(embeds["box_mask"]):
        boxes, vectors = (each[0] for each in term.head(embeds["patch_embeds"][i, None]))
        known = embeds["boxes"][i][mask]
        pairs_of = [[box_losses(box, one) for one in known] for box in boxes]
        costs = [[(5 * l1 + 2 * giou).item() for l1, giou in row] for row in pairs_of]
        for query, region in zip(*linear_sum_assignment(costs), strict=True) if len(known) else ():
            losses.append(pairs_of[query][region])
            found.append(logit_scale * vectors[query])
            texts.append(embeds["region_embeds"][i][mask][region])
            keys.append(embeds["region_keys"][i][mask][region].item())
    l1, giou = torch.stack(losses).mean(0)
    parts = {"l1": l1, "giou": giou, "description": cross_entropy(found, texts, keys)}
    return {name: term.weights[name] * value for name, value in parts.items()}


def normed(head: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
    """The output of a head, with the normalisation of torch."""
    for layer in head:
        is_norm = isinstance(layer, BatchNorm)
        options = {"running_mean": None, "running_var": None, "training": True}
        features = (
            F.batch_norm(features, weight=layer.weight, bias=layer.bias, **options) if is_norm else layer(features)
        )
    return features


def two_views(term: Any, embeds: dict[str, torch.Tensor], logit_scale: torch.Tensor) -> dict[str, torch.Tensor]:
    both = [
        plain_loss(Objective({"infonce": term}), {**embeds, "image_embeds": embeds[name]}, logit_scale)
        for name in ("image_embeds", "image_embeds_2")
    ]
    return {
        part: (both[0][f"loss_infonce_{part}"] + both[1][f"loss_infonce_{part}"]) / 2 for part in ("short", "long")
    }


def simclr(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    """Of 2 N pictures, each of which finds the other one of its pair."""
    features = normed(term.head, torch.cat([embeds["image_embeds"], embeds["image_embeds_2"]]))
    cosines = F.cosine_similarity(features[:, None], features[None], dim=-1) / term.temperature
    return F.cross_entropy(cosines.fill_diagonal_(-torch.inf), torch.arange(len(features)).roll(len(features) // 2))


def byol(term: Any, embeds: dict[str, torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    features = normed(term.projection, torch.cat([embeds["image_embeds"], embeds["image_embeds_2"]]))
    targets = normed(term.target, embeds["teacher_image_embeds"]).detach().repeat(2, 1)
    distances = F.normalize(normed(term.predictor, features), dim=1) - F.normalize(targets, dim=1)
    return distances.square().sum(1).mean()


PLAIN = {
    one.__name__: one
    for one in (
        *(guess, instance, structure, cosine, similarities, hard_negatives, negatives, tags),
        masked_words,
        *(margin, caption_margin, groups),
        *(region_text, regions),
        *(two_views, simclr, byol),
    )
}


def softened(logits: torch.Tensor, share: float) -> torch.Tensor:
    """The share of the negatives in proportion to their exponentials."""
    exponentials = logits.detach().exp().fill_diagonal_(0)
    return share * exponentials / exponentials.sum(1, keepdim=True) + (1 - share) * torch.eye(len(logits))


def equal_targets(embeds: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """The soft targets of a kind of text: spread evenly over the equal ones. Corners belong to their long text."""
    num_texts = embeds["text_embeds"].shape[1]
    if number >= num_texts:
        number = 1 + (number - num_texts) // embeds["corner_embeds"].shape[2]
    return equal_rows(embeds["text_keys"][:, number])


def equal_rows(keys: torch.Tensor) -> torch.Tensor:
    """The even distribution over the samples with the same key."""
    equal = (keys[:, None] == keys).double()
    return equal / equal.sum(1, keepdim=True)


def plain_loss(
    objective: Objective, embeds: dict[str, torch.Tensor], logit_scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The whole matrices, in one process."""
    texts, images = embeds["text_embeds"], logit_scale * embeds["image_embeds"]
    features = [texts, embeds["corner_embeds"].flatten(1, 2)] if "corner_embeds" in embeds else [texts]
    losses = {}
    for name, term in objective.terms.items():
        if name in PLAIN:
            loss = PLAIN[name](term, embeds, logit_scale)
            losses |= {f"loss_{name}_{part}": one for part, one in loss.items()} if isinstance(loss, dict) else {}
            losses |= {} if isinstance(loss, dict) else {f"loss_{name}": loss}
            continue
        each = []
        for number, text in enumerate(torch.cat(features, dim=1).unbind(1)):
            is_components = name == "primary_components" and number == 0
            logits = (primary_components(images, term.num_components) if is_components else images) @ text.t()
            if isinstance(term, Sigmoid):
                each.append(sigmoid_loss(logits, term.logit_bias))
            elif isinstance(term, Distribution):
                targets = equal_rows(embeds["groups"]).to(logits.dtype)
                both = (one.softmax(1) * (one.softmax(1) / (targets + 1e-8)).log() for one in (logits, logits.t()))
                each.append(sum(one.sum() for one in both) / len(logits))
            elif isinstance(term, SoftLabels):
                each.append(sum(F.cross_entropy(one, softened(one, term.share)) for one in (logits, logits.t())) / 2)
            else:
                targets, smoothing = torch.arange(len(logits)), term.label_smoothing
                if term.equal_positives:
                    targets = equal_targets(embeds, number).to(logits.dtype)
                both = (F.cross_entropy(one, targets, label_smoothing=smoothing) for one in (logits, logits.t()))
                each.append(sum(both) / 2)
        losses[f"loss_{name}_short"] = WEIGHTS["short_loss_weight"] * each[0] / len(each)
        losses[f"loss_{name}_long"] = WEIGHTS["long_loss_weight"] * sum(each[1:], torch.tensor(0.0)) / len(each)
    return {"loss": sum(losses.values()), **losses}


def expected(terms: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Losses and gradients of the whole batch."""
    towers, objective = Towers(), make(terms)
    losses = plain_loss(objective, *towers())
    losses["loss"].backward()
    return results(losses, towers, objective)


def results(losses: dict[str, torch.Tensor], *modules: nn.Module) -> dict[str, torch.Tensor]:
    answers = {name: value.detach() for name, value in losses.items()}
    parameters = [pair for module in modules for pair in module.named_parameters()]
    return answers | {f"{name}.grad": torch.zeros(()) if p.grad is None else p.grad for name, p in parameters}


def assert_equal(answers: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert answers.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(answers[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


# One process


@pytest.mark.parametrize("tile_size", TILE_SIZES)
@pytest.mark.parametrize("terms", OBJECTIVES, ids=str)
def test_tiles_are_the_plain_loss(
    terms: dict[str, dict[str, Any]], tile_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "TILE_SIZE", tile_size)
    towers, objective = Towers(), make(terms)
    losses = objective(*towers())
    losses["loss"].backward()
    assert next(iter(losses)) == "loss"
    assert_equal(results(losses, towers, objective), expected(terms))


@pytest.mark.parametrize("equal_positives", [False, True])
def test_without_long_texts_or_corners(equal_positives: bool) -> None:
    embeds, scale = Towers()()
    objective = make({"infonce": {"equal_positives": equal_positives}})
    images, texts, keys = embeds["image_embeds"], embeds["text_embeds"], embeds["text_keys"]
    for given in (
        {"image_embeds": images, "text_embeds": texts[:, :1], "text_keys": keys[:, :1]},
        {"image_embeds": images, "text_embeds": texts, "text_keys": keys},
    ):
        assert_equal(objective(given, scale), plain_loss(objective, given, scale))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equal_positives_are_soft_targets(label_smoothing: float) -> None:
    """Of `cross_entropy`, in float64: the loss and its gradients. Without equal texts nothing changes, bit for bit."""
    embeds, scale = Towers()()
    embeds = {name: value.double() if value.is_floating_point() else value for name, value in embeds.items()}
    leaves = {
        name: embeds[name].detach().requires_grad_() for name in ("image_embeds", "text_embeds", "corner_embeds")
    }
    objective = make({"infonce": {"label_smoothing": label_smoothing, "equal_positives": True}})
    assert objective.needs == {*leaves, "text_keys"}
    answers = []
    for function in (objective, partial(plain_loss, objective)):
        losses = function({**embeds, **leaves}, scale.detach().double())
        answers.append([*losses.values(), *torch.autograd.grad(losses["loss"], [*leaves.values()])])
    for answer, expected in zip(*answers, strict=True):
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)

    plain = make({"infonce": {"label_smoothing": label_smoothing}})
    different = {**leaves, "text_keys": torch.arange(13)[:, None].expand(-1, 3)}
    assert torch.equal(objective(different, scale)["loss"], plain(leaves, scale)["loss"])
    assert not torch.equal(objective({**different, "text_keys": KEYS}, scale)["loss"], plain(leaves, scale)["loss"])


@pytest.mark.parametrize("terms", OBJECTIVES, ids=str)
def test_terms_are_float32_under_autocast(terms: dict[str, dict[str, Any]]) -> None:
    """Also where a term takes what is half as long."""
    objective = make(terms)
    embeds, scale = Towers()()
    exact = {
        name: (value.detach().bfloat16() if value.is_floating_point() else value) for name, value in embeds.items()
    }
    half = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in exact.items()}
    exact = {name: (value.float() if value.is_floating_point() else value) for name, value in exact.items()}
    exact = {name: value.requires_grad_(value.is_floating_point()) for name, value in exact.items()}
    expected = objective(exact, scale.detach())["loss"]
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        answer = objective(half, scale.detach())["loss"]
    answer.backward()
    assert answer.dtype == torch.float32
    assert torch.equal(answer, expected)
    for name in (name for name in objective.needs & exact.keys() if exact[name].grad is not None):
        torch.testing.assert_close(half[name].grad.float(), exact[name].grad, rtol=0.01, atol=0.01)


class LiveBytes(TorchDispatchMode):
    """The most bytes that were held at a time by tensors made meanwhile."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.live = self.most = 0
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for tensor in answer if isinstance(answer, (tuple, list)) else (answer,):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                storage = tensor.untyped_storage()
                self.known[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self.forget, key)
        return answer

    def forget(self, key: int) -> None:
        self.live -= self.known.pop(key)


@pytest.mark.parametrize(
    "options",
    [
        {"infonce": {"label_smoothing": 0.1, "equal_positives": True}},
        {"sigmoid": {}},
        {"soft_labels": {}},
        {"distribution": {}},
        {"hard_negatives": {}},
        {"similarities": {"temperature": 1.0}},
    ],
    ids=str,
)
def test_tiles_hold_no_matrix_of_the_batch(
    options: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither forward nor backward, nor with smoothed labels."""
    monkeypatch.setattr(pairs, "TILE_SIZE", 16)
    batch_size, num_sets, width = 96, 3, 4
    images, texts, teacher = (torch.randn(batch_size, *shape, width) for shape in ((), (num_sets,), (num_sets,)))
    keys = torch.arange(batch_size * num_sets).view(batch_size, num_sets) // 8
    embeds = {"image_embeds": images.requires_grad_(), "text_embeds": texts.requires_grad_(), "text_keys": keys}
    embeds |= {"teacher_text_embeds": teacher, "groups": keys[:, 0]}

    def most(function: Any) -> int:
        with LiveBytes(*embeds.values()) as mode:
            function(embeds, torch.tensor(2.0))["loss"].backward()
        return mode.most

    matrix = 4 * batch_size**2  # bytes
    assert most(make(options)) < matrix
    assert most(partial(plain_loss, make({"infonce": {}}))) >= num_sets * matrix


# Several processes

SPLITS = {2: [8, 5], 4: [5, 0, 1, 7]}  # of the 13 samples: the last batch is seldom even


def own_share(split: list[int], terms: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    towers, objective = Towers(), make(terms)
    start = sum(split[: rank()])
    losses = objective(*towers(slice(start, start + split[rank()])))
    losses["loss"].backward()
    return results(losses, towers, objective)


def shares(split: list[int]) -> list[dict[str, torch.Tensor]]:
    """A process's answers with each of the objectives."""
    pairs.TILE_SIZE = 3  # in a process of its own
    return [own_share(split, terms) for terms in OBJECTIVES]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_the_mean_over_processes_is_the_plain_loss(num_processes: int, tmp_path: Path) -> None:
    answers = run_processes(shares, num_processes, tmp_path, SPLITS[num_processes])
    for i, terms in enumerate(OBJECTIVES):
        of_processes = [answer[i] for answer in answers]
        mean = {name: torch.stack([a[name] for a in of_processes]).mean(0) for name in of_processes[0]}
        for name in mean:
            if name.startswith("terms."):  # averaged by the objective: every process has the mean
                for answer in of_processes:
                    torch.testing.assert_close(answer[name], mean[name])
        assert_equal(mean, expected(terms))


# Gradient cache


def tiny_model(dropout: float = 0.0) -> LoTLIPModel:
    torch.manual_seed(2)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = LoTLIPConfig(
        text_config=LoTLIPTextConfig(backbone_config=BertConfig(**tiny.TEXT_SIZE, **rates)),
        vision_config=LoTLIPVisionConfig(backbone_config=ViTConfig(**tiny.IMAGE_SIZE, **rates)),
        projection_dim=24,
    )
    model = LoTLIPModel(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # large enough that every part matters
            nn.init.normal_(parameter, std=0.3)
    nn.init.constant_(model.logit_scale, 2.0)
    return model.train()


def tiny_batch(
    batch_size: int, num_negatives: int = 0, num_regions: int = 0, is_masked: bool = False
) -> dict[str, Any]:
    torch.manual_seed(3)
    long_input_ids = tiny.input_ids(batch_size, 2 + num_negatives + num_regions + is_masked, 8)
    batch = {"input_ids": tiny.input_ids(batch_size, 5), "long_input_ids": long_input_ids}
    masks = {name.replace("input_ids", "attention_mask"): torch.ones_like(ids) for name, ids in batch.items()}
    batch |= masks | {"pixel_values": tiny.pixel_values(batch_size)}
    others = {"labels": torch.arange(batch_size) % 3 + 1}  # which no model takes
    others |= {"text_keys": KEYS[:batch_size], "tags": TAGS[:batch_size], "groups": GROUPS[:batch_size]}
    others["teacher_text_embeds"] = F.normalize(torch.randn(batch_size, 3, 24), dim=-1)
    others["teacher_image_embeds"] = F.normalize(torch.randn(batch_size, 24), dim=-1)
    if num_negatives:
        numbers = torch.arange(num_negatives * batch_size).view(batch_size, num_negatives)
        others["negative_mask"] = numbers % 3 > 0
    if is_masked:
        others["masked_labels"] = F.pad(LABELS[:batch_size], (0, 4), value=-100)
    if num_regions:
        corners = torch.rand(batch_size, num_regions, 2, 2).sort(dim=2).values
        numbers = torch.arange(num_regions * batch_size).view(batch_size, num_regions)
        others |= {"boxes": corners.flatten(2), "region_keys": numbers % 5, "box_mask": numbers % 4 > 0}
    return {**batch, **others, "ids": [str(i) for i in range(batch_size)], "return_loss": True}


def part(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {name: value if name == "return_loss" else value[start:stop] for name, value in batch.items()}


CACHED = [
    {"infonce": {"label_smoothing": 0.1}},
    {"infonce": {"label_smoothing": 0.1, "equal_positives": True}},
    {"sigmoid": {}},
    {"infonce": {}, "guess": {"projection_dim": 24}},
    {"instance": {"of": "both"}, "structure": {}, "similarities": {}, "cosine": {"of": "image"}},
    {"negatives": {}, "hard_negatives": {}, "soft_labels": {}},
    {"tags": {"vocabulary": VOCABULARY, "projection_dim": 24}},
    {"distribution": {}, "masked_words": {**MASKED, "projection_dim": 24}, "negatives": {}},
    {"margin": {**CLASSED, "projection_dim": 24}, "caption_margin": {}, "groups": {"hard_negatives": 2}},
    {"negatives": {}, **{name: {**options, "projection_dim": 24} for name, options in REGIONS.items()}},
]


def chunked_plain(
    model: LoTLIPModel, batch: dict[str, Any], bounds: list[int], objective: Objective
) -> dict[str, torch.Tensor]:
    """The loss of all chunks' embeddings with the graphs of all chunks kept: dropout draws as with the cache."""
    torch.manual_seed(4)
    chunks = [
        embed(model, part(batch, *chunk), objective.needs) for chunk in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return objective(
        {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}, model.logit_scale.exp()
    )


@pytest.mark.parametrize("with_accelerator", [False, True])
@pytest.mark.parametrize("terms", CACHED, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cached_gradients_are_the_plain_ones(
    dropout: float, terms: dict[str, dict[str, Any]], with_accelerator: bool
) -> None:
    numbers = (2 if "negatives" in terms else 0, 3 if "regions" in terms else 0)
    batch = tiny_batch(7, *numbers, "masked_words" in terms)
    objective = make(terms)
    model = tiny_model(dropout)
    plain = chunked_plain(model, batch, [0, 1, 3, 5, 7], objective)
    plain["loss"].backward()
    answer = results(plain, model, objective)
    if not dropout:
        assert_equal(batch_loss(model, batch, objective), plain)

    model, objective = tiny_model(dropout), make(terms)
    accelerator = Accelerator(cpu=True) if with_accelerator else None
    prepared = model if accelerator is None else accelerator.prepare(model)
    torch.manual_seed(4)
    cached = cached_backward(prepared, batch, 2, objective, accelerator)
    assert not cached["loss"].requires_grad
    assert_equal(results(cached, model, objective), answer)
    after = torch.get_rng_state()
    chunked_plain(tiny_model(dropout), batch, [0, 1, 3, 5, 7], objective)
    assert torch.equal(torch.get_rng_state(), after)  # it drew what one pass draws


def test_a_batch_with_and_without_long_texts() -> None:
    model, batch = tiny_model(), tiny_batch(3)
    names = {"image_embeds", "text_embeds", "corner_embeds"}
    short = embed(model, {**batch, "long_input_ids": None, "long_attention_mask": None}, names)
    long = embed(model, batch, names)
    assert short["text_embeds"].shape == (3, 1, 24)
    assert short.keys() == names - {"corner_embeds"}
    assert long["text_embeds"].shape == (3, 3, 24)
    assert long["corner_embeds"].shape == (3, 2, 2, 24)
    torch.testing.assert_close(long["text_embeds"][:, :1], short["text_embeds"], **TOLERANCE)
    loss = model(
        **{name: value for name, value in batch.items() if name in ModelInputs.__annotations__}, return_loss=True
    ).loss
    answer = batch_loss(model, batch, Objective({"infonce": InfoNCE()}))["loss"]
    torch.testing.assert_close(answer, loss, **TOLERANCE)


def test_the_model_computes_what_is_needed() -> None:
    model, batch = tiny_model(), tiny_batch(3)
    asked: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    embeds = embed(model, batch, {"text_embeds", "labels", "corner_embeds"})
    assert embeds.keys() == {"text_embeds", "labels", "corner_embeds"}
    assert embed(model, batch, {"image_embeds"}).keys() == {"image_embeds"}
    assert ["pixel_values" in each for each in asked] == [False, True]
    assert [each["output_corner_embeds"] for each in asked] == [True, False]
    assert all(each["pooled_only"] and "labels" not in each and not each["return_loss"] for each in asked)


def test_cached_gradients_of_locked_parameters() -> None:
    model, batch = tiny_model(), tiny_batch(4)
    model.vision_model.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    cached_backward(model, batch, 2, make({"infonce": {}}))
    answers = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert model.logit_scale.grad is None
    model.zero_grad()
    batch_loss(model, batch, make({"infonce": {}}))["loss"].backward()
    assert_equal(answers, {name: p.grad for name, p in model.named_parameters() if p.requires_grad})


def test_cached_gradients_under_autocast() -> None:
    batch, objective = tiny_batch(4), make({"infonce": {}})
    answers = []
    for cached in (False, True):
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(tiny_model())
        # within a caller's autocast, which caches the weights' casts, too
        with accelerator.autocast():
            if cached:
                losses = cached_backward(model, batch, 2, objective, accelerator)
            else:
                losses = batch_loss(model, batch, objective)
        if not cached:
            accelerator.backward(losses["loss"])
        answers.append(results(losses, accelerator.unwrap_model(model)))
    plain, cached = (torch.cat([value.flatten() for value in answer.values()]) for answer in answers)
    assert (cached - plain).norm() <= 0.03 * plain.norm()  # bfloat16 has 8 bits


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Every accelerator of a process shares its settings with the first one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


CACHED_TOGETHER = {"infonce": {"equal_positives": True}, "sigmoid": {}, "guess": {"projection_dim": 24}}


def of_processes(split: list[int], chunk_size: int, batch_size: int) -> dict[str, torch.Tensor]:
    """A process's cached gradients; `DistributedDataParallel` has averaged them."""
    start = sum(split[: rank()])
    batch = part(tiny_batch(batch_size), start, start + split[rank()])
    objective = make(CACHED_TOGETHER)
    wrapped = DistributedDataParallel(tiny_model())
    synchronised, forwards = [], []
    wrapped.register_forward_hook(lambda *_: forwards.append(1))
    wrapped.register_comm_hook(None, lambda _, bucket: synchronised.append(bucket) or allreduce_hook(None, bucket))
    for step in range(2):  # the second step finds what the first left
        wrapped.zero_grad()
        objective.zero_grad()
        losses = cached_backward(wrapped, batch, chunk_size, objective)
        assert len(synchronised) == step + 1  # once, not with every chunk
        assert len(forwards) == (step + 1) * 2 * max(split)  # as often on every process, whatever its share
    return results(losses, wrapped.module, objective)


@pytest.mark.slow
def test_cached_gradients_of_two_processes(tmp_path: Path) -> None:
    """In chunks of 1 the second process has one sample for the first one's four chunks."""
    model, objective = tiny_model(), make(CACHED_TOGETHER)
    plain = batch_loss(model, tiny_batch(5), objective)
    plain["loss"].backward()
    answers = run_processes(of_processes, 2, tmp_path, [4, 1], 1, 5)
    mean = {name: (answers[0][name] + answers[1][name]) / 2 for name in answers[0]}
    assert_equal(mean, results(plain, model, objective))
    for name in mean:
        if "grad" in name:
            torch.testing.assert_close(answers[0][name], answers[1][name])


@pytest.mark.slow
def test_the_memory_of_a_chunk_is_enough() -> None:
    model, objective = tiny_model(), make({"infonce": {}})
    cached_backward(model, tiny_batch(2), 2, objective)  # the parameters' gradients are there already

    def most(batch_size: int, cached: bool) -> int:
        batch = tiny_batch(batch_size)
        with LiveBytes(*(value for value in batch.values() if isinstance(value, torch.Tensor))) as mode:
            if cached:
                cached_backward(model, batch, 2, objective)
            else:
                batch_loss(model, batch, objective)["loss"].backward()
        return mode.most

    # a batch of 32 costs what one of 4 does, its embeddings (10 features of 24 floats, with gradients and copies) and
    # the states of the random numbers
    growth = most(32, cached=True) - most(4, cached=True)
    assert growth <= 28 * 10 * 24 * 4 * 8 + 14 * len(torch.get_rng_state())
    assert most(32, cached=False) - most(4, cached=False) > 20 * growth
