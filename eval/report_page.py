"""The HTML of the report: one page, no scripts or pictures from elsewhere."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from eval.measures import PERCENT, Style
from eval.report_data import Report, Run
from eval.report_figures import accuracy_figure, loss_figure
from eval.report_style import PAGE
from eval.results import format_estimate
from eval.samples import labels_of

_FORMATS_OF_BROWSERS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


def render(report: Report) -> str:
    """The whole page."""
    results = report.results
    title = f"{results['model']['name'] or 'predictions'} on {results['benchmark']['name']}"
    sections = [
        _headline(results),
        _facts(report),
        _section("Accuracy against published results", _accuracy(report)),
        _section("By kind of question", "".join(map(_breakdown, results["breakdown"].values()))),
    ]
    curves = {run.name: (run.steps, run.losses) for run in report.runs if run.losses}
    if curves:
        sections.append(_section("Training loss", _figure(loss_figure(curves), "training loss against step")))
    sections.append(_section("What it saw, what it said", _gallery(report)))
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
    what = f"{benchmark['name']}, official {benchmark['split']} split"
    if results["partial"]:
        number = f"<p class='number'>partial {benchmark['n']:,}/{benchmark['n_expected']:,}</p>"
        note = "Not every question was asked, so there is no headline number."
    else:
        name, metric = _primary(results)
        style = Style(**metric["style"])
        low, high = (style.number(bound) for bound in metric["ci95"])
        number = f"<p class='number'>{style.text(metric['value'])}</p>"
        note = f"{name} on {benchmark['n']:,} questions; 95 % interval {low} to {high}{style.unit}"
    return f"<header><h1>{escape(what)}</h1>{number}<p>{escape(note)}</p></header>"


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
    if Style(**metric["style"]) != PERCENT:
        return "<p>No published results to compare with are recorded for this metric.</p>"
    figure = _figure(accuracy_figure(metric, "this model", report.baselines), "accuracy beside the published results")
    sources = "".join(f"<li>{escape(b.name)}: {escape(b.source)}</li>" for b in report.baselines)
    return f"{figure}<ul class='sources'>{sources}</ul>"


def _figure(svg: str, description: str) -> str:
    """An image of its own, because the element ids of several inline SVGs would clash."""
    data = base64.b64encode(svg.encode()).decode()
    return f"<img class='figure' alt='{escape(description)}' src='data:image/svg+xml;base64,{data}'>"


def _breakdown(groups: Mapping[str, Any]) -> str:
    rows = ((name, f"{group['n']:,}", format_estimate(group)) for name, group in groups.items())
    return _table(("kind", "questions", "score"), rows)


def _gallery(report: Report) -> str:
    shown_wrong = sum(sample["score"] != 1 for sample in report.gallery)
    shown_right = len(report.gallery) - shown_wrong
    kinds = sorted({kind for sample in report.gallery for kind in _kinds(sample)})
    options = "".join(f"<option>{escape(kind)}</option>" for kind in kinds)
    images = {name: _data_uri(report.image_root, name) for sample in report.gallery for name in sample["images"]}
    cards = "".join(_card(sample, images) for sample in report.gallery)
    return (
        f"<p>Shown: {shown_wrong} of {report.wrong:,} wrong answers, {shown_right} of {report.right:,} right ones, "
        "drawn at random.</p>"
        "<p class='filter'><label>answer <select id='outcome'><option>all</option><option>wrong</option>"
        "<option>partly right</option><option>right</option></select></label> "
        f"<label>kind <select id='kind'><option>all</option>{options}</select></label> "
        "<label>text <input id='words' type='search' placeholder='question, answer or truth'></label> "
        f"<output id='shown'></output></p><div class='gallery'>{cards}</div>"
    )


def _kinds(sample: Mapping[str, Any]) -> list[str]:
    return sorted(label for category in sample["categories"].values() for label in labels_of(category))


def _card(sample: Mapping[str, Any], images: Mapping[str, str]) -> str:
    outcome = _outcome(sample["score"])
    kinds = json.dumps(_kinds(sample))
    pictures = "".join(f"<img alt='{escape(name)}' src='{images[name]}'>" for name in sample["images"])
    answer = escape(sample["text"].strip()) or "<i>nothing</i>"
    return (
        f"<article class='{'right' if outcome == 'right' else 'wrong'}' data-outcome='{outcome}' "
        f"data-kinds='{escape(kinds)}'>{pictures}<p>{escape(sample['question'])}</p>"
        f"<p class='answer'>{'✓' if outcome == 'right' else '✗'} {answer}</p>"
        f"<p class='truth'>truth: {escape(str(sample['target']))}</p>"
        f"<p class='truth'>score: {sample['score']:.3g}</p></article>"
    )


def _outcome(score: float) -> str:
    if score == 1:
        return "right"
    return "partly right" if score > 0 else "wrong"


def _data_uri(root: Path, name: str) -> str:
    """An image of the benchmark as a data URI; no other file may enter a page that is made to be passed on."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"samples.jsonl: image {name!r} lies outside the images of the benchmark in {root}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file: the report needs the images of the benchmark")
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS_OF_BROWSERS) as image:
            media_type = Image.MIME[str(image.format)]
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image ({', '.join(_FORMATS_OF_BROWSERS)})") from error
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


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
    health = ", ".join(f"{key} {value:,}" for key, value in results["health"].items())
    environment = results["env"]
    rows = {
        "benchmark": f"{results['benchmark']['reference']}, data {results['benchmark']['fingerprint'][:12]}",
        "prompt": results["protocol"]["prompt_id"],
        "generation": results["protocol"]["gen"],
        "interval": f"{metric['method']} of {name} over the clusters: {metric['cluster']}",
        "health": health,
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
