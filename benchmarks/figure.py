"""Cost against length, both on logarithmic axes: a line of slope 1 is linear, one of slope 2 quadratic."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from typing import Any

MISSING = "no figure: matplotlib is not installed (pip install 'defocus-mllm[benchmarks]')"
_OURS = ("#0b6e4f", "#1d4e89", "#b5561c", "#7a3e9d", "#a61c3c")
_PEERS = ("#8a8f98", "#3c4048")
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "defocus",  # the same figure gives the same bytes
}

Curves = dict[str, dict[int, float]]
"""Name of a curve -> tokens -> seconds."""


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def curves_of(benchmark: Mapping[str, Any]) -> Curves:
    """The points that a benchmark of `results.json` has measured."""
    curves: Curves = {}
    for race in benchmark["races"]:
        for contestant in race.get("contestants", []):
            if contestant["curve"] and "median" in contestant:
                curves.setdefault(contestant["curve"], {})[contestant["length"]] = contestant["median"]
    return curves


def figure(results: Mapping[str, Any]) -> str | None:
    """A panel for each benchmark with curves, as SVG; None where there are none. Needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [(benchmark, curves_of(benchmark)) for benchmark in results["benchmarks"]]
    panels = [(benchmark, curves) for benchmark, curves in panels if curves]
    if not panels:
        return None
    with rc_context(_STYLE):
        drawing = Figure(figsize=(6.4 * len(panels), 5.2), layout="constrained")
        for axes, (benchmark, curves) in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, curves)
            axes.set_title(benchmark["name"])
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw(axes: Any, curves: Curves) -> None:
    ours, peers = iter(_OURS), iter(_PEERS)
    lengths: set[int] = set()
    for name, points in curves.items():
        mine = name.startswith("De-focus")
        x = sorted(points)
        y = [1000 * points[length] for length in x]
        axes.plot(x, y, "o-" if mine else "s--", color=next(ours if mine else peers), label=name, markersize=5)
        lengths.update(x)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds, median")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
