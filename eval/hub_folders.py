"""Where the tables of a dataset of the Hugging Face Hub lie on this machine; nothing here opens a connection.

A folder may be laid out in three ways: a snapshot of the repository (Parquet files, as in the Hub's cache or after
`hf download --local-dir`), what `save_to_disk` writes, or what `load_dataset` leaves in the cache of `datasets`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from eval.files import read_json
from eval.stored_tables import StoredTable

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFolder:
    """A folder that may hold tables of a repository; `repository` is None where the user only says that it does."""

    path: Path
    repository: str | None = None
    revision: str | None = None


def cached_folders(repository: str) -> Iterator[HubFolder]:
    """Folders of a repository in the Hub's cache, the branch `main` first, and in that of `datasets`."""
    folder = hub_cache() / f"datasets--{repository.replace('/', '--')}"
    main = folder / "refs" / "main"
    latest = main.read_text().strip() if main.is_file() else ""
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    for path in sorted(snapshots, key=lambda path: (path.name == latest, _age(path)), reverse=True):
        yield HubFolder(path, repository, path.name)
    for path in sorted(datasets_cache().glob("*___*")):
        if _squeezed(path.name) == _squeezed(repository.replace("/", "")):
            yield HubFolder(path, repository)


def hub_cache() -> Path:
    """The Hub's cache, as the environment says at this moment."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or _home() / "hub").expanduser()


def datasets_cache() -> Path:
    """The cache of `datasets`, as the environment says at this moment."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()


def _home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser()


def _squeezed(name: str) -> str:
    """A name without what `datasets` changes in it for a folder (ScienceQA becomes science_qa)."""
    return name.replace("_", "").lower()


def _age(path: Path) -> float:
    return path.stat().st_mtime


def find_table(folder: Path, config: str | None, split: str) -> tuple[StoredTable, str | None] | None:
    """The files of one split, and the revision if the folder tells; None if the split is not there.

    Args:
        folder: laid out in one of the three ways.
        config: None for a repository that has only one configuration.
        split: its name.

    Raises:
        FileNotFoundError: some of the split's files are there, others not; the message names one.
        ValueError: a malformed file that says which files belong to the split.
    """
    for files in (_saved(folder, config, split), _snapshot(folder, config, split)):
        if files:
            return StoredTable(_complete(files)), None
    prepared = _prepared(folder, config, split)
    if prepared:
        commit = prepared[0].parent.name
        return StoredTable(_complete(prepared)), commit if _COMMIT.fullmatch(commit) else None
    return None


def _saved(folder: Path, config: str | None, split: str) -> list[Path]:
    """What `save_to_disk` wrote: a dataset, or a folder of splits."""
    for place in [folder / config, folder] if config else [folder]:  # a single configuration may be saved as it is
        for table in (place / split, place):
            state = read_json(table / "state.json") if (table / "state.json").is_file() else {}
            if state and state.get("_split") in (None, split):
                return [table / Path(file["filename"]).name for file in state.get("_data_files", ())]
    return []


def _snapshot(folder: Path, config: str | None, split: str) -> list[Path]:
    """Parquet files: those that the repository's README names, or else those of the usual names."""
    patterns = _patterns_of_readme(folder, config, split)
    if not patterns:
        places = [config, f"data/{config}"] if config else ["data", "default", "."]
        names = [f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet"]
        patterns = [f"{place}/{name}" for place in places for name in names]
    for pattern in patterns:
        files = sorted(path for path in folder.glob(pattern) if path.suffix == ".parquet")
        if files:
            return files
    return []


def _patterns_of_readme(folder: Path, config: str | None, split: str) -> list[str]:
    readme = folder / "README.md"
    parts = readme.read_text(encoding="utf-8").split("---\n", 2) if readme.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return []
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ValueError(f"{readme}: malformed YAML: {error}") from error
    found: list[str] = []
    for entry in _dictionaries(header.get("configs") if isinstance(header, dict) else None):
        if entry.get("config_name") != (config or "default"):
            continue
        for files in _dictionaries(entry.get("data_files")):
            path = files.get("path")
            if files.get("split") == split:
                found += [str(each) for each in (path if isinstance(path, list) else [path])]
    return [pattern for pattern in found if not {"..", "/"} & set(PurePosixPath(pattern).parts)]


def _dictionaries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _prepared(folder: Path, config: str | None, split: str) -> list[Path]:
    """What `load_dataset` wrote, the newest of several revisions: CONFIGURATION/VERSION/REVISION/NAME-SPLIT.arrow."""
    named = re.compile(re.escape(config or "default") + "(-[0-9a-f]{16})?")
    configs = [path for path in folder.glob("*") if named.fullmatch(path.name)]
    done = [info.parent for path in configs for info in path.glob("*/*/dataset_info.json")]
    for place in sorted(done, key=_age, reverse=True):
        files = sorted([*place.glob(f"*-{split}.arrow"), *place.glob(f"*-{split}-?????-of-?????.arrow")])
        if files:
            return files
    return []


def _complete(files: list[Path]) -> tuple[Path, ...]:
    """The files, if none is missing of those that their names count."""
    shards = [_SHARD.search(file.name) for file in files]
    numbers = {int(shard[1]) for shard in shards if shard}
    total = max((int(shard[2]) for shard in shards if shard), default=0)
    missing = min(set(range(total)) - numbers, default=None)
    gone = [file for file in files if not file.is_file()]  # a link of the Hub's cache whose file was deleted
    if missing is not None:
        raise FileNotFoundError(f"{files[0].parent}: file {missing} of {total} (from 0) is missing: download it too")
    if gone:
        raise FileNotFoundError(f"{gone[0]}: no such file: download it again")
    return tuple(files)
