"""Weights, gradients and the optimiser's state split over the processes: FSDP2."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions
from torch import nn
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.modeling_lotlip import LoTLIPModel


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
