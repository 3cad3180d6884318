"""Retrieval on held-out records, measured during training."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch import nn

from ..data.collator import LoTLIPCollator
from ..data.sampling import WholeCaptions
from ..distributed import gather, raise_on_all_ranks
from ..evaluation.retrieval import DIRECTIONS, recalls
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..states import FrozenStates
from .config import TrainingConfig
from .frozen import KeyedRecords, add_states
from .objective import embed

# Keys of the recalls by long and by short captions
RECALL_KEYS = {
    kind: [f"{kind}_{direction}_r{k}" for direction in DIRECTIONS for k in (1, 5, 10)] for kind in ("long", "short")
}


@torch.no_grad()
def validate(
    model: nn.Module,
    processor: LoTLIPProcessor,
    records: Dataset | IterableDataset | KeyedRecords,
    config: TrainingConfig,
    accelerator: Accelerator | None = None,
    states: Mapping[str, FrozenStates] | None = None,
) -> dict[str, float]:
    """
    Measures retrieval over the first `eval_samples` records, once with the short captions and once with the first long
    caption of each record. Captions are not split. The model is left in evaluation mode.

    Args:
        model (`nn.Module`): A [`LoTLIPModel`], also wrapped in DDP or FSDP.
        processor (`LoTLIPProcessor`): The processor of the model.
        records (`Dataset` or `IterableDataset` or `KeyedRecords`): The records.
        config (`TrainingConfig`): Options of the run. Only `eval_samples`, `batch_size`, `captioners` (the first is
            evaluated), `splitter` and `on_error` are used.
        accelerator (`Accelerator`, *optional*): The processes of the run share the work and return the same result.
        states (`Mapping`, *optional*): States of the towers that are computed once, by modality. Those of images are
            used with `KeyedRecords`.

    Returns:
        `dict[str, float]`: `long_image_to_text_r1`, `long_text_to_image_r1`, `short_...`, and the same at 5 and 10.

    Raises:
        `ValueError`: If there are fewer records than processes.
        `ImageError`, `RecordError`: If a record is broken. The other processes raise [`OtherProcessError`].
    """
    rank, num_processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    if isinstance(records, IterableDataset):
        records = cast(Any, list(islice(records, config.eval_samples)))
    number = min(config.eval_samples, len(records))
    if number < num_processes:
        raise ValueError(
            f"{number} evaluation records are too few for {num_processes} processes. Add records to `eval_data`."
        )
    states = dict(states or {})
    frozen = {modality for modality in states if modality == "text" or isinstance(records, KeyedRecords)}
    collator = LoTLIPCollator(processor, whole_captions(config), on_error=config.on_error, frozen=frozen)
    # Every process needs the same number of batches, because DDP or FSDP may communicate in each.
    part = np.array_split(np.arange(number), num_processes)[rank]
    num_batches = min(math.ceil(math.ceil(number / num_processes) / config.batch_size), number // num_processes)
    images, texts = [], []
    model.eval()
    for rows in np.array_split(part, num_batches):
        batch, error = {}, None
        try:
            batch = add_states(collator([records[int(row)] for row in rows]), states)
        except Exception as caught:  # raised below, because the other processes would wait in the forward pass
            error = caught
        raise_on_all_ranks(error, device)
        with nullcontext() if accelerator is None else accelerator.autocast():
            embeds = embed(model, send_to_device(batch, device), ("image_embeds", "text_embeds"))
        images.append(embeds["image_embeds"].float())
        texts.append(embeds["text_embeds"].float())  # [B, 2, dim], the short text first
    return short_and_long_recalls(gather(torch.cat(images)), gather(torch.cat(texts)))


def whole_captions(config: TrainingConfig) -> WholeCaptions:
    """Returns the strategy that draws the short caption and the first long caption of a record."""
    return WholeCaptions(None if config.captioners is None else tuple(config.captioners), config.splitter)


def short_and_long_recalls(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> dict[str, float]:
    """Returns the recalls of images [N, dim] and their short and long texts [N, 2, dim], by their log keys."""
    return {
        f"{kind}_{name}": value
        for number, kind in ((1, "long"), (0, "short"))
        for name, value in recalls(image_embeds, text_embeds[:, number]).items()
    }
