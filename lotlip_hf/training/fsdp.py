"""Weights, gradients and the optimiser's state split over the processes: FSDP2."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions
from torch import nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.modeling_lotlip import LoTLIPModel

OBJECTIVE = "objective"  # where the model holds it


def prepare_sharding(model: LoTLIPModel, objective: nn.Module, accelerator: Accelerator) -> None:
    """
    Completes the settings of FSDP for `accelerate launch --use_fsdp --fsdp_version 2`; without FSDP it does nothing.
    Call it after the optimiser is made and before `accelerator.prepare`.

    - Every transformer layer is a unit of its own, unless `accelerate` was given others.
    - Scalar parameters stay whole on every process, and those of the objective, which averages their gradients.
    - The model holds the objective too, for checkpoints name the optimiser's state by the model's parameters.
    - Gradients are averaged in float32, also if the layers compute in bfloat16.
    - Each process loads the weights by itself. The first one writes and reads the state, in whole files.

    Raises:
        ValueError: on DeepSpeed, whose checkpoints are unpickled, Megatron-LM, FSDP1, CPU offload and older libraries.
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
    model.add_module(OBJECTIVE, objective)
    scalars = nn.ParameterList(parameter for parameter in model.parameters() if parameter.dim() == 0)
    plugin.ignored_modules = [scalars.to(accelerator.device), objective]
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )
    plugin.cpu_ram_efficient_loading = False
    # torch reads the shards of a checkpoint by unpickling them
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")


def keep_class_name(model: nn.Module) -> None:
    """Names the class that FSDP2 made of the model's as before: `save_pretrained` copies the code of its module."""
    if isinstance(model, FSDPModule):
        type(model).__module__, type(model).__name__ = LoTLIPModel.__module__, LoTLIPModel.__name__
