"""The HTML of the report: one page, no scripts or pictures from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from eval.measures import PERCENT, Style
from eval.report_data import Report, Run
from eval.report_figures import accuracy_figure, loss_figure
from eval.report_gallery import gallery
from eval.report_style import PAGE
from eval.results import describe_data, describe_health, format_estimate

_MOST_GROUPS_OPEN = 20


def render(report: Report) -> str:
    """The whole page."""
    results = report.results
    title = f"{results['model']['name'] or 'predictions'} on {results['benchmark']['name']}"
    sections = [
        _headline(results),
        _facts(report),
    ]
    if not results["partial"]:
        sections.append(_section("All metrics", _metrics(results)))
    if report.baselines:
        sections.append(_section("Accuracy against published results", _accuracy(report)))
    if results["breakdown"]:
        groups = (_breakdown(name, found) for name, found in results["breakdown"].items())
        sections.append(_section("By kind of question", "".join(groups)))
    curves = {run.name: (run.steps, run.losses) for run in report.runs if run.losses}
    if curves:
        sections.append(_section("Training loss", _figure(loss_figure(curves), "training loss against step")))
    sections.append(_section("What it saw, what it said", gallery(report)))
    if report.runs:
        sections.append(_section("Training runs", _runs(report.runs)))
    sections.append(_section("How this was measured", _measurement(results)))
    return PAGE.substitute(title=escape(title), body="\n".join(sections))


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{content}\n</section>"


def _primary(results: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    metrics = results["partial_metrics"] if results["partial"] else results["metrics"]
    return next((name, metric) for name, metric in metrics.items() if metric["primary"])


def _headline(results: Mapping[str, Any]) -> str:
    benchmark = results["benchmark"]
    what = f"{results['model']['name'] or 'predictions'} on {benchmark['name']}, official {benchmark['split']} split"
    if results["partial"]:
        number = f"<p class='number'>partial {benchmark['n']:,}/{benchmark['n_expected']:,}</p>"
        note = "Not every question was asked, so there is no headline number."
    else:
        name, metric = _primary(results)
        style = Style(**metric["style"])
        number = f"<p class='number'>{style.text(metric['value'])}</p>"
        note = f"{name} on {benchmark['n']:,} questions{_interval(metric, style)}"
    return f"<header><h1>{escape(what)}</h1>{number}<p>{escape(note)}</p></header>"


def _interval(metric: Mapping[str, Any], style: Style) -> str:
    if metric["ci95"] is None:
        return f"; no interval: one {metric['cluster']} only"
    low, high = (style.number(bound) for bound in metric["ci95"])
    return f"; 95 % interval {low} to {high}{style.unit}"


def _metrics(results: Mapping[str, Any]) -> str:
    """Every metric of the generated answers, then those of the most likely options, where they were asked for."""
    rows = [(name, format_estimate(metric)) for name, metric in results["metrics"].items()]
    likelihood = results.get("likelihood")
    if likelihood is not None:
        estimates = likelihood["metrics"].items()
        rows += [(f"{name}, by likelihood of the options", format_estimate(metric)) for name, metric in estimates]
        rows.append(("generation says the most likely option", f"{100 * likelihood['agreement']:.1f} %"))
    return _table(("metric", "value"), rows)


def _facts(report: Report) -> str:
    results = report.results
    seconds = [run.record["train_seconds"] for run in report.runs if run.record.get("train_seconds") is not None]
    seeds = sorted({str(run.record["seed"]) for run in report.runs if "seed" in run.record})
    throughput = results["throughput"] or {}
    facts = {
        "parameters": _number(results["model"].get("params")),
        "training time": _duration(sum(seconds)) if seconds else None,
        "seed": ", ".join(seeds),
        "answers a second": f"{throughput['samples_per_s']:,.0f}" if throughput.get("generated") else None,
        "commit": _commit(results["env"]["git"]),
    }
    tiles = (f"<div><b>{escape(str(value))}</b><span>{name}</span></div>" for name, value in facts.items() if value)
    return f"<div class='facts'>{''.join(tiles)}</div>"


def _accuracy(report: Report) -> str:
    results = report.results
    if results["partial"]:
        return "<p>A partial run is not compared with published results.</p>"
    _, metric = _primary(results)
    if Style(**metric["style"]) != PERCENT or metric["ci95"] is None:
        return "<p>No published results to compare with are recorded for this metric.</p>"
    figure = _figure(accuracy_figure(metric, "this model", report.baselines), "accuracy beside the published results")
    sources = "".join(f"<li>{escape(b.name)}: {escape(b.source)}</li>" for b in report.baselines)
    return f"{figure}<ul class='sources'>{sources}</ul>"


def _figure(svg: str, description: str) -> str:
    """An image of its own, because the element ids of several inline SVGs would clash."""
    data = base64.b64encode(svg.encode()).decode()
    return f"<img class='figure' alt='{escape(description)}' src='data:image/svg+xml;base64,{data}'>"


def _breakdown(name: str, groups: Mapping[str, Any]) -> str:
    rows = ((label, f"{group['n']:,}", format_estimate(group)) for label, group in groups.items())
    table = _table((name.replace("_", " "), "questions", "score"), rows)
    if len(groups) <= _MOST_GROUPS_OPEN:
        return table
    return f"<details><summary>{escape(name.replace('_', ' '))}: {len(groups)} groups</summary>{table}</details>"


def _runs(runs: Iterable[Run]) -> str:
    names = ("run", "status", "seed", "steps", "last loss", "training time", "commit")
    rows = (
        (
            run.name,
            run.record.get("status"),
            run.record.get("seed"),
            run.steps[-1] if run.steps else None,
            f"{run.losses[-1]:.4g}" if run.losses else None,
            _duration(run.record.get("train_seconds")),
            _commit(run.record.get("commit")),
        )
        for run in runs
    )
    return _table(names, rows)


def _measurement(results: Mapping[str, Any]) -> str:
    name, metric = _primary(results)
    environment = results["env"]
    rows = {
        "benchmark": results["benchmark"]["reference"],
        "data": "; ".join([results["benchmark"]["fingerprint"][:12], *describe_data(results["benchmark"])]),
        "prompt": results["protocol"]["prompt_id"],
        "generation": results["protocol"]["gen"],
        "interval": f"{metric['method']} of {name} over the clusters: {metric['cluster']}",
        "health": describe_health(results["health"]),
        "throughput": results["throughput"],
        "model": results["model"].get("path") or results["model"].get("predictions"),
        "weights": str(results["model"].get("weights_sha") or "")[:12],
        "software": f"python {environment['python']}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}",
        "hardware": environment["gpu"] or f"{environment['platform']}, {environment['cpu_threads']} threads",
        "run": f"{results['run_id']}, {results['created']}",
    }
    return _table(None, ((key, _plain(value)) for key, value in rows.items() if value))


def _plain(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _table(header: Iterable[str] | None, rows: Iterable[Iterable[object]]) -> str:
    head = f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>" if header else ""
    return f"<table>{head}{''.join(map(_table_row, rows))}</table>"


def _table_row(cells: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<td>{'' if cell is None else escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _commit(revision: str | None) -> str | None:
    """Ten digits of a commit, and whether files differed from it (a suffix after its 40 digits)."""
    if not revision:
        return None
    return revision[:10] + (" + changes" if len(revision) > 40 else "")


def _number(value: int | None) -> str | None:
    return f"{value / 1e6:.2f} M" if value else None


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
