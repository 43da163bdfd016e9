"""Model and optimizer as the launch asked for them: whole (one process, DDP) or as shards (FSDP2).

The loop and the checkpoints need not know which. What leaves this module, for a checkpoint, is whole.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from training.arguments import CommonArguments
from training.averaging import copy_into, exchanged
from training.checkpointing import Savable, load_model_weights
from training.sharding import forget_gathered, gather, layer_classes, shard_like, whole


class NonFiniteLossError(ValueError):
    """Loss or gradient norm became NaN or infinite; nothing was saved after the step named in the message."""


class Engine:
    """Prepares a model and its AdamW, and does with them what depends on how processes share them.

    Args:
        accelerator: devices and processes.
        model: stays the same object; FSDP2 exchanges its parameters for shards.
        groups: the optimizer's parameter groups.
        arguments: the run's arguments.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, groups: list[dict[str, Any]], arguments: CommonArguments
    ) -> None:
        self.accelerator, self.module = accelerator, model
        self.sharded = accelerator.is_fsdp2
        if not self.sharded:  # FSDP2 moves layer by layer, since the whole may not fit a device
            model.to(accelerator.device)
        else:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(model)
            # of image tokens among the outputs, which nobody here changes in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        optimizer = torch.optim.AdamW(groups, arguments.learning_rate, betas, arguments.adam_epsilon, fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        if accelerator.device.type == "cpu":
            for module in model.modules():
                if isinstance(module, FSDPModule):  # gloo can add, but not average
                    module.set_force_sum_reduction_for_comms(True)
        # Accelerate runs DDP's forward pass in mixed precision, but leaves FSDP2's to a policy that rounds weights
        # before the layers see them, also those that must be in float32 whatever the precision.
        self.mixed = self.sharded and arguments.mixed_precision == "bf16"

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; gradients are shared in the last of a step.

        Shards of gradients are added up each time: whole ones would need the memory that FSDP2 is there to save.
        """
        shared = contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(self.model)
        with shared, torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.mixed):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the sum of `loss` over processes; they are averaged where a sum is needed."""
        processes = self.accelerator.num_processes
        self.accelerator.backward(loss * processes if processes > 1 else loss)

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradients down to the norm `limit` (0: leave them); returns their norm before."""
        return whole(torch.nn.utils.clip_grad_norm_(self.parameters, limit or math.inf, foreach=True))

    def gradient_norms(self) -> list[float] | None:
        """Of each of the optimizer's groups, before they are added up over processes that do not share them yet.

        None where they cannot be looked at.
        """
        norms = torch.zeros(len(self.optimizer.param_groups), device=self.accelerator.device)
        for number, group in enumerate(self.optimizer.param_groups):
            if gradients := [parameter.grad for parameter in group["params"] if parameter.grad is not None]:
                norms[number] = whole(torch.nn.utils.get_total_norm(gradients))
        return self.accelerator.reduce(norms, reduction="mean").tolist()

    def step(self, norm: torch.Tensor) -> torch.Tensor:
        """Change the weights and drop the gradients, whose norm `clip` told to be `norm`; returns that norm."""
        self.optimizer.step()
        self.drop_gradients()
        return norm

    def drop_gradients(self) -> None:
        """Forget the gradients of a finished backward pass."""
        self.optimizer.zero_grad(set_to_none=True)

    def copy_parameters(self) -> list[torch.Tensor]:
        """The trained parameters as they are now."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def assign(self, values: Sequence[torch.Tensor]) -> None:
        """Overwrite the trained parameters, as `copy_parameters` gave them; no values change nothing."""
        copy_into(self.parameters, values)
        forget_gathered(self.module)

    @contextlib.contextmanager
    def assigned(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Like `assign`, inside only."""
        with exchanged(self.parameters, values):
            forget_gathered(self.module)
            yield
        forget_gathered(self.module)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def savable(self, writer: Savable | None = None) -> Savable:
        """The model, to be saved whole by the main process: by `writer`, or by itself. Every process must call this."""
        if not self.sharded:
            return writer or self.module  # type: ignore[return-value]
        return GatheredModel(writer or self.module, gather(self.module.state_dict(keep_vars=True), self._is_main))

    def optimizer_state(self) -> dict[str, Any]:
        """What `load` takes, whole on the main process. Every process must call this."""
        return gather(self.optimizer.state_dict(), self._is_main)

    def gathered(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`values`, as `copy_parameters` gave them, whole on the main process. Every process must call this."""
        return gather(list(values), self._is_main)

    def load(self, directory: Path, optimizer_state: dict[str, Any]) -> None:
        """Take weights from the checkpoint in `directory` and the optimizer's state from `optimizer_state`."""
        load_model_weights(self.module, directory)
        for number, moments in optimizer_state["state"].items():
            parameter = self.parameters[number]
            for name, value in moments.items():
                if value.shape == parameter.shape:  # not the number of steps
                    moments[name] = shard_like(value, parameter)
        # the arguments' groups: DeepSpeed's checkpoints have none
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer_state["state"], "param_groups": groups})

    def load_average(self, average: Sequence[torch.Tensor], saved: Sequence[torch.Tensor]) -> None:
        """Overwrite `average`, which `copy_parameters` made, by `saved`, which `gathered` made."""
        for mine, value in zip(average, saved, strict=True):
            mine.copy_(shard_like(value, mine))

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process


class GatheredModel:
    """A shared model with its whole weights beside it, which only the main process has."""

    def __init__(self, model: Any, weights: dict[str, Any]) -> None:
        self.model, self.weights = model, weights

    def save_pretrained(self, save_directory: Any, /) -> None:
        """Write the model as if it had never been sharded."""
        self.model.save_pretrained(save_directory, state_dict=self.weights)


def make_engine(
    accelerator: Accelerator, model: nn.Module, groups: list[dict[str, Any]], arguments: CommonArguments
) -> Engine:
    """The engine for the way the launch asked for; see `Engine` for the arguments."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from training.deepspeed_engine import DeepSpeedEngine  # needs deepspeed, which nothing else does

        return DeepSpeedEngine(accelerator, model, groups, arguments)
    return Engine(accelerator, model, groups, arguments)
