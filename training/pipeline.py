"""The whole way in one command: data, stages 0 to 2, evaluation, report. It runs the commands a user would type.

    python -m training.pipeline --config training/recipes/easy_vqa.yaml --output_dir outputs/quickstart [--seed N]

Each command is printed before it runs and may be run by hand. A stage that is already finished with the same arguments
and inputs is skipped, an interrupted one continues from its last checkpoint.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defocus_mllm.console import run_script
from defocus_mllm.files import write_json_atomically
from defocus_mllm.loading import holds_model
from training.argument_parsing import ArgumentsError, parse_arguments, recipe_values, split_config
from training.arguments import SECTIONS, CommonArguments, EvaluationArguments, require
from training.files import fingerprint
from training.interruption import EXIT_STOPPED, run_forwarding
from training.run_record import changed_arguments, read_run

STAGES = ("stage0_language", "stage0_vision", "stage1", "stage2")


@dataclass
class PipelineArguments:
    """What `python -m training.pipeline` takes; the recipe given by --config says the rest."""

    output_dir: str = ""
    """Folder for all stages, the evaluation and the report."""
    data_dir: str = "data/easy_vqa"
    """Where the training data is prepared; shared by all runs."""
    seed: int = -1
    """Seed of every stage; -1 leaves it to the recipe."""
    cpu: bool = False
    """Stay on the CPU even if there is a GPU."""

    def __post_init__(self) -> None:
        require(bool(self.output_dir), "output_dir: required, the folder for all results")
        require(self.seed >= -1, f"seed: must not be negative, got {self.seed}")


@dataclass(frozen=True)
class Step:
    """One command of the pipeline: `python -m <words>`."""

    name: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(["python", "-m", *self.words])


class StepError(ValueError):
    """A command failed; it has said why."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run all steps, then print the result."""
    words = list(sys.argv[1:] if argv is None else argv)
    config, rest = split_config(words)
    arguments = parse_pipeline_arguments(rest)
    if config is None:
        raise ArgumentsError("command line: --config is missing; give a recipe such as training/recipes/easy_vqa.yaml")
    steps = plan(config, arguments)
    for step in steps:  # a misspelt field of the last stage shows now and not after the others
        stage_arguments(step)
    began = time.perf_counter()
    for number, step in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}] {step.name}")
    print(f"\nall {len(steps)} steps took {time.perf_counter() - began:.0f} s", flush=True)
    record = Path(arguments.output_dir) / "summary.json"
    write_json_atomically(record, summary_record(config, arguments))
    print(summary(arguments))


def parse_pipeline_arguments(argv: Sequence[str]) -> PipelineArguments:
    """The pipeline's own arguments, without `--config`."""
    return parse_arguments(PipelineArguments, "pipeline", argv)


def plan(config: str, arguments: PipelineArguments) -> list[Step]:
    """The commands, in order. Raises `ValueError` naming what is wrong in the recipe."""
    output, data = Path(arguments.output_dir), Path(arguments.data_dir)
    inputs = {
        "stage0_language": {"text": data / "dialogues.json"},
        "stage0_vision": {"data": data / "images" / "train" / "metadata.jsonl"},
        "stage1": {
            "vision_model": output / "stage0_vision",
            "language_model": output / "stage0_language",
            "data": data / "captions.json",
            "image_root": data / "images",
        },
        "stage2": {
            "model": output / "stage1",
            "data": data / "conversations.json",
            "image_root": data / "images",
        },
    }
    steps = [Step("data", ("training.prepare_easy_vqa", "--output", str(data)))]
    for stage in STAGES:
        words = ["--config", config, "--output_dir", str(output / stage)]
        for name, path in inputs[stage].items():
            words += [f"--{name}", str(path)]
        if arguments.seed >= 0:
            words += ["--seed", str(arguments.seed)]
        if arguments.cpu:
            words.append("--cpu")
        steps.append(Step(stage, (*stage_command(stage), *words)))
    return [*steps, *evaluation_steps(config, output, arguments.cpu)]


def stage_command(stage: str) -> tuple[str, ...]:
    """Module and first words of a stage's command."""
    tasks = {"stage0_language": "language", "stage0_vision": "classification"}
    return ("training.stage0", "--task", tasks[stage]) if stage in tasks else (f"training.{stage}",)


def evaluation_steps(config: str, output: Path, cpu: bool) -> list[Step]:
    """The commands that score stage 2's model and write the report."""
    given = recipe_values(config, "evaluation", optional=True)
    words = [f"--{name}={value}" for name, value in given.items()]
    evaluation = parse_arguments(EvaluationArguments, "evaluation", words)
    run = ["eval.run", "--model", str(output / "stage2"), "--benchmarks", evaluation.benchmarks]
    run += ["--output", str(output / "eval")]
    for name in ("limit", "batch_size"):
        if getattr(evaluation, name):
            run += [f"--{name.replace('_', '-')}", str(getattr(evaluation, name))]
    if cpu:
        run += ["--device", "cpu"]
    first = evaluation.benchmarks.split(",")[0]
    report = ["eval.report", "--evaluation", str(output / "eval" / first)]
    report += ["--runs", *(str(output / stage) for stage in STAGES), "--output", str(output / "report.html")]
    return [Step("evaluation", tuple(run)), Step("report", tuple(report))]


