"""Incremental encoding: what the next row of a stream costs early and late."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.models import MIXER_NAMES, defocus_mixer, random_tokens
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.setting import Setting

_SHOWS = {"retention": "push_retention", "mamba": "push_mamba"}


def push_races(setting: Setting) -> list[Race]:
    """A race of an early and a late row for each mixer; attention, whose state grows, is shown and not judged."""
    early, late = (_name(row) for row in setting.sizes.rows)
    tokens = setting.sizes.row_tokens
    return [
        Race(
            f"stream, {mixer} mixer, {tokens} tokens a row",
            _builder(setting, mixer),
            [Comparison(late, early, _SHOWS.get(mixer))],
            {"batch": 1, "tokens of a row": tokens, "rows": list(setting.sizes.rows)},
        )
        for mixer in MIXER_NAMES
    ]


def _name(row: int) -> str:
    return f"row {row}"


def _builder(setting: Setting, mixer: str) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        layer = defocus_mixer(setting, mixer)
        tokens = setting.sizes.row_tokens
        contestants = []
        for row in setting.sizes.rows:
            stream = random_tokens(setting, mixer, 1, row * tokens)
            with torch.no_grad():
                _, state = layer(stream[:, :-tokens])
            run = torch.no_grad()(lambda stream=stream, state=state: layer(stream[:, -tokens:], state))
            contestants.append(Contestant(_name(row), setting.stopwatch.timed(run)))
        return contestants

    return build
