"""Proof that nothing is lost: a run of stage 2 killed with SIGKILL at random moments, taken up again each time.

    python -m training.kill_test --output docs/results/resume.json

The killed run must end as one that was never stopped: the same weights, optimizer, average and random state, bit for
bit, and the same lines of metrics. After every kill all its checkpoints must verify and no line of metrics may be
missing. The model is tiny (`training.toy`); its moments of danger are those of any other. Runs on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from defocus_mllm.console import run_script
from defocus_mllm.files import PARTIAL_PREFIX, write_json_atomically, write_text_atomically
from defocus_mllm.provenance import commit, hardware, versions
from training.argument_parsing import parse_arguments
from training.arguments import require
from training.checkpointing import list_checkpoints, load_training_state, verify_checkpoint
from training.run_record import MetricsFile, read_run
from training.toy import write_toy

WALL_CLOCK = {"seconds", "tokens_per_second", "images_per_second", "train_seconds"}
"""What two equal runs may differ in."""
_POLL = 0.004
"""Seconds between looks at a running process."""


@dataclass
class KillTestArguments:
    """What `python -m training.kill_test` takes."""

    kills: int = 20
    """How often the run is killed."""
    steps: int = 200
    """Optimizer steps of the run."""
    save_steps: int = 5
    """Steps between its checkpoints."""
    seed: int = 0
    """Seed of the run and of the moments of the kills."""
    output: str = ""
    """JSON file for the result, with a page of the same name (.md) beside it; empty: it is only printed."""

    def __post_init__(self) -> None:
        for name in ("kills", "steps", "save_steps"):
            require(getattr(self, name) > 0, f"{name}: must be positive, got {getattr(self, name)}")
        require(self.steps % self.save_steps == 0, "save_steps: must divide steps, so that the end has a checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test; 1 if anything was lost."""
    arguments = parse_arguments(KillTestArguments, "kill_test", argv)
    disable_progress_bar()  # of weight files
    with tempfile.TemporaryDirectory(prefix="defocus-kill-test-") as folder:
        result = kill_test(arguments, Path(folder))
    if arguments.output:
        write_json_atomically(arguments.output, result)
        write_text_atomically(Path(arguments.output).with_suffix(".md"), page(result))
    print(sentence(result))
    for problem in result["problems"]:
        print(f"problem: {problem}")
    return int(not result["held"])


def kill_test(arguments: KillTestArguments, folder: Path) -> dict[str, Any]:
    """Kill and resume in `folder`, and compare; the result as `main` writes it."""
    began = time.monotonic()
    draw = random.Random(arguments.seed)
    stage_words = write_toy(folder / "toy", arguments.seed)
    straight = folder / "straight"
    _Process(stage_words, straight, arguments).finish()
    kills: list[dict[str, Any]] = []
    problems: list[str] = []
    runs = 0
    with tqdm(total=arguments.kills, desc="kills", unit="kill") as bar:
        while len(kills) < arguments.kills or not runs:
            killed = folder / f"killed-{runs}"
            while len(kills) < arguments.kills:
                process = _Process(stage_words, killed, arguments)
                if not process.kill_at_random(draw):
                    break  # it was faster
                kills.append(inspect(killed, problems))
                bar.update()
            _Process(stage_words, killed, arguments).finish()
            problems += differences(straight, killed)
            runs += 1
    return {
        "schema_version": 1,
        "held": not problems,
        "problems": problems,
        "arguments": {**dataclasses.asdict(arguments), "output": Path(arguments.output).name},
        "command": "python -m training.kill_test "
        + " ".join(f"--{name} {value}" for name, value in dataclasses.asdict(arguments).items() if value != ""),
        "runs": runs,
        "kills": kills,
        "moments": dict(Counter(kill["moment"] for kill in kills)),
        "seconds": round(time.monotonic() - began, 1),
        "commit": commit(Path(__file__).parent),
        "hardware": hardware(),
        "versions": versions(),
    }


