"""Frozen towers in training: their pooled states are computed once, and batches contain states as inputs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from ..data.collator import Batch, read_record
from ..data.record import RecordError
from ..distributed import gather_lists, raise_on_all_ranks, rank, world_size
from ..encoder import Encoder, Modality
from ..images import ImageError, ImageSource, image_digest, image_source
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor
from ..states import FrozenStates
from ..terminal import progress_bar
from .config import TrainingConfig


def _locked_towers(
    model: LoTLIPModel,
    records: Dataset | IterableDataset,
    config: TrainingConfig,
    accelerator: Accelerator,
    needs: Collection[str],
) -> dict[Modality, str]:
    """Locked towers, with the reason why a tower is computed in every step, or `""` if it is computed once."""
    towers: dict[Modality, str] = {}
    if config.lock_vision and not config.unlocked_vision_layers:
        towers["image"] = ""
        if config.patch_dropout:
            towers["image"] = "`patch_dropout` is set"
        elif config.augment:
            towers["image"] = "`augment` is set"
        elif isinstance(records, IterableDataset):
            towers["image"] = "the records are a stream"
    if config.lock_text and not config.unlocked_text_layers:
        towers["text"] = ""
        if any(parameter.requires_grad for parameter in model.text_model.parameters()):
            towers["text"] = "its corner tokens are trained"
        elif accelerator.distributed_type == DistributedType.FSDP:
            towers["text"] = "FSDP shards it"
    of_tokens = [("text", "token_embeds"), ("text", "masked_token_embeds")]
    for modality, name in (("image", "boxes"), ("image", "patch_embeds"), *of_tokens):
        if name in needs and modality in towers:
            towers[modality] = f"a term needs `{name}`"
    if config.word_scores is not None and "text" in towers:
        towers["text"] = "`word_scores` masks words of its texts"
    return dict.fromkeys(towers, "`no_cache` is set") if config.no_cache else towers


def frozen_states(
    model: LoTLIPModel,
    processor: LoTLIPProcessor,
    records: Dataset | IterableDataset,
    config: TrainingConfig,
    accelerator: Accelerator,
    needs: Collection[str] = (),
) -> dict[str, FrozenStates]:
    """
    Returns the states of the towers that a run computes once, by modality. Prints the file that keeps them, and the
    reason why another locked tower is computed in every step. Moves the model to the device.

    Args:
        model (`LoTLIPModel`): The model, after [`~lotlip_hf.training.optim.freeze`].
        processor (`LoTLIPProcessor`): The processor of the model.
        records (`Dataset` or `IterableDataset`): Training records.
        config (`TrainingConfig`): Options of the run.
        accelerator (`Accelerator`): The processes.
        needs (`Collection[str]`, *optional*): Names of the tensors that the objective uses.

    Raises:
        `ValueError`: If `head_start` or `state_dropout` needs a tower that is computed in every step.
    """
    states: dict[str, FrozenStates] = {}
    towers = _locked_towers(model, records, config, accelerator, needs)
    options = [("state_dropout", "image")] if config.state_dropout else []
    options += [("head_start", "image"), ("head_start", "text")] if config.head_start == "ridge" else []
    for option, modality in options:
        if reason := towers.get(cast(Modality, modality), "not all of its layers are frozen"):
            raise ValueError(
                f"`{option}` needs the states of the {modality} tower, which is computed in every step, because "
                f"{reason}. Change that, or set `{option}` to {getattr(TrainingConfig, option)}."
            )
    for modality, reason in towers.items():
        if reason:
            accelerator.print(f"The frozen {modality} tower is computed in every step, because {reason}.")
            continue
        encoder = Encoder(model.to(accelerator.device), processor)
        states[modality] = FrozenStates(encoder, modality, config.cache, config.cache_dtype)
        each = states[modality].row_bytes
        size = f"{each / 1e3:.1f} kB for each text"
        if isinstance(records, Dataset) and modality == "image":
            size = f"{each * len(records) / 1e6:.1f} MB"
        accelerator.print(
            f"The frozen {modality} tower is computed once. {states[modality].store.path} keeps its states (up to "
            f"{size}). Pass --cache FOLDER for another folder, or --no-cache."
        )
    return states


class KeyedRecords(TorchDataset):
    """Records with the key of the states of their image as `image_key`, or the error of an unreadable image."""

    def __init__(self, records: Dataset, keys: Sequence[str | Exception]) -> None:
        self.records, self.keys = records, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.records[index], "image_key": self.keys[index]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Reads the records of a batch together, which is faster."""
        records = self.records.__getitems__(indices)
        return [{**record, "image_key": self.keys[index]} for record, index in zip(records, indices, strict=True)]


