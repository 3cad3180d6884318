"""
Teachers: they compute `teacher_image_embeds` and `teacher_text_embeds`, which are targets of terms of the objective,
and choose the patches that a step keeps.

To add a kind, write a subclass of [`Teacher`] and list it in `KINDS`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.collator import RIDERS, Batch, image_key, num_riders
from ..data.record import Record, RecordError
from ..encoder import load_encoder, warn_of_cut_texts
from ..modeling.backbones_lotlip import pair
from ..modeling.modeling_lotlip import LoTLIPModel
from ..states import FrozenStates
from .config import TrainingConfig
from .frozen import KeyedRecords, fill_images
from .keeping import attention_scores, check_attention, kept_by_score, scores_of_view
from .objective import Objective, embed

IMAGE_EMBEDS, TEXT_EMBEDS = "teacher_image_embeds", "teacher_text_embeds"
KEPT_PATCHES, BOXES = "kept_patches", "view_boxes"
Records = Dataset | IterableDataset | KeyedRecords


class Teacher:
    """
    The base class of teachers. A teacher is frozen and belongs neither to the model nor to the optimiser. Each process
    has a whole teacher.

    Args:
        config (`TrainingConfig`): Options of the run.
        model (`LoTLIPModel`): The model.
        needs (`Collection[str]`): Names of the tensors to compute: `teacher_image_embeds`, `teacher_text_embeds`, and
            `kept_patches` for the choice by attention.
        accelerator (`Accelerator`): The processes.

    Attributes:
        reads_texts (`bool`): Whether the teacher needs `texts` of a batch.
        read (`Callable` or `None`): Reads inputs of the teacher from a record, for the collator.
        averaged (`AveragedModel` or `None`): Weights that are saved with the training state.
    """

    reads_texts = False
    read: Callable[[Record], Mapping[str, Any]] | None = None
    averaged: AveragedModel | None = None

    def __init__(
        self, config: TrainingConfig, model: LoTLIPModel, needs: Collection[str], accelerator: Accelerator
    ) -> None:
        self.config, self.needs, self.accelerator = config, set(needs), accelerator
        self.dim = model.config.projection_dim

    def start(self, model: LoTLIPModel, records: Records) -> Records:
        """Prepares the teacher when the model has its first weights. Returns the records to train on."""
        return records

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the tensors in `needs` for a batch, normalised and in float32."""
        raise NotImplementedError

    def update(self, model: LoTLIPModel, objective: Objective) -> None:
        """Follows the model and the terms of the objective after a step of the optimiser."""


