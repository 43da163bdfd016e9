"""Evidence on CIFAR-10: train every model of a table with every seed through stage 0, and write the table.

    python -m training.evidence --config training/recipes/cifar10.yaml --output_dir outputs/cifar10 --seeds 0 1 \\
        --train ../shared/data/cifar10/train.parquet --test ../shared/data/cifar10/test.parquet --processes 2

`--study` chooses the table (`training.evidence_models`), `--models` some of its rows. Each run is two commands that may
be typed by hand: `training.stage0`, then `training.classify` on the test pictures, which are looked at only then. The
same command again continues what was stopped and skips what is finished. Under `output_dir`: `runs/`, `predictions/`,
`logs/`, and `<study>/` with `results.json`, `table.md` and `figure.svg`, written again after every run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from defocus_mllm import DefocusImageProcessor
from defocus_mllm.console import run_script
from training.argument_parsing import ArgumentsError, parse_arguments, recipe_values, split_config
from training.arguments import EvidenceArguments, Stage0VisionArguments
from training.evidence_models import (
    STUDIES,
    EvidenceModel,
    check_equal_sizes,
    chosen_models,
    count_parameters,
    model_fields,
)
from training.evidence_page import write_page, write_results
from training.evidence_results import Outcome, read_outcome, summarise
from training.files import fingerprint
from training.labelled_images import load_labelled_images
from training.pipeline import Step, is_finished
from training.run_record import METRICS_FILE, read_run

SECONDS_BETWEEN_REPORTS = 60


@dataclass(frozen=True, eq=False)  # each its own key
class Run:
    """One model trained with one seed."""

    model: EvidenceModel
    seed: int
    folder: Path
    predictions: Path
    log: Path
    steps: tuple[Step, Step]
    """Training, then classifying the test pictures."""

    def __str__(self) -> str:
        return f"{self.model.name} seed {self.seed}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not finished, then print the table. Raises `ValueError` naming the runs that failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    config, _ = split_config(words)
    arguments = parse_arguments(EvidenceArguments, "evidence", words)
    if config is None:
        raise ArgumentsError("command line: --config is missing; give a recipe such as training/recipes/cifar10.yaml")
    evidence = Evidence(config, arguments, shlex.join(["python", "-m", "training.evidence", *words]))
    with _alone_in(Path(arguments.output_dir)) as lock:
        failed = evidence.train(lock) if arguments.processes else []
        results = evidence.write()
    if arguments.write:
        write_page(Path(arguments.write), arguments.study, results)
    folder = Path(arguments.output_dir) / arguments.study
    print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}\nwritten to {folder}", flush=True)
    if failed:
        names = ", ".join(f"{run} (see {run.log})" for run in failed)
        raise ValueError(f"{len(failed)} run(s) failed: {names}; the same command tries them again")


class Evidence:
    """The runs of one study. Building it checks recipe, names and sizes and reads both data sets' labels."""

    def __init__(self, config: str, arguments: EvidenceArguments, command: str) -> None:
        self.config, self.arguments, self.command = config, arguments, command
        self.models = chosen_models(arguments)
        shared = recipe_values(config, "stage0_vision").get("vision_config", {})
        # seeds outside, so that all models have their first result early
        self.runs = [self._plan(model, seed, shared) for seed in arguments.seeds for model in self.models]
        classes = len(load_labelled_images(arguments.train, DefocusImageProcessor()).label_names)
        self.parameters = {run.model.name: count_parameters(stage_arguments(run), classes) for run in self.runs}
        if arguments.study == "main":  # in an ablation the parameters of what is taken away go with it
            check_equal_sizes(self.parameters)
        self.training = describe_training(stage_arguments(self.runs[0]))
        self.test_fingerprint = fingerprint(arguments.test)
        self.outcomes: dict[str, dict[int, Outcome]] = {model.name: {} for model in self.models}
        for run in self.runs:
            if is_finished(run.steps[0]):
                self._look_for_outcome(run)

    def _plan(self, model: EvidenceModel, seed: int, shared: dict[str, Any]) -> Run:
        output, name = Path(self.arguments.output_dir), f"{model.name}-seed{seed}"
        folder, predictions = output / "runs" / name, output / "predictions" / f"{name}.json"
        device = ["--cpu"] if self.arguments.cpu else []
        fields = json.dumps(model_fields(model, shared, self.arguments))
        train = ["training.stage0", "--task", "classification", "--config", self.config, "--output_dir", str(folder)]
        train += ["--data", self.arguments.train, "--seed", str(seed), "--vision_config", fields, *device]
        train += [f"--{field}={value}" for field, value in model.arguments.items()]
        test = ["training.classify", "--model", str(folder), "--data", self.arguments.test]
        test += ["--output", str(predictions), *device]
        steps = (Step("stage0_vision", tuple(train)), Step("classify", tuple(test)))
        return Run(model, seed, folder, predictions, output / "logs" / f"{name}.log", steps)

    def _look_for_outcome(self, run: Run) -> None:
        outcome = read_outcome(run.folder, run.predictions, self.test_fingerprint)
        if outcome:
            self.outcomes[run.model.name][run.seed] = outcome

    def train(self, lock: int) -> list[Run]:
        """Train all unfinished runs, `processes` at a time, reporting as it goes; returns those that failed."""
        waiting = [run for run in self.runs if run.seed not in self.outcomes[run.model.name]]
        print(f"{len(self.runs)} runs, {len(self.runs) - len(waiting)} of them finished before", flush=True)
        for name, count in self.parameters.items():
            print(f"  {name}: {count:,} parameters", flush=True)
        failed = []
        with _Workers(self.arguments.processes, lock) as workers:
            pending = {workers.start(run): run for run in waiting}
            while pending:
                done, _ = wait(pending, timeout=SECONDS_BETWEEN_REPORTS, return_when=FIRST_COMPLETED)
                for future in done:
                    run = pending.pop(future)
                    if future.result():
                        failed.append(run)
                    self._report_end(run, future.result())
                if pending:
                    print(self._progress(), flush=True)
        return failed

    def _report_end(self, run: Run, code: int) -> None:
        if code:
            print(f"{run}: FAILED with exit code {code}; its message ends {run.log}", flush=True)
            return
        self._look_for_outcome(run)
        outcome = self.outcomes[run.model.name][run.seed]
        seconds = outcome.run["train_seconds"]
        print(f"{run}: test accuracy {100 * outcome.accuracy:.2f} %, {seconds:.0f} s of training", flush=True)
        self.write()

    def write(self) -> dict[str, Any]:
        """Write the study's results as they stand, and return them."""
        arguments, study = self.arguments, STUDIES[self.arguments.study]
        results = summarise(study, self.models, arguments.seeds, self.outcomes, self.parameters)
        results |= {"command": self.command, "training": self.training}
        write_results(Path(arguments.output_dir) / arguments.study, results)
        return results

    def _progress(self) -> str:
        """One line: what is finished, how far the others are, and about how long it will take."""
        done = {run: progress(run) for run in self.runs}
        running = [f"{run} {fraction:.0%}" for run, (fraction, _) in done.items() if 0 < fraction < 1]
        finished = sum(len(of_seeds) for of_seeds in self.outcomes.values())
        remaining = remaining_seconds(done) / self.arguments.processes
        left = f"about {remaining / 60:.0f} min left" if remaining else "time left unknown"
        clock = time.strftime("%H:%M:%S")
        return f"{clock} {finished}/{len(self.runs)} finished, {left}; {', '.join(running) or 'reading data'}"


