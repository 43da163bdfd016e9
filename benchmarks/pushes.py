"""Incremental encoding: what the next row of a stream costs early and late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.models import MIXER_NAMES, defocus_encoder, random_images
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.setting import Setting
from defocus_mllm.cache_defocus import DefocusVisionCache

_SHOWS = {"retention": "push_retention", "mamba": "push_mamba"}


def push_races(setting: Setting) -> list[Race]:
    """A race of an early and a late row for each encoder.

    Attention, whose state grows unless it is bounded, is shown and not judged.
    """
    window = setting.sizes.attention_window
    kinds: list[tuple[str, str, int | None]] = [(mixer, name, None) for mixer, name in MIXER_NAMES.items()]
    kinds.append(("attention", f"{MIXER_NAMES['attention']}, state bounded to {window} tokens", window))
    early, late = (_name(row) for row in setting.sizes.rows)
    tokens = setting.sizes.row_tokens
    return [
        Race(
            f"stream, {name}, {tokens} tokens a row",
            _builder(setting, mixer, bound),
            [Comparison(late, early, _SHOWS.get(mixer))],
            {"batch": 1, "tokens of a row": tokens, "rows": list(setting.sizes.rows), "window": bound},
        )
        for mixer, name, bound in kinds
    ]


def _name(row: int) -> str:
    return f"row {row}"


def _builder(setting: Setting, mixer: str, window: int | None) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        rows, columns = max(setting.sizes.rows) + 1, setting.sizes.row_tokens
        patch_size = setting.encoder_config(mixer, setting.sizes.answer_image).patch_size
        encoder = defocus_encoder(setting, mixer, columns * patch_size)
        pixels = random_images(setting, 1, rows * patch_size, columns * patch_size)

        @torch.no_grad()
        def push(cache: DefocusVisionCache, first: int, last: int) -> DefocusVisionCache:
            piece = pixels[:, :, first * patch_size : last * patch_size]
            encoder(piece, any_size=True, image_size=tuple(pixels.shape[2:]), past_key_values=cache)
            return cache

        cache = DefocusVisionCache(window)
        contestants, arrived = [], 0
        for row in sorted(setting.sizes.rows):
            push(cache, arrived, row - 1)
            arrived = row - 1
            contestants.append(_contestant(setting, row, cache.fork(), push))
        return contestants

    return build


def _contestant(
    setting: Setting, row: int, cache: DefocusVisionCache, push: Callable[[DefocusVisionCache, int, int], Any]
) -> Contestant:
    """Row number `row`, from 1, after those that `cache` holds."""
    run = setting.stopwatch.timed(lambda fork: push(fork, row - 1, row), prepare=cache.fork)
    return Contestant(_name(row), run)
