"""What VLMEvalKit wrote, read with suspicion: it logs an error, goes on, and exits with 0."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks.official import read_table
from eval.files import read_json

_NOT_SCORED_HERE = {
    "mode_infer": "--mode infer",
    "official_submission_only_mmmu_test": "a test server scores it",
    "official_submission_only_mmt_bench": "a test server scores it",
    "external_submission_required": "its authors score it",
    "test_split_without_ground_truth": "a test split without truth",
    "mmbench_evaluation_requires_official_server": "the kit scores it on the official server only",
}
"""The kit's reasons for no score that are no errors."""
_FAILED = "Failed to obtain answer"
"""The kit writes this in place of an answer that it did not get (with SKIP_ERR=1), and scores it."""


@dataclass(frozen=True)
class KitRun:
    """What was asked of the kit: the model's name, the data sets, and the folder of results."""

    model: str
    data: tuple[str, ...]
    work_dir: Path


def check_run(run: KitRun, started: float) -> str:
    """One line for every data set, if all were answered and scored.

    Args:
        started: seconds since the epoch; the kit's status file is the newest one written since.

    Raises:
        FileNotFoundError: the kit wrote no status file.
        ValueError: something failed; the message says what, for every data set.
    """
    found = [path for path in run.work_dir.glob(f"{run.model}/*/status.json") if path.stat().st_mtime >= started - 1]
    if not found:
        raise FileNotFoundError(
            f"{run.work_dir / run.model}: the kit wrote no status.json there: it failed before it began (see its log), "
            "or is a version that this command does not know"
        )
    status = max(found, key=lambda path: path.stat().st_mtime)
    datasets = read_json(status).get("datasets", {})
    lines, failures = [], []
    for name in run.data:
        problem = _problem(datasets.get(name), status.parent)
        if problem:
            failures.append(f"{name}: {problem}")
        else:
            lines.append(_success(name, datasets[name], status.parent))
    if failures:
        done = f" ({len(lines)} of {len(run.data)} data sets are done)" if lines else ""
        raise ValueError(f"{'; '.join(failures)}{done}; see {status}")
    return "\n".join([*lines, f"written to {status.parent}"])


def _problem(entry: Mapping[str, Any] | None, folder: Path) -> str | None:
    """What is wrong with a data set's entry in the status file; None if nothing is."""
    if entry is None:
        return "the kit did not run it"
    if "error_message" in entry:
        message = entry["error_message"]
        return message or "the kit failed without a message (it has no score for open questions in a user's own table)"
    reason = entry.get("skip_reason")
    if reason and reason not in _NOT_SCORED_HERE:
        return f"skipped by the kit: {reason}"
    if entry.get("status") != "done":
        return f"not finished (status {entry.get('status')!r})"
    if not reason and not entry.get("metrics"):
        return "the kit computed no metric"
    path = folder / entry.get("prediction_file", "")
    if not path.is_file():
        return f"{path}: the predictions are missing"
    rows = _rows(path)
    if not rows:
        return f"{path}: there are no predictions"
    failed = sum(_FAILED in str(row["prediction"]) for row in rows)
    return f"{path}: {failed} of {len(rows)} samples failed, and count as wrong answers" if failed else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one of the kit's files, read by the kit: a workbook, a table, or JSON."""
    table = importlib.import_module("vlmeval.smp").load(str(path))
    return table if isinstance(table, list) else table.to_dict("records")


def _success(name: str, entry: Mapping[str, Any], folder: Path) -> str:
    answers = len(_rows(folder / entry["prediction_file"]))
    line = f"{name}: {answers} answers"
    source = Path(importlib.import_module("vlmeval.smp").LMUDataRoot()) / f"{name}.tsv"
    asked = len(read_table(source)) if source.is_file() else answers
    if asked > answers:
        line += f" ({asked - answers} of {asked} rows of {source} left out by the kit: it drops those without an image)"
    if "skip_reason" in entry:
        return f"{line}, not scored: {_NOT_SCORED_HERE[entry['skip_reason']]}"
    metrics, headline = entry["metrics"], entry.get("primary_metric") or []
    headline = [headline] if isinstance(headline, str) else headline
    # The kit's name for the headline is not always that of a metric.
    shown = [name for name in headline if name in metrics] or [next(iter(metrics))]
    return ", ".join([line, *(f"{name} {metrics[name]}" for name in shown)])
