"""How many tokens of a run are padding: told before it starts, from the lengths of its samples alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from training.packing import PackedSampler
from training.sampling import BatchPlan, SampleKey

MOST_STEPS = 1_000
"""Steps that are looked at; more would tell nothing new."""


def padding_share(micro_batches: Iterable[Sequence[int]]) -> float:
    """Share of all tokens that are padding, 0 to 1, where the rows of a micro-batch are as long as its longest one.

    Args:
        micro_batches: tokens of each row, micro-batch by micro-batch.
    """
    used = padded = 0
    for rows in micro_batches:
        used += sum(rows)
        padded += len(rows) * max(rows)
    return 1 - used / padded


def padded_rows(plan: BatchPlan, steps: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Lengths of the rows of each micro-batch of all processes, a sample a row."""
    for step in range(steps):
        for micro_step in range(plan.accumulation_steps):
            for rank in range(plan.world_size):
                yield [lengths[key.sample] for key in plan.keys(step, micro_step, rank)]


def packed_rows(sampler: PackedSampler, steps: int, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Lengths of the rows of each micro-batch of all processes, as `sampler` packs them."""
    for step in range(steps):
        for parts in sampler.rows_of_step(step):
            for rows in parts:
                yield [sum(lengths[key.sample] for key in row) for row in rows]


def describe_packing(plan: BatchPlan, total_steps: int, lengths: Sequence[int], max_length: int) -> str:
    """What packing does to padding and to the number of rows of a step."""
    steps = min(total_steps, MOST_STEPS)

    def length(key: SampleKey) -> int:
        return lengths[key.sample]

    packed = list(packed_rows(PackedSampler(length, max_length, plan, 0, steps, 0), steps, lengths))
    rows = sum(map(len, packed)) / steps
    before = padding_share(padded_rows(plan, steps, lengths))
    return (
        f"packed to {max_length} tokens a row: {rows:.1f} rows hold the {plan.global_batch_size} samples of a step "
        f"(at most {plan.per_device_batch_size} rows at once on a device), and {padding_share(packed):.1%} of the "
        f"tokens are padding ({before:.1%} with a sample a row)"
    )


def describe_grouping(plan: BatchPlan, total_steps: int, lengths: Sequence[int], group_by: str) -> str:
    """What grouping does to padding; `plan` has the grouped order."""
    steps = min(total_steps, MOST_STEPS)
    after = padding_share(padded_rows(plan, steps, lengths))
    before = padding_share(padded_rows(replace(plan, order=None), steps, lengths))
    text = f"grouped by {group_by}: {after:.1%} of the tokens are padding ({before:.1%} in random order)"
    if after >= before > 0:
        text += "; warning: grouping gains nothing here"
    return text
