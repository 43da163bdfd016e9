"""Files in the layout of the official De-focus Mamba release: read without running anything in them, and written.

The release writes `.pth` files (`save_checkpoint_ema` in classification/utils/utils.py): a dictionary with `model`,
`model_ema`, `config` (yacs) and the state of the training. A `.safetensors` file holds the same tensors, with their
plain names or beneath `state_dict.`, and may hold the configuration as JSON in its metadata.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .loading import CheckpointError

WRITTEN_SUFFIXES = (".pth", ".safetensors")
READ_SUFFIXES = (*WRITTEN_SUFFIXES, ".pt")
SAFETENSORS_PREFIX = "state_dict."
PARALLEL_PREFIX = "module."
"""What `DistributedDataParallel` and timm's `ModelEmaV2` put before every name."""
MAXIMUM_NAMES = 20
"""Names of tensors that one error lists of each kind."""


class _Unread:
    """Stands in for a value that no conversion needs; whatever the file says about it is forgotten."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# All that a pickle may name beside what torch itself allows (tensors, numbers, strings and their containers). The names
# are only labels: none is imported, yacs and numpy need not be installed, and no code of theirs runs.
_HARMLESS: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]
_HARMLESS += [(_Unread, name) for name in ("argparse.Namespace", "numpy.dtype", "numpy.ndarray")]
for _core in ("numpy.core", "numpy._core"):  # numpy's name for it before and since version 2
    _HARMLESS += [(_Unread, f"{_core}.multiarray.{name}") for name in ("scalar", "_reconstruct")]


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """What a file of the release holds for a conversion.

    Attributes:
        path: the file.
        tensors: released name -> tensor on the CPU, as stored.
        config: the release's nested configuration; empty where the file has none.
        weights: which of the file's weights these are: "model", "model_ema", "state_dict" or "all tensors".
        left: names of what else the file holds.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    config: Mapping[str, Any]
    weights: str
    left: tuple[str, ...]


def read_released(path: str | Path, use_ema: bool = False) -> ReleasedCheckpoint:
    """Read a released checkpoint (.pth, .pt or .safetensors) without running anything that it holds.

    Args:
        path: the file.
        use_ema: take the averaged weights (`model_ema`) instead of the last ones (`model`).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, holds anything but data, has no weights of the kind asked for, or tensors
            that are not plain numbers; names the file, the reason and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a released checkpoint is needed ({', '.join(READ_SUFFIXES)})")
    if path.suffix not in READ_SUFFIXES:
        raise CheckpointError(f"{path}: unknown kind of file; a released checkpoint is {', '.join(READ_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; download it again")
    if path.suffix == ".safetensors":
        content, config = _read_safetensors(path)
    else:
        content = _read_pickle(path)
        config = content.get("config")
    key, weights = _select(path, content, use_ema)
    if not isinstance(config, Mapping):
        config = {}
    used = {key, "config"} if config else {key}
    left = tuple(str(name) for name in content if key in content and name not in used)
    return ReleasedCheckpoint(path, _checked_tensors(path, weights), config, key, left)


def write_released(
    path: str | Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], suffix: str
) -> None:
    """Write `tensors` (released names) and the release's `config` to `path`; `suffix` is .pth or .safetensors."""
    if suffix == ".pth":
        torch.save({"model": OrderedDict(tensors), "config": dict(config)}, path)
    else:
        save_file(dict(tensors), path, metadata={"config": json.dumps(config)})


def listed(names: list[str]) -> str:
    """The names in one line; of more than `MAXIMUM_NAMES`, the first and the number of the others."""
    rest = len(names) - MAXIMUM_NAMES
    return ", ".join(names[:MAXIMUM_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); download it again") from error
    if inner := [name for name in content if name.startswith(SAFETENSORS_PREFIX)]:
        content["state_dict"] = {name.removeprefix(SAFETENSORS_PREFIX): content.pop(name) for name in inner}
    config = None
    with contextlib.suppress(ValueError):  # metadata is free text: what is no JSON is none of ours
        config = json.loads(metadata.get("config", "null"))
    return content, config


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except Exception as error:  # damage and malice reach torch's reader as whatever its next step raises
        raise CheckpointError(_explain_refusal(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _can_be_mapped(path: Path) -> bool:
    """Whether the file is an archive that need not be read in full: a training's is several times its weights.

    Checks the sums of an archive on the way, which torch does not: a flipped bit would become a wrong weight.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise CheckpointError(f"the checksum of {damaged} in it is wrong")
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _explain_refusal(path: Path, error: Exception) -> str:
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"{path} refused: it holds the pickled object {named[1]}, which is no plain data; it was not run. "
            "If you trust its source, load it there and save its tensors alone with safetensors.torch.save_file"
        )
    # torch adds advice to load the file unsafely; only the reason matters here.
    reason = re.sub(r"^.*WeightsUnpickler error: ", "", str(error), flags=re.DOTALL).strip().split("\n")[0]
    reason = (reason or type(error).__name__)[:200]
    return f"{path} is damaged or no checkpoint of plain data ({reason}); nothing of it was run: download it again"


def _select(path: Path, content: dict[str, Any], use_ema: bool) -> tuple[str, dict[str, Any]]:
    """Which part of the file holds the weights asked for, and that part."""
    if use_ema:
        key = "model_ema"
        if content.get(key) is None:
            raise CheckpointError(f"{path} has no model_ema; leave out --use-ema to convert its only weights")
    elif not (key := next((key for key in ("model", "state_dict") if key in content), "")):
        if "model_ema" in content:
            raise CheckpointError(f"{path} has averaged weights only (model_ema); --use-ema converts them")
        key, content = "all tensors", {"all tensors": content}
    weights = content[key]
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: {key} holds no tensors")
    return key, weights


def _checked_tensors(path: Path, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights without the prefix of a parallel wrapper; refuses whatever is not a plain array of floats."""
    bad = [f"{name} ({fault})" for name, value in weights.items() if (fault := _fault(name, value))]
    if bad:
        raise CheckpointError(f"{path}: not a plain floating-point tensor: {listed(bad)}")
    wrapped = all(name.startswith(PARALLEL_PREFIX) for name in weights)
    return {name.removeprefix(PARALLEL_PREFIX) if wrapped else name: value for name, value in weights.items()}


def _fault(name: Any, value: Any) -> str | None:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return f"{value.layout} on {value.device.type}"
    if not value.is_floating_point():
        return str(value.dtype)
    if not value.numel():
        return "empty"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "claims more values than the file holds"  # a copy of it could fill any memory
    return None
