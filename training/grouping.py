"""Samples of like length in one step: the alternative to packing, for decoders whose samples cannot share a row.

An epoch still visits every sample once. Its random order is cut into windows of `GROUPED_STEPS` steps; the samples of a
window are sorted by length, cut into steps, and the steps put in random order. It is a pure function of the lengths,
the seed, the epoch and the global batch size, so the number of processes and resuming change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from training.sampling import epoch_permutation, mix_seed

GROUPED_STEPS = 50
"""Steps whose samples are sorted together: more leave less padding, fewer leave more chance."""


def grouped_order(
    lengths: Sequence[int], seed: int, global_batch_size: int, with_image: Sequence[int] | None = None
) -> Callable[[int], Sequence[int]]:
    """Epoch -> the order in which it visits the samples, for `BatchPlan.order`.

    Args:
        lengths: tokens of each sample.
        global_batch_size: samples of a step.
        with_image: 1 or 0, whether each sample has an image; steps then have samples of one kind only, but for one step
            a window at most. None: no matter.

    A step that begins in one epoch and ends in the next keeps samples of any length.
    """
    count = len(lengths)
    kinds = with_image if with_image is not None else bytes(count)

    @lru_cache(maxsize=2)  # a step straddles two epochs at most
    def order(epoch: int) -> list[int]:
        shuffled = epoch_permutation(count, seed, epoch)
        first = min(-epoch * count % global_batch_size, count)  # where the epoch's first whole step begins
        last = first + (count - first) // global_batch_size * global_batch_size
        chance = random.Random(mix_seed(seed, epoch, global_batch_size))
        grouped: list[int] = []
        window = GROUPED_STEPS * global_batch_size
        for begin in range(first, last, window):
            # sorting keeps the random order of samples that are equally long
            part = sorted(
                shuffled[begin : min(begin + window, last)], key=lambda sample: (kinds[sample], lengths[sample])
            )
            steps = [part[start : start + global_batch_size] for start in range(0, len(part), global_batch_size)]
            chance.shuffle(steps)
            grouped += [sample for step in steps for sample in step]
        return shuffled[:first] + grouped + shuffled[last:]

    return order