class EncoderTeacher(Teacher):
    """
    The dual encoder in `config.teacher`. It prepares images and tokenises texts itself.

    With the cache of frozen towers (`lotlip_hf.states`) the embedding of an image or text is computed once and kept,
    and otherwise in every step. Images of a stream are computed in every step.

    Raises:
        `ValueError`: If the checkpoint is not a complete dual encoder, or its embeddings have another size than the
            model's.
    """

    def __init__(
        self, config: TrainingConfig, model: LoTLIPModel, needs: Collection[str], accelerator: Accelerator
    ) -> None:
        super().__init__(config, model, needs, accelerator)
        assert config.teacher is not None
        self.encoder = load_encoder(config.teacher, device=accelerator.device)
        if self.encoder.dim != self.dim:
            raise ValueError(
                f"`teacher` {config.teacher} has embeddings of size {self.encoder.dim}, the model of size {self.dim}. "
                f"Choose another teacher, or start a model with `projection_dim` {self.encoder.dim}."
            )
        self.reads_texts = TEXT_EMBEDS in self.needs
        states = partial(FrozenStates, self.encoder, folder=config.cache, dtype=config.cache_dtype, pooled=False)
        self.texts = states("text") if self.reads_texts and not config.no_cache else None
        self.images = states("image") if IMAGE_EMBEDS in self.needs and not config.no_cache else None
        self._has_warned = False

    def start(self, model: LoTLIPModel, records: Records) -> Records:
        if IMAGE_EMBEDS not in self.needs:
            return records
        if self.images is None or isinstance(records, IterableDataset):
            reason = "`no_cache` is set" if self.images is None else "the records are a stream"
            self.accelerator.print(f"The teacher embeds images in every step, because {reason}.")
            self.images, self.read = None, partial(_pixels, pixels=self.encoder.engine.pixels)
            return records
        self.accelerator.print(
            f"The teacher embeds each image once. {self.images.store.path} keeps the embeddings (up "
            f"to {self.images.row_bytes * len(records) / 1e6:.1f} MB). Pass --cache FOLDER for another folder, or "
            "--no-cache."
        )
        self.read = _image_key
        return fill_images(records, self.images, self.config, self.accelerator.device)

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        targets = {}
        if IMAGE_EMBEDS in self.needs:
            inputs = batch["teacher_inputs"]
            embeds = self._image_embeds(inputs) if self.images is None else self.images.read(inputs["image_keys"])
            targets[IMAGE_EMBEDS] = embeds
        if TEXT_EMBEDS in self.needs:
            number = sum(num_riders(batch).values())
            targets[TEXT_EMBEDS] = self.text_embeds([row[: len(row) - number] for row in batch["texts"]])
        return targets

    def text_embeds(self, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Returns the embeddings [b, T, dim] of texts [b][T], normalised, in float32 on the CPU."""
        flat = [text for row in texts for text in row]
        if self.texts is not None:
            embeds = self.texts.read(self.texts.fill_texts(flat))
        else:
            embeds = self._computed(flat)
        return embeds.unflatten(0, (len(texts), -1))

    def _image_embeds(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        engine, rows = self.encoder.engine, []
        for chunk in _chunks(inputs, self.config.grad_cache_chunk):
            arrays = {name: values.cpu().numpy() for name, values in chunk.items()}
            rows.append(torch.from_numpy(engine.fetch(engine.embed("image", arrays))))
        return torch.cat(rows)

    def _computed(self, texts: Iterable[str]) -> torch.Tensor:
        rows = {index: (embedding, was_cut) for index, embedding, was_cut in self.encoder.iterate_texts(texts)}
        if not self._has_warned:
            cut = sum(was_cut for _, was_cut in rows.values())
            warn_of_cut_texts(cut, len(rows), self.encoder.max_text_length)
            self._has_warned = cut > 0
        return torch.stack([rows[index][0] for index in range(len(rows))])


class StartTeacher(Teacher):
    """
    The model as it started, in evaluation mode. It sees whole images, also with `patch_dropout`, and with two views
    the smallest part of an image that holds both.
    """

    def start(self, model: LoTLIPModel, records: Records) -> Records:
        if KEPT_PATCHES in self.needs:
            check_attention(model.vision_model)
        average = get_ema_multi_avg_fn(self.config.teacher_momentum)  # for `AverageTeacher`
        self.averaged = AveragedModel(model, self.accelerator.device, multi_avg_fn=average)
        self.averaged.requires_grad_(False).eval()
        return records

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        assert self.averaged is not None
        names = {name.removeprefix("teacher_") for name in self.needs - {KEPT_PATCHES}}
        inputs, parts = _inputs(batch), []
        with torch.no_grad(), self.accelerator.autocast():
            for chunk in _chunks(inputs, self.config.grad_cache_chunk):
                chunk = cast(dict[str, Any], send_to_device(chunk, self.accelerator.device, non_blocking=True))
                parts.append(self._part(chunk, names))
        targets = {f"teacher_{name}": torch.cat([part[name] for part in parts]).float() for name in names}
        if KEPT_PATCHES in self.needs:
            targets[KEPT_PATCHES] = torch.cat([part[KEPT_PATCHES] for part in parts])
        return targets

    def _part(self, chunk: dict[str, Any], names: set[str]) -> dict[str, torch.Tensor]:
        """Returns embeddings of a chunk and, if they are needed, its `kept_patches`: [b, K], or [b, 2, K] of views."""
        assert self.averaged is not None
        model = cast(LoTLIPModel, self.averaged.module)
        if KEPT_PATCHES not in self.needs:
            return embed(model, chunk, names)
        scores, images = attention_scores(model, pixel_values=chunk["pixel_values"])
        patch_size = pair(cast(Any, model.config.vision_config).patch_size)
        sides = zip(chunk["pixel_values"].shape[-2:], patch_size, strict=True)
        rows, columns = (side // size for side, size in sides)
        seen = [scores]
        if BOXES in chunk:
            seen = [scores_of_view(scores, (rows, columns), box) for box in chunk[BOXES].unbind(1)]
        kept = [kept_by_score(each, (rows, columns), 1 - self.config.patch_dropout) for each in seen]
        rest = names - {"image_embeds"}
        embeds = {"image_embeds": images, **(embed(model, chunk, rest) if rest else {})}
        return {**embeds, KEPT_PATCHES: torch.stack(kept, 1) if BOXES in chunk else kept[0]}


class AverageTeacher(StartTeacher):
    """A moving average of the model's weights with the decay `config.teacher_momentum`, as that of `ema_decay`."""

    def update(self, model: LoTLIPModel, objective: Objective) -> None:
        assert self.averaged is not None
        self.averaged.update_parameters(model)
        objective.follow(self.config.teacher_momentum)


class ColumnsTeacher(Teacher):
    """Embeddings of images and short captions that were computed before, in columns of the records."""

    def start(self, model: LoTLIPModel, records: Records) -> Records:
        self.read = partial(_vectors, names=sorted(self.needs), dim=self.dim)
        return records

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        targets = dict(batch["teacher_inputs"])
        if TEXT_EMBEDS in targets:
            targets[TEXT_EMBEDS] = targets[TEXT_EMBEDS].unsqueeze(1)
        return targets


KINDS: dict[str, type[Teacher]] = {"self": StartTeacher, "ema": AverageTeacher, "columns": ColumnsTeacher}


def make_teacher(
    config: TrainingConfig, model: LoTLIPModel, needs: Collection[str], accelerator: Accelerator
) -> Teacher | None:
    """Creates the teacher of a run, if `config.teacher` is set. See [`Teacher`] for the arguments."""
    if config.teacher is None:
        return None
    kind = KINDS.get(config.teacher, EncoderTeacher)
    needed = {name for name in needs if name.startswith("teacher_")}
    if config.patch_choice == "attention":
        needed.add(KEPT_PATCHES)
    return kind(config, model, needed, accelerator)


def add_teacher(batch: Batch, teacher: Teacher | None) -> Batch:
    """Replaces `teacher_inputs` of a batch by the tensors of the teacher."""
    if teacher is None:
        return batch
    rest = {name: value for name, value in batch.items() if name != "teacher_inputs"}
    # Tensors come first: accelerate reads the size of a batch from its first entry.
    return cast(Batch, {**teacher.targets(batch), **rest})


def _inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors for a model as teacher: whole images, or what holds both views, and texts without riders."""
    unseen = (KEPT_PATCHES, *RIDERS.values())
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name not in unseen}
    if number := sum(num_riders(batch).values()):
        for name in {"long_input_ids", "long_attention_mask", "text_states"} & inputs.keys():
            inputs[name] = inputs[name][:, :-number]
    inputs |= batch.get("teacher_inputs", {})
    return {name: value for name, value in inputs.items() if value.numel()}


def _chunks(inputs: Mapping[str, torch.Tensor], size: int | None) -> Iterator[dict[str, torch.Tensor]]:
    """Returns chunks of `size` samples, or one of all."""
    parts = (value.split(size or len(value)) for value in inputs.values())
    return (dict(zip(inputs, part, strict=True)) for part in zip(*parts, strict=True))


# Functions that the collator calls, at module level because its processes pickle them.


def _pixels(record: Record, pixels: Callable[[Any, str], dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Prepares the image for the teacher's encoder."""
    inputs = pixels(record["image"], f"record {record['id']}")
    return {name: torch.from_numpy(values) for name, values in inputs.items()}


def _image_key(record: Record) -> dict[str, str]:
    """Returns the key of a kept embedding (see [`KeyedRecords`])."""
    return {"image_keys": image_key(record)}


def _vectors(record: Record, names: Sequence[str], dim: int) -> dict[str, torch.Tensor]:
    """Returns normalised embeddings [1, dim] of the record, or raises an error for one that cannot be used."""
    vectors = {}
    for name in names:
        if (size := len(record.get(name) or ())) != dim:
            flag = f"--{name.replace('_', '-').replace('embeds', 'column')}"
            raise RecordError(
                f"record {record['id']}: `{name}` must have {dim} numbers, the size of the model's embeddings, got "
                f"{size}. Fill the column of {flag}."
            )
        vector = torch.tensor([record[name]], dtype=torch.float64)
        if not vector.any():
            raise RecordError(f"record {record['id']}: `{name}` has only zeros, which have no direction.")
        vectors[name] = F.normalize(vector, dim=-1, eps=0).float()
    return vectors
