"""What flows through an evaluation: samples in, predictions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.files import sha256_of_json


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    `images` are paths relative to the benchmark's data root (none for a text-only question); samples of one `cluster`
    (usually one image) are not independent, which the confidence interval must know; `categories` are the columns
    by which results are broken down.
    """

    id: str
    images: tuple[str, ...]
    question: str
    target: str
    cluster: str
    categories: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkData:
    """The samples of a benchmark in their official order, and the folder their image paths are relative to."""

    root: Path
    samples: tuple[Sample, ...]

    def fingerprint(self) -> str:
        """sha256 over (id, question, target, images), sorted by id: equal wherever the same data are installed."""
        rows = sorted((sample.id, sample.question, sample.target, sample.images) for sample in self.samples)
        return sha256_of_json(rows)


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one sample.

    `finish` is "stop" (the model ended its turn) or "length" (cut at the token limit); `n_in` and `n_out` count prompt
    and answer tokens; `secs` is this sample's share of its batch's wall time; `ll` maps each option to its
    log-likelihood, if that was asked for. None where a predictions file is silent.
    """

    id: str
    text: str
    finish: str | None = None
    n_in: int | None = None
    n_out: int | None = None
    secs: float | None = None
    ll: Mapping[str, float] | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Prediction:
        """Read a row of a predictions file; further keys are ignored. ValueError names `where` and the field."""
        for name in ("id", "text"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{where}: {name!r} must be a string, found {row.get(name)!r}")
        known: dict[str, Any] = {name: row.get(name) for name in cls.__dataclass_fields__}
        return cls(**known)

    def to_row(self) -> dict[str, Any]:
        """The prediction as a JSON object; `ll` only where there is one."""
        row = asdict(self)
        return row if self.ll is not None else {name: value for name, value in row.items() if name != "ll"}