def stage_arguments(step: Step) -> CommonArguments | None:
    """The arguments a stage's command will see, or None for another command. Raises what that command would."""
    if step.name not in STAGES:
        return None
    return parse_arguments(SECTIONS[step.name], step.name, step.words[1:])


def is_finished(step: Step) -> bool:
    """Whether the stage's folder holds a complete run with the same arguments and inputs."""
    arguments = stage_arguments(step)
    if arguments is None:
        return False
    run = read_run(arguments.output_dir)
    if run is None or run["status"] != "complete" or run["stage"] != step.name:
        return False
    if changed_arguments(run["arguments"], arguments) or not holds_model(arguments.output_dir):
        return False
    return all(_same(getattr(arguments, name, ""), recorded) for name, recorded in run["inputs"].items())


def run_step(step: Step, title: str) -> None:
    """Run a command in a process of its own. Raises `StepError` when it fails; leaves with it when it was stopped."""
    print(f"\n{title}\n$ {step}", flush=True)
    if is_finished(step):
        print("already finished with these arguments and inputs; skipped", flush=True)
        return
    began = time.perf_counter()
    code = run_forwarding([sys.executable, "-m", *step.words])
    if code == EXIT_STOPPED:
        print(f"stopped in step {step.name!r}; the same command continues", flush=True)
        sys.exit(EXIT_STOPPED)
    if code:
        raise StepError(f"step {step.name!r} failed with exit code {code}; its own message stands above")
    print(f"{step.name}: {time.perf_counter() - began:.0f} s", flush=True)


def summary(arguments: PipelineArguments) -> str:
    """What was reached, read from the files that hold it, and what to do next."""
    output = Path(arguments.output_dir)
    runs = [read_run(output / stage) or {} for stage in STAGES]
    results = sorted((output / "eval").glob("*/results.json"))
    lines = [accuracy_line(json.loads(path.read_text(encoding="utf-8"))) for path in results]
    seconds = sum(run.get("train_seconds", 0.0) for run in runs)
    lines.append(f"{runs[-1].get('parameters', 0):,} parameters, {seconds:.0f} s of training in all")
    lines.append(f"report: {output / 'report.html'}")
    image = Path(arguments.data_dir) / "images" / "train" / "0.png"
    lines.append(f"talk to it: {_command('defocus-mllm')} chat {output / 'stage2'} --image {image}")
    return "\n".join(lines)


def summary_record(config: str, arguments: PipelineArguments) -> dict[str, Any]:
    """What `summary.json` holds: result and cost of the run, and what is needed to repeat it."""
    output = Path(arguments.output_dir)
    runs = {stage: read_run(output / stage) or {} for stage in STAGES}
    last = runs[STAGES[-1]]
    seconds = {stage: run.get("train_seconds", 0.0) for stage, run in runs.items()}
    kept = ("benchmark", "partial", "metrics", "breakdown", "health", "protocol", "throughput")
    evaluations = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("eval/*/results.json"))]
    command = ["python", "-m", "training.pipeline", "--config", config, "--output_dir", arguments.output_dir]
    command += ["--data_dir", arguments.data_dir]
    command += ["--seed", str(arguments.seed)] if arguments.seed >= 0 else []
    command += ["--cpu"] if arguments.cpu else []
    return {
        "command": shlex.join(command),
        **{name: last.get(name) for name in ("commit", "seed", "hardware", "versions", "parameters")},
        "train_seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "evaluation": [{name: result.get(name) for name in kept} for result in evaluations],
    }


def accuracy_line(results: dict[str, Any]) -> str:
    """The headline number of a `results.json` with its 95 % interval; none for a partial run."""
    benchmark = results["benchmark"]
    if results["partial"]:
        return f"{benchmark['name']}: partial {benchmark['n']}/{benchmark['n_expected']}: no headline number"
    accuracy = results["metrics"]["accuracy"]
    low, high = accuracy["ci95"]
    return (
        f"{benchmark['name']}: accuracy {100 * accuracy['value']:.2f} % [{100 * low:.2f}, {100 * high:.2f}] "
        f"(95 % interval) on all {benchmark['n']:,} questions"
    )


def _command(name: str) -> Path:
    """How to call an installed command from here, whether or not its environment is activated."""
    path = Path(sys.executable).with_name(name)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _same(path: str, recorded: str) -> bool:
    try:
        return fingerprint(path) == recorded
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    run_script(main)
