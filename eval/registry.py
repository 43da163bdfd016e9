"""The list of benchmarks. Adding one: a file in `eval/benchmarks/` that defines a `Benchmark`, and its name below."""

from __future__ import annotations

import importlib
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.answer_files import AnswerFile, Imported
from eval.hub import HubSource, load_from_hub
from eval.layouts import Found, Layout, locate
from eval.measures import Metric, Row
from eval.samples import BenchmarkData, Prediction, Sample

_MODULES = {
    "ai2d": "eval.benchmarks.ai2d",
    "ai2d_no_mask": "eval.benchmarks.ai2d:BENCHMARK_NO_MASK",
    "chartqa": "eval.benchmarks.chartqa",
    "coco_captions": "eval.benchmarks.coco_captions",
    "docvqa": "eval.benchmarks.docvqa",
    "docvqa_test": "eval.benchmarks.docvqa:BENCHMARK_TEST",
    "easy_vqa": "eval.benchmarks.easy_vqa",
    "gqa": "eval.benchmarks.gqa",
    "infovqa": "eval.benchmarks.infovqa",
    "infovqa_test": "eval.benchmarks.infovqa:BENCHMARK_TEST",
    "llava_bench": "eval.benchmarks.judged",
    "mm_vet": "eval.benchmarks.judged:BENCHMARK_MM_VET",
    "mmbench": "eval.benchmarks.mmbench",
    "mme": "eval.benchmarks.mme",
    "mmmu": "eval.benchmarks.mmmu",
    "nlvr": "eval.benchmarks.nlvr",
    "nlvr_hidden": "eval.benchmarks.nlvr:BENCHMARK_HIDDEN",
    "nlvr_test": "eval.benchmarks.nlvr:BENCHMARK_TEST",
    "okvqa": "eval.benchmarks.okvqa",
    "pope": "eval.benchmarks.pope",
    "scienceqa": "eval.benchmarks.scienceqa",
    "seed_bench": "eval.benchmarks.seed_bench",
    "textvqa": "eval.benchmarks.textvqa",
    "textvqa_ocr": "eval.benchmarks.textvqa:BENCHMARK_OCR",
    "vizwiz": "eval.benchmarks.vizwiz",
    "vizwiz_test": "eval.benchmarks.vizwiz:BENCHMARK_TEST",
    "vqav2": "eval.benchmarks.vqav2",
    "vqav2_test_dev": "eval.benchmarks.vqav2:BENCHMARK_TEST_DEV",
}
"""Benchmark -> the module, and the variable if it is not BENCHMARK, that defines it."""


@dataclass(frozen=True)
class Baseline:
    """A published result (a share, 0 to 1) and who published it."""

    name: str
    value: float
    source: str


@dataclass(frozen=True)
class Submission:
    """The file that an official test server, scorer or judge takes: its name, and its text made of samples and their
    predictions."""

    file_name: str
    write: Callable[[BenchmarkData, Mapping[str, Prediction]], str]
    needs: str = "test server required"
    """What scores it, where nothing is scored here."""


