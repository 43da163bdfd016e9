"""One self-contained HTML page about a run: curves, how it was made, what its data held, and answers to read.

    python -m training.report OUTPUT_DIR [--output FILE]

Reads run.json, metrics.jsonl and answers.jsonl only, so it may be made while the run goes on. Without `--output` the
page is OUTPUT_DIR/report.html. Nothing in it points outside it.
"""

from __future__ import annotations

import argparse
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from defocus_mllm.console import run_script
from defocus_mllm.files import write_text_atomically
from training.held_out import ANSWERS_FILE
from training.run_record import METRICS_FILE, read_run

CURVES = (
    ("loss", ("loss", "validation_loss")),
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("grad_norm",)),
    ("tokens a second", ("tokens_per_second",)),
    ("images a second", ("images_per_second",)),
    ("validation accuracy", ("validation_accuracy",)),
    ("share of padding", ("padding",)),
    ("steps skipped", ("nonfinite_steps",)),
)
"""Title of a panel -> fields of metrics.jsonl in it; a panel without a value is left out."""

STYLE = """body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.4 }
table { border-collapse: collapse; margin-bottom: 1rem } td, th { border: 1px solid #bbb; padding: .2rem .5rem;
text-align: left; vertical-align: top; overflow-wrap: anywhere } svg { max-width: 100%; height: auto }"""


def main(argv: Sequence[str] | None = None) -> None:
    """Read the run and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m training.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="OUTPUT_DIR", help="folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page; default OUTPUT_DIR/report.html")
    given = parser.parse_args(argv)
    record = read_run(given.run)
    if record is None:
        raise FileNotFoundError(f"{given.run} holds no run.json, so it is no run's folder")
    output = given.output or given.run / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    page = render(record, read_lines(given.run / METRICS_FILE), read_lines(given.run / ANSWERS_FILE))
    write_text_atomically(output, page)
    print(f"report: {output}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file, none if there is no file; a run may just be writing the last one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def render(
    record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> str:
    """The page. Raises `ValueError` where matplotlib, which draws the curves, is not installed."""
    title = html.escape(f"{record['stage']}: {record['status']}")
    drawn = curves(metrics)
    parts = [
        ("Curves", drawn or "<p>metrics.jsonl has no line yet</p>"),
        ("Run", table(flat({name: value for name, value in record.items() if name not in ("facts", "arguments")}))),
        ("Data", table(flat(record.get("facts", {}))) if record.get("facts") else ""),
        ("Answers on held-out samples", answer_table(answers)),
        ("Arguments", table(flat(record["arguments"]))),
    ]
    body = "\n".join(f"<h2>{heading}</h2>\n{content}" for heading, content in parts if content)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """SVG of all panels of `CURVES` that have a value, over the number of steps; empty if none has."""
    panels = []
    for title, names in CURVES:
        found = {name: [(line["step"], line[name]) for line in metrics if name in line] for name in names}
        found = {name: points for name, points in found.items() if points}
        if found:
            panels.append((title, found))
    if not panels:
        return ""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"the report needs {error.name}: pip install 'defocus-mllm[quickstart]'") from error
    rows = -(-len(panels) // 2)
    with mpl.rc_context({"svg.hashsalt": "defocus", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
        for number, (title, found) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, 2, number)
            for name, points in found.items():
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=name, marker="." if len(points) < 20 else "")
            axes.set_title(title)
            axes.set_xlabel("step")
            if len(found) > 1:
                axes.legend()
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def flat(content: Any, name: str = "") -> list[tuple[str, str]]:
    """Rows (name, value) of nested dictionaries and lists, names joined by dots."""
    if isinstance(content, Mapping) and content:
        return [row for key, value in content.items() for row in flat(value, f"{name}.{key}" if name else str(key))]
    if isinstance(content, list) and any(isinstance(value, (Mapping, list)) for value in content):
        return [row for number, value in enumerate(content) for row in flat(value, f"{name}[{number}]")]
    if isinstance(content, list):
        return [(name, " ".join(map(str, content)))]
    return [(name, f"{content:,}" if type(content) is int else str(content))]


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """An HTML table; everything in it is escaped."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>"] if header else []
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def answer_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """The answers of the last validation, and of the first one to compare; empty without any."""
    if not answers:
        return ""
    names = ("step", "record", "question", "answer", "expected")
    steps = {answers[0]["step"], answers[-1]["step"]}
    return table(([str(line[name]) for name in names] for line in answers if line["step"] in steps), names)


if __name__ == "__main__":
    run_script(main)
