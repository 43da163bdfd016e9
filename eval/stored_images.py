"""Images that are no files: inside a table (base64 in a TSV, bytes in Parquet) or drawn from others.

Everything else reads image files: so these are written as such once, with their original bytes, into a folder of the
user's cache, and only those that are needed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from defocus_mllm.files import PARTIAL_PREFIX, write_bytes_atomically
from eval.files import sha256_of_json

_SECONDS_BEFORE_BAR = 1.0
_IMAGES_AT_ONCE = 64
_WRITERS = 8
"""Writing waits for the disk: 500 images of 5 kB took 0.3 s where one at a time took 5 s."""


@dataclass(frozen=True)
class StoredImages:
    """Images known by name, and the folder in which they become files of that name.

    `read` takes names, each once, and yields each with the bytes of its image file, in any order.
    """

    folder: Path
    read: Callable[[Sequence[str]], Iterable[tuple[str, bytes]]]

    @classmethod
    def in_cache(
        cls, name: str, origin: Any, read: Callable[[Sequence[str]], Iterable[tuple[str, bytes]]]
    ) -> StoredImages:
        """Images that become files in a folder of their own: `name` and a digest of `origin`.

        Args:
            name: what they belong to, usually the benchmark.
            origin: a JSON value that differs wherever the bytes may: for a table its `file_identity`.
            read: see above.
        """
        return cls(cache_folder() / f"{name}-{sha256_of_json(origin)[:16]}", read)

    def provide(self, names: Iterable[str]) -> None:
        """Make these images files; those that are there already are kept.

        A file appears whole or not at all, so a run that was killed leaves nothing that could be taken for an image.

        Raises:
            ValueError: a name that leads out of the folder, or an image that is missing or empty where it should stand.
            DiskFullError: no space is left.
        """
        waiting = [name for name in dict.fromkeys(names) if not self._path(name).is_file()]
        images = iter(self.read(waiting) if waiting else ())
        written: set[str] = set()
        with (
            tqdm(total=len(waiting), desc="images", unit="image", delay=_SECONDS_BEFORE_BAR) as progress,
            ThreadPoolExecutor(_WRITERS) as writers,
        ):
            while batch := list(itertools.islice(images, _IMAGES_AT_ONCE)):
                written.update(writers.map(self._write, batch))
                progress.update(len(batch))
        missing = next((name for name in waiting if name not in written), None)
        if missing is not None:
            raise ValueError(f"image {missing!r} stands nowhere in the data")

    def _write(self, image: tuple[str, bytes]) -> str:
        name, content = image
        if not content:
            raise ValueError(f"image {name!r} is empty")
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, content)
        return name

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        inside = parts and not name.startswith("/") and ".." not in parts and not set("\\\0") & set(name)
        if not inside or parts[-1].startswith(PARTIAL_PREFIX):
            raise ValueError(f"image name {name!r}: must be a path inside a folder, without '..' or backslash")
        return self.folder / name


def cache_folder() -> Path:
    """The folder of this project's evaluation in the user's cache: under XDG_CACHE_HOME, or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defocus_mllm" / "eval"


def file_identity(path: Path) -> list[Any]:
    """What tells a file from another, or from itself before it changed, without reading it: place, size, time."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
