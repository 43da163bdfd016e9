"""What every stage does around the loop: start, resume or recognise a finished run; report; save the result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from defocus_mllm.files import PARTIAL_PREFIX
from defocus_mllm.loading import holds_model
from training.arguments import CommonArguments
from training.checkpointing import find_newest_valid, save_final, write_card
from training.data_arguments import data_locations
from training.files import check_writable, remove_partial_work
from training.freezing import FreezePlan, apply_freezing
from training.interruption import EXIT_STOPPED, Interrupted
from training.loop import TrainingLoop
from training.preflight import describe, rehearse
from training.processes import make_accelerator
from training.run_record import RunRecord, changed_arguments, fingerprints, read_run
from training.sampling import mix_seed
from training.stage import Stage
from training.tracking import tracked

INPUT_FIELDS = ("data", "validation_data", "text", "tokenizer", "model", "vision_model", "language_model")
"""Arguments that name a file or folder the result depends on; their fingerprints stand in run.json."""

ArgumentsT = TypeVar("ArgumentsT", bound=CommonArguments)


@dataclass
class RunState:
    """What `inspect_output` found in output_dir."""

    complete: bool = False
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what the run reads."""


def run_stage(section: str, arguments: ArgumentsT, build: Callable[[ArgumentsT], Stage]) -> None:
    """Train one stage from its arguments to a model in `output_dir`; a finished run is recognised and left alone.

    Args:
        section: the stage's name, also its section in recipes.
        build: makes model, data and loss; called after the random seed is set.

    Raises `ValueError`, `FileNotFoundError` or `OSError` with one clear line; a run that could not begin leaves no
    output behind.
    """
    disable_progress_bar()  # of weight files; the steps have their own
    accelerator = make_accelerator(arguments)
    output_dir = Path(arguments.output_dir)
    with _empty_folder_removed(output_dir, accelerator):
        state = RunState()
        if accelerator.is_main_process:  # which may read much, and speaks for all if there is an error
            named = {name: getattr(arguments, name, None) for name in INPUT_FIELDS}
            inputs = fingerprints({**named, **data_locations(arguments)})
            check_writable(output_dir)
            state = inspect_output(section, arguments, inputs)
        (state,) = broadcast_object_list([state])
        for note in state.notes:
            accelerator.print(note)
        if state.complete:
            accelerator.print(f"{section}: {output_dir} is already complete; nothing to do")
            return
        set_seed(arguments.seed)
        stage = build(arguments)
        freeze = _freeze(stage, arguments)
        set_seed(mix_seed(arguments.seed, 1, accelerator.process_index) % 2**32)  # each process its own dropout
        loop = TrainingLoop(stage, arguments, accelerator, freeze)
        accelerator.print(describe(loop, stage, freeze))
        result = rehearse(loop, stage, freeze)
        if arguments.dry_run:
            accelerator.print(f"dry run: {result}; nothing was kept")
            return
        accelerator.print(f"preflight: {result}")
        _train(loop, stage, freeze, arguments, state)


def inspect_output(section: str, arguments: CommonArguments, inputs: dict[str, str]) -> RunState:
    """Whether `output_dir` is new, holds a run to continue, or a finished one. Writes nothing.

    Raises `ValueError` when it holds something else, or a run with other arguments or inputs: continuing it would give
    a model that no recipe describes.
    """
    output_dir = Path(arguments.output_dir)
    names = [path.name for path in output_dir.iterdir() if not path.name.startswith(PARTIAL_PREFIX)]
    if not names:
        return RunState(inputs=inputs)
    if not arguments.resume:
        raise ValueError(f"output_dir {output_dir} is not empty and resume is false; choose another or empty it")
    run = read_run(output_dir)
    if run is None:
        raise ValueError(f"output_dir {output_dir} has files but no run.json, so it is no run's folder; choose another")
    checkpoint, notes = find_newest_valid(output_dir / "checkpoints")
    complete = run["status"] == "complete" and holds_model(output_dir)
    changes = [] if run["stage"] == section else [f"stage: {run['stage']} -> {section}"]
    changes += changed_arguments(run["arguments"], arguments)
    changes += [f"content of {name}" for name in inputs if run["inputs"].get(name) != inputs[name]]
    if changes and (complete or checkpoint):
        raise ValueError(
            f"output_dir {output_dir} holds a run that differs in {'; '.join(changes)}; choose another output_dir, or "
            "delete that run"
        )
    if complete:
        return RunState(complete=True, inputs=inputs)
    if checkpoint:
        notes.append(f"continuing from {checkpoint}")
    else:
        notes.append(f"{output_dir} holds a run that stopped before its first checkpoint; starting it again")
    return RunState(checkpoint=checkpoint, notes=notes, inputs=inputs)


