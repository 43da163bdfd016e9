"""Checkpoints from disk, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER_CONFIG)
"""A folder with one of them holds a model, or an adapter of one."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and why."""


def holds_model(directory: str | Path) -> bool:
    """Whether a model or an adapter is saved in `directory`."""
    return any((Path(directory) / name).is_file() for name in MODEL_FILES)


def holds_adapter(directory: str | Path) -> bool:
    """Whether an adapter is saved in `directory`, without the model that it belongs to."""
    return (Path(directory) / ADAPTER_CONFIG).is_file() and not (Path(directory) / "config.json").is_file()


def require_model(directory: str | Path, what: str = "model") -> None:
    """Raise `FileNotFoundError`, beginning with `what`, unless a whole model is saved in `directory`."""
    if holds_adapter(directory):
        raise FileNotFoundError(
            f"{what}: {directory} holds an adapter without its model; `defocus-mllm merge {directory} --output DIR` "
            "makes a model of the two"
        )
    if not (Path(directory) / "config.json").is_file():
        raise FileNotFoundError(f"{what}: {directory} holds no saved model (no config.json in it)")


def load_strictly(
    model_class: Any, directory: str | Path, what: str = "model", dtype: Any = torch.float32, **options: Any
) -> Any:
    """`model_class.from_pretrained(directory)` without a network, refusing weights that would stay at random values.

    Args:
        model_class: a model or Auto class.
        directory: what `save_pretrained` wrote.
        what: how an error calls the checkpoint.
        dtype: number format of the weights; "auto" keeps the saved one.
        options: what else `from_pretrained` is to be given.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: weights are missing, damaged, or of another shape; names the folder and the first of them.
    """
    require_model(directory, what)
    try:
        model, report = model_class.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise CheckpointError(f"{what}: the weights in {directory} are damaged: {error}") from error
    except RuntimeError as error:  # how Transformers reports weights of another shape
        raise CheckpointError(f"{what}: the weights in {directory} do not fit its config.json: {error}") from error
    if missing := sorted(str(name) for name in report["missing_keys"]):
        raise CheckpointError(f"{what}: {directory} lacks {len(missing)} weights, first {missing[0]}")
    return model
