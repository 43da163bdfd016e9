"""Checkpoints from disk, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and why."""


def load_strictly(model_class: Any, directory: str | Path, what: str = "model", dtype: Any = torch.float32) -> Any:
    """`model_class.from_pretrained(directory)` without a network, refusing weights that would stay at random values.

    Args:
        model_class: a model or Auto class.
        directory: what `save_pretrained` wrote.
        what: how an error calls the checkpoint.
        dtype: number format of the weights; "auto" keeps the saved one.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: weights are missing, damaged, or of another shape; names the folder and the first of them.
    """
    if not (Path(directory) / "config.json").is_file():
        adapter = (Path(directory) / "adapter_config.json").is_file()
        hint = ", but an adapter: merge it with its base model first, see docs/ecosystem.md" if adapter else ""
        raise FileNotFoundError(f"{what}: {directory} holds no saved model (no config.json in it){hint}")
    try:
        model, report = model_class.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise CheckpointError(f"{what}: the weights in {directory} are damaged: {error}") from error
    except RuntimeError as error:  # how Transformers reports weights of another shape
        raise CheckpointError(f"{what}: the weights in {directory} do not fit its config.json: {error}") from error
    if missing := sorted(str(name) for name in report["missing_keys"]):
        raise CheckpointError(f"{what}: {directory} lacks {len(missing)} weights, first {missing[0]}")
    return model
