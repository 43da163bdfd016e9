"""Files written so that a kill or a full disk never leaves half of one, and fingerprints that say what was read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTIAL_PREFIX = ".partial-"
"""Names beginning like this are unfinished work of a run that stopped; they are never read and may be deleted."""


class DiskFullError(OSError):
    """No space left (or a quota reached) while writing; what was written before is untouched."""


def write_text_atomically(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader sees the old content or the new one, never a part.

    Raises `DiskFullError` when the disk is full; the old content is then still there.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise explain_write_error(error, path) from error
    synchronise_directory(path.parent)


def write_json_atomically(path: str | Path, value: Any) -> None:
    """`write_text_atomically` for JSON, indented, with a final newline."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def synchronise_directory(directory: str | Path) -> None:
    """Ask the file system to remember the directory's entries (a rename is lost by a power cut otherwise)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def synchronise_tree(directory: str | Path) -> None:
    """`fsync` every file under `directory`, then the directories."""
    directory = Path(directory)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            synchronise_directory(path)
    synchronise_directory(directory)


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


def remove_partial_work(directory: str | Path) -> list[str]:
    """Delete what an interrupted run left unfinished directly in `directory`; return the names deleted."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    removed = []
    for path in sorted(directory.glob(f"{PARTIAL_PREFIX}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


def explain_write_error(error: OSError, path: str | Path) -> OSError:
    """The same error with a sentence a user can act on when the disk is full; any other error unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            error.errno, f"no space left while writing {path}; nothing older was lost: free some space and start again"
        )
    return error


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of one file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: str | Path) -> str:
    """SHA-256 that identifies an input: a file's bytes, or a model folder's configuration, weights and tokenizer.

    A folder's fingerprint covers the files that define a model (`.json`, `.safetensors`, `.jinja`, `.model` directly
    in it) and neither records nor metrics of the run that wrote it, so that training it again to the same weights
    gives the same fingerprint. Raises `FileNotFoundError` naming the path.
    """
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    return combined_sha256(sorted(file for file in path.iterdir() if _defines_a_model(file)))


def combined_sha256(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of `files`, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _defines_a_model(file: Path) -> bool:
    return file.is_file() and file.suffix in {".json", ".safetensors", ".jinja", ".model"} and file.name != "run.json"
