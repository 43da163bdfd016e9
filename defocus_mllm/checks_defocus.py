"""Checks of what tensors hold, which torch.compile keeps in its graph instead of breaking it there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.utils import torch_compilable_check


def check_all(condition: torch.Tensor, rule: str, found: Callable[[], str] | None = None) -> None:
    """Raise unless `condition`, a tensor of truth values, holds throughout.

    Args:
        rule: what must hold; all that a compiled model, which cannot put numbers into text, has to say.
        found: what was found instead, put before the rule.

    Raises:
        ValueError: it does not hold. A compiled model raises RuntimeError; on a GPU, where it does not wait for the
            answer, the error comes with a later operation.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), rule)
    else:
        torch_compilable_check(condition, lambda: f"{found()}; {rule}" if found else rule)
