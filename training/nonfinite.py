"""Steps whose loss or gradient norm is not finite: found by all processes alike, skipped, counted, kept for replay.

output_dir/nonfinite/step-000123/
    model.safetensors, config.json, ...   the model before the step (of LoRA its adapter)
    batch-0.safetensors, ...              the micro-batches of each process: "<number>.<name>" -> tensor
    nonfinite.json                        step, loss, gradient norm, what the loss was divided by; written last
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from defocus_mllm.files import explain_write_error, write_json_atomically
from training.batches import Batch
from training.checkpointing import Savable, save_final
from training.engine import NonFiniteLossError

RECORD = "nonfinite.json"


class NonFiniteGuard:
    """Looks at every step before it changes the weights; on a GPU only if steps may be skipped, since it has to wait.

    Args:
        accelerator: whose processes decide together.
        limit: steps in a row that may be skipped.
    """

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        self.accelerator, self.limit = accelerator, limit
        self.looks_at_once = limit > 0 or accelerator.device.type == "cpu"
        self.skipped, self.in_a_row = 0, 0
        self._pending: list[torch.Tensor] = []

    def allows(self, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether the step may be taken, the same on all processes. If not it is counted, and `worst` tells why.

        Args:
            loss: this process's part of it, ().
            norm: of the gradients, ().
        """
        self._pending.append(torch.stack([loss.float(), norm.float()]))
        if not self.looks_at_once:
            return True
        if self.find() is None:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    def find(self) -> int | None:
        """How many of the steps not looked at yet lie from the first that is not finite to the last; None: none is.

        Every process must call it. `worst` is then (loss, gradient norm) of that step.
        """
        if not self._pending:
            return None
        values = torch.stack(self._pending)
        self._pending.clear()
        if self.accelerator.num_processes > 1:  # what is not finite stays so in a sum
            values = self.accelerator.reduce(values, reduction="sum")
            values[:, 1] /= self.accelerator.num_processes
        rows = values.tolist()
        for number, row in enumerate(rows):
            if not all(map(math.isfinite, row)):
                self.worst = (row[0], row[1])
                return len(rows) - number
        return None

    def error(self, stage: str, step: int, more: str) -> NonFiniteLossError:
        """What to raise about the step after `step`, which `worst` is of; `more` is added to the message."""
        loss, norm = self.worst
        return NonFiniteLossError(
            f"{stage}: loss {loss} and gradient norm {norm} at step {step + 1}; lower learning_rate or raise "
            f"warmup_ratio, and start again in a new output_dir{more}"
        )

    @property
    def exhausted(self) -> bool:
        """Whether more steps in a row were not finite than may be skipped."""
        return self.in_a_row > self.limit

    def state(self) -> list[int]:
        """For a checkpoint."""
        return [self.skipped, self.in_a_row]

    def restore(self, state: Sequence[int]) -> None:
        """Undo of `state`."""
        self.skipped, self.in_a_row = state


def keep_for_replay(
    folder: Path,
    accelerator: Accelerator,
    savables: Sequence[Savable],
    micro_batches: Sequence[Batch],
    counts: Sequence[int],
    record: dict[str, Any],
) -> None:
    """Write `folder`, which `python -m training.replay` reads. Every process must call it.

    Args:
        savables: the model and what belongs to it.
        micro_batches: of this process, on the CPU.
        counts: supervised items of each.
        record: what else `nonfinite.json` is to hold.
    """
    main = accelerator.is_main_process
    if main:
        (folder / RECORD).unlink(missing_ok=True)
        save_final(folder, savables)
    accelerator.wait_for_everyone()
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, batch in enumerate(micro_batches)
        for name, tensor in batch.items()
    }
    path = folder / f"batch-{accelerator.process_index}.safetensors"
    try:
        save_file(tensors, path, {"counts": json.dumps(list(counts))})
    except Exception as error:
        raise explain_write_error(error, path) from error
    accelerator.wait_for_everyone()
    if main:
        write_json_atomically(folder / RECORD, {**record, "world_size": accelerator.num_processes})
