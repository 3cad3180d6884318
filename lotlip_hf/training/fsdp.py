"""FSDP2: shards weights, gradients and the optimiser's state over the processes."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions
from torch import nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.modeling_lotlip import LoTLIPModel

OBJECTIVE = "objective"  # name of the objective as a module of the model


def prepare_sharding(model: LoTLIPModel, objective: nn.Module, accelerator: Accelerator) -> None:
    """
    Completes the settings of FSDP for `accelerate launch --use_fsdp --fsdp_version 2`. Without FSDP it does nothing.
    Call it after creating the optimiser and before `accelerator.prepare`.

    - Every transformer layer is one unit of FSDP, unless `accelerate launch` names other layers.
    - Scalar parameters and the parameters of the objective are not sharded.
    - The objective becomes a module of the model, because checkpoints name the optimiser's state by the parameters of
      the model.
    - Gradients are averaged in float32, also if the layers compute in bfloat16.
    - Every process loads the weights. The first process writes and reads the state in unsharded files.

    Raises:
        `ValueError`: If the run uses DeepSpeed (which unpickles checkpoints), Megatron-LM, FSDP1, CPU offload or old
            libraries.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} is not supported. Launch with `accelerate launch --use_fsdp "
            "--fsdp_version 2`."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    for library, version in (("torch", "2.7"), ("accelerate", "1.15")):
        if compare_versions(library, "<", version):
            raise ValueError(f"FSDP needs {library} {version} or newer. Run `pip install -U {library}`.")
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP1 is not supported. Launch with `accelerate launch --use_fsdp --fsdp_version 2`.")
    if type(plugin.cpu_offload) is not OffloadPolicy:
        raise ValueError("CPU offload is not supported. Remove `--fsdp_offload_params`.")
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
    # torch would unpickle a sharded checkpoint.
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")


def keep_class_name(model: nn.Module) -> None:
    """Restores the class name that FSDP2 changed, because `save_pretrained` copies the code of the class's module."""
    if isinstance(model, FSDPModule):
        type(model).__module__, type(model).__name__ = LoTLIPModel.__module__, LoTLIPModel.__name__
