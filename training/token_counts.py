"""What a run reads of tokens, of padding and of tokens to learn: counted batch by batch, summed over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator

from training.batches import Batch
from training.stage import count_supervised


class TokenCounts:
    """Tokens that this process has read since the last `reset`: all, padding among them, and supervised ones."""

    def __init__(self) -> None:
        self.reset()

    def add(self, batches: Iterable[Batch]) -> None:
        """Count batches on the CPU; those that are not text with labels (without an `attention_mask`) count nothing."""
        for batch in batches:
            if "labels" in batch and (mask := batch.get("attention_mask")) is not None:
                self._counts += torch.tensor([mask.numel(), mask.numel() - int(mask.sum()), count_supervised(batch)])

    def over_processes(self, accelerator: Accelerator) -> list[int]:
        """[tokens, padding, supervised] of all processes; every process must call it."""
        return accelerator.reduce(self._counts.to(accelerator.device), reduction="sum").tolist()

    def describe(self, accelerator: Accelerator, steps: int, global_batch_size: int) -> dict[str, float]:
        """What a line of metrics.jsonl says of `steps` steps: samples, supervised tokens, share of padding (0 to 1).

        Empty where no text was read. Every process must call it.
        """
        tokens, padding, supervised = self.over_processes(accelerator)
        if not tokens:
            return {}
        return {
            "samples_per_step": global_batch_size,
            "supervised_tokens_per_step": round(supervised / steps, 2),
            "padding": round(padding / tokens, 6),
        }

    def reset(self, counts: Sequence[int] = (0, 0, 0)) -> None:
        """Begin again, from `counts`."""
        self._counts = torch.tensor(counts, dtype=torch.long)
