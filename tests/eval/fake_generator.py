"""A generator that needs no model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from eval.generator import Request
from eval.samples import Prediction


class FakeGenerator:
    """Answers by a rule, records its batches, and dies before batch `dies_at` as if the power failed."""

    def __init__(self, fingerprint: str = "model-a", dies_at: int | None = None, device: str = "cpu") -> None:
        self.fingerprint = fingerprint
        self.environment = {"device": device}
        self.batches: list[list[Request]] = []
        self._dies_at = dies_at

    def describe(self) -> dict[str, Any]:
        return {"name": "fake", "params": 0, "weights_sha": self.fingerprint}

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        return {"max_new_tokens": max_new_tokens}

    def request_length(self, request: Request) -> int:
        return len(request.prompt.split())

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        if len(self.batches) == self._dies_at:
            raise RuntimeError("killed")
        self.batches.append(list(requests))
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Prediction:
        digest = hashlib.sha256(f"{self.fingerprint}{request.prompt}{request.images[0].name}".encode()).digest()
        text = "yes" if request.prompt.startswith("is") else ("red", "circle", "fish", "")[digest[0] % 4]
        return Prediction(request.id, text, finish="stop", n_in=7, n_out=2, secs=0.0)


class SlowGenerator(FakeGenerator):
    """Takes its time over every batch."""

    def __init__(self, seconds: float, dies_at: int | None = None) -> None:
        super().__init__(dies_at=dies_at)
        self._seconds = seconds

    def forget_images(self) -> None:
        """There is nothing to forget."""

    @classmethod
    def of_process(cls, seconds: float, dies_at: int | None, number: int) -> SlowGenerator:
        """The generator of process `number`, which must not be the parent's 0."""
        assert number > 0
        return cls(seconds, dies_at)

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        time.sleep(self._seconds)
        return super().generate(requests, max_new_tokens)