def usable_samples(
    num_samples: int, limit: int, load: Callable[[int], Any], on_bad_sample: str
) -> tuple[Sequence[int], list[str]]:
    """Load up to `limit` samples, evenly spaced, so that a corrupt one is named now and not hours into the run.

    Returns the indices to train on and one message a sample left out, which `on_bad_sample="raise"` raises instead.
    """
    count = min(num_samples, limit)
    bad: dict[int, str] = {}
    bar = tqdm(range(count), "checking samples", delay=2, mininterval=0.5, disable=not PartialState().is_main_process)
    for number in bar:
        index = number * num_samples // count
        try:
            load(index)
        except ValueError as error:
            if on_bad_sample == "raise":
                raise
            bad[index] = str(error)
    if len(bad) == num_samples:
        raise ValueError(f"none of the {num_samples} samples can be used; the first: {bad[0]}")
    usable = [index for index in range(num_samples) if index not in bad] if bad else range(num_samples)
    return usable, list(bad.values())


def _freeze(stage: Stage, arguments: CommonArguments) -> FreezePlan:
    return apply_freezing(
        stage.model,
        stage.components,
        train=stage.train or list(stage.components),
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        learning_rates=stage.learning_rates,
        decay_class_token=getattr(arguments, "decay_class_token", True),
    )


def _train(
    loop: TrainingLoop,
    stage: Stage,
    freeze: FreezePlan,
    arguments: CommonArguments,
    state: RunState,
) -> None:
    accelerator, output_dir = loop.accelerator, Path(arguments.output_dir)
    if accelerator.is_main_process:
        for folder in (output_dir, output_dir / "checkpoints"):
            for name in remove_partial_work(folder):
                accelerator.print(f"removed {folder / name}: the unfinished work of an interrupted run")
    if state.checkpoint:
        for warning in loop.resume(state.checkpoint):
            accelerator.print(warning)
    elif accelerator.is_main_process:
        loop.metrics.keep_until(0)
    record = RunRecord.start(
        stage.name,
        arguments,
        state.inputs,
        accelerator.num_processes,
        parameters=freeze.total_parameters,
        trainable_parameters=freeze.trainable_parameters,
        freeze=freeze.rows,
        num_samples=stage.num_samples,
        total_steps=loop.total_steps,
        resumed_from_step=loop.step,
        facts=stage.facts,
    )
    with loop.interruption.listening(), _recorded(record, loop), tracked(accelerator, arguments):
        if stage.begin:
            stage.begin()
        loop.run()
        conclusion = stage.conclude() if stage.conclude else {}
        averaged = loop.use_average()
        savables = loop.savables()
        if accelerator.is_main_process:
            save_final(output_dir, savables)
            done = {"step": loop.step, "train_seconds": round(loop.train_seconds, 3)}
            done["nonfinite_steps"] = loop.guard.skipped
            record.update(
                saved_weights="average" if averaged else "last", **done, **_last_validation(loop), **conclusion
            )
            write_card(output_dir, record.content)
        accelerator.wait_for_everyone()
    for name, value in conclusion.items():
        accelerator.print(f"{stage.name}: {name}: {value}")
    accelerator.print(f"{stage.name}: {loop.total_steps:,} steps in {loop.train_seconds:.1f} s; saved in {output_dir}")


def _last_validation(loop: TrainingLoop) -> dict[str, Any]:
    """The metrics of the last validation for run.json; read back, since a resumed run may have nothing left to do."""
    if loop.stage.validate is None:
        return {}
    last = [line for line in loop.metrics.read() if "validation_samples" in line][-1]
    return {"validation": {name: value for name, value in last.items() if name != "epoch"}}


@contextlib.contextmanager
def _recorded(record: RunRecord, loop: TrainingLoop) -> Iterator[None]:
    """Keep run.json's status true: running, then complete, interrupted (leaving with `EXIT_STOPPED`) or failed."""
    main = loop.accelerator.is_main_process
    if main:
        record.update(train_seconds=loop.train_seconds)
    try:
        yield
    except Interrupted as stop:
        if main:
            record.finish(
                "interrupted", step=loop.step, train_seconds=round(loop.train_seconds, 3), stopped_by=stop.signal_name
            )
        # a launcher ends all processes when the first one leaves
        loop.accelerator.wait_for_everyone()
        place = f"saved in {loop.output_dir}; " if loop.step else ""
        loop.accelerator.print(f"{loop.stage.name}: {stop} of {loop.total_steps:,}; {place}the same command continues")
        sys.exit(EXIT_STOPPED)
    except BaseException as error:
        if main:
            with contextlib.suppress(OSError):  # a full disk: the error itself matters more than its record
                facts: dict[str, Any] = {"step": loop.step, "train_seconds": round(loop.train_seconds, 3)}
                facts["nonfinite_steps"] = loop.guard.skipped
                record.finish("failed", error=f"{type(error).__name__}: {error}", **facts)
        raise
    if main:
        record.finish("complete", step=loop.step, train_seconds=round(loop.train_seconds, 3))


@contextlib.contextmanager
def _empty_folder_removed(directory: Path, accelerator: Accelerator) -> Iterator[None]:
    """Leave no empty folder behind when what follows fails or needs none."""
    existed = directory.exists()
    try:
        yield
    finally:
        if not existed and accelerator.is_main_process and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
