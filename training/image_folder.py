"""Image names of a data file, resolved inside the image root and nowhere else."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

from training.conversation_records import BadRecord, shown


class ImageFolder:
    """The images below `root`.

    Args:
        root: the folder; it may itself be a link.
        follow_links: accept symbolic links in it that lead out of it (a folder on another disk).
        any_extension: where `a/b.jpg` does not exist, take the only file `a/b.*` instead.
    """

    def __init__(self, root: str | Path, follow_links: bool = False, any_extension: bool = False) -> None:
        self.root = os.path.abspath(root)
        self.follow_links, self.any_extension = follow_links, any_extension
        self._real_root = os.path.realpath(root)
        self._leaves_root = lru_cache(maxsize=100_000)(self._folder_leaves_root)
        self._stems = lru_cache(maxsize=1_000)(_files_by_stem)

    def path(self, name: str) -> str:
        """The file that `name` stands for, whether it exists or not.

        Raises `BadRecord` if the name leads out of the root by `..` or as an absolute path.
        """
        path = os.path.normpath(os.path.join(self.root, name))
        if not _is_inside(path, self.root):
            raise BadRecord(
                "image outside the image root",
                f"image {shown(name)} lies outside the image root {self.root}; move it there",
            )
        return path

    def find(self, name: str) -> tuple[str, bool]:
        """The existing file of `name`, and whether its extension is another one.

        Raises `BadRecord`: as `path` does, or because a link leads out of the root, or because there is no such file.
        """
        path, replaced = self.path(name), False
        if self.any_extension and not os.path.lexists(path):
            folder, file = os.path.split(path)
            others = self._stems(folder).get(os.path.splitext(file)[0], ())
            if len(others) == 1:
                path, replaced = os.path.join(folder, others[0]), True
        try:
            mode = os.lstat(path).st_mode
            is_link = stat.S_ISLNK(mode)
            if is_link:
                mode = os.stat(path).st_mode
        except OSError as error:
            raise BadRecord("image missing", path) from error
        if not stat.S_ISREG(mode):
            raise BadRecord("image missing", path)
        if not self.follow_links and (
            self._leaves_root(os.path.dirname(path)) or (is_link and not self._holds(os.path.realpath(path)))
        ):
            raise BadRecord(
                "image outside the image root",
                f"image {shown(name)} is reached by a link out of the image root {self.root}; "
                "move it there or set follow_links: true",
            )
        return path, replaced

    def _folder_leaves_root(self, folder: str) -> bool:
        return not self._holds(os.path.realpath(folder))

    def _holds(self, real_path: str) -> bool:
        return _is_inside(real_path, self._real_root)


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _files_by_stem(folder: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if os.path.isdir(folder):
        for file in sorted(os.listdir(folder)):
            found.setdefault(os.path.splitext(file)[0], []).append(file)
    return found
