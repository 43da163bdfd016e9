"""The second source of a benchmark: its dataset on the Hugging Face Hub, as it lies in a cache on this machine.

The official files come first; see `Benchmark.load_verified`. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.hub_folders import HubFolder, cached_folders, find_table
from eval.samples import BenchmarkData, Origin, Sample
from eval.stored_images import StoredImages, file_identity
from eval.stored_tables import StoredTable

_SPLITS_SHOWN = 4
Split = tuple[str | None, str]
"""Configuration (None where a repository has only one) and split."""
_Place = tuple[int, int, int]
"""Where an image stands: number of the table, number of the row, number of the image in that row."""


@dataclass(frozen=True)
class HubSource:
    """How the rows of a dataset become samples."""

    repositories: tuple[str, ...]
    """Names under which the same dataset is published."""
    splits: tuple[Split, ...]
    """Read one after the other."""
    sample: Callable[[dict[str, Any], int, str], Sample | None]
    """(row, its number from 0 over all splits, where it stands for an error message) -> a sample, or None for a row
    that the benchmark does not ask. In place of images a row holds their number. The images of the sample are those of
    the row, in order; a sample that is there already, equal in everything, counts once."""
    image_split: Split | None = None
    """A split of its own that holds the images: its column `id` is the samples' cluster."""
    also_needed: tuple[Split, ...] = ()
    """Splits that must be there beside those that are asked, for the submission."""
    differs: str = ""
    """What is not as in the official files: a missing column, another edition."""
    counts: tuple[int, ...] = ()
    """Numbers of samples accepted beside the official one."""
    compared: tuple[str, ...] = BenchmarkData.compared
    """See `BenchmarkData`."""

    @property
    def all_splits(self) -> tuple[Split, ...]:
        """The splits of the rows, those also needed, and that of the images if there is one."""
        return (*self.splits, *self.also_needed, *((self.image_split,) if self.image_split else ()))

    def __str__(self) -> str:
        splits = ["/".join(filter(None, split)) for split in self.all_splits]
        if len(splits) > _SPLITS_SHOWN:
            splits = [splits[0], f"... {len(splits)} in all", splits[-1]]
        return f"{' or '.join(self.repositories)} ({', '.join(splits)})"


def load_from_hub(folder_name: str, sources: Sequence[HubSource], data_root: Path | None) -> BenchmarkData | None:
    """The benchmark's samples from the first of its datasets that is on this machine, or None.

    Looked for in `data_root`/FOLDER_NAME and `data_root`, then in the caches of the Hub and of `datasets`.

    Raises:
        FileNotFoundError: a dataset is there only in part, and no other is whole.
        ValueError: a malformed row or file; the message names it.
    """
    found = find_on_hub(folder_name, sources, data_root)
    if found is None:
        return None
    source, folder, tables = found
    origin = Origin(folder.repository, folder.revision, source.differs, source.counts)
    return replace(_read(source, folder.path, tables), origin=origin)


def read_official_tables(source: HubSource, folder: Path) -> BenchmarkData:
    """The samples of a benchmark whose official files are the tables of the Hub themselves.

    Raises:
        FileNotFoundError: a split is not in the folder.
        ValueError: a malformed row or file; the message names it.
    """
    tables = []
    for split in source.all_splits:
        found = find_table(folder, *split)
        if found is None:
            raise FileNotFoundError(f"{folder}: holds no split {'/'.join(filter(None, split))}")
        tables.append(found[0])
    return _read(source, folder, tables)


def find_on_hub(
    folder_name: str, sources: Sequence[HubSource], data_root: Path | None
) -> tuple[HubSource, HubFolder, list[StoredTable]] | None:
    """Where `load_from_hub` would read, without reading; the tables are those of the source's `all_splits`."""
    partial_error = None
    for source in sources:
        for folder in _folders(folder_name, source, data_root):
            try:
                tables = [find_table(folder.path, *split) for split in source.all_splits]
            except FileNotFoundError as error:
                partial_error = partial_error or error
                continue
            whole = [table for table in tables if table is not None]
            if len(whole) == len(tables):
                revision = folder.revision or next((found for _, found in whole if found), None)
                return source, HubFolder(folder.path, folder.repository, revision), [table for table, _ in whole]
    if partial_error is not None:
        raise partial_error
    return None


def _folders(folder_name: str, source: HubSource, data_root: Path | None) -> Iterator[HubFolder]:
    if data_root is not None:
        yield from (HubFolder(data_root / folder_name), HubFolder(data_root))
    for repository in source.repositories:
        yield from cached_folders(repository)


def _read(source: HubSource, folder: Path, tables: Sequence[StoredTable]) -> BenchmarkData:
    samples: dict[str, Sample] = {}
    places: dict[str, _Place] = {}
    row_number = 0
    for table_number, (split, table) in enumerate(zip(source.splits, tables, strict=False)):
        bar = tqdm(table.rows(), source.repositories[0], len(table), unit="row", delay=1)
        for number, row in enumerate(bar):
            where = f"{folder}, {'/'.join(filter(None, split))}, row {number + 1}"
            sample = source.sample(row, row_number, where)
            row_number += 1
            if sample is None:
                continue
            if samples.setdefault(sample.id, sample) != sample:
                raise ValueError(f"{where}: another question has the identifier {sample.id!r} too")
            for at, image in enumerate(sample.images):
                places.setdefault(image, (table_number, number, at))
    if source.image_split:
        rows = {str(row.get("id")): number for number, row in enumerate(tables[-1].rows())}
        clusters = {image: sample.cluster for sample in samples.values() for image in sample.images}
        places = {image: (len(tables) - 1, rows[key], 0) for image, key in clusters.items() if key in rows}
    images = StoredImages.in_cache(
        source.repositories[0].replace("/", "--"),
        [file_identity(file) for table in tables for file in table.files],
        partial(_read_images, tables, places),
    )
    return BenchmarkData(folder, tuple(samples.values()), source.compared, images)


def _read_images(
    tables: Sequence[StoredTable], places: Mapping[str, _Place], names: Sequence[str]
) -> Iterable[tuple[str, bytes]]:
    for number, table in enumerate(tables):
        wanted: dict[int, list[tuple[str, int]]] = {}
        for name in names:
            if name in places and places[name][0] == number:
                wanted.setdefault(places[name][1], []).append((name, places[name][2]))
        for row, images in table.images(wanted):
            yield from ((name, images[at]) for name, at in wanted[row] if at < len(images))


def records(value: Any) -> list[dict[str, Any]]:
    """A column of lists of records, which `datasets` may store as a record of lists."""
    if isinstance(value, dict):
        return [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    return list(value or ())
