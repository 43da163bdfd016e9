"""Batches prepared in order, by this process or by workers, without a draw from the global random generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from training.interruption import ignore_signals

KeyT = TypeVar("KeyT")
Batch = dict[str, torch.Tensor]


class _BatchLoader(Dataset[Batch | Exception]):
    """Lets a `DataLoader` (and its workers) turn keys into a batch, or into the error that says why not.

    A `DataLoader` would turn a worker's error into many lines, in which the one that names the file is hard to find.
    """

    def __init__(self, load_batch: Callable[[Any], Batch]) -> None:
        self._load_batch = load_batch

    def __getitem__(self, keys: Any) -> Batch | Exception:
        try:
            return self._load_batch(keys)
        except (ValueError, FileNotFoundError) as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def load_batches(
    load_batch: Callable[[Sequence[KeyT]], Batch],
    sampler: Sampler[list[KeyT]] | Sequence[Sequence[KeyT]],
    num_workers: int,
    pin_memory: bool,
    seed: int = 0,
) -> Iterator[Batch]:
    """`load_batch` of each list of keys, in the order of `sampler`. Raises what `load_batch` raises."""
    loader = DataLoader(
        _BatchLoader(load_batch),
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # load_batch is a closure, which does not pickle
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        # of its own, since a DataLoader draws from the global generator otherwise, which a resumed run would do once
        # more than a straight one
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=lambda _: ignore_signals(),
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch
