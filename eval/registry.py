"""The list of benchmarks. Adding one: a file in `eval/benchmarks/` that defines a `Benchmark`, and its name below."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.samples import BenchmarkData, Sample

_MODULES = {"easy_vqa": "eval.benchmarks.easy_vqa"}


@dataclass(frozen=True)
class Baseline:
    """A published result (a share, 0 to 1) and who published it."""

    name: str
    value: float
    source: str


@dataclass(frozen=True)
class Metric:
    """A score per sample and whether its mean is the headline number."""

    name: str
    score: Callable[[str, Sample], float]
    primary: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Everything that defines a measurement, so that two people who run it measure the same thing."""

    name: str
    split: str
    version: str
    reference: str
    data_needed: str
    load: Callable[[Path | None], BenchmarkData]
    n_expected: int
    fingerprint: str
    prompt_id: str
    prompt: Callable[[Sample], str]
    max_new_tokens: int
    parser: str
    parse: Callable[[str], str | None]
    metrics: tuple[Metric, ...]
    cluster: str = "image"
    breakdowns: tuple[str, ...] = ()
    options: Callable[[Sample], Sequence[str]] | None = None
    """The closed list of answers to a sample, for likelihood scoring beside generation; None where answers are free."""
    baselines: tuple[Baseline, ...] = ()

    @property
    def primary_metric(self) -> str:
        """Name of the metric that is the headline number."""
        return next(metric.name for metric in self.metrics if metric.primary)

    def load_verified(self, data_root: Path | None) -> BenchmarkData:
        """Load the data and check that they are the official ones.

        Args:
            data_root: folder that holds a folder named after the benchmark; None for the benchmark's own default.

        Raises:
            FileNotFoundError: data are missing; the message names the files expected.
            ValueError: identifiers repeat, or number or fingerprint of the samples differ from the official split.
        """
        data = self.load(data_root)
        found = len(data.samples)
        if len({sample.id for sample in data.samples}) != found:
            raise ValueError(f"{data.root}: {self.name} has samples that share an identifier")
        if found != self.n_expected or data.fingerprint() != self.fingerprint:
            raise ValueError(
                f"{data.root}: not the official {self.split} split of {self.name}: {found} samples (expected "
                f"{self.n_expected}), fingerprint {data.fingerprint()[:12]} (expected {self.fingerprint[:12]}); "
                f"restore it: {self.data_needed}"
            )
        return data


def benchmark_names() -> list[str]:
    """The names that `get_benchmark` knows."""
    return sorted(_MODULES)


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; ValueError lists the known ones."""
    if name not in _MODULES:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(benchmark_names())}")
    benchmark: Benchmark = importlib.import_module(_MODULES[name]).BENCHMARK
    return benchmark
