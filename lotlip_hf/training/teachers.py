"""Teachers: frozen dual encoders, whose embeddings of a step's texts are targets of terms of the objective."""

from collections.abc import Collection, Iterable, Sequence
from typing import cast

import torch

from ..data.collator import Batch
from ..encoder import load_encoder, warn_of_cut_texts
from ..modeling.configuration_lotlip import LoTLIPConfig
from ..states import FrozenStates
from .config import TrainingConfig

TEXT_EMBEDS = "teacher_text_embeds"


class Teacher:
    """
    The dual encoder in `config.teacher`. It is frozen and in evaluation mode, belongs neither to the model nor to the
    optimiser nor to checkpoints, and tokenises texts itself. Each process has a whole teacher, also under FSDP.

    With the cache of frozen towers (`lotlip_hf.states`) the embedding of a text is computed once and kept, and
    otherwise in every step.

    Args:
        config (`TrainingConfig`): Options of the run. Only `teacher` and those of the cache are used.
        model_config (`LoTLIPConfig`): Configuration of the model.
        device (`torch.device`): Device of this process.

    Raises:
        `ValueError`: If the checkpoint is not a complete dual encoder, or its embeddings have another size than the
            model's.
    """

    def __init__(self, config: TrainingConfig, model_config: LoTLIPConfig, device: torch.device) -> None:
        assert config.teacher is not None
        self.encoder = load_encoder(config.teacher, device=device)
        if self.encoder.dim != model_config.projection_dim:
            raise ValueError(
                f"`teacher` {config.teacher} has embeddings of size {self.encoder.dim}, the model of size "
                f"{model_config.projection_dim}. Choose another teacher, or start a model with `projection_dim` "
                f"{self.encoder.dim}."
            )
        self.states = None
        if not config.no_cache:
            self.states = FrozenStates(self.encoder, "text", config.cache, config.cache_dtype, pooled=False)
        self._has_warned = False

    def text_embeds(self, texts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Returns the embeddings [b, T, dim] of texts [b][T], normalised, in float32 on the CPU."""
        flat = [text for row in texts for text in row]
        if self.states is not None:
            embeds = self.states.read(self.states.fill_texts(flat))
        else:
            embeds = self._computed(flat)
        return embeds.unflatten(0, (len(texts), -1))

    def _computed(self, texts: Iterable[str]) -> torch.Tensor:
        rows = {index: (embedding, was_cut) for index, embedding, was_cut in self.encoder.iterate_texts(texts)}
        if not self._has_warned:
            cut = sum(was_cut for _, was_cut in rows.values())
            warn_of_cut_texts(cut, len(rows), self.encoder.max_text_length)
            self._has_warned = cut > 0
        return torch.stack([rows[index][0] for index in range(len(rows))])


def add_teacher(batch: Batch, teacher: Teacher | None, needs: Collection[str]) -> Batch:
    """Adds the tensors in `needs` that the teacher computes to a batch of the collator, which has `texts`."""
    if teacher is None or TEXT_EMBEDS not in needs:
        return batch
    texts = batch["texts"]
    if "negative_mask" in batch:
        texts = [row[: -batch["negative_mask"].shape[1]] for row in texts]  # negatives have no target
    # Tensors come first: accelerate reads the size of a batch from its first entry.
    return cast(Batch, {TEXT_EMBEDS: teacher.text_embeds(texts), **batch})
