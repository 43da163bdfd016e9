"""How conversations come together in batches: padded, packed into rows, or grouped by length."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from training.arguments import MultimodalArguments
from training.bad_samples import BadSamples
from training.batches import Batch
from training.conversations import Conversation, ConversationDataset
from training.grouping import grouped_order
from training.lengths import UNUSABLE, measure_lengths
from training.packing import PackedSampler, Rows
from training.padding import describe_grouping, describe_packing
from training.sampling import BatchPlan, MicroBatchSampler, SampleKey, StepSampler
from training.supervision import ConversationCollator


@dataclass(frozen=True)
class Batching:
    """The parts of a `Stage` that decide which conversations share a batch, and a row of it."""

    usable: Sequence[int]
    """Positions in the data set that are trained on; a stream has none."""
    load_batch: Callable[[Any], Batch]
    sampler: Callable[[BatchPlan, int, int, int], StepSampler[Any]] = MicroBatchSampler
    describe_plan: Callable[[BatchPlan, int], str] | None = None
    left_out: Sequence[str] = ()
    """Messages about conversations that do not fit `max_length` and are left out."""


def choose_batching(
    arguments: MultimodalArguments,
    dataset: ConversationDataset,
    usable: Sequence[int],
    collate: ConversationCollator,
    bad: BadSamples,
) -> Batching:
    """What `packing` and `group_by` ask for.

    Args:
        usable: positions in `dataset` that may be trained on.
        collate: makes the batches.
        bad: is told of conversations that do not fit `max_length`.

    Raises `ValueError` naming such a conversation, unless they are left out and few enough.
    """
    if arguments.packing == "none" and arguments.group_by == "none":
        return Batching(usable, _padded(dataset, usable, collate))
    # counts of its own: what is measured is not what is trained on
    measure = ConversationCollator(collate.processor, False, collate.max_turns, collate.max_length)
    lengths = measure_lengths(dataset, measure, arguments.dataloader_num_workers)
    left_out = [_explain(dataset[index], measure, bad) for index in usable if lengths[index] == UNUSABLE]
    kept = array("q", [index for index in usable if lengths[index] != UNUSABLE])
    if not kept:
        raise ValueError(f"none of the {len(usable)} samples can be used; the first: {left_out[0]}")
    bad.check()
    tokens = array("q", [lengths[index] for index in kept])
    make = _packed if arguments.packing == "pack" else _grouped
    return replace(make(arguments, dataset, kept, collate, tokens), left_out=left_out)


def _explain(conversation: Conversation, measure: ConversationCollator, bad: BadSamples) -> str:
    """Why a conversation has no length; raised instead unless such are left out."""
    try:
        measure.count_tokens(conversation)
    except ValueError as error:
        message = f"{conversation.source}: {error}"
        if not bad.skips:
            raise ValueError(message) from error
        bad.add([dataclasses.replace(conversation.bad(error), found="before training")])
        return message
    raise AssertionError(f"{conversation.record} has a length now")


def _padded(
    dataset: ConversationDataset, usable: Sequence[int], collate: ConversationCollator
) -> Callable[[Sequence[SampleKey]], Batch]:
    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return collate([dataset[usable[key.sample]] for key in keys], keys)

    return load_batch


def _packed(
    arguments: MultimodalArguments,
    dataset: ConversationDataset,
    usable: Sequence[int],
    collate: ConversationCollator,
    tokens: Sequence[int],
) -> Batching:
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

    return Batching(usable, load_batch, partial(PackedSampler, length, arguments.max_length), describe)


def _grouped(
    arguments: MultimodalArguments,
    dataset: ConversationDataset,
    usable: Sequence[int],
    collate: ConversationCollator,
    tokens: Sequence[int],
) -> Batching:
    kinds = None
    if arguments.group_by == "modality_length":
        kinds = bytes(bool(dataset.num_images[index]) for index in usable)
    order = grouped_order(tokens, arguments.seed, arguments.global_batch_size, kinds)

    def sampler(plan: BatchPlan, first_step: int, total_steps: int, rank: int) -> MicroBatchSampler:
        return MicroBatchSampler(replace(plan, order=order), first_step, total_steps, rank)

    def describe(plan: BatchPlan, total_steps: int) -> str:
        return describe_grouping(replace(plan, order=order), total_steps, tokens, arguments.group_by)

    return Batching(usable, _padded(dataset, usable, collate), sampler, describe)