class _Process:
    """One start of the run in `output`, which begins it or takes it up again."""

    def __init__(self, stage_words: Sequence[str], output: Path, arguments: KillTestArguments) -> None:
        self.output, self.budget = output, max(1, arguments.steps // arguments.kills)
        words = [*stage_words, "--output_dir", str(output), "--max_steps", str(arguments.steps)]
        words += ["--save_steps", str(arguments.save_steps), "--logging_steps", "1", "--seed", str(arguments.seed)]
        words += ["--global_batch_size", "4", "--per_device_batch_size", "2", "--learning_rate", "1e-3"]
        words += ["--ema_decay", "0.9", "--save_total_limit", "3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training.stage2", *words],
            cwd=Path(__file__).parents[1],  # so that the same code runs there
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def finish(self) -> None:
        """Wait until the run is complete. Raises `ValueError` with the end of its output if it is not."""
        if code := self.process.wait():
            self.log.seek(0)
            raise ValueError(f"the run ended with exit code {code}: {self.log.read().decode(errors='replace')[-2000:]}")

    def kill_at_random(self, draw: random.Random) -> bool:
        """SIGKILL after a random number of steps and a random part of one; false if the run ended before.

        On average it takes as many steps as leave something to do for all kills.
        """
        lines_before, target = self._lines(), draw.randint(0, 2 * self.budget - 1)
        while self._lines() - lines_before < target and self._runs():
            pass
        waited, part = 0.0, draw.uniform(0, 0.1) if target else draw.uniform(0, 10)
        while waited < part and self._runs():
            waited += _POLL
        self.process.send_signal(signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def _lines(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def _runs(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_POLL)
        return self.process.poll() is None


def inspect(run: Path, problems: list[str]) -> dict[str, Any]:
    """What a kill left of `run`; what must not be is added to `problems`."""
    checkpoints = list_checkpoints(run / "checkpoints")
    for step, directory in checkpoints:
        try:
            verify_checkpoint(directory)
        except ValueError as error:
            problems.append(f"after a kill: checkpoint of step {step}: {error}")
    newest = max((step for step, _ in checkpoints), default=0)
    lines, torn = _whole_lines(run / "metrics.jsonl")
    if lines != list(range(1, len(lines) + 1)) or len(lines) < newest:
        problems.append(f"after a kill: metrics have the steps {lines}, the newest checkpoint is of step {newest}")
    partial = [path.name for path in (*run.glob(f"{PARTIAL_PREFIX}*"), *run.glob(f"checkpoints/{PARTIAL_PREFIX}*"))]
    moment = "saving" if partial else "training" if (run / "run.json").is_file() else "starting"
    return {"step": len(lines), "newest_checkpoint": newest, "moment": moment, "partial": partial, "torn_line": torn}


def _whole_lines(path: Path) -> tuple[list[int], bool]:
    """Steps of the whole lines of a metrics file, and whether its last line is torn."""
    if not path.is_file():
        return [], False
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["step"] for line in lines], bool(rest)


def differences(straight: Path, killed: Path) -> list[str]:
    """In what the end of a killed run differs from that of the straight one, a sentence each."""
    found = []
    if (straight / "model.safetensors").read_bytes() != (killed / "model.safetensors").read_bytes():
        found.append("the final weights differ")
    ours, theirs = ([_timeless(line) for line in MetricsFile(run).read()] for run in (killed, straight))
    if ours != theirs:
        found.append("the lines of metrics differ")
    if (read_run(killed) or {}).get("status") != "complete":
        found.append("the killed run is not recorded as complete")
    names = [[path.name for _, path in list_checkpoints(run / "checkpoints")] for run in (straight, killed)]
    if names[0] != names[1]:
        return [*found, f"the checkpoints differ: {names[0]} and {names[1]}"]
    for name in names[0]:
        states = [_timeless(load_training_state(run / "checkpoints" / name)) for run in (straight, killed)]
        if not _equal(*states):
            found.append(f"the training state of {name} differs")
    return found


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in WALL_CLOCK}


def _equal(one: Any, other: Any) -> bool:
    """Whether nested dictionaries and lists hold the same values, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


def sentence(result: dict[str, Any]) -> str:
    """The result in one sentence."""
    moments = ", ".join(f"{count} while {moment}" for moment, count in sorted(result["moments"].items()))
    verdict = "nothing was lost" if result["held"] else f"{len(result['problems'])} problem(s)"
    return (
        f"{len(result['kills'])} kills ({moments}) of a run of {result['arguments']['steps']} steps, "
        f"{result['runs']} time(s) to its end: {verdict}"
    )


def page(result: dict[str, Any]) -> str:
    """The result as a page of Markdown."""
    machine = result["hardware"]
    rows = [
        f"| {number} | {kill['step']} | {kill['newest_checkpoint']} | {kill['moment']} | "
        f"{'yes' if kill['torn_line'] else 'no'} |"
        for number, kill in enumerate(result["kills"], start=1)
    ]
    lines = [
        "# Killed and resumed",
        "",
        "Made by `training/kill_test.py`, do not edit.",
        "",
        sentence(result) + ".",
        "",
        "Compared with a run that was never stopped: weights, optimizer, average of the weights, random state and "
        "lines of metrics are equal bit for bit at the end. After every kill all checkpoints were verified (SHA-256 of "
        "every file) and the lines of metrics counted."
        if result["held"]
        else "\n".join(f"- {problem}" for problem in result["problems"]),
        "",
        "| Kill | Step reached | Newest checkpoint | Moment | Torn line at the end |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"`{result['command']}`, {result['seconds']:.0f} s on {machine['processor']} ({machine['cores']} cores), "
        f"seed {result['arguments']['seed']}, torch {result['versions']['torch']}, commit {result['commit']}.",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_script(main)
