"""What a run folder needs of the file system: room, order, and fingerprints of what was read."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from pathlib import Path

from defocus_mllm.files import PARTIAL_PREFIX, file_sha256, model_sha256


def check_writable(directory: str | Path) -> None:
    """Create `directory` if needed and prove that a file can be written in it.

    Raises `ValueError` naming the directory and the reason: hours before the first checkpoint would have failed.
    """
    directory = Path(directory)
    probe = directory / f"{PARTIAL_PREFIX}probe-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"writable")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {directory} cannot be written: {error.strerror or error}") from error


def remove_partial_work(directory: str | Path, prefix: str = PARTIAL_PREFIX) -> list[str]:
    """Delete what was left unfinished directly in `directory` under names with `prefix`; return the names deleted."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    removed = []
    for path in sorted(directory.glob(f"{glob.escape(prefix)}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


def fingerprint(path: str | Path) -> str:
    """SHA-256 that identifies an input: a file, a model folder, or the files of a folder or glob pattern of data.

    A file counts with its bytes, data of many files with their names and sizes. A model folder's
    fingerprint covers the files that define a model (`.json`, `.safetensors`, `.jinja`, `.model` directly in it) and
    neither records nor metrics of the run that wrote it, so that training it again to the same weights gives the same
    fingerprint. Raises `FileNotFoundError` naming the path.
    """
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    if (path / "config.json").is_file() or (path / "tokenizer_config.json").is_file():
        return model_sha256(path)
    files = sorted(path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    listing = [f"{os.path.relpath(file, path.parent)} {file.stat().st_size}" for file in files if file.is_file()]
    if not listing:
        raise FileNotFoundError(f"{path} does not exist or is empty")
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()
