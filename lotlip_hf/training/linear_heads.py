"""Two linear heads on the states of frozen towers: the baseline that a trained model has to beat."""

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..distributed import raise_on_all_ranks, rank, world_size
from ..states import FrozenStates
from ..store import text_digest
from .config import TrainingConfig
from .data import intact_texts
from .frozen import KeyedRecords
from .validation import short_and_long_recalls, whole_captions

RECORDS = 20_000  # maximum number of training records
BATCH_SIZE = 512
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
LOG_SCALE = 3.5  # logarithm of the factor of the similarities at the start


class PairStates(NamedTuple):
    """The pooled states of N images [N, V], and of their short and long captions [N, T]."""

    image: torch.Tensor
    short: torch.Tensor
    long: torch.Tensor


def sampled(number: int, seed: int) -> list[int]:
    """Returns the indices of the records to train heads on: all, or a sample of `RECORDS`, in their order."""
    return sorted(Random(seed).sample(range(number), min(number, RECORDS)))


def pair_states(
    records: KeyedRecords, states: Mapping[str, FrozenStates], config: TrainingConfig, device: torch.device
) -> PairStates:
    """
    Returns the states of the readable records, of whole captions as in the evaluation. Every process must call it: the
    processes share the computation of the captions, and each gets all states.

    Args:
        records (`KeyedRecords`): The records, from [`~lotlip_hf.training.frozen.fill_images`].
        states (`Mapping[str, FrozenStates]`): The states of both towers, by modality.
        config (`TrainingConfig`): Options of the run. Only `captioners` and `splitter` are used.
        device (`torch.device`): Device of this process.
    """
    draw, images, texts = whole_captions(config), list[str](), list[str]()
    keys = {index: key for index, key in enumerate(records.keys) if isinstance(key, str)}
    for index, record in intact_texts(records.records, [*keys]):
        (drawn,) = draw([record], [Random(0)])
        images.append(keys[index])
        texts += [drawn.short, drawn.long[0]]
    error = None
    try:
        states["text"].fill_texts(texts[rank() :: world_size()], progress=rank() == 0)
    except Exception as caught:  # the other processes would wait
        error = caught
    raise_on_all_ranks(error, device)
    read = states["text"].read([text_digest(text) for text in texts])
    return PairStates(states["image"].read(images), read[::2], read[1::2])


def linear_heads(train: PairStates, held_out: PairStates, seed: int = 0, steps: int = 500) -> dict[str, float]:
    """
    Trains a linear head for images and one for texts with a symmetric contrastive loss, and measures retrieval on
    held-out states: steps of 512 pairs with AdamW, a learning rate of 1e-3 and a cosine schedule. Image states are
    standardised with the mean and the deviation of the training images, text states are normalised.

    Args:
        train (`PairStates`): States to train on, in float32 on the CPU.
        held_out (`PairStates`): States to measure on.
        seed (`int`, *optional*, defaults to 0): Seed of the weights and of the drawn pairs. The global random
            generators do not change.
        steps (`int`, *optional*, defaults to 500): Number of steps.

    Returns:
        `dict[str, float]`: Recalls with the keys of [`~lotlip_hf.training.validation.validate`].

    Example:

    ```python
    >>> import torch
    >>> from lotlip_hf.training.linear_heads import PairStates, linear_heads

    >>> texts = torch.randn(20, 8)
    >>> states = PairStates(texts @ torch.randn(8, 12), texts, texts)
    >>> linear_heads(states, states)["long_image_to_text_r10"] > 0.9
    True
    ```
    """
    correction = min(1, len(train.image) - 1)  # else, the deviation of one image is NaN
    mean, std = train.image.mean(0), train.image.std(0, correction=correction).clamp(min=1e-6)
    images = (train.image - mean) / std
    texts = [F.normalize(states, dim=-1) for states in (train.short, train.long)]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        width = texts[0].shape[1]
        image_head, text_head = torch.nn.Linear(images.shape[1], width), torch.nn.Linear(width, width)
        scale = torch.nn.Parameter(torch.tensor(LOG_SCALE))
        trained = [*image_head.parameters(), *text_head.parameters(), scale]
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        target = torch.arange(BATCH_SIZE)
        for _ in range(steps):
            rows = torch.randint(0, len(images), (BATCH_SIZE,))
            embeds = F.normalize(image_head(images[rows]), dim=-1)
            loss = torch.zeros(())
            for states in texts:
                logits = scale.exp() * embeds @ F.normalize(text_head(states[rows]), dim=-1).T
                loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        text_embeds = [text_head(F.normalize(states, dim=-1)) for states in (held_out.short, held_out.long)]
        return short_and_long_recalls(image_head((held_out.image - mean) / std), torch.stack(text_embeds, dim=1))