@dataclass(frozen=True)
class Benchmark:
    """Everything that defines a measurement, so that two people who run it measure the same thing."""

    name: str
    split: str
    version: str
    reference: str
    """Address of the official scorer or, where there is none, of the data."""
    data_needed: str
    """What `layouts` says, in words, and where the files are published."""
    layouts: tuple[Layout, ...]
    """How the official files may lie below the benchmark's folder, and how they are read, in order of preference."""
    n_expected: int
    fingerprint: str | None
    """Of the official samples (`BenchmarkData.fingerprint`); None where nobody could take it yet: only counted then."""
    prompt_id: str
    prompt: Callable[[Sample], str]
    max_new_tokens: int
    parser: str
    """Name of the rule by which `judge` reads an answer in official mode."""
    judge: Callable[[str, Sample], dict[str, Any]]
    """(raw answer, sample) -> the sample's row: `parsed` and `parsed_lenient` (what the official and the forgiving
    reading understood; None = unparsed), `score` and `score_lenient` (0 to 1), and whatever `metrics` need besides.
    The row of samples.jsonl holds these beside id, cluster, categories, target, ..."""
    metrics: tuple[Metric, ...]
    """Empty where nothing can be scored here (a test server or a judge does): there is a `submission` then."""
    cluster: str = "image"
    breakdowns: tuple[str, ...] = ()
    options: Callable[[Sample], Sequence[str]] | None = None
    """The closed list of answers to a sample, for likelihood scoring beside generation. None: the letters of its
    `choices`, and where it has none, answers are free."""
    score_together: Callable[[Sequence[Row]], Sequence[Row]] | None = None
    """(all rows) -> what each gets in addition, where an answer's score depends on the others'; else `judge` scores."""
    baselines: tuple[Baseline, ...] = ()
    import_predictions: Callable[[AnswerFile, BenchmarkData], Imported] | None = None
    """Matches an official or LLaVA answer file, whose rows have no `id`, with the samples."""
    load_from_predictions: Callable[[AnswerFile], BenchmarkData] | None = None
    """For answer files that hold the truth too: `eval.score` uses it where the official files are absent."""
    submission: Submission | None = None
    shares_folder: str | None = None
    """The benchmark whose folder below the data root is this one's too."""
    default_folder: Callable[[], Path | None] | None = None
    """Its folder where no data root is given: that of an installed package, or None."""
    hub: tuple[HubSource, ...] = ()
    """Datasets that hold the same questions, in order of preference: read where the official files are absent."""

    @property
    def folder(self) -> str:
        """Name of the folder below the data root."""
        return self.shares_folder or self.name

    @property
    def primary_metric(self) -> str:
        """Name of the metric that is the headline number."""
        return next(metric.name for metric in self.metrics if metric.primary)

    @property
    def not_scored_here(self) -> str | None:
        """Why nothing is scored here, and what scores it; None where something is."""
        return None if self.metrics or not self.submission else f"not scored here: {self.submission.needs}"

    def options_of(self, sample: Sample) -> tuple[str, ...]:
        """The closed list of answers to a sample; ValueError where answers are free."""
        options = self.options(sample) if self.options else string.ascii_uppercase[: len(sample.choices)]
        if not options:
            raise ValueError(
                f"{self.name}: the answer to {sample.id} is free text, without options to take the likelihood of: "
                "leave --likelihood out"
            )
        return tuple(options)

    def load_verified(self, data_root: Path | None) -> BenchmarkData:
        """Load the data, from the official files or else from a dataset on this machine, and check them.

        Args:
            data_root: folder that holds a folder named after the benchmark; None for the benchmark's own default.

        Raises:
            FileNotFoundError: data are missing; the message names the files expected, and the datasets.
            ValueError: see `verified`, and `Layout.read`.
        """
        return self.verified(self.load_anywhere(data_root))

    def find(self, data_root: Path | None) -> Found | None:
        """Where the official files are or are expected, none of them opened; None without a folder to look in."""
        if data_root is not None:
            return locate(self.layouts, (data_root / self.folder, data_root))
        folder = self.default_folder() if self.default_folder else None
        return locate(self.layouts, (folder,)) if folder else None

    def load(self, data_root: Path | None) -> BenchmarkData:
        """The data of the official files, without a check; arguments and errors as in `load_verified`."""
        found = self.find(data_root)
        if found is None:
            raise FileNotFoundError(f"{self.name} needs {self.data_needed}")
        if found.missing is not None:
            raise FileNotFoundError(f"{found.missing}: no such file: {self.data_needed}")
        return found.layout.read(found.folder)

    def load_anywhere(self, data_root: Path | None) -> BenchmarkData:
        """The data without a check; arguments and errors as in `load_verified`."""
        try:
            return self.load(data_root)
        except FileNotFoundError as missing:
            data = load_from_hub(self.folder, self.hub, data_root)
            if data is None and self.hub:
                datasets = "; or ".join(str(source) for source in self.hub)
                raise FileNotFoundError(
                    f"{missing}; nor is there a dataset {datasets} in the cache of the Hub or of `datasets`, "
                    "or saved in that folder (nothing is downloaded)"
                ) from missing
            if data is None:
                raise
            return data

    def verified(self, data: BenchmarkData) -> BenchmarkData:
        """The data, if they are the official ones; a dataset of the Hub is counted, for no two are made alike.

        Raises:
            ValueError: identifiers repeat, or number or fingerprint of the samples differ from the official split.
        """
        found = len(data.samples)
        if len({sample.id for sample in data.samples}) != found:
            raise ValueError(f"{data.root}: {self.name} has samples that share an identifier")
        other_data = data.origin is None and self.fingerprint not in (None, data.fingerprint())
        if found != self.number_expected(data) or other_data:
            fingerprint = ""
            if self.fingerprint:
                fingerprint = f", fingerprint {data.fingerprint()[:12]} (expected {self.fingerprint[:12]})"
            raise ValueError(
                f"{data.root}: not the official {self.split} split of {self.name}: {found} samples (expected "
                f"{self.n_expected}){fingerprint}; restore it: {self.data_needed}"
            )
        return data

    def check_askable(self, data: BenchmarkData) -> None:
        """ValueError if a question has no text where the prompt needs it: such data are enough to score answers only,
        and where the fingerprint covers no questions nothing else would tell."""
        empty = [
            sample
            for sample in data.samples
            if not sample.question.strip() and self.prompt(sample) != self.prompt(replace(sample, question="?"))
        ]
        if empty:
            raise ValueError(
                f"{data.root}: {len(empty)} of {len(data.samples)} questions of {self.name} have no text, the first is "
                f"{empty[0].id}: enough to score answers, not to ask a model: {self.data_needed}"
            )

    def number_expected(self, data: BenchmarkData) -> int:
        """Number of samples of the whole split, in the edition that these data are."""
        found = len(data.samples)
        return found if data.origin is not None and found in data.origin.counts else self.n_expected


def benchmark_names() -> list[str]:
    """The names that `get_benchmark` knows."""
    return sorted(_MODULES)


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; ValueError lists the known ones."""
    if name not in _MODULES:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(benchmark_names())}")
    module, _, variable = _MODULES[name].partition(":")
    benchmark: Benchmark = getattr(importlib.import_module(module), variable or "BENCHMARK")
    return benchmark
