"""Other values for a model's parameters, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


@contextlib.contextmanager
def exchanged(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """`parameters` hold `values` inside (or stay as they are if there are none), and come back bit for bit."""
    kept = [parameter.detach().clone() for parameter in parameters] if values else []
    try:
        copy_into(parameters, values)
        yield
    finally:
        copy_into(parameters, kept)


def copy_into(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Overwrite the parameters; no values change nothing."""
    if values:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
