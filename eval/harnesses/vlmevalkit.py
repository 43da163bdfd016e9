"""Run VLMEvalKit on a checkpoint, without a fork of it.

    python -m eval.harnesses.vlmevalkit --kit /path/VLMEvalKit --model outputs/quickstart/stage2 --data MME POPE

Registers the checkpoint in the kit's list of models and runs the kit's own run.py in this process; all other arguments
are the kit's (`--mode infer`, `--work-dir`, `--judge exact_matching`, `--reuse`, ...). Afterwards the kit's files are
read: it logs most errors and exits with 0, this command then exits with 2. Several processes, each with its own model:

    torchrun --nproc-per-node 2 -m eval.harnesses.vlmevalkit --kit ...
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import runpy
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from defocus_mllm.console import run_script
from eval.checkpoints import find_checkpoint
from eval.harnesses.vlmevalkit_model import Tally, ending_the_process, model_class
from eval.harnesses.vlmevalkit_report import KitRun, check_run
from eval.run import DTYPES, generator_of_process

_NOT_FOR_LOCAL_MODELS = (
    *("--api-mode", "--base-url", "--custom-prompt", "--extra-body", "--key", "--local-media", "--max-tokens"),
    *("--monitor-interval", "--repetition-penalty", "--stream", "--temperature", "--thinker", "--timeout", "--top-k"),
    *("--top-p", "--use-vllm", "--video-llm"),
)
"""Arguments of the kit that concern models behind an address; it ignores them for others, without a word."""
_MAX_NEW_TOKENS = 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Parse our arguments, run the kit with the others, then check what it wrote."""
    arguments, kit_arguments = _argument_parser().parse_known_args(argv)
    _check(arguments.kit, kit_arguments)
    checkpoint = find_checkpoint(arguments.model)  # the kit would find late that there is none
    name = arguments.name or checkpoint.name.replace("/", "--")
    if "/" in name:
        raise ValueError(f"--name {name!r}: it becomes a folder's name, and must not contain '/'")
    run = _kit_run(name, kit_arguments)
    tally = Tally()
    _register(arguments, name, tally)
    command = [str(arguments.kit / "run.py"), "--model", name, *kit_arguments]
    started = time.time()
    with _arguments(command), _gloo_where_there_is_no_gpu():
        runpy.run_path(command[0], run_name="__main__")
    if tally.truncated:
        print(f"{tally.truncated} of {tally.answered} answers were cut at --max-new-tokens {arguments.max_new_tokens}")
    if int(os.environ.get("RANK", 0)) == 0:
        print(check_run(run, started))


def _kit_run(name: str, kit_arguments: Sequence[str]) -> KitRun:
    """What of the kit's arguments says which files it will write."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--work-dir", type=Path, default=Path("outputs"))
    known, _ = parser.parse_known_args(kit_arguments)
    return KitRun(name, tuple(known.data), Path(os.environ.get("MMEVAL_ROOT", known.work_dir)))


def _check(kit: Path, kit_arguments: Sequence[str]) -> None:
    """Find before the kit starts what it would find late, or never."""
    if not (kit / "run.py").is_file() or not (kit / "vlmeval").is_dir():
        raise FileNotFoundError(f"--kit {kit}: no run.py with vlmeval/ there; give a checkout of VLMEvalKit")
    given = [argument.partition("=")[0] for argument in kit_arguments]
    if "--data" not in given:
        raise ValueError("--data: name the kit's data sets (--config of the kit cannot name this model)")
    ignored = [argument for argument in given if argument in _NOT_FOR_LOCAL_MODELS]
    if ignored:
        raise ValueError(f"{ignored[0]}: the kit ignores it for a model on disk; leave it out")
    data_root = os.environ.get("LMUData")  # noqa: SIM112 (the kit spells it so)
    if data_root and not Path(data_root).is_dir():
        raise FileNotFoundError(f"LMUData={data_root}: no such folder; the kit would take ~/LMUData instead")


def _register(arguments: argparse.Namespace, name: str, tally: Tally) -> None:
    """Put the checkpoint under `name` into the kit's list of models; it is loaded when the kit first asks for it."""
    sys.path.insert(0, str(arguments.kit.resolve()))
    with _verification_kept():
        try:
            config = importlib.import_module("vlmeval.config")
        except ImportError as error:
            raise ValueError(f"--kit {arguments.kit}: cannot be imported, install what it requires: {error}") from error
    if name in config.supported_VLM:
        raise ValueError(f"--name {name!r}: the kit has a model of that name; give another")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1

    @functools.cache
    def build() -> Any:
        with ending_the_process(several):
            local = [int(os.environ.get(variable, default)) for variable, default in _PROCESS_VARIABLES.items()]
            generator = generator_of_process(arguments.model, arguments.device, arguments.dtype, *local)
            return model_class()(generator, arguments.max_new_tokens, tally, several)

    # Names that contain those of other models get their options: {'use_vllm': False}.
    config.supported_VLM[name] = lambda **_: build()


_PROCESS_VARIABLES = {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@contextlib.contextmanager
def _verification_kept() -> Iterator[None]:
    """Undo what importing the kit does: no HTTPS connection of the process would check certificates any more."""
    make_context = ssl._create_default_https_context
    try:
        yield
    finally:
        ssl._create_default_https_context = make_context


@contextlib.contextmanager
def _arguments(command: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, command
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _gloo_where_there_is_no_gpu() -> Iterator[None]:
    """The kit asks for NCCL in any case. Whether there is a GPU is asked late, after the kit has dealt them out."""
    initialise = torch.distributed.init_process_group

    def with_usable_backend(*arguments: Any, **options: Any) -> None:
        initialise(*arguments, **options | ({} if torch.cuda.is_available() else {"backend": "gloo"}))

    torch.distributed.init_process_group = with_usable_backend
    try:
        yield
    finally:
        torch.distributed.init_process_group = initialise


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.harnesses.vlmevalkit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --mode is the kit's
    )
    parser.add_argument("--kit", type=Path, required=True, metavar="DIR", help="checkout of open-compass/VLMEvalKit")
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder, or USER/NAME[@REVISION] on the Hub")
    parser.add_argument("--name", help="the model's name in the kit's files (default: its own)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=_MAX_NEW_TOKENS, metavar="N", help="of an answer (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: as saved)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    return parser


if __name__ == "__main__":
    run_script(main)
