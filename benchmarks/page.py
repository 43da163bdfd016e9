"""The results as a reader sees them: a line for each claim, then every measurement, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import errors_of

_READING = (
    "Medians of at least {repeats} rounds after two that do not count. A round measures everything of one comparison "
    "once, in random order, in one process; memory is measured in a fresh process each time. In brackets: minimum, "
    "interquartile range and, of our own cores, the backend that ran. A ratio is that of the medians. FLOP are those "
    "of the matrix products of the plain architecture, with attention over all pairs of tokens."
)
_TOY = "**Toy sizes: this shows that everything runs. Its numbers mean nothing, and no claim is judged.**"
_GPU = "The limits were set for 2 CPU cores and float32; they stand here for comparison."


def markdown(results: Mapping[str, Any], record: str, figure: str | None) -> str:
    """The page; `record` and `figure` name the JSON and, if there is one, the drawing beside it."""
    lines = [f"# Speed and memory: suite {results['suite']}", ""]
    if results["toy"]:
        lines += [_TOY, ""]
    if not results["complete"]:
        lines += ["**Partial: not every benchmark has run.**", ""]
    lines += [_READING.format(repeats=results["repeats"]), ""]
    if results["suite"] == "gpu":
        lines += [_GPU, ""]
    lines += ["## Claims", "", "| Claim | Measured | Limit | |", "| --- | --- | --- | --- |"]
    lines += [_claim_row(claim) for claim in results["claims"]]
    if figure:
        lines += ["", f"![Time against length of the sequence]({figure})"]
    for benchmark in results["benchmarks"]:
        lines += ["", f"## {benchmark['name']}: {benchmark['description']}", "", *_benchmark(benchmark)]
    return "\n".join([*lines, "", "## Origin", "", *_origin(results, record)]) + "\n"


def _claim_row(claim: Mapping[str, Any]) -> str:
    measured = f"{claim['measured']:.3g}x" if "measured" in claim else ""
    verdict = claim["verdict"] if claim["verdict"] in ("held", "not run") else f"**{claim['verdict']}**"
    return f"| {claim['claim']} | {measured} | {claim['kind']} {claim['limit']:g}x | {verdict} |"


def _benchmark(benchmark: Mapping[str, Any]) -> list[str]:
    if benchmark["status"] == "not run":
        return ["Not run."]
    lines = [f"**Failed:** {error}" for error in errors_of(benchmark)]
    lines += [""] if lines else []
    races = [race for race in benchmark["races"] if race.get("comparisons")]
    if races:
        lines += ["| Measurement | Ours | Peer | Ours / peer | Limit |", "| --- | --- | --- | --- | --- |"]
        lines += [_comparison_row(race, row) for race in races for row in race["comparisons"]]
    for race in races:
        lines += _rates(race)
    return lines


def _comparison_row(race: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    contestants = {contestant["name"]: contestant for contestant in race["contestants"]}
    cells = [f"{race['title']} ({race['dtype']})"]
    cells += [f"{row[side]}: {_measured(race, contestants[row[side]])}" for side in ("ours", "peer")]
    cells.append(f"{row['ratio']:.3f}" if "ratio" in row else "**failed**")
    return f"| {' | '.join([*cells, _limit(row)])} |"


def _limit(row: Mapping[str, Any]) -> str:
    if "holds" not in row:
        return ""
    threshold, verdict = row["threshold"], "held" if row["holds"] else "**missed**"
    limit = f"{threshold['kind']} {threshold['limit']:g}x"
    if threshold["kind"] == "at least":
        limit = f"{row['measured']:.3g}x faster, {limit}"
    return f"{limit}: {verdict}"


def _measured(race: Mapping[str, Any], contestant: Mapping[str, Any]) -> str:
    if "error" in contestant:
        return "failed"
    write = duration if race["unit"] == "s" else size
    notes = [f"min {write(contestant['minimum'])}", f"IQR {write(contestant['interquartile_range'])}"]
    notes += [f"{core} {'+'.join(names)}" for core, names in contestant["backends"].items()]
    text = f"{write(contestant['median'])} ({', '.join(notes)})"
    if race["item"]:
        text += f", {contestant['items'] / contestant['median']:,.0f} {race['item']}s/s"
    return text


def _rates(race: Mapping[str, Any]) -> list[str]:
    """Operations a second of the contestants that count them, and their share of the fastest rate that was seen."""
    counted = [contestant for contestant in race["contestants"] if "flops_per_second" in contestant]
    if not counted:
        return []
    best = max(contestant["flops_per_second"] for contestant in counted)
    lines = ["", f"| {race['title']} | GFLOP | GFLOP/s | of the best |", "| --- | --- | --- | --- |"]
    for contestant in counted:
        rate = contestant["flops_per_second"]
        cells = [contestant["name"], f"{contestant['flops'] / 1e9:,.1f}", f"{rate / 1e9:,.0f}", f"{rate / best:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _origin(results: Mapping[str, Any], record: str) -> list[str]:
    """Command, commit, machine and versions: what is needed to repeat it."""
    machine, versions = results["hardware"], results["versions"]
    state = " with changes that are not committed" if results["dirty"] else ""
    lines = [
        f"- Command: `{results['command']}` (seed {results['seed']}), {results['started']}",
        f"- Commit: {results['commit'] or 'not a checkout'}{state}",
        f"- Hardware: {machine['gpu'] or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        f"- Every sample, with shapes: [json]({record})",
        f"- Versions: {_join(f'{name} {version}' for name, version in versions.items())}",
    ]
    if results["forced_kernel"]:
        lines.append(f"- `DEFOCUS_KERNEL={results['forced_kernel']}` was set")
    return lines


def _join(words: Any) -> str:
    return ", ".join(words)


_DURATIONS: Sequence[tuple[float, str]] = ((1, "s"), (1e-3, "ms"), (0, "µs"))


def duration(seconds: float) -> str:
    """Three significant digits in s, ms or µs."""
    least, unit = next((least, unit) for least, unit in _DURATIONS if seconds >= least)
    return f"{_significant(seconds / (least or 1e-6))} {unit}"


def size(number: float) -> str:
    """Three significant digits in GB or MB (1e9 and 1e6 bytes)."""
    return f"{_significant(number / 1e9)} GB" if number >= 1e9 else f"{_significant(number / 1e6)} MB"


def _significant(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
