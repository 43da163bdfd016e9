"""Several results side by side, a row for each model, a column for each benchmark, every number with its interval.

    python -m eval.table outputs/a/eval outputs/b/eval
    python -m eval.table outputs/a/eval outputs/b/eval --names small large --format latex --output table.tex

A folder holds results.json, or folders that do. A run over a part of the questions shows "partial n/N" and no number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from defocus_mllm.console import run_script
from defocus_mllm.files import write_text_atomically
from eval.measures import Style
from eval.results import read_results

_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass(frozen=True)
class Table:
    """Plain text in rows and columns; the first column names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read, render, print or write."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="one for each row")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names of the rows instead of the models' own")
    parser.add_argument("--format", choices=sorted(FORMATS), default="markdown")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of printing")
    arguments = parser.parse_args(argv)
    text = FORMATS[arguments.format](read_table(arguments.folders, arguments.names))
    if arguments.output is None:
        print(text, end="")
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(arguments.output, text)
    print(f"table: {arguments.output}")


def read_table(folders: Sequence[Path], names: Sequence[str] | None = None) -> Table:
    """One row for each folder, one column for each benchmark and split found in any of them.

    Raises:
        FileNotFoundError: a folder holds no results.
        ValueError: not as many names as folders, two rows of one name, or one benchmark measured on different data.
    """
    rows = [_read_row(folder) for folder in folders]
    if names is None:
        names = [_name_of(results, folder) for results, folder in zip(rows, folders, strict=True)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"several models are called {repeated[0]!r}: give --names, one for each folder")
    if len(names) != len(folders):
        raise ValueError(f"--names: {len(names)} names for {len(folders)} folders")
    columns: dict[str, dict[str, Any]] = {}
    for folder, row in zip(folders, rows, strict=True):
        for column, results in row.items():
            first = columns.setdefault(column, results)
            if first["benchmark"]["fingerprint"] != results["benchmark"]["fingerprint"]:
                raise ValueError(f"{folder}: {column} was measured on other data than in the rows above")
    header = ("model", *(_heading(column, results) for column, results in columns.items()))
    cells = ((name, *(_cell(row.get(column)) for column in columns)) for name, row in zip(names, rows, strict=True))
    return Table(header, tuple(cells))


def _read_row(folder: Path) -> dict[str, dict[str, Any]]:
    own = folder / "results.json"
    files = [own] if own.is_file() else sorted(folder.glob("*/results.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no results.json, nor do its folders")
    row: dict[str, dict[str, Any]] = {}
    for file in files:
        results = read_results(file)
        column = f"{results['benchmark']['name']} {results['benchmark']['split']}"
        if column in row:
            raise ValueError(f"{file}: a second result of {column} in {folder}: move one elsewhere")
        row[column] = results
    return row


def _name_of(row: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    models = {results["model"].get("name") for results in row.values()} - {None}
    return str(models.pop()) if len(models) == 1 else folder.name


def _heading(column: str, results: Mapping[str, Any]) -> str:
    """The benchmark, its primary metric and the unit of the numbers below."""
    primary = _primary(results)
    metric = (results["metrics"] or results.get("partial_metrics") or {}).get(primary)
    unit = Style(**metric["style"]).unit.strip() if metric else ""
    return f"{column}, {primary}" + (f" ({unit})" if unit else "")


def _primary(results: Mapping[str, Any]) -> str:
    metrics = results["metrics"] or results.get("partial_metrics") or {}
    return next((name for name, metric in metrics.items() if metric["primary"]), "not scored here")


def _cell(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "-"
    if results["partial"]:
        return f"partial {results['benchmark']['n']}/{results['benchmark']['n_expected']}"
    if not results["metrics"]:
        return "-"
    metric = results["metrics"][_primary(results)]
    style = Style(**metric["style"])
    if metric["value"] is None or metric["ci95"] is None:
        return "-" if metric["value"] is None else style.number(metric["value"])
    low, high = (style.number(bound) for bound in metric["ci95"])
    return f"{style.number(metric['value'])} [{low}, {high}]"


def to_markdown(table: Table) -> str:
    """A table as GitHub renders it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |\n"

    return line(table.header) + line(["---"] * len(table.header)) + "".join(map(line, table.rows))


def to_latex(table: Table) -> str:
    """A `tabular` with the rules of the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join("".join(_LATEX_SPECIAL.get(c, c) for c in cell) for cell in cells) + r" \\" + "\n"

    columns = "l" + "r" * (len(table.header) - 1)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n  \\toprule\n{line(table.header)}  \\midrule\n"
        f"{''.join(map(line, table.rows))}  \\bottomrule\n\\end{{tabular}}\n"
    )


def to_html(table: Table) -> str:
    """A `table` element."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    body = "".join(line(row, "td") for row in table.rows)
    return f"<table>\n<thead>\n{line(table.header, 'th')}</thead>\n<tbody>\n{body}</tbody>\n</table>\n"


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": to_markdown, "latex": to_latex, "html": to_html}

if __name__ == "__main__":
    run_script(main)
