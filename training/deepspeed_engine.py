"""DeepSpeed's ZeRO stages 2 and 3 behind the interface of `Engine`; imported only where a launch asks for them.

DeepSpeed clips and steps by itself and keeps weights, gradients and moments in flat partitions of its own. They go in
and out through its functions for whole tensors, so that its checkpoints are the same as those of the other engines: a
run begun with DDP may go on with ZeRO and the other way round.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from training.arguments import CommonArguments
from training.checkpointing import Savable, load_saved
from training.engine import Engine, GatheredModel, NonFiniteLossError

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(Engine):
    """See `Engine`. Raises `ValueError` for an average of the weights, which partitions leave no place for."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, groups: list[dict[str, Any]], arguments: CommonArguments
    ) -> None:
        if arguments.ema_decay > 0:
            raise ValueError(
                "ema_decay: not with DeepSpeed; take training/accelerate_configs/fsdp2.yaml, or set it to 0"
            )
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,  # only counted with; the loop forms the batches
            gradient_accumulation_steps=1,
            gradient_clipping=arguments.max_grad_norm,
            # weights, gradients and what is sent stay in float32, as with the other engines
            bf16={"enabled": False},
            torch_autocast={
                "enabled": arguments.mixed_precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        )
        self.stage = accelerator.state.deepspeed_plugin.zero_stage
        # no rate yet: the step that makes the moments must not decay a weight
        super().__init__(accelerator, model, [{**group, "lr": 0.0} for group in groups], arguments)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self._make_moments()

    def _make_moments(self) -> None:
        """By a step without gradients. DeepSpeed makes them in its first one, too late to load a checkpoint."""
        zero = self.optimizer.optimizer
        partitions = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for number, partition in enumerate(partitions):
            partition.grad = torch.zeros_like(partition)
            if self.stage == 3:
                zero._optimizer_step(number)
        if self.stage < 3:
            zero.optimizer.step()
            zero._lazy_init_hp_params_optimizer_state()
        for partition in partitions:
            partition.grad = None
        self._set_steps(0.0)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch."""
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the sum of `loss` over processes."""
        self.model.backward(loss * self.accelerator.num_processes)

    def clip(self, limit: float) -> torch.Tensor:
        """Nothing yet: DeepSpeed clips in its step, which also tells the norm."""
        return torch.zeros((), device=self.accelerator.device)

    def step(self, norm: torch.Tensor) -> torch.Tensor:
        """Clip, change the weights and drop the gradients. Raises `NonFiniteLossError` after the fact."""
        self.model.step()
        norm = torch.as_tensor(self.model.get_global_grad_norm(), dtype=norm.dtype, device=norm.device)
        if not math.isfinite(norm.item()):
            raise NonFiniteLossError(
                f"gradient norm {norm.item()} under DeepSpeed; lower learning_rate, and start again"
            )
        return norm

    def drop_gradients(self) -> None:
        """Forget the gradients of a finished backward pass."""
        self.optimizer.optimizer.zero_grad()

    def gradient_norms(self) -> None:
        """Not known: each process has a part of the gradients, and in places of DeepSpeed's own."""

    def savable(self, writer: Savable | None = None) -> GatheredModel:
        """The model, to be saved whole by the main process: by `writer`, or by itself. Every process must call this."""
        done: dict[int, torch.Tensor | None] = {}
        weights = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if id(tensor) not in done:
                with GatheredParameters([tensor], enabled=_is_partitioned(tensor)):
                    done[id(tensor)] = tensor.detach().cpu().clone() if self._is_main else None
            weights[name] = done[id(tensor)]
        return GatheredModel(writer or self.module, weights)

    def optimizer_state(self) -> dict[str, Any]:
        """As `torch.optim.AdamW` would have it, whole on the main process. Every process must call this."""
        state: dict[int, Any] = {}
        for number, parameter in enumerate(self.parameters):
            state[number] = {"step": torch.tensor(self._steps())}
            for name in MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, name)
                state[number][name] = moment.cpu().clone() if self._is_main else None
        return {"state": state, "param_groups": []}

    def load(self, directory: Path, optimizer_state: dict[str, Any]) -> None:
        """Take weights from the checkpoint in `directory` and the optimizer's state from `optimizer_state`."""
        loaded = load_saved(self.module, directory).state_dict()
        numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            value = loaded[name].to(self.accelerator.device)
            with GatheredParameters([tensor], modifier_rank=0, enabled=_is_partitioned(tensor)), torch.no_grad():
                tensor.copy_(value)
            if id(tensor) in numbers:
                moments = optimizer_state["state"][numbers[id(tensor)]]
                self._set_partitions(tensor, value, {kind: moments[kind].to(value.device) for kind in MOMENTS})
        self._set_steps(float(next(iter(optimizer_state["state"].values()))["step"]))

    def _set_partitions(self, parameter: Any, value: torch.Tensor, moments: dict[str, torch.Tensor]) -> None:
        if not _is_partitioned(parameter):
            safe_set_full_fp32_param(parameter, value)
            for name, moment in moments.items():
                safe_set_full_optimizer_state(parameter, moment, name)
            return
        # the function for whole tensors fails where the last partition is padded
        size = safe_get_local_optimizer_state(parameter, MOMENTS[0]).numel()
        safe_set_local_fp32_param(parameter, self._partition(value, size))
        for name, moment in moments.items():
            safe_set_local_optimizer_state(parameter, self._partition(moment, size), name)

    def _partition(self, value: torch.Tensor, size: int) -> torch.Tensor:
        start = size * self.accelerator.process_index
        mine = value.flatten()[start : start + size]
        return nn.functional.pad(mine, (0, size - mine.numel()))

    def _states(self) -> list[dict[str, Any]]:
        return list(self.optimizer.optimizer.optimizer.state.values())  # Accelerate's, DeepSpeed's and AdamW

    def _steps(self) -> float:
        return float(self._states()[0]["step"])

    def _set_steps(self, steps: float) -> None:
        for state in self._states():
            state["step"].fill_(steps)


def _is_partitioned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")
