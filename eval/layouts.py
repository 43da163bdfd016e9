"""The ways in which the official files of a benchmark may lie in its folder, and which of them is on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.samples import BenchmarkData


@dataclass(frozen=True)
class Layout:
    """One way; names are relative to the benchmark's folder."""

    files: tuple[str, ...]
    """What the questions are read from: files, folders, or patterns with `*` of which one file must be there."""
    read: Callable[[Path], BenchmarkData]
    """The data in such a folder; ValueError names a malformed record by file and place."""
    images: tuple[str, ...] = ()
    """Patterns of the image files; () where the files above hold the images."""


@dataclass(frozen=True)
class Found:
    """A layout, and the folder in which it was found or is expected."""

    layout: Layout
    folder: Path

    @property
    def missing(self) -> Path | None:
        """The first of the questions' files that is not there."""
        return _missing(self.layout.files, self.folder)

    @property
    def missing_images(self) -> Path | None:
        """The first pattern of images of which there are none."""
        return _missing(self.layout.images, self.folder)


def locate(layouts: Sequence[Layout], folders: Sequence[Path]) -> Found:
    """The first layout whose questions are in one of the folders, or else that with the most files; opens no file."""
    possible = [Found(layout, folder) for layout in layouts for folder in folders]
    whole = (found for found in possible if found.missing is None)
    return next(whole, None) or max(possible, key=_number_of_files)


def _missing(names: Sequence[str], folder: Path) -> Path | None:
    return next((folder / name for name in names if not _exists(folder, name)), None)


def _number_of_files(found: Found) -> int:
    return sum(_exists(found.folder, name) for name in found.layout.files)


def _exists(folder: Path, name: str) -> bool:
    return next(folder.glob(name), None) is not None if "*" in name else (folder / name).exists()


def check_data_root(data_root: Path | None) -> None:
    """FileNotFoundError if the folder that a command was given for its data is none."""
    if data_root is not None and not data_root.is_dir():
        raise FileNotFoundError(f"--data-root: {data_root} is no folder")
