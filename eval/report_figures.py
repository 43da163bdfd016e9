"""The figures of the report, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from eval.registry import Baseline

OURS, OTHERS, FAINT = "#0b6e4f", "#8a8f98", "#d9dce1"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": OTHERS,
    "axes.labelcolor": "#3a3f47",
    "xtick.color": "#3a3f47",
    "ytick.color": "#3a3f47",
    "svg.hashsalt": "defocus",  # the same figure gives the same bytes
}
_CURVES_PER_ROW = 2


def accuracy_figure(metric: Mapping[str, Any], label: str, baselines: Sequence[Baseline]) -> str:
    """Points on one percent axis: this model with its 95 % interval, above the published results."""
    others = sorted(baselines, key=lambda baseline: baseline.value)
    rows = [*((other.name, other.value, OTHERS) for other in others), (label, metric["value"], OURS)]
    low, high = metric["ci95"]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.55 * len(rows) + 0.9))
        axes = figure.subplots()
        for height, (_, value, colour) in enumerate(rows):
            interval = f" ({100 * low:.2f} to {100 * high:.2f})" if colour == OURS else ""
            axes.axhline(height, color=FAINT, linewidth=1, zorder=0)
            axes.plot(100 * value, height, "o", color=colour, markersize=9)
            axes.annotate(
                f"{100 * value:.{2 if interval else 1}f} %{interval}",
                (100 * value, height),
                xytext=(6, 9),
                textcoords="offset points",
                ha="right",
                color=colour,
                fontweight="bold" if colour == OURS else "normal",
            )
        axes.plot([100 * low, 100 * high], [len(rows) - 1] * 2, color=OURS, linewidth=3, solid_capstyle="butt")
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.5, len(rows) - 0.3)
        axes.set_xlim(max(0.0, 100 * min(value for _, value, _ in rows) - 6), 101)
        axes.set_xlabel("accuracy on the official test questions, %")
        return _as_svg(figure)


def loss_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """One panel per run: training loss (log scale) against the step."""
    columns = min(_CURVES_PER_ROW, len(curves))
    lines = -(-len(curves) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.8 * columns, 2.6 * lines))
        panels = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, (name, (steps, losses)) in zip(panels, curves.items(), strict=False):
            axes.plot(steps, losses, color=OURS, linewidth=1.6, marker="o" if len(steps) < 3 else None)
            axes.set_title(name, fontsize=11, loc="left", color="#3a3f47")
            axes.set_xlabel("step")
            axes.set_ylabel("training loss")
            if min(losses) > 0:
                axes.set_yscale("log")
            axes.grid(color=FAINT, linewidth=0.6)
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        return _as_svg(figure)


def _as_svg(figure: Figure) -> str:
    figure.tight_layout()
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
