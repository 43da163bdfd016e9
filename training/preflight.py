"""Preflight: before step 0 of every run, and alone with `--dry_run`, all that could go wrong later is tried once.

It shows what is trained on what, takes micro-batches forward and backward, and looks at the gradient of every part that
is to learn and of every one that is not. It saves the model where the run will, loads it again, compares weights and
logits, and lets the loaded model answer. Nothing of it stays: neither files nor gradients nor a random number drawn.
"""

from __future__ import annotations

import math
import os
import shutil
import time

import torch
from torch import nn

from defocus_mllm.files import PARTIAL_PREFIX
from training.checkpointing import (
    CheckpointError,
    Savable,
    get_random_state,
    load_saved,
    save_final,
    set_random_state,
)
from training.engine import GatheredModel
from training.freezing import FreezePlan
from training.loop import TrainingLoop
from training.memory import describe_memory
from training.stage import Stage

MICRO_BATCHES = 16
"""Taken at most until every part that learns has had a gradient."""


class PreflightError(ValueError):
    """The run would have failed, or learned nothing; the message says what and how to mend it."""


def describe(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> str:
    """The freeze table, the size of the run, its memory and one sample, as printed before step 0."""
    arguments, plan, accelerator = loop.arguments, loop.plan, loop.accelerator
    lines = [
        "",
        f"=== {stage.name} ===",
        freeze.table(),
        f"{plan.num_samples:,} samples, {loop.num_epochs} epoch(s), {loop.total_steps:,} steps "
        f"({loop.warmup_steps} warm-up)",
        f"global batch {plan.global_batch_size} = {plan.per_device_batch_size} a device x {plan.accumulation_steps} "
        f"accumulated x {plan.world_size} process(es)",
        f"{accelerator.device}, mixed precision {arguments.mixed_precision}, {torch.get_num_threads()} thread(s)",
        *describe_memory(loop, stage, freeze),
    ]
    if arguments.gradient_checkpointing:
        lines.append(f"activations are computed a second time in {loop.recomputed}")
    if arguments.torch_compile:
        lines.append("the model is compiled in its first steps, and again for new shapes, which takes minutes")
    if loop.warmup_steps >= loop.total_steps:
        lines.append("warning: the warm-up is as long as the run, so learning_rate is reached at its end or not at all")
    if plan.num_samples < plan.global_batch_size:
        lines.append("warning: fewer samples than a global batch: each step sees samples more than once")
    if stage.describe_plan:
        lines.append(stage.describe_plan(plan, loop.total_steps))
    if stage.sample_text:
        lines += ["one sample as it is trained on:", stage.sample_text]
    return "\n".join([*lines, ""])


def rehearse(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> str:
    """Do everything once that the run will do, on every process; returns what came of it.

    Raises `PreflightError`, `CheckpointError`, or what loading data and saving raise.
    """
    began = time.perf_counter()
    random_state = get_random_state()
    lines = [try_gradients(loop, stage, freeze)]
    savables = loop.savables()
    if loop.accelerator.is_main_process:
        lines.append(try_saving(loop, stage, savables))
    loop.accelerator.wait_for_everyone()
    set_random_state(random_state)
    return "; ".join(lines) + f" ({time.perf_counter() - began:.0f} s)"


def try_gradients(loop: TrainingLoop, stage: Stage, freeze: FreezePlan) -> str:
    """A forward and backward pass: loss and gradients finite, none missing where something learns, none elsewhere.

    Raises `PreflightError` naming the component or the parameter.
    """
    loss, norms = loop.rehearse(MICRO_BATCHES)
    rows = [row for row in freeze.rows if row["trainable"]]
    names = [row["component"] + (f" ({row['group']})" if row["group"] else "") for row in rows]
    try:
        if not math.isfinite(loss):
            raise PreflightError(
                f"{stage.name}: the loss of the first batch is {loss}; the weights or the data are not finite"
            )
        for name, norm in zip(names, norms, strict=True) if norms is not None else ():
            _check_norm(stage.name, name, norm)
        _check_frozen(stage.model, freeze)
    finally:
        loop.engine.drop_gradients()
    if norms is None:
        return f"loss {loss:.4f}; gradients are DeepSpeed's own and were not looked at"
    shown = ", ".join(f"{name} {norm:.3g}" for name, norm in zip(names, norms, strict=True))
    return f"loss {loss:.4f}, gradient norm {math.hypot(*norms):.4f} ({shown}), none in what is frozen"


def _check_norm(stage: str, name: str, norm: float) -> None:
    if not math.isfinite(norm):
        raise PreflightError(f"{stage}: the gradient of {name} is {norm} in the first batch")
    if norm == 0:
        raise PreflightError(
            f"{stage}: {name} is to be trained but gets no gradient from the first {MICRO_BATCHES} micro-batches, so "
            "it would stay as it is; leave it out of `train`, or give data it can learn from"
        )


def _check_frozen(model: nn.Module, freeze: FreezePlan) -> None:
    trained = set(freeze.trainable_names)
    for name, parameter in model.named_parameters():
        if name not in trained and (parameter.requires_grad or parameter.grad is not None):
            raise PreflightError(f"{name} is frozen but has a gradient; it belongs to no component that `train` names")


def try_saving(loop: TrainingLoop, stage: Stage, savables: list[Savable]) -> str:
    """Save the loop's `savables` where the run will save, load, compare weights and logits, generate.

    Raises `CheckpointError` naming the first weight that changes on the way.
    """
    folder = loop.output_dir / f"{PARTIAL_PREFIX}preflight-{os.getpid()}"
    try:
        save_final(folder, savables)
        loaded = load_saved(stage.model, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    gathered = savables[0] if isinstance(savables[0], GatheredModel) else None
    weights = gathered.weights if gathered else stage.model.state_dict()
    _check_weights(stage.name, weights, loaded.state_dict())
    if stage.try_out is None:
        return "saved and loaded with the same weights"
    device = loop.accelerator.device
    stage.model.eval()
    # the precision of the run's own forward passes, which the model being trained has and the loaded one has not
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), loop.accelerator.autocast():
        if gathered or not _fits_twice(device, weights):
            _, text = stage.try_out(loaded.eval())
            return f"saved and loaded with the same weights (no room to compare logits); it answers {text!r}"
        logits, _ = stage.try_out(stage.model)
        again, text = stage.try_out(loaded.to(device).eval())
    logits, again = logits.float(), again.float()
    if not torch.equal(logits, again):
        difference = (logits - again).abs().max().item()
        raise CheckpointError(
            f"{stage.name}: saved and loaded, the model has the same weights but other logits (by {difference:.2g})"
        )
    return f"saved and loaded with the same weights and logits; it answers {text!r}"


def _check_weights(name: str, now: dict[str, torch.Tensor], then: dict[str, torch.Tensor]) -> None:
    if different := sorted(set(now) ^ set(then)):
        raise CheckpointError(f"{name}: {different[0]} is lost or made up when the model is saved and loaded")
    for weight, tensor in now.items():
        if not torch.equal(tensor.cpu(), then[weight].cpu()):
            raise CheckpointError(f"{name}: {weight} changes when the model is saved and loaded")


def _fits_twice(device: torch.device, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the device has room for a second model."""
    if device.type != "cuda":
        return True
    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    return 1.2 * needed < torch.cuda.mem_get_info(device)[0]
