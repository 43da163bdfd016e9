"""Which base model an adapter was trained on, written beside it: another one would give garbage without an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import model_sha256, write_json_atomically

BASE_RECORD = "base_model.json"


def describe_base(base: str | Path, quantization: str = "none") -> dict[str, str]:
    """What `base_model.json` holds for an adapter of the model in `base`, trained with its weights so quantised."""
    return {"path": str(base), "sha256": model_sha256(base), "quantization": quantization}


def write_base_record(folder: str | Path, content: dict[str, str]) -> None:
    """Write `base_model.json` into `folder`."""
    write_json_atomically(Path(folder) / BASE_RECORD, content)


def check_base(folder: str | Path, base: str | Path) -> list[str]:
    """Hold the model in `base` against the record in the adapter's `folder`; returns notes for the user.

    Raises:
        ValueError: the base model is another one than the adapter was trained on, or the record is damaged.
    """
    file = Path(folder) / BASE_RECORD
    if not file.is_file():
        return [f"{folder} has no {BASE_RECORD}, so whether it was trained on {base} as it is now is not known"]
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        expected, quantization = content["sha256"], content["quantization"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"adapter: {file} is damaged: {error}") from error
    if model_sha256(base) != expected:
        raise ValueError(
            f"adapter: {base} has other weights or files than when {folder} was trained on it; put the original back "
            "(adapter_config.json says where it is looked for)"
        )
    if quantization != "none":
        return [f"the adapter was trained on {quantization} weights and is put on the original ones here"]
    return []
