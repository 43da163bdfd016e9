"""What a task asks of generation, honoured or refused: nothing is ignored unless the user names it.

Values come from the task's YAML file and from lmms-eval's `--gen_kwargs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_NEW_TOKENS = 1024
"""Where a task sets no limit; what lmms-eval's own LLaVA classes take."""
WITHOUT_EFFECT = ("top_p", "top_k", "seed")
"""Greedy search takes the most likely token, which these never exclude."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "temperature": (0, None),
    "num_beams": (1, None),
    "repetition_penalty": (1, None),
    "num_return_sequences": (1, None),
    "n": (1, None),
    "best_of": (1, None),
}
"""The values of a setting that mean greedy search, one answer."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings that the model honours."""

    max_new_tokens: int
    until: tuple[str, ...]
    """The answer ends before the first of them."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str, ignored: Collection[str] = ()) -> GenerationSettings:
        """Read a task's settings; `ignored` are names that the user chose to leave unheeded.

        Raises:
            ValueError: a setting is unknown, asks for more than greedy search, or has a senseless value; the message
                begins with `where` and says how to go on.
        """
        heeded = {name: value for name, value in values.items() if name not in ignored}
        for name, value in heeded.items():
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise ValueError(
                    f"{where}: generation setting {name}={value!r} is not supported: answers are found by greedy "
                    f"search; set it on the command line: --gen_kwargs {name}={NEUTRAL[name][0]}"
                )
            if name not in (*NEUTRAL, *WITHOUT_EFFECT, "max_new_tokens", "until"):
                raise ValueError(
                    f"{where}: generation setting {name}={value!r} is unknown here; to run without heeding it, add "
                    f"ignore={name} to --model_args"
                )
        return cls(_positive(heeded.get("max_new_tokens"), where), _texts(heeded.get("until"), where))

    def cut(self, answer: str) -> str:
        """The answer up to the first of `until`; white space at its beginning was removed before."""
        ends = [position for position in (answer.find(text) for text in self.until) if position >= 0]
        return answer[: min(ends)].strip() if ends else answer


def _positive(value: Any, where: str) -> int:
    if value is None:
        return DEFAULT_NEW_TOKENS
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: max_new_tokens must be a positive integer, found {value!r}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{where}: until must be a text or a list of texts, none of them empty, found {value!r}")
    return texts
