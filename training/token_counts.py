"""How much of what a run reads is padding: counted batch by batch, summed over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator

from training.batches import Batch


class TokenCounts:
    """Tokens that this process has read since the last `reset`, and how many of them are padding."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2, dtype=torch.long)

    def add(self, batches: Iterable[Batch]) -> None:
        """Count batches on the CPU; those without an `attention_mask` have no padding that could be seen."""
        for batch in batches:
            if (mask := batch.get("attention_mask")) is not None:
                self._counts += torch.tensor([mask.numel(), mask.numel() - int(mask.sum())])

    def over_processes(self, accelerator: Accelerator) -> list[int]:
        """[tokens, padding] of all processes; every process must call it."""
        return accelerator.reduce(self._counts.to(accelerator.device), reduction="sum").tolist()

    def padding_share(self, accelerator: Accelerator) -> float:
        """Share of padding over all processes, 0 to 1; every process must call it."""
        tokens, padding = self.over_processes(accelerator)
        return round(padding / max(1, tokens), 6)

    def reset(self, counts: Sequence[int] = (0, 0)) -> None:
        """Begin again, from `counts`."""
        self._counts = torch.tensor(counts, dtype=torch.long)
