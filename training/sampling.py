"""Which sample is seen when: a pure function of (number of samples, seed, position), sharded over processes.

The samples of all epochs form one endless stream: the permutation of epoch 0, then that of epoch 1, and so on. Step
`s` takes the next `global_batch_size` samples of it. So every batch is full, every sample is seen exactly once an
epoch, nothing is dropped at an epoch's end, all processes have the same amount of work, and to resume at step `s` is to
start reading at position `s * global_batch_size`. A batch may hold the end of one epoch and the beginning of the next.
(Repeated augmentation is the exception to "exactly once", see `BatchPlan.repeats`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import Sampler

ItemT = TypeVar("ItemT")


class SampleKey(NamedTuple):
    """One visit to one sample: what random choices about it (order of turns, flips) are seeded by."""

    epoch: int
    """0 for the first pass over the data."""
    sample: int
    """Position in the dataset."""
    copy: int = 0
    """Which one of the repeated visits within a batch (see `BatchPlan.repeats`)."""

    def seed(self, *parts: int) -> int:
        """Seed of random choices about this visit; `parts` tell runs and purposes apart."""
        # the first visit's does not depend on whether there are others
        return mix_seed(*parts, self.epoch, self.sample, *([self.copy] if self.copy else []))


@lru_cache(maxsize=2)  # a batch straddles two epochs at most, unless the data set is smaller than a batch
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of epoch `epoch`: a permutation of `range(num_samples)`."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(num_samples, generator=generator).tolist()


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers; near-by integers give unrelated seeds (splitmix64 finaliser)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class BatchPlan:
    """How `num_samples` become steps.

    `global_batch_size` samples a step, in micro-batches of `per_device_batch_size` on each of `world_size` processes.
    0 for `per_device_batch_size` stands for the global batch's share of one process. Raises `ValueError` when the
    global batch is not a multiple of what the processes take at once.
    """

    num_samples: int
    global_batch_size: int
    per_device_batch_size: int
    world_size: int
    seed: int
    repeats: int = 1
    """Repeated augmentation (Hoffer et al., arXiv 1901.09335): visits to a sample in a row, each augmented anew.

    As with the release's `RASampler`, an epoch keeps its number of visits and shows as much less of the data: a random
    third of the samples, three times each, for 3.
    """
    order: Callable[[int], Sequence[int]] | None = None
    """Epoch -> the order in which it visits the samples; None: `epoch_permutation`."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError("the training data holds no sample")
        if self.repeats < 1:
            raise ValueError(f"repeated_augmentation must be at least 1, not {self.repeats}")
        if not self.per_device_batch_size:
            object.__setattr__(self, "per_device_batch_size", max(1, self.global_batch_size // self.world_size))
        at_once = self.per_device_batch_size * self.world_size
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of per_device_batch_size "
                f"{self.per_device_batch_size} x {self.world_size} process(es) = {at_once}"
            )

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a process adds up for one step."""
        return self.global_batch_size // (self.per_device_batch_size * self.world_size)

    def total_steps(self, num_train_epochs: float, max_steps: int) -> int:
        """`max_steps` if positive, else the steps that cover `num_train_epochs` epochs (rounded up)."""
        if max_steps > 0:
            return max_steps
        # rounded to 9 digits first: 0.1 epochs of 1,000 samples are 100 samples and not 100.00000000000001
        return max(1, math.ceil(round(num_train_epochs * self.num_samples / self.global_batch_size, 9)))

    def epoch_at(self, step: int) -> float:
        """Epochs finished after `step` steps; its whole part is the epoch of the next sample."""
        return step * self.global_batch_size / self.num_samples

    def positions(self, step: int, micro_step: int, rank: int) -> range:
        """Where in the endless stream of samples one process's micro-batch lies."""
        start = step * self.global_batch_size
        start += (micro_step * self.world_size + rank) * self.per_device_batch_size
        return range(start, start + self.per_device_batch_size)

    def keys(self, step: int, micro_step: int, rank: int) -> list[SampleKey]:
        """The samples of one process's micro-batch."""
        return self._keys_at(self.positions(step, micro_step, rank))

    def keys_of_step(self, step: int) -> list[SampleKey]:
        """The samples of a step, those of all processes and micro-batches."""
        start = step * self.global_batch_size
        return self._keys_at(range(start, start + self.global_batch_size))

    def _keys_at(self, positions: range) -> list[SampleKey]:
        keys = []
        for position in positions:
            epoch, offset = divmod(position, self.num_samples)
            number, copy = divmod(offset, self.repeats)
            order = self.order(epoch) if self.order else epoch_permutation(self.num_samples, self.seed, epoch)
            keys.append(SampleKey(epoch, order[number], copy))
        return keys


class StepSampler(Sampler[ItemT]):
    """What one process reads from `first_step` to `total_steps`, an item a micro-batch; samplers are kinds of it.

    For `DataLoader(batch_size=None)`.
    """

    def __init__(self, plan: BatchPlan, first_step: int, total_steps: int, rank: int) -> None:
        self.plan, self.first_step, self.total_steps, self.rank = plan, first_step, total_steps, rank

    def micro_batches(self, step: int) -> int:
        """How many of the items make a step; the same on every process."""
        return self.plan.accumulation_steps


class MicroBatchSampler(StepSampler[list[SampleKey]]):
    """The samples of each micro-batch of one process."""

    def __len__(self) -> int:
        return max(0, self.total_steps - self.first_step) * self.plan.accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in range(self.first_step, self.total_steps):
            for micro_step in range(self.plan.accumulation_steps):
                yield self.plan.keys(step, micro_step, self.rank)
