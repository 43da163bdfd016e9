"""Which samples are answered together: sorted by length, as many as a budget of tokens allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.generator import Request

DEFAULT_SAMPLES = 64
DEFAULT_TOKENS = 16384


@dataclass(frozen=True)
class BatchPolicy:
    """Limits of one batch."""

    samples: int = DEFAULT_SAMPLES
    """Most samples in a batch."""
    tokens: int = DEFAULT_TOKENS
    """Most tokens in a batch, padding and the answers' room included; a longer sample is a batch of its own."""

    def __str__(self) -> str:
        return f"samples<={self.samples}, tokens<={self.tokens}, longest first"


class BatchQueue:
    """Requests waiting for an answer, given out in batches of similar length.

    The longest come first, so that too large a batch fails at once. Within a length, requests keep their order, so that
    questions about one image stay together.

    Args:
        requests: in any order.
        length: tokens of a request's prompt, images included.
        policy: the limits of a batch.
        max_new_tokens: room for every answer, counted in the budget of tokens.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        length: Callable[[Request], int],
        policy: BatchPolicy,
        max_new_tokens: int,
    ) -> None:
        sized = [(length(request) + max_new_tokens, request) for request in requests]
        self._waiting = deque(sorted(sized, key=lambda entry: -entry[0]))
        self._samples = policy.samples
        self._tokens = policy.tokens

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> list[Request]:
        """The next batch; empty when nothing waits."""
        if not self._waiting:
            return []
        longest = self._waiting[0][0]
        size = max(1, min(self._samples, self._tokens // longest, len(self._waiting)))
        return [self._waiting.popleft()[1] for _ in range(size)]

    def limit_samples(self, samples: int) -> None:
        """Give out at most so many samples at a time from now on: more of them did not fit into memory."""
        self._samples = max(1, min(self._samples, samples))
