"""The processes of a run: as many as were asked for, sharing the model the way they were asked to."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from transformers.integrations import unset_hf_deepspeed_config

from training.arguments import CommonArguments


def make_accelerator(arguments: CommonArguments) -> Accelerator:
    """Devices and processes of a run, from `arguments` and what `accelerate launch` or `torchrun` put in place.

    Raises `ValueError` when there are not `arguments.world_size` processes (if it is set) or when the launch asked for
    something that does not work here.
    """
    deepspeed = _asked_for("ACCELERATE_USE_DEEPSPEED")
    on_cpu = arguments.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        # DeepSpeed chooses the device, and Accelerate finds its processes on CPUs only if told what connects them
        cpu=arguments.cpu and not deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed and on_cpu else [],
        log_with=arguments.report_to or None,
        project_dir=arguments.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop's; a launcher's would scale
    )
    if arguments.world_size and accelerator.num_processes != arguments.world_size:
        raise ValueError(
            f"world_size: {arguments.world_size} processes were asked for, but {accelerator.num_processes} run; start "
            "them with `accelerate launch --config_file training/accelerate_configs/...` or torchrun "
            "(`accelerate launch --cpu --num_processes 2` alone starts one)"
        )
    if deepspeed:
        # Transformers would load models in partitions, which cannot be put together; `DeepSpeedEngine` makes them
        unset_hf_deepspeed_config()
    if _asked_for("ACCELERATE_USE_FSDP"):
        _use_fsdp2(accelerator.state)
    return accelerator


def _use_fsdp2(state: AcceleratorState) -> None:
    """Let Accelerate shard on CPUs too, where it would silently leave the model whole, and never round weights."""
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if not state.is_fsdp2:
        raise ValueError(
            "FSDP was asked for, but "
            + (
                "one process has nothing to share; start several, or none of it"
                if state.num_processes == 1
                else "not its version 2; take training/accelerate_configs/fsdp2.yaml"
            )
        )
    # Its mixed precision rounds weights to bfloat16 before the layers see them, also those that must be in float32
    # whatever the precision. `Engine` computes in mixed precision as DDP does.
    state.fsdp_plugin.mixed_precision_policy = None


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
