"""The generation loop: samples in, one prediction each, nothing done twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.answering import Outcome, answer
from eval.batches import BatchPolicy, BatchQueue
from eval.files import sha256_of_files, sha256_of_json
from eval.generator import Generator, Request
from eval.images import check_images_exist
from eval.journal import PredictionJournal
from eval.registry import Benchmark
from eval.samples import Prediction, Sample
from eval.workers import Workers


@dataclass(frozen=True)
class Answers:
    """What a run has: predictions in sample order, and how they came about.

    `fresh` were made in this run, `resumed` were in the journal, `other_keys` were there under another key (see
    journal.py). `failures` maps the samples without a prediction to the reason, `backoffs` counts batches halved for
    lack of memory, `wall_s` is the time of what was done now.
    """

    predictions: list[Prediction]
    fresh: list[Prediction]
    failures: dict[str, str]
    resumed: int
    other_keys: int
    backoffs: int
    wall_s: float

    @property
    def generated(self) -> int:
        """Number of predictions made in this run."""
        return len(self.fresh)


def generate_answers(
    benchmark: Benchmark,
    root: Path,
    samples: Sequence[Sample],
    generator: Generator,
    journal_path: Path,
    policy: BatchPolicy,
    *,
    outdated: Path | None = None,
    workers: Workers | None = None,
    likelihood: bool = False,
) -> Answers:
    """Answer every sample, resuming from the journal; a killed run loses at most the batches it was working on.

    `outdated` is the file of an earlier result, removed as soon as there is a first new batch of answers: a run that
    fails before that, or finds all answers in the journal, leaves it alone. `workers` answer beside this process.
    With `likelihood`, predictions also hold the log-likelihood of each of the benchmark's options.

    Raises:
        FileNotFoundError: images are missing; all are checked before the first is used.
        ValueError: the journal is malformed or another run's, a sample does not fit into memory, or the benchmark has
            no options to take the likelihood of.
    """
    requests = [_request(benchmark, root, sample, likelihood) for sample in samples]
    images = sorted({image for request in requests for image in request.images})
    check_images_exist(images)
    reading = tqdm(images, desc=f"{benchmark.name}: digests of images", unit="image", delay=2, leave=False)
    digests = {image: sha256_of_files([image]) for image in reading}
    maker = [generator.fingerprint, generator.settings(benchmark.max_new_tokens), generator.environment]
    keys = {request.id: _key(request, digests, maker) for request in requests}
    done = Outcome()
    with PredictionJournal(journal_path, keys) as journal:
        resumed = sum(request.id in journal.finished for request in requests)
        pending = [request for request in requests if request.id not in journal.finished]
        started = time.perf_counter()
        queue = BatchQueue(pending, generator.request_length, policy, benchmark.max_new_tokens)
        with tqdm(total=len(requests), initial=resumed, desc=benchmark.name, unit="sample") as progress:
            for outcome in outcomes(queue, generator, workers, benchmark.max_new_tokens):
                if outdated is not None and outcome.predictions:
                    outdated.unlink(missing_ok=True)
                journal.append(outcome.predictions)
                done.add(outcome)
                progress.update(len(outcome.predictions) + len(outcome.failures))
        answers = [journal.finished[request.id] for request in requests if request.id in journal.finished]
        wall = time.perf_counter() - started
        return Answers(answers, done.predictions, done.failures, resumed, journal.other_keys, done.backoffs, wall)


def outcomes(
    queue: BatchQueue, generator: Generator, workers: Workers | None, max_new_tokens: int
) -> Iterator[Outcome]:
    """Outcomes of all batches as they are ready; this process answers batches itself while the workers do."""
    under_way: set[Future[Outcome]] = set()
    while queue or under_way:
        while workers is not None and queue and len(under_way) < workers.capacity:
            under_way.add(workers.submit(queue.take(), max_new_tokens))
        ready = []
        if queue:
            ready.append(answer(generator, queue.take(), max_new_tokens))
        finished = wait(under_way, 0 if ready else None, FIRST_COMPLETED).done if under_way else set()
        under_way -= finished
        ready += [future.result() for future in finished]
        for outcome in ready:
            if outcome.backoffs:
                queue.limit_samples(outcome.fitted)
            yield outcome


def _request(benchmark: Benchmark, root: Path, sample: Sample, likelihood: bool) -> Request:
    options = benchmark.options_of(sample) if likelihood else ()
    return Request(sample.id, benchmark.prompt(sample), tuple(root / image for image in sample.images), options)


def _key(request: Request, digests: dict[Path, str], maker: list[Any]) -> str:
    """Digest of everything the answer depends on: an answer under the same key need not be generated again."""
    asked: list[Any] = [maker, request.prompt, [digests[path] for path in request.images]]
    return sha256_of_json([*asked, request.options] if request.options else asked)
