"""Files written so that a kill or a full disk never leaves half of one, and digests that say what was read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARTIAL_PREFIX = ".partial-"
"""Names beginning like this are unfinished work of a run that stopped; they are never read and may be deleted."""


class DiskFullError(OSError):
    """No space left (or a quota reached) while writing; what was written before is untouched."""


def write_text_atomically(path: str | Path, text: str) -> None:
    """`write_bytes_atomically` for text, in UTF-8."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: str | Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old content or the new one, never a part.

    Raises `DiskFullError` when the disk is full; the old content is then still there.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
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


def refuse_existing(path: str | Path) -> None:
    """Raise `FileExistsError` if there is anything at `path`."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already; choose another name, or delete it first")


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a place beside `path` to write a new file or folder at; it becomes `path` when the block ends well.

    Whatever goes wrong in the block, `path` does not exist afterwards, nor does anything written for it.

    Raises:
        FileExistsError: `path` exists; nothing is replaced.
        DiskFullError: no space is left.
    """
    path = Path(path)
    refuse_existing(path)
    partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        synchronise_tree(partial)
        os.replace(partial, path)
        synchronise_directory(path.parent)
    except Exception as error:
        raise explain_write_error(error, path) from error
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def synchronise_tree(path: str | Path) -> None:
    """`fsync` a file, or every file under a folder and then the folders."""
    path = Path(path)
    for entry in [*sorted(path.rglob("*")), path]:
        if entry.is_dir():
            synchronise_directory(entry)
        else:
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())


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


def explain_write_error(error: BaseException, path: str | Path) -> BaseException:
    """The same error with a sentence a user can act on when the disk is full; any other error unchanged."""
    number = error.errno if isinstance(error, OSError) else None
    if "No space left" in str(error):  # safetensors and torch.save wrap it in errors of their own
        number = errno.ENOSPC
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            number, f"no space left while writing {path}; nothing older was lost: free some space and start again"
        )
    return error


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of one file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined_sha256(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents of `files`, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def model_sha256(folder: str | Path) -> str:
    """SHA-256 of the files that define the model in `folder`: configurations, weights, tokenizer and template.

    Records and metrics of the run that wrote it do not count, so that training again to the same weights gives the
    same digest.
    """
    return combined_sha256(sorted(file for file in Path(folder).iterdir() if _defines_a_model(file)))


def _defines_a_model(file: Path) -> bool:
    return file.is_file() and file.suffix in {".json", ".safetensors", ".jinja", ".model"} and file.name != "run.json"
