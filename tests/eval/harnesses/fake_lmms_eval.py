"""What our model touches of lmms-eval's public interface, for tests where lmms-eval is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest


@dataclass
class TokenCounts:
    """Counts of an answer's tokens."""

    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    """An answer with its counts."""

    text: str
    token_counts: TokenCounts | None = None


class ChatModel:
    """The class that models derive from (`lmms`)."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


class Logger:
    """Keeps its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logger]:
    """Put the fake in the place of lmms-eval and Loguru, and take our module out again afterwards."""
    logger = Logger()
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": ChatModel},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "loguru": {"logger": logger},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "eval.harnesses.lmms_model", raising=False)
    yield logger
    sys.modules.pop("eval.harnesses.lmms_model", None)
