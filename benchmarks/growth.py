"""How the time per token grows with the length of the sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from benchmarks.attention import BIDIRECTIONAL, CAUSAL, core_forward
from benchmarks.models import (
    FILTERS,
    STRONG,
    AttentionCore,
    PlainCore,
    RetentionCore,
    defocus_mixer,
    random_heads,
    random_tokens,
)
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.setting import Setting


def growth_races(setting: Setting) -> list[Race]:
    """A race of lengths for each core; mamba's is its whole mixer, whose projections are linear anyway."""
    strong = f"De-focus attention, {STRONG}"
    cores: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
        "De-focus retention": (lambda: RetentionCore(setting), "growth_retention"),
        "De-focus mamba mixer": (lambda: defocus_mixer(setting, "mamba"), "growth_mamba"),
        strong: (lambda: AttentionCore(setting, FILTERS[STRONG]), "growth_attention"),
        CAUSAL: (lambda: PlainCore(True), None),
        BIDIRECTIONAL: (lambda: PlainCore(False), None),
    }
    return [_race(setting, name, make, show) for name, (make, show) in cores.items()]


def _race(setting: Setting, name: str, make: Callable[[], nn.Module], show: str | None) -> Race:
    lengths = setting.sizes.growth_lengths

    def build() -> Sequence[Contestant]:
        core = make()
        return [_contestant(setting, name, core, length) for length in lengths]

    return Race(
        f"growth, {name}, batch {setting.sizes.growth_batch}",
        build,
        [Comparison(_name(max(lengths)), _name(min(lengths)), show)],
        {"batch": setting.sizes.growth_batch, "tokens": list(lengths)},
        item="token",
    )


def _name(length: int) -> str:
    return f"{length:,} tokens"


def _contestant(setting: Setting, curve: str, core: nn.Module, length: int) -> Contestant:
    batch = setting.sizes.growth_batch
    if isinstance(core, AttentionCore | RetentionCore | PlainCore):
        run = core_forward(core, random_heads(setting, batch, length))
    else:
        run = core_forward(core, [random_tokens(setting, "mamba", batch, length)])
    return Contestant(_name(length), setting.stopwatch.timed(run), batch * length, curve, length)
