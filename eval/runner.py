"""The generation loop: samples in, one prediction each, nothing done twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.files import sha256_of_files, sha256_of_json
from eval.generator import Generator, Request
from eval.images import check_images_exist
from eval.journal import PredictionJournal
from eval.registry import Benchmark
from eval.samples import Prediction, Sample


@dataclass(frozen=True)
class Answers:
    """Predictions in sample order; how many were resumed, or had another key (see journal.py); seconds of the rest."""

    predictions: list[Prediction]
    resumed: int
    other_keys: int
    wall_s: float

    @property
    def generated(self) -> int:
        """Number of predictions made in this run."""
        return len(self.predictions) - self.resumed


def generate_answers(
    benchmark: Benchmark,
    root: Path,
    samples: Sequence[Sample],
    generator: Generator,
    journal_path: Path,
    batch_size: int,
    outdated: Path | None = None,
) -> Answers:
    """Answer every sample, resuming from the journal; a killed run loses at most the batch it was working on.

    `outdated` is the file of an earlier result, removed as soon as there is a first new batch of answers: a run that
    fails before that, or finds all answers in the journal, leaves it alone.

    Raises:
        FileNotFoundError: images are missing; all are checked before the first is used.
        ValueError: an image cannot be decoded, or the journal is malformed.
    """
    requests = [_request(benchmark, root, sample) for sample in samples]
    images = sorted({image for request in requests for image in request.images})
    check_images_exist(images)
    digests = {image: sha256_of_files([image]) for image in images}
    maker = [generator.fingerprint, generator.settings(benchmark.max_new_tokens), generator.environment]
    keys = {request.id: _key(request, digests, maker) for request in requests}
    with PredictionJournal(journal_path, keys) as journal:
        resumed = sum(request.id in journal.finished for request in requests)
        pending = [request for request in requests if request.id not in journal.finished]
        started = time.perf_counter()
        with tqdm(total=len(requests), initial=resumed, desc=benchmark.name, unit="sample") as progress:
            for batch in length_sorted_batches(pending, generator.prompt_length, batch_size):
                predictions = generator.generate(batch, benchmark.max_new_tokens)
                if outdated is not None:
                    outdated.unlink(missing_ok=True)
                journal.append(predictions)
                progress.update(len(batch))
        answers = [journal.finished[request.id] for request in requests]
        return Answers(answers, resumed, journal.other_keys, time.perf_counter() - started)


def _request(benchmark: Benchmark, root: Path, sample: Sample) -> Request:
    return Request(sample.id, benchmark.prompt(sample), tuple(root / image for image in sample.images))


def _key(request: Request, digests: dict[Path, str], maker: list[Any]) -> str:
    """Digest of everything the answer depends on: an answer under the same key need not be generated again."""
    return sha256_of_json([maker, request.prompt, [digests[path] for path in request.images]])


def length_sorted_batches(
    requests: Sequence[Request], prompt_length: Callable[[str], int], batch_size: int
) -> list[list[Request]]:
    """Cut the requests into batches of similar length, longest first, so that too large a batch fails at once.

    Within a length, requests keep their order, so that questions about one image stay together.
    """
    lengths = {prompt: prompt_length(prompt) for prompt in {request.prompt for request in requests}}
    ordered = sorted(requests, key=lambda request: (-len(request.images), -lengths[request.prompt]))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