def fill_images(
    records: Dataset | KeyedRecords,
    states: FrozenStates,
    config: TrainingConfig,
    device: torch.device,
    num_records: int | None = None,
) -> KeyedRecords:
    """
    Computes the states of the images that the cache lacks. The processes share the work.

    Args:
        records (`Dataset` or `KeyedRecords`): The records. Those that have keys keep them.
        states (`FrozenStates`): The states of an image tower.
        config (`TrainingConfig`): Options of the run. Only `on_error` is used.
        device (`torch.device`): Device of this process.
        num_records (`int`, *optional*): Number of records to use, from the first. Defaults to all.

    Raises:
        `ImageError`, `RecordError`: If a record is broken and `on_error` is `"raise"`. The other processes raise
            [`OtherProcessError`].
    """
    number = len(records) if num_records is None else min(num_records, len(records))
    known = None
    if isinstance(records, KeyedRecords):
        records, known = records.records, records.keys
    keys: list[str | Exception] = []
    error = None
    try:
        keys = _fill_share(records, range(rank(), number, world_size()), states, config.on_error == "skip", known)
    except Exception as caught:  # the other processes would wait
        error = caught
    raise_on_all_ranks(error, device)
    ordered: list[str | Exception] = [""] * number
    for first, share in enumerate(gather_lists([keys])):
        ordered[first :: world_size()] = share
    return KeyedRecords(records, ordered)


def _fill_share(
    records: Dataset, share: range, states: FrozenStates, skips: bool, known: Sequence[str | Exception] | None
) -> list[str | Exception]:
    """Returns the keys of the images of one process, or the errors of broken records."""
    results: dict[int, str | Exception] = {}
    for index in progress_bar(share, desc="Reading images", unit="image", shown=rank() == 0, delay=2):
        try:
            results[index] = read_record(records[index], image_digest)[1] if known is None else known[index]
        except (ImageError, RecordError) as error:
            if not skips:
                raise
            results[index] = error
    keyed = [index for index, result in results.items() if isinstance(result, str)]
    failed: dict[Any, ImageError] = {}

    def source(number: int) -> ImageSource:
        return image_source(records[keyed[number]]["image"]).source

    def fail(number: int, error: ImageError) -> None:
        record = records[keyed[number]]
        names = [f"record {record['id']}", image_source(record["image"]).path]
        named = ImageError(": ".join(filter(None, names)), error.reason, error.transient)
        if not skips:
            raise named
        failed[results[keyed[number]]] = named

    states.fill_images([cast(str, results[index]) for index in keyed], source, fail, progress=rank() == 0)
    return [failed.get(result, result) for result in results.values()]


def add_states(batch: Batch, states: Mapping[str, FrozenStates]) -> Batch:
    """Adds the states of a batch's images and texts. New texts are computed and kept."""
    added: dict[str, Any] = {}
    if "image_keys" in batch:
        added["image_states"] = states["image"].read(batch["image_keys"])
    if "text" in states and "texts" in batch:
        texts = batch["texts"]
        keys = states["text"].fill_texts(text for row in texts for text in row)
        added["text_states"] = states["text"].read(keys).unflatten(0, (len(texts), -1))
    return cast(Batch, {**added, **batch})
