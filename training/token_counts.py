"""What a run reads: tokens, padding, tokens to learn, images; counted batch by batch, summed over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator

from training.batches import Batch
from training.stage import count_supervised


class TokenCounts:
    """What this process has read since the last `reset`: tokens, padding among them, supervised ones; and images."""

    def __init__(self) -> None:
        self.reset()

    def add(self, batches: Iterable[Batch]) -> None:
        """Count batches on the CPU; those that are not text with labels (without an `attention_mask`) count nothing."""
        for batch in batches:
            if "labels" in batch and (mask := batch.get("attention_mask")) is not None:
                images = len(batch["pixel_values"]) if "pixel_values" in batch else 0
                padding = mask.numel() - int(mask.sum())
                self._counts += torch.tensor([mask.numel(), padding, count_supervised(batch), images])

    def over_processes(self, accelerator: Accelerator) -> list[int]:
        """[tokens, padding, supervised, images] of all processes; every process must call it."""
        return accelerator.reduce(self._counts.to(accelerator.device), reduction="sum").tolist()

    def describe(
        self, accelerator: Accelerator, steps: int, global_batch_size: int, seconds: float
    ) -> dict[str, float]:
        """What a line of metrics.jsonl says of `steps` steps: samples, tokens to learn, padding (0 to 1), rates.

        Empty where no text was read. Every process must call it.
        """
        tokens, padding, supervised, images = self.over_processes(accelerator)
        if not tokens:
            return {}
        return {
            "samples_per_step": global_batch_size,
            "supervised_tokens_per_step": round(supervised / steps, 2),
            "padding": round(padding / tokens, 6),
            "tokens_per_second": round((tokens - padding) / seconds, 2),
            "images_per_second": round(images / seconds, 2),
        }

    def reset(self, counts: Sequence[int] = (0, 0, 0, 0)) -> None:
        """Begin again, from `counts`."""
        self._counts = torch.tensor(counts, dtype=torch.long)
