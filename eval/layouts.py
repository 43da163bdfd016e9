"""The ways in which the official files of a benchmark may lie in its folder, and which of them is on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """One way; names are relative to the benchmark's folder."""

    files: tuple[str, ...]
    """What the questions are read from: files, folders, or patterns with `*` of which one file must be there."""
    images: tuple[str, ...] = ()
    """Patterns of the image files; () where the files above hold the images."""


@dataclass(frozen=True)
class Found:
    """Where official files are, or which are missing first, the questions' and the images'."""

    folder: Path | None
    missing: Path | None
    missing_images: Path | None = None


def locate(layouts: Sequence[Layout], folders: Sequence[Path]) -> Found:
    """The first layout whose questions are in one of the folders; opens no file. What is missing is of the first."""
    for layout in layouts:
        for folder in folders:
            if _missing(layout.files, folder) is None:
                return Found(folder, None, _missing(layout.images, folder))
    return Found(None, _missing(layouts[0].files, folders[0]))


def _missing(names: Sequence[str], folder: Path) -> Path | None:
    return next((folder / name for name in names if not exists(folder, name)), None)


def exists(folder: Path, name: str) -> bool:
    """Whether a folder has this file or folder, or one for a pattern with `*`."""
    return next(folder.glob(name), None) is not None if "*" in name else (folder / name).exists()


def check_data_root(data_root: Path | None) -> None:
    """FileNotFoundError if the folder that a command was given for its data is none."""
    if data_root is not None and not data_root.is_dir():
        raise FileNotFoundError(f"--data-root: {data_root} is no folder")
