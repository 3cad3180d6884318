"""What a run starts from: the model, the records, what of the model is trained, and at which rates."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions
from datasets import Dataset, IterableDataset
from torch import nn
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

# transformers 5.17 exports it only where torchvision is installed
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..data.collator import RecordError, read_record
from ..data.records import ColumnError, SplitError, first_error, is_hub_name, load_records
from ..images import set_max_image_pixels
from ..loading import fit_tokenizer, load_model, max_text_length
from ..modeling.modeling_lotlip import LoTLIPModel
from ..modeling.processing_lotlip import LoTLIPProcessor, check_image_sizes
from ..modeling.tokenization_lotlip import LoTLIPTokenizer
from ..scenes.dataset import scenes_dataset
from .config import SCENES, TrainingConfig

NUM_CORNER_TOKENS = 2
# Positions of the released models, corner tokens included.
CONTEXT_LENGTH = 128


def load_or_start_model(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    """
    The model that `config` names: a checkpoint, or a new one from two pretrained encoders (LiT,
    https://arxiv.org/abs/2111.07991) or, for Scenes, from random weights.

    Args:
        config: Its part "The model".

    Returns:
        The model, on the CPU, in float32, and its processor.

    Raises:
        ValueError: if options contradict each other or the checkpoint, or a checkpoint is not one of LoTLIP.
        OSError: if there is no such checkpoint.
    """
    has_encoders = config.text_model is not None or config.image_model is not None
    if (config.model is None) != has_encoders or (config.text_model is None) != (config.image_model is None):
        raise ValueError(
            "Say which model to train: `model` (a checkpoint to train further, or "
            f"{SCENES!r} for a new small one), or both `text_model` and `image_model` (two encoders to start from)."
        )
    if config.model is None:
        model, processor = _from_encoders(config)
    elif config.model == SCENES:
        from ..scenes.small import small_model

        _refuse(config, "projection_dim", "text_pooling")
        num_corner_tokens = NUM_CORNER_TOKENS if config.num_corner_tokens is None else config.num_corner_tokens
        length = {} if config.max_text_length is None else {"max_text_length": config.max_text_length}
        return small_model(num_corner_tokens, seed=config.seed, cleaning=config.cleaning or "official", **length)
    else:
        _refuse(config, "projection_dim", "text_pooling")
        model, processor = load_model(config.model, device="cpu", dtype="float32")
        if not isinstance(model, LoTLIPModel):
            raise ValueError(
                f"{config.model} is a {model.config.model_type!r} checkpoint, not one of LoTLIP. `text_model` and "
                "`image_model` make a new LoTLIP of two encoders."
            )
        number = model.config.text_config.num_corner_tokens
        if config.num_corner_tokens not in (None, number):
            raise ValueError(
                f"`num_corner_tokens` is for new models: {config.model} has {number}, not {config.num_corner_tokens}."
            )
        cleaning = getattr(processor.tokenizer, "cleaning", None)
        if config.cleaning not in (None, cleaning):
            raise ValueError(f"`cleaning` is for new models: {config.model} has {cleaning}, not {config.cleaning}.")
    fit_tokenizer(model, processor.tokenizer, config.max_text_length)
    max_text_length(model, processor.tokenizer)  # complains if there is no limit
    return model, processor


def _refuse(config: TrainingConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            raise ValueError(f"`{name}` is for new models made of two encoders; {config.model} has its own.")


def _from_encoders(config: TrainingConfig) -> tuple[LoTLIPModel, LoTLIPProcessor]:
    number = NUM_CORNER_TOKENS if config.num_corner_tokens is None else config.num_corner_tokens
    model = LoTLIPModel.from_backbones(
        config.text_model,
        config.image_model,
        number,
        text_pooling=config.text_pooling,
        projection_dim=config.projection_dim,
    ).float()
    positions = model.config.text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(config.text_model, trust_remote_code=False)
    if model.config.text_config.is_causal:
        if config.cleaning is not None:
            raise ValueError(
                f"`cleaning` is for text encoders with a separator token between sentences, which CLIP's has not: "
                f"leave it out for {config.text_model}."
            )
        tokenizer.model_max_length = positions
    else:
        tokenizer = LoTLIPTokenizer.from_backbone_tokenizer(
            tokenizer,
            model_max_length=min(CONTEXT_LENGTH - number, positions),
            cleaning=config.cleaning or "official",
        )
    image_processor = AutoImageProcessor.from_pretrained(config.image_model, trust_remote_code=False)
    check_image_sizes(image_processor, str(config.image_model))
    return model, LoTLIPProcessor(image_processor, tokenizer)


# How to say which columns to read.
COLUMN_HINTS = {
    "image": "Say which to read: --image-column.",
    "short": "Say which to read: --short-column (`none` takes the first sentence of each long caption).",
    "long": "Say which to read: --long-columns; --num-long-texts 0 trains on short captions alone.",
}


def load_data(config: TrainingConfig) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    The records that `config` names. Where a broken record stops the run, the first record is read, so that what is
    wrong with all of them shows before a model is loaded.

    Args:
        config: Its part "The data", and `eval_data`.

    Returns:
        The records to train on, and those to evaluate on, if any are named.

    Raises:
        ValueError: if `data` is not given, a column is missing, a file cannot be read, or there is no record.
        ImageError, RecordError: if the first record is broken and `on_error` is `"raise"`.
        FileNotFoundError: if there is no such file or folder.
    """
    if config.max_image_pixels is not None:
        set_max_image_pixels(config.max_image_pixels)
    if config.data is None:
        raise ValueError(f"Say what to train on: `data` (a folder, files, a data set on the Hub, or {SCENES!r}).")
    records = _records(config, config.data, "split", "train", config.num_scenes)
    if config.eval_data is None:
        return records, None
    return records, _records(config, config.eval_data, "eval_split", "validation", config.eval_samples)


def _records(
    config: TrainingConfig, data: str, option: str, usual_split: str, num_scenes: int
) -> Dataset | IterableDataset:
    split = getattr(config, option)
    if data == SCENES:
        split = split or usual_split
        # the same held-out scenes, whatever the seed
        return scenes_dataset(num_scenes, config.seed if split == "train" else 0, split)
    try:
        records = _load_records(config, data, split or (usual_split if is_hub_name(data) else None))
    except ColumnError as error:
        raise ColumnError(error.problem, error.field, COLUMN_HINTS[error.field]) from error
    except SplitError as error:
        if error.splits or split != usual_split:
            raise SplitError(error.problem, error.splits, option) from error
        records = _load_records(config, data, None)  # files that are no splits are the usual one
    first = next(iter(records), None)
    if first is None:
        raise ValueError(f"{data}: holds no record.")
    if config.on_error == "raise":
        if error := first_error(records):
            raise RecordError(error)
        read_record(first, config.sampling(), config.seed)
    return records


def _load_records(config: TrainingConfig, data: str, split: str | None) -> Dataset | IterableDataset:
    return load_records(
        data,
        config.column_mapping(),
        split,
        config.image_folder,
        config.streaming,
        image_root=config.image_root,
        max_record_bytes=config.max_record_bytes,
    )


def freeze(model: LoTLIPModel, config: TrainingConfig) -> None:
    """
    Freezes what is not trained: with `lock_vision` the image tower, but for its last `unlocked_vision_layers` layers
    and what follows them; without long texts the corner tokens; and what the forward pass never uses. The projections
    stay trainable.

    Args:
        model: The model, changed in place.
        config: The options.

    Raises:
        ValueError: if more layers are to be unlocked than there are.
    """
    for name, parameter in model.named_parameters():
        unused = name.endswith("mask_token") or (name.endswith("corner_embeds") and not config.num_long_texts)
        parameter.requires_grad_(not unused)
    if not config.lock_vision:
        return
    tower = model.vision_model
    num_layers = tower.backbone.config.num_hidden_layers
    if config.unlocked_vision_layers > num_layers:
        raise ValueError(
            f"`unlocked_vision_layers` is {config.unlocked_vision_layers}, but the image tower has {num_layers}."
        )
    tower.requires_grad_(False)
    if config.unlocked_vision_layers:
        (layers,) = [
            module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers
        ]
        first = next(iter(layers[num_layers - config.unlocked_vision_layers].parameters()))
        # parameters come in the order of the forward pass
        parameters = list(tower.parameters())
        start = next(index for index, parameter in enumerate(parameters) if parameter is first)
        for parameter in parameters[start:]:
            parameter.requires_grad_(True)


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but for modules whose parameters are all frozen: these run as in inference, without dropout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def parameter_groups(model: nn.Module, objective: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """
    The trainable parameters in groups for AdamW: by tower, each with its own learning rate, and by whether they decay.

    Args:
        model: A [`LoTLIPModel`] or what wraps one.
        objective: Its parameters, if any, are trained too.
        config: The options.

    Returns:
        `dict`s with `params`, `lr` and `weight_decay`; none is empty.
    """

    def named() -> Iterator[tuple[str, nn.Parameter]]:
        yield from model.named_parameters()
        yield from objective.named_parameters(prefix="objective")

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named():
        if not parameter.requires_grad:
            continue
        if "text_model." in name or "text_projection." in name:
            rate = config.text_learning_rate
        elif "vision_model." in name or "visual_projection." in name:
            rate = config.image_learning_rate
        else:
            rate = None
        rate = config.learning_rate if rate is None else rate
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def rate_factor(step: int, config: TrainingConfig, max_steps: int) -> float:
    """
    What a step multiplies the learning rates by, as transformers' schedules of these names do: importing those imports
    PEFT and, where it is installed, bitsandbytes.

    Args:
        step: Steps of the optimiser so far.
        config: Its `lr_scheduler` and `warmup_steps`.
        max_steps: Steps of the run.
    """
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.lr_scheduler == "constant_with_warmup":
        return 1.0
    num_steps = max(1, max_steps - config.warmup_steps)
    if config.lr_scheduler == "linear":
        return max(0.0, (max_steps - step) / num_steps)
    return (1 + math.cos(math.pi * (step - config.warmup_steps) / num_steps)) / 2


def prepare_sharding(model: LoTLIPModel, objective: nn.Module, accelerator: Accelerator) -> None:
    """
    Completes the settings of FSDP from the model, so that `accelerate launch --use_fsdp --fsdp_version 2` needs no
    others. Without FSDP it does nothing.

    - Every transformer layer of both towers is gathered by itself, unless other units were asked for.
    - FSDP takes no scalar parameters: they stay whole on every process, and the objective averages their gradients.
    - Gradients are averaged in float32, also where the layers compute in bfloat16.
    - Each process has loaded the weights by itself; they are not sent around.
    - A checkpoint's state is in whole files, which the first process writes and reads.

    To be called before `accelerator.prepare`, and after the optimiser is made.

    Args:
        model: The model.
        objective: If it has a parameter, the model holds it from now on too, for FSDP's checkpoints name the
            optimiser's state by the model's parameters.
        accelerator: Its `state.fsdp_plugin` is changed.

    Raises:
        ValueError: on what does not work: DeepSpeed, whose checkpoints are unpickled, Megatron-LM, FSDP1, parameters
            kept on the CPU, and older libraries.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported: start with `accelerate launch --use_fsdp "
            "--fsdp_version 2`."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    for library, version in (("torch", "2.7"), ("accelerate", "1.15")):
        if compare_versions(library, "<", version):
            raise ValueError(f"FSDP needs {library} {version} or newer.")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("Of FSDP it has to be version 2: start with `accelerate launch --use_fsdp --fsdp_version 2`.")
    if type(plugin.cpu_offload) is not OffloadPolicy:
        raise ValueError("Parameters cannot be kept on the CPU: leave out `--fsdp_offload_params`.")
    if plugin.auto_wrap_policy is None or (
        plugin.auto_wrap_policy is transformer_auto_wrap_policy and not plugin.transformer_cls_names_to_wrap
    ):
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
    for name, parameter in objective.named_parameters():
        model.register_parameter(name, parameter)
    scalars = nn.ParameterList(parameter for parameter in model.parameters() if parameter.dim() == 0)
    plugin.ignored_modules = [scalars.to(accelerator.device)]
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )
    plugin.cpu_ram_efficient_loading = False
    # torch reads the shards of a checkpoint by unpickling them
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
