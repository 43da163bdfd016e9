"""Look at a step that ended a run because its loss or gradient was not finite.

    python -m training.replay OUTPUT_DIR/nonfinite/step-000123 [--cpu true]

Loads the model as it was before the step and the micro-batches of all processes, takes each forward and backward, and
prints its loss, its gradient norm, the first module whose output is not finite and the first parameter whose gradient
is not. Nothing is drawn at random: without dropout and drop path, which the run may have had.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
)

from defocus_mllm import DefocusCLIPModel
from defocus_mllm.adapters import load_adapter
from defocus_mllm.console import run_script
from defocus_mllm.loading import holds_adapter, load_strictly
from training.argument_parsing import parse_arguments
from training.arguments import require
from training.batches import Batch
from training.multimodal import answer_loss
from training.nonfinite import RECORD

MODELS: dict[str, Any] = {
    "stage0_contrastive": DefocusCLIPModel,
    "stage0_language": AutoModelForCausalLM,
    "stage0_vision": AutoModelForImageClassification,
    "stage1": AutoModelForImageTextToText,
    "stage2": AutoModelForImageTextToText,
}


@dataclass
class ReplayArguments:
    """What `python -m training.replay` takes beside the folder."""

    step: str = ""
    """Folder that a run left behind, OUTPUT_DIR/nonfinite/step-<number>; may be given without its name, first."""
    cpu: bool = False
    """Stay on the CPU even if there is a GPU."""

    def __post_init__(self) -> None:
        require(bool(self.step), "step: required, a folder such as OUTPUT_DIR/nonfinite/step-000123")


def main(argv: Sequence[str] | None = None) -> None:
    """Replay and print."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--step")
    arguments = parse_arguments(ReplayArguments, "replay", words)
    folder = Path(arguments.step)
    record = read_record(folder)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    model = load_model(folder, record["stage"]).to(device).eval()
    print(f"{record['stage']}, step {record['step']}: loss {record['loss']}, gradient norm {record['gradient_norm']}")
    total = 0.0
    for rank in range(record["world_size"]):
        for number, (batch, count) in enumerate(read_batches(folder / f"batch-{rank}.safetensors")):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            loss, line = replay(model, record, batch, count)
            total += loss
            print(f"process {rank}, micro-batch {number}: {line}")
    print(f"loss {total}")


def read_record(folder: Path) -> dict[str, Any]:
    """Content of `nonfinite.json`. Raises `FileNotFoundError` or `ValueError` naming the folder."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds no {RECORD}; give a folder such as OUTPUT_DIR/nonfinite/step-000123"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is not valid JSON: {error}") from error
    if record.get("stage") not in MODELS:
        raise ValueError(f"{folder / RECORD}: unknown stage {record.get('stage')!r}")
    return record


def load_model(folder: Path, stage: str) -> nn.Module:
    """The model kept in `folder`, with its adapter if it had one. Raises what loading a checkpoint raises."""
    model = load_adapter(folder, trainable=True) if holds_adapter(folder) else load_strictly(MODELS[stage], folder)
    assert isinstance(model, nn.Module)
    return model


def read_batches(path: Path) -> list[tuple[Batch, int]]:
    """Micro-batches of one process, in order, each with its number of supervised items. Raises `ValueError`."""
    try:
        with safe_open(path, "pt") as file:
            counts = json.loads(file.metadata()["counts"])
            batches: list[Batch] = [{} for _ in counts]
            for key in file.keys():  # noqa: SIM118  (not a dictionary)
                number, _, name = key.partition(".")
                batches[int(number)][name] = file.get_tensor(key)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    return list(zip(batches, counts, strict=True))


def replay(model: Any, record: dict[str, Any], batch: Batch, count: int) -> tuple[float, str]:
    """One micro-batch forward and backward: its part of the step's loss, and a line about it."""
    found: list[str] = []
    hooks = [module.register_forward_hook(_watcher(name, found)) for name, module in model.named_modules()]
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device.type
    try:
        with torch.autocast(device, torch.bfloat16, enabled=record["mixed_precision"] == "bf16"):
            loss = compute_loss(model, record, batch, count)
    finally:
        for hook in hooks:
            hook.remove()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    weights = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    line = f"{count} supervised items, loss {loss.item()}, gradient norm {norm}"
    for what, names in (("weights", weights), ("the output of", found), ("the gradient of", bad)):
        if names:
            line += f"; not finite: {what} {names[0]} (and {len(names) - 1} more)"
    return (loss.item() if math.isfinite(loss.item()) else math.nan), line


def compute_loss(model: Any, record: dict[str, Any], batch: Batch, count: int) -> torch.Tensor:
    """The micro-batch's part of the step's loss, as the stage computes it."""
    stage, items = record["stage"], record["items"]
    if stage in ("stage1", "stage2"):
        return answer_loss(model)(model, batch, items)
    if stage == "stage0_language":
        return model(**batch, num_items_in_batch=items, use_cache=False).loss
    options = {"return_loss": True, "use_cache": False} if stage == "stage0_contrastive" else {}
    return model(**batch, **options).loss * (count / items)


def _watcher(name: str, found: list[str]) -> Any:
    """A forward hook that notes `name` when the module's output is not finite."""

    def look(module: nn.Module, given: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, torch.Tensor) else []
        if isinstance(output, tuple):
            tensors = [value for value in output if isinstance(value, torch.Tensor)]
        if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in tensors):
            found.append(name)

    return look


if __name__ == "__main__":
    run_script(main)
