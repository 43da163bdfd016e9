"""How conversations come together in batches: padded, packed into rows, or grouped by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from training.arguments import MultimodalArguments
from training.batches import Batch
from training.conversations import Conversation
from training.grouping import grouped_order
from training.lengths import Lengths, measure_lengths, unusable
from training.packing import PackedSampler, Rows
from training.padding import describe_grouping, describe_packing
from training.sampling import BatchPlan, MicroBatchSampler, SampleKey, StepSampler
from training.supervision import ConversationCollator


@dataclass(frozen=True)
class Batching:
    """The parts of a `Stage` that decide which conversations share a batch, and a row of it."""

    usable: list[int]
    """Positions in the data set that are trained on."""
    load_batch: Callable[[Any], Batch]
    sampler: Callable[[BatchPlan, int, int, int], StepSampler[Any]]
    describe_plan: Callable[[BatchPlan, int], str] | None
    left_out: list[str]
    """Why conversations are left out that are too long, a message each."""


def choose_batching(
    arguments: MultimodalArguments,
    dataset: Sequence[Conversation],
    usable: Sequence[int],
    collate: ConversationCollator,
) -> Batching:
    """What `packing` and `group_by` ask for.

    Args:
        usable: positions in `dataset` that are trained on.
        collate: makes the batches.

    Raises `ValueError` naming a conversation that does not fit `max_length`, unless such are left out.
    """
    if arguments.packing == "none" and arguments.group_by == "none":
        return Batching(list(usable), _padded(dataset, usable, collate), MicroBatchSampler, None, [])
    # counts of its own: what is measured here is not what is trained on
    measure = ConversationCollator(collate.processor, False, collate.max_turns, collate.max_length, collate.seed)
    lengths = measure_lengths(dataset, measure, arguments.dataloader_num_workers)

    def explain(index: int) -> None:
        try:
            measure.count_tokens(dataset[index])
        except ValueError as error:
            raise ValueError(f"{arguments.data}: {error}") from error

    problems = unusable(lengths, usable, explain, arguments.on_bad_sample)
    kept = [index for index in usable if index not in problems]
    if not kept:
        raise ValueError(f"none of the {len(usable)} samples can be used; the first: {next(iter(problems.values()))}")
    make = _packed if arguments.packing == "pack" else _grouped
    return make(arguments, dataset, kept, collate, lengths, list(problems.values()))


def _padded(
    dataset: Sequence[Conversation], usable: Sequence[int], collate: ConversationCollator
) -> Callable[[Sequence[SampleKey]], Batch]:
    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return collate([dataset[usable[key.sample]] for key in keys], keys)

    return load_batch


def _packed(
    arguments: MultimodalArguments,
    dataset: Sequence[Conversation],
    usable: Sequence[int],
    collate: ConversationCollator,
    lengths: Lengths,
    left_out: list[str],
) -> Batching:
    tokens = [lengths.tokens[index] for index in usable]
    measure = ConversationCollator(
        collate.processor, collate.shuffle_turns, collate.max_turns, collate.max_length, collate.seed
    )

    def length(key: SampleKey) -> int:
        # in another order of turns a conversation may be cut elsewhere, so that its length belongs to the epoch
        return measure.count_tokens(dataset[usable[key.sample]], key) if collate.shuffle_turns else tokens[key.sample]

    def load_batch(rows: Rows) -> Batch:
        return collate.pack([[dataset[usable[key.sample]] for key in row] for row in rows], rows)

    def describe(plan: BatchPlan, total_steps: int) -> str:
        return describe_packing(plan, total_steps, tokens, arguments.max_length)

    sampler = partial(PackedSampler, length, arguments.max_length)
    return Batching(list(usable), load_batch, sampler, describe, left_out)


def _grouped(
    arguments: MultimodalArguments,
    dataset: Sequence[Conversation],
    usable: Sequence[int],
    collate: ConversationCollator,
    lengths: Lengths,
    left_out: list[str],
) -> Batching:
    tokens = [lengths.tokens[index] for index in usable]
    with_image = [lengths.with_image[index] for index in usable]
    kinds = with_image if arguments.group_by == "modality_length" else None
    order = grouped_order(tokens, arguments.seed, arguments.global_batch_size, kinds)

    def sampler(plan: BatchPlan, first_step: int, total_steps: int, rank: int) -> MicroBatchSampler:
        return MicroBatchSampler(replace(plan, order=order), first_step, total_steps, rank)

    def describe(plan: BatchPlan, total_steps: int) -> str:
        return describe_grouping(replace(plan, order=order), total_steps, tokens, arguments.group_by)

    return Batching(list(usable), _padded(dataset, usable, collate), sampler, describe, left_out)