def stage_arguments(run: Run) -> Stage0VisionArguments:
    """What the run's training command will see. Raises what that command would."""
    return parse_arguments(Stage0VisionArguments, "stage0_vision", run.steps[0].words[1:])


def describe_training(arguments: Stage0VisionArguments) -> str:
    """What all models of a study have in common, in a line."""
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    fields = arguments.vision_config
    return (
        f"{length}, batches of {arguments.global_batch_size}, AdamW, peak learning rate {arguments.learning_rate:g}, "
        f"weight decay {arguments.weight_decay:g}, precision {arguments.mixed_precision}, flip, shift up to "
        f"{arguments.max_shift} pixels; images of {fields.get('image_size')}, patches of {fields.get('patch_size')}; "
        f"drop path {arguments.min_drop_path_rate:g} to {arguments.drop_path_rate:g} unless the row says otherwise"
    )


def progress(run: Run) -> tuple[float, float]:
    """(share of the steps done, seconds they took), from the run's own files; (0, 0) before its first metrics."""
    record, metrics = read_run(run.folder), run.folder / METRICS_FILE
    if record is None or not metrics.is_file():
        return 0.0, 0.0
    if record["status"] == "complete":
        return 1.0, record["train_seconds"]
    lines = metrics.read_text(encoding="utf-8").splitlines()
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):  # nothing yet, or a line that is being written
        return 0.0, 0.0
    return last["step"] / record["total_steps"], last.get("seconds", 0.0)


def remaining_seconds(done: dict[Run, tuple[float, float]]) -> float:
    """Seconds of training that are left, one run at a time; 0 while nothing is known.

    A run that has not begun takes as long as others of its mixer, or as any other.
    """
    whole = {run: seconds / fraction for run, (fraction, seconds) in done.items() if fraction and seconds}
    if not whole:
        return 0.0
    total = 0.0
    for run, (fraction, _) in done.items():
        alike = [seconds for other, seconds in whole.items() if other.model.mixer == run.model.mixer]
        others = alike or list(whole.values())
        total += (1 - fraction) * whole.get(run, sum(others) / len(others))
    return total


class _Workers:
    """Starts the commands of runs, some at a time; leaving it early, by an error or a signal, ends them all."""

    def __init__(self, number: int, lock: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._environment = {"OMP_NUM_THREADS": str(max(1, cores // number)), **os.environ}
        self._pool = ThreadPoolExecutor(number)
        self._lock_descriptor = lock
        self._guard = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def __enter__(self) -> _Workers:
        self._handler = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._stopped = True
            for process in self._processes:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, self._handler)

    def start(self, run: Run) -> Future[int]:
        """Exit code of the run's commands, to come: of the first that fails, or 0."""
        return self._pool.submit(self._perform, run)

    def _perform(self, run: Run) -> int:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        code = 0
        for step in run.steps:
            with run.log.open("ab") as log:
                log.write(f"\n$ {step}\n".encode())
                log.flush()
                code = self._run(step, log)
            if code:
                break
        return code

    def _run(self, step: Step, log: Any) -> int:
        with self._guard:
            if self._stopped:
                return 1
            process = subprocess.Popen(
                [sys.executable, "-m", *step.words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=(self._lock_descriptor,),
            )
            self._processes.add(process)
        code = process.wait()
        with self._guard:
            self._processes.discard(process)
        return code


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """A lock on `folder` that commands started here hold too, so that none outlives its runner unnoticed.

    Raises `ValueError` when another runner, or a command that one left behind, still works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ValueError(f"output_dir {folder}: another runner, or a run it left behind, still works there") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    run_script(main)
