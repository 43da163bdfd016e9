"""What a run leaves beside its weights: `run.json` (what, with what, on what) and `metrics.jsonl` (how it went)."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defocus_mllm.files import explain_write_error, synchronise_tree, write_json_atomically, write_text_atomically
from defocus_mllm.provenance import commit, hardware, versions
from training.files import fingerprint

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SCHEMA_VERSION = 1

MAY_DIFFER = frozenset(
    {
        *("output_dir", "resume", "dry_run", "logging_steps", "save_steps", "save_total_limit"),
        *("per_device_batch_size", "dataloader_num_workers", "cpu", "validation_steps", "image_cache_megabytes"),
        *("gradient_checkpointing", "torch_compile", "world_size", "max_bad_samples", "index_cache"),
        *("max_nonfinite_steps", "validation_answers", "report_to"),
    }
)
"""Arguments that say where, how often or on what, and not what is learned: a run may be continued with others."""


class RunRecord:
    """`run.json` of one run directory. Only the main process may write it.

    Fields: `status` ("running", "complete", "interrupted", "failed"), `stopped_by` (a signal's name), `error`,
    `arguments`, `inputs` (path and fingerprint of all that was read), `versions`, `commit`, `hardware`, `world_size`,
    `train_seconds` (in the loop, over all resumptions), `wall_seconds` (of the last process), `started`, `finished`,
    and what the stage adds (`freeze`, `total_steps`, ...).
    """

    def __init__(self, output_dir: str | Path, content: dict[str, Any]) -> None:
        self.path = Path(output_dir) / RUN_FILE
        self.content = content
        self._began = time.monotonic()

    @classmethod
    def start(cls, stage: str, arguments: Any, inputs: Mapping[str, str], world_size: int, **facts: Any) -> RunRecord:
        """Record of a run that begins now; nothing is written before the first `update`."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage,
            "status": "running",
            "started": _now(),
            "arguments": arguments_as_dict(arguments),
            "inputs": dict(inputs),
            "seed": arguments.seed,
            "world_size": world_size,
            "versions": versions(),
            "commit": commit(Path(__file__).parent),
            "hardware": hardware(),
            "command": [sys.executable, *sys.argv],
            **facts,
        }
        return cls(arguments.output_dir, content)

    def update(self, **facts: Any) -> None:
        """Add or change fields and write the file."""
        self.content.update(facts)
        self.content["wall_seconds"] = round(time.monotonic() - self._began, 3)
        write_json_atomically(self.path, self.content)

    def finish(self, status: str, **facts: Any) -> None:
        """`update` with the final `status`: "complete", "interrupted" (it may go on) or "failed"."""
        self.update(status=status, finished=_now(), **facts)


def read_run(output_dir: str | Path) -> dict[str, Any] | None:
    """Content of a run directory's `run.json`, or None where there is none.

    Raises `ValueError` naming the file when it holds something else.
    """
    path = Path(output_dir) / RUN_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); move the folder away and start again") from error
    if not isinstance(content, dict) or not {"stage", "status", "arguments", "inputs"} <= set(content):
        raise ValueError(f"{path} is not the record of a run; move the folder away and start again")
    return content


def arguments_as_dict(arguments: Any) -> dict[str, Any]:
    """An arguments dataclass as plain JSON values, the way `run.json` stores them."""
    return json.loads(json.dumps(dataclasses.asdict(arguments), default=str))


def changed_arguments(recorded: Mapping[str, Any], arguments: Any) -> list[str]:
    """`field: old -> new` for every argument that changes what is learned; empty when the run is the same.

    A field that is younger than the record had the effect of its default.
    """
    current = arguments_as_dict(arguments)
    before = {**_defaults(arguments), **recorded}
    names = sorted((set(before) | set(current)) - MAY_DIFFER)
    return [
        f"{name}: {json.dumps(before.get(name))} -> {json.dumps(current.get(name))}"
        for name in names
        if before.get(name) != current.get(name)
    ]


def _defaults(arguments: Any) -> dict[str, Any]:
    """Field -> its default as `run.json` would store it."""
    values = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(arguments)
    }
    return json.loads(json.dumps(values, default=str))


def fingerprints(paths: Mapping[str, str | Path | None]) -> dict[str, str]:
    """argument name -> fingerprint of the file or model folder it names; arguments left empty are absent.

    Raises `FileNotFoundError` naming the argument and the path.
    """
    found = {}
    for name, path in paths.items():
        if path:
            try:
                found[name] = fingerprint(path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{name}: {error}") from error
    return found


class MetricsFile:
    """`metrics.jsonl`: one JSON object a logging step, appended and flushed; or another file whose lines have steps."""

    def __init__(self, output_dir: str | Path, name: str = METRICS_FILE) -> None:
        self.path = Path(output_dir) / name

    def keep_until(self, step: int) -> None:
        """Drop lines beyond `step` (and a torn last one): a resumed run writes them again."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break  # torn by a kill; all lines before it are whole
            kept.append(line + "\n")
        write_text_atomically(self.path, "".join(kept))

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line; `keep_until` removes what a kill may cut off. Raises `DiskFullError` on a full disk."""
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values, allow_nan=False) + "\n")
        except OSError as error:
            raise explain_write_error(error, self.path) from error

    def synchronise(self) -> None:
        """Have all lines on the disk itself, as a checkpoint written next will be."""
        if self.path.is_file():
            synchronise_tree(self.path)

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
