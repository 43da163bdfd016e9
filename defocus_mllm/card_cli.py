"""`defocus-mllm card`: the model card of a checkpoint, with its training, its evaluations and its licence.

defocus-mllm card outputs/quickstart/stage2 --results outputs/quickstart/eval/easy_vqa/results.json --license mit
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from .card_defocus import CARD, is_replaceable, model_card
from .files import combined_sha256, write_text_atomically

RESULTS_SCHEMA = 1
RUN_FILE = "run.json"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_BLOCKS = ("benchmark", "model", "metrics", "partial", "run_id", "env")


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `defocus-mllm card`."""
    add = parser.add_argument
    add("directory", metavar="DIR", help="folder of a checkpoint; its run.json, if any, says how it was trained")
    add("--results", metavar="FILE", nargs="+", default=[], help="results.json of evaluations of exactly these weights")
    add("--license", metavar="ID", help="the Hub's identifier of the weights' licence, such as mit; else: not stated")
    add("--base-model", metavar="NAME", nargs="+", default=[], help="models on the Hub that this one derives from")


def run_card(arguments: argparse.Namespace) -> None:
    """Write the card into the checkpoint's folder; what is not given is said to be unknown."""
    directory = Path(arguments.directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is no checkpoint: it has no config.json")
    if not is_replaceable(directory / CARD):
        raise ValueError(f"{directory / CARD} was not generated and is not replaced; move it away first")
    if arguments.license is not None and not _LICENSE.fullmatch(arguments.license):
        raise ValueError(f"--license: {arguments.license!r} is no identifier of the Hub, such as apache-2.0")
    run = find_run(directory)
    results = [read_results(Path(path), directory) for path in arguments.results]
    card = model_card(directory, run, results, arguments.license, arguments.base_model)
    write_text_atomically(directory / CARD, card)
    trained = "with its training" if run else "without a training run (no run.json)"
    licence = arguments.license or "not stated"
    print(f"wrote {directory / CARD}, {trained}, {len(results)} evaluation(s), licence {licence}")


def find_run(directory: Path) -> dict[str, Any] | None:
    """The record of the run that wrote `directory`, or of the one whose `checkpoints/step-...` it is; else None.

    Raises:
        ValueError: the record is damaged.
    """
    step = re.fullmatch(r"step-(\d+)", directory.resolve().name)
    path = (directory.resolve().parents[1] if step else directory) / RUN_FILE
    if not path.is_file():
        return None
    run = _read_json(path)
    if not {"arguments", "inputs"} <= set(run):
        raise ValueError(f"{path} is not the record of a run: it has no arguments or inputs")
    return {**run, "step": int(step.group(1))} if step else run


def read_results(path: Path, directory: Path) -> dict[str, Any]:
    """The results of an evaluation of the weights in `directory`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or results of other weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--results: {path}: no such file")
    results = _read_json(path)
    if results.get("schema_version") != RESULTS_SCHEMA or not set(_BLOCKS) <= set(results):
        raise ValueError(f"--results: {path} is not a results.json of this version: evaluate again with eval.run")
    here = combined_sha256(sorted(directory.glob("*.safetensors")))
    if results["model"].get("weights_sha") != here:
        raise ValueError(
            f"--results: {path} is of other weights than those in {directory}, or does not say of which: evaluate "
            "this folder with eval.run"
        )
    return results


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
