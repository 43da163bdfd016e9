"""What a reader sees of the evidence: a Markdown table, a figure, and the generated part of a page of results."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from defocus_mllm.files import write_json_atomically, write_text_atomically

INTERVALS = (
    "Test accuracy after the last epoch, in percent, mean over seeds. Intervals are 95 %. *Images*: the standard error "
    "over test images of these weights. *Seeds*: Student's t over seeds, wide with two of them. Differences are in "
    "percentage points, paired image by image and seed by seed."
)
_OURS, _PLAIN = "#0b6e4f", "#8a8f98"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "defocus",  # the same figure gives the same bytes
}


def markdown(results: Mapping[str, Any]) -> str:
    """Table of the models and table of the differences; what is not finished is marked partial."""
    lines = []
    if results["partial"]:
        done = f"{results['runs_finished']} of {results['runs_expected']} runs are finished"
        lines += [f"**Partial: {done}; the numbers below will change.**", ""]
    lines += [
        INTERVALS,
        "",
        "| Model | Parameters | Accuracy | Images | Seeds | Each seed | Training |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_model_row(row, len(results["seeds"])) for row in results["models"]]
    if results["comparisons"]:
        lines += ["", "| Difference | Mean | Images | Seeds | Each seed |", "| --- | --- | --- | --- | --- |"]
        lines += [_comparison_row(row, len(results["seeds"])) for row in results["comparisons"]]
    return "\n".join(lines) + "\n"


def _model_row(row: Mapping[str, Any], num_seeds: int) -> str:
    if not row["seeds"]:
        return f"| {row['title']} | {row['parameters']:,} | not finished | | | | |"
    cells = [_title(row["title"], row, num_seeds), f"{row['parameters']:,}", f"{100 * row['mean']:.2f}"]
    cells += [_interval(row["ci95_images"]), _interval(row["ci95_seeds"])]
    cells += [", ".join(f"{100 * value:.2f}" for value in row["by_seed"]), f"{row['train_seconds']:,.0f} s"]
    return f"| {' | '.join(cells)} |"


def _comparison_row(row: Mapping[str, Any], num_seeds: int) -> str:
    cells = [_title(f"{row['model']} − {row['reference']}", row, num_seeds), f"{100 * row['mean']:+.2f}"]
    cells += [_interval(row["ci95_images"], "+"), _interval(row["ci95_seeds"], "+")]
    cells += [", ".join(f"{100 * value:+.2f}" for value in row["by_seed"])]
    return f"| {' | '.join(cells)} |"


def _title(title: str, row: Mapping[str, Any], num_seeds: int) -> str:
    return f"{title} (partial: {len(row['seeds'])} of {num_seeds} seeds)" if row["partial"] else title


def _interval(interval: list[float] | None, sign: str = "") -> str:
    if interval is None:
        return "one seed"
    low, high = (format(100 * value, f"{sign}.2f") for value in interval)
    return f"{low} to {high}"


def figure(results: Mapping[str, Any]) -> str:
    """SVG: the accuracy of every finished model with its interval over images, and every seed as a small dot."""
    rows = [row for row in results["models"] if row["seeds"]][::-1]
    with rc_context(_STYLE):
        drawing = Figure(figsize=(8.4, 0.5 * len(rows) + 1.1), layout="constrained")
        axes = drawing.subplots()
        for height, row in enumerate(rows):
            colour = _OURS if "De-focus" in row["title"] else _PLAIN
            low, high = (100 * value for value in row["ci95_images"])
            axes.plot([low, high], [height, height], color=colour, linewidth=2)
            axes.plot(100 * row["mean"], height, "o", color=colour, markersize=8)
            axes.plot([100 * value for value in row["by_seed"]], [height] * len(row["seeds"]), "|", color="black")
        axes.set_yticks(range(len(rows)), [_title(row["title"], row, len(results["seeds"])) for row in rows])
        axes.set_xlabel("test accuracy in %: mean over seeds, 95 % interval over test images, and each seed")
        axes.grid(axis="x", alpha=0.3)
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """`results.json`, `table.md` and, as soon as a run is finished, `figure.svg` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomically(folder / "results.json", results)
    write_text_atomically(folder / "table.md", markdown(results))
    if results["runs_finished"]:
        write_text_atomically(folder / "figure.svg", figure(results))


def write_page(page: Path, name: str, results: Mapping[str, Any]) -> None:
    """Replace the part of `page` that belongs to the study `name`, or append it; the rest is a person's and stays.

    `<page>_<name>.svg` and `<page>_<name>.json` are written beside it. Raises `ValueError` when the part has no end.
    """
    first, last = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# CIFAR-10: what was measured\n"
    before, found, rest = text.partition(first)
    if found and last not in rest:
        raise ValueError(f"{page}: {first} has no {last} after it; mend the page")
    after = rest.partition(last)[2] if found else "\n"
    before = before if found else before.rstrip("\n") + "\n\n"
    drawing = page.with_name(f"{page.stem}_{name}.svg")
    record = page.with_name(f"{page.stem}_{name}.json")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(record, results)
    pictures = [f"![{results['study']}]({drawing.name})", ""] if results["runs_finished"] else []
    if pictures:
        write_text_atomically(drawing, figure(results))
    parts = [first, f"## {results['study']}", "", markdown(results), *pictures, _origin(results, record.name), last]
    write_text_atomically(page, before + "\n".join(parts) + after)


def _origin(results: Mapping[str, Any], record: str) -> str:
    """Command, data, training, commit and hardware: what is needed to repeat the table."""
    machines = [
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s) a run"
        for machine in results["hardware"]
    ]
    return "\n".join(
        [
            f"- Command: `{results['command']}`",
            f"- Seeds: {', '.join(map(str, results['seeds']))}; training images {_join(results['pictures']['train'])}, "
            f"test images {_join(results['pictures']['test'])}",
            f"- Training of every model: {results['training']}",
            f"- Commit: {_join(results['commits'])}",
            f"- Hardware: {'; '.join(machines)}",
            f"- Record: [json]({record})",
        ]
    )


def _join(values: list[Any]) -> str:
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)
