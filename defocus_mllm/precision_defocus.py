"""What stays in float32 when a model is made 16 bits wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .card_defocus import DefocusCardModel


class DefocusFloat32Model(DefocusCardModel):
    """A model of which `_keep_in_fp32_modules_strict` holds for `.to(dtype)`, `.bfloat16()` and `.half()` as well.

    Transformers heeds it in `from_pretrained` only. A cast to 16 bits leaves the parameters and buffers it names at
    the precision they have, and takes them to the device.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept: set[int] = set()
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not set(self._keep_in_fp32_modules_strict or ()).isdisjoint(name.split(".")):
                kept |= {id(tensor), id(tensor.grad)}  # both are given to `fn`

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            narrows = id(tensor) in kept and applied.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(applied.device) if narrows else applied

        return super()._apply(apply, recurse)
