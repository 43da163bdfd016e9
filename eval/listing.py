"""What `python -m eval.run --list` prints: every benchmark, the data it needs, and whether they are on this machine."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from eval.hub import find_on_hub
from eval.registry import Benchmark, benchmark_names, get_benchmark

_WIDTH = 120
_INDENT = " " * 14


def list_benchmarks(data_root: Path | None) -> str:
    """All benchmarks, a block for each, and a last line that says which are ready; nothing is read, only looked for."""
    blocks, ready = [], []
    for name in benchmark_names():
        benchmark = get_benchmark(name)
        is_ready, status = describe_data(benchmark, data_root)
        ready += [name] if is_ready else []
        blocks.append(_describe(benchmark, status))
    place = f"under {data_root} or in a cache" if data_root else "(no --data-root)"
    total = f"{len(ready)} of {len(blocks)} benchmarks have their data {place}: {', '.join(ready) or 'none'}"
    return "\n\n".join([*blocks, total])


def describe_data(benchmark: Benchmark, data_root: Path | None) -> tuple[bool, str]:
    """Whether the benchmark could run now, and where its data are or what is missing."""
    found = benchmark.find(data_root)
    if found is not None and found.missing is None:
        if found.missing_images is not None:
            return False, f"questions found in {found.folder}, images missing: {found.missing_images}"
        return True, f"found: official files in {found.folder}"
    problem = f"missing: {found.missing}" if found else "missing: give --data-root DIR"
    try:
        dataset = find_on_hub(benchmark.folder, benchmark.hub, data_root)
    except (FileNotFoundError, ValueError) as error:
        return False, f"{problem}; the dataset is incomplete: {error}"
    if dataset is None:
        return False, problem + ("; no dataset in a cache either" if benchmark.hub else "")
    _, folder, _ = dataset
    revision = f"@{folder.revision[:12]}" if folder.revision else ""
    return True, f"found: dataset {folder.repository or ''}{revision} in {folder.path}"


def check_data_are_here(benchmarks: Sequence[Benchmark], data_root: Path | None) -> None:
    """Raise one FileNotFoundError that names every benchmark without its data: before a model is loaded, not after
    hours with the other benchmarks. Nothing is read, so data that are here may still turn out to be malformed."""
    missing = [
        (benchmark, status)
        for benchmark in benchmarks
        for is_ready, status in [describe_data(benchmark, data_root)]
        if not is_ready
    ]
    if not missing:
        return
    needed = missing[0][0].data_needed if len(missing) == 1 else "`python -m eval.run --list` says what each needs"
    problems = "; ".join(f"{benchmark.name}: {status}" for benchmark, status in missing)
    raise FileNotFoundError(f"{problems} (nothing is downloaded); needed: {needed}")


def _describe(benchmark: Benchmark, status: str) -> str:
    result = f"headline {benchmark.primary_metric}" if benchmark.metrics else benchmark.not_scored_here
    lines = [f"{benchmark.name}: {benchmark.split}, {benchmark.n_expected:,} samples, {result}"]
    if benchmark.submission is not None:
        lines.append(_entry("writes", f"{benchmark.submission.file_name} {_for_whom(benchmark)}"))
    lines.append(_entry("needs", benchmark.data_needed))
    if benchmark.hub:
        lines.append(_entry("or dataset", "; ".join(map(str, benchmark.hub))))
    return "\n".join([*lines, _entry("now", status), _entry("see", benchmark.reference)])


def _for_whom(benchmark: Benchmark) -> str:
    return "as the official script takes it" if benchmark.metrics else "for what scores it"


def _entry(label: str, text: str) -> str:
    """One labelled entry, wrapped; paths and addresses are never broken."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"  {label}".ljust(len(_INDENT)),
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
