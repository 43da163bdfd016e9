"""One batch and what can go wrong with it: too little memory, or a sample that cannot be read."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from defocus_mllm.images import ImageError
from eval.generator import Generator, Request
from eval.samples import Prediction

# The CPU's allocator; the CUDA driver, and other devices; libraries of CUDA that allocate for themselves.
_TEXTS_OF_LACKING_MEMORY = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


@dataclass
class Outcome:
    """What became of a batch.

    `failures` maps the id of a sample that cannot be answered to the reason; `backoffs` counts the times a batch was
    halved for lack of memory, and `fitted` is the largest number of samples answered at once.
    """

    predictions: list[Prediction] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    backoffs: int = 0
    fitted: int = 0

    def add(self, other: Outcome) -> None:
        """Take in the outcome of another batch."""
        self.predictions += other.predictions
        self.failures |= other.failures
        self.backoffs += other.backoffs
        self.fitted = max(self.fitted, other.fitted)


def answer(generator: Generator, batch: Sequence[Request], max_new_tokens: int) -> Outcome:
    """Answer a batch; halve it while it does not fit into memory or holds a sample that cannot be read.

    Raises:
        ValueError: a single sample does not fit into memory.
    """
    try:
        return Outcome(generator.generate(batch, max_new_tokens), fitted=len(batch))
    except ImageError as error:
        if len(batch) == 1:
            return Outcome(failures={batch[0].id: str(error)})
        backoffs = 0
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ValueError(
                f"sample {batch[0].id!r} does not fit into memory, even alone: take a smaller model, number format or "
                "image size"
            ) from error
        backoffs = 1
    if backoffs:  # outside the handlers: the traceback of the failed call would keep its tensors alive
        _release_memory()
    half = len(batch) // 2
    outcome = Outcome(backoffs=backoffs)
    for part in (batch[:half], batch[half:]):
        outcome.add(answer(generator, part, max_new_tokens))
    return outcome


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has a class for its own GPU allocator's lack of memory; on other paths it is a text."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(text in str(error) for text in _TEXTS_OF_LACKING_MEMORY)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
