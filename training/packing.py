"""Which samples share a row: the samples of one step, packed into rows of equal load for every process.

A step learns from the same `global_batch_size` samples as without packing, so its loss, the number of steps and the
schedule stay what they were; only the rows are fewer and full. The rows are a pure function of the samples' lengths and
the step: nothing is carried from one step to the next, and to resume is to begin at another step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from training.sampling import BatchPlan, SampleKey, StepSampler

Rows = list[list[SampleKey]]
"""The samples of each row of a micro-batch."""


def pack_rows(lengths: Sequence[int], budget: int, multiple: int = 1) -> list[list[int]]:
    """Put every sample into one of as few rows as this takes, all rows about equally long.

    Longest first, each sample goes to the shortest row; if it does not fit there, there must be more rows.

    Args:
        lengths: tokens of each sample.
        budget: tokens that a row holds.
        multiple: the number of rows is a multiple of this, and no row is empty; `lengths` must be one too.

    Returns:
        Positions in `lengths`, row by row, the longest row first.

    Raises:
        ValueError: a sample is longer than a row, or the samples cannot be shared out.
    """
    if not lengths or len(lengths) % multiple:
        raise ValueError(f"{len(lengths)} samples cannot be shared out evenly to {multiple} process(es)")
    if max(lengths) > budget:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit a row of max_length {budget}")
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    fewest = -(-max(1, sum(lengths)) // (budget * multiple)) * multiple
    for count in range(fewest, len(lengths), multiple):
        rows = _fill(longest_first, lengths, budget, count)
        if rows is not None:
            return rows
    return [[position] for position in longest_first]


def _fill(order: Sequence[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """`count` rows, the longest first; None if the samples do not fit into so few this way."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]  # a heap: the shortest row stands first
    for position in order:
        load, row = loads[0]
        if load + lengths[position] > budget:
            return None
        rows[row].append(position)
        heapq.heapreplace(loads, (load + lengths[position], row))
    return [sorted(rows[row]) for _, row in sorted(loads, key=lambda entry: (-entry[0], entry[1]))]


def share_out(rows: Sequence[Sequence[int]], world_size: int, at_once: int) -> list[list[list[Sequence[int]]]]:
    """Rows, the longest first, as micro-batches: [micro-batch][process][row].

    Every process has the same number of micro-batches, each with the same number of rows, of about the same length.

    Args:
        rows: a multiple of `world_size`.
        at_once: rows that a process takes at once, at most.
    """
    per_process = len(rows) // world_size
    count = -(-per_process // at_once)
    shared, begin = [], 0
    for number in range(count):
        size = per_process // count + (number < per_process % count)
        part = rows[begin : begin + size * world_size]
        shared.append([list(part[rank::world_size]) for rank in range(world_size)])
        begin += size * world_size
    return shared


class PackedSampler(StepSampler[Rows]):
    """The micro-batches of one process, each a list of rows of samples, as `MicroBatchSampler` gives samples.

    Args:
        length: tokens of the sample that a key stands for.
        max_length: tokens that a row holds.
        plan: its `per_device_batch_size` is the number of rows that a process takes at once, at most.
        first_step, total_steps, rank: as for `MicroBatchSampler`.
    """

    def __init__(
        self,
        length: Callable[[SampleKey], int],
        max_length: int,
        plan: BatchPlan,
        first_step: int,
        total_steps: int,
        rank: int,
    ) -> None:
        super().__init__(plan, first_step, total_steps, rank)
        self.length, self.max_length = length, max_length
        # workers read ahead of the step being taken, which asks for its number of micro-batches
        self.rows_of_step = lru_cache(maxsize=64)(self._rows_of_step)

    def _rows_of_step(self, step: int) -> list[list[Rows]]:
        """The step's rows as [micro-batch][process][row]."""
        plan = self.plan
        keys = plan.keys_of_step(step)
        rows = pack_rows([self.length(key) for key in keys], self.max_length, plan.world_size)
        shared = share_out(rows, plan.world_size, plan.per_device_batch_size)
        return [[[[keys[position] for position in row] for row in part] for part in parts] for parts in shared]

    def micro_batches(self, step: int) -> int:
        """How many micro-batches make the step; the same on every process."""
        return len(self.rows_of_step(step))

    def __iter__(self) -> Iterator[Rows]:
        for step in range(self.first_step, self.total_steps):
            for parts in self.rows_of_step(step):
                yield parts[self.rank]
