"""Checkpoints that are whole or absent: written beside their place, verified by hash, then renamed into it.

output_dir/checkpoints/step-000123/
    config.json, model.safetensors, tokenizer.json, ...   what `save_pretrained` writes: loads with `from_pretrained`
    training_state.pt                                      optimizer, EMA, random state, position
    README.md                                              its model card, with the record of the run so far
    manifest.json                                          size and SHA-256 of every file above
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import nn

from defocus_mllm.card_defocus import CARD, model_card
from defocus_mllm.files import (
    PARTIAL_PREFIX,
    explain_write_error,
    file_sha256,
    synchronise_directory,
    synchronise_tree,
    write_json_atomically,
    write_text_atomically,
)
from defocus_mllm.loading import MODEL_FILES, CheckpointError, holds_adapter, load_strictly
from training.lora import is_adapted, load_adapted, load_adapter_weights
from training.sharding import original_class, shard_like

MANIFEST = "manifest.json"
TRAINING_STATE = "training_state.pt"
STEP_FOLDER = re.compile(r"step-(\d+)")


class Savable(Protocol):
    """Anything with `save_pretrained`: a model, a tokenizer, an image processor, a processor."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], /) -> Any:
        """Write its files into `save_directory`."""


def step_directory(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies: `checkpoints/step-000123`."""
    return checkpoints / f"step-{step:06d}"


def save_checkpoint(
    directory: str | Path,
    savables: Sequence[Savable],
    state: Mapping[str, Any],
    save_total_limit: int = 0,
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write one checkpoint to `directory` (named `step-<number>`) in one step, then delete the oldest beyond the limit.

    Args:
        savables: model first, then processor or tokenizer; each is written by its own `save_pretrained`.
        state: what `torch.load(..., weights_only=True)` reads back: tensors, numbers, strings, lists, dictionaries.
        save_total_limit: how many checkpoints to keep beside each other; 0 keeps all.
        run: record of the run, for the model card; None: the card says that none is known.

    Raises `DiskFullError` when the disk is full. Whatever happens before the final rename leaves older checkpoints
    untouched, and a checkpoint is only deleted after its successor is on disk.
    """
    directory = Path(directory)
    partial = directory.with_name(f"{PARTIAL_PREFIX}{directory.name}-{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for savable in savables:
            savable.save_pretrained(partial)
        if run is not None:
            write_card(partial, run)
        torch.save(dict(state), partial / TRAINING_STATE)
        write_json_atomically(partial / MANIFEST, _describe_files(partial))
        synchronise_tree(partial)
        _discard(directory)  # only an invalid checkpoint of the same step can be in the way
        os.replace(partial, directory)
        synchronise_directory(directory.parent)
    except BaseException as error:
        raise explain_write_error(error, directory) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _limit(directory, save_total_limit)
    return directory


def save_final(directory: str | Path, savables: Sequence[Savable]) -> None:
    """Put the files of `savables` directly into `directory`, `config.json` (or an adapter's configuration) last.

    The files are first written in full beside their place, so a full disk changes nothing; each then moves in one step.
    A reader needs it, so a folder where it exists has all its weights.
    """
    directory = Path(directory)
    partial = directory / f"{PARTIAL_PREFIX}final-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for savable in savables:
            savable.save_pretrained(partial)
        synchronise_tree(partial)
        for name in MODEL_FILES:
            (directory / name).unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name in MODEL_FILES):
            if path.is_dir():
                shutil.rmtree(directory / path.name, ignore_errors=True)
            os.replace(path, directory / path.name)
        synchronise_directory(directory)
    except BaseException as error:
        raise explain_write_error(error, directory) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_card(directory: str | Path, run: Mapping[str, Any]) -> None:
    """Write the model card of the checkpoint in `directory`, which the run of the record `run` made.

    An adapter gets none: the card describes a whole model, such as `defocus-mllm merge` makes of it.
    """
    if holds_adapter(directory):
        return
    write_text_atomically(Path(directory) / CARD, model_card(directory, run))


def verify_checkpoint(directory: str | Path) -> None:
    """Raise `CheckpointError` unless every file of the manifest is there with the size and hash it was written with."""
    directory = Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {directory} has no {MANIFEST}: it is incomplete") from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} is not valid JSON") from error
    for name, expected in manifest.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {directory}: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {directory}: {name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            )
        if file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {directory}: {name} is corrupt (its SHA-256 does not match)")


def list_checkpoints(checkpoints: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that looks like a checkpoint, oldest first; not yet verified."""
    checkpoints = Path(checkpoints)
    if not checkpoints.is_dir():
        return []
    matches = ((STEP_FOLDER.fullmatch(path.name), path) for path in checkpoints.iterdir() if path.is_dir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def find_newest_valid(checkpoints: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies (or None), and one warning for each newer one that does not."""
    warnings = []
    for _, directory in reversed(list_checkpoints(checkpoints)):
        try:
            verify_checkpoint(directory)
        except CheckpointError as error:
            warnings.append(f"warning: {error}; skipped")
        else:
            return directory, warnings
    return None, warnings


def load_training_state(directory: str | Path) -> dict[str, Any]:
    """The `state` given to `save_checkpoint`, on the CPU, read without executing anything the file contains."""
    return torch.load(Path(directory) / TRAINING_STATE, map_location="cpu", weights_only=True)


def load_model_weights(model: nn.Module, directory: str | Path) -> None:
    """Copy the weights saved in `directory` into `model`, bit for bit; `CheckpointError` when they do not fit."""
    if is_adapted(model):
        load_adapter_weights(model, directory)
        return
    own, saved = model.state_dict(), load_saved(model, directory).state_dict()
    model.load_state_dict({name: shard_like(value, own.get(name, value)) for name, value in saved.items()})


def load_saved(model: nn.Module, directory: str | Path) -> nn.Module:
    """The model saved in `directory`, a new one of the class and number format of `model`, whole and on the CPU.

    Of an adapter's checkpoint it is the base model that `model` was made of, with the adapter. Raises `CheckpointError`
    when the weights do not fit.
    """
    if is_adapted(model):
        return load_adapted(model, directory)
    return load_strictly(original_class(model), directory, "checkpoint", next(model.parameters()).dtype)


def get_random_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy and torch (CPU, and CUDA where there is one) in this process."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(numpy.asarray(keys).astype("int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo of `get_random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(("MT19937", keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }


def _discard(directory: Path) -> None:
    """Delete a folder such that a kill in between leaves no half of it under its own name."""
    if directory.exists():
        doomed = directory.with_name(f"{PARTIAL_PREFIX}old-{directory.name}-{os.getpid()}")
        os.replace(directory, doomed)
        shutil.rmtree(doomed)


def _limit(newest: Path, save_total_limit: int) -> None:
    """Keep `newest` and those before it. Later steps are of a run that was taken up again from an earlier one."""
    if save_total_limit > 0:
        names = [directory for _, directory in list_checkpoints(newest.parent)]
        position = names.index(newest)
        for directory in [*names[position + 1 :], *names[: max(0, position + 1 - save_total_limit)]]:
            _discard(directory)
