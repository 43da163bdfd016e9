"""Conversations read in order instead of by position: nothing is indexed or copied first, however large the data.

The order is random only as far as shards (`.tar` files, Parquet row groups, files of JSON Lines) come in random order
and a buffer of records is shuffled. As in stage 0, an epoch is `num_samples` usable conversations, the same number for
each process; neither workers nor resuming change what comes.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch

from training.bad_samples import BAD_SAMPLES, BadSample, BadSamples, decode, encode
from training.conversation_records import BadRecord, ImageReference, check_record, structured
from training.conversation_sources import (
    IMAGE_COLUMNS,
    RECORD_COLUMNS,
    JsonSource,
    ShardSource,
    Source,
    SourceRecord,
    read_slice,
)
from training.conversations import Conversation, SourceOptions, same_bytes
from training.image_stream import RowStream, one_line_errors, row_groups, tar_files
from training.images import StoredImage
from training.records import record_name
from training.sampling import BatchPlan, SampleKey
from training.streamed_images import StreamReader, StreamSampler
from training.supervision import ConversationCollator
from training.table_images import parquet_files

_ROWS_AT_ONCE = 100


@dataclass(frozen=True)
class StreamedConversation:
    """A conversation that was read, which visit it is, and what was passed over on the way to it."""

    key: SampleKey
    conversation: Conversation
    passed_over: tuple[BadSample, ...]


class RowGroup(Source):
    """The rows of one row group of a Parquet file, with the bytes of their images."""

    def __init__(self, file: str, number: int, first_row: int) -> None:
        self.location, self._number, self._first_row = file, number, first_row

    def fingerprint(self) -> str:
        """Streams keep nothing, so there is nothing to name."""
        raise NotImplementedError

    def records(self) -> Iterator[SourceRecord]:
        """Raises ValueError naming the file if it is damaged or has no conversations."""
        with one_line_errors(self.location):
            file = pyarrow.parquet.ParquetFile(self.location)
            names = [name for name in ("id", *RECORD_COLUMNS, *IMAGE_COLUMNS) if name in file.schema_arrow.names]
            if not set(names) & set(RECORD_COLUMNS):
                found = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{self.location}: no column {' or '.join(RECORD_COLUMNS)}; it has {found}")
            row = self._first_row
            for batch in file.iter_batches(_ROWS_AT_ONCE, [self._number], names):
                for cells in batch.to_pylist():
                    images = [cells.pop(name) for name in IMAGE_COLUMNS if name in cells]
                    embedded = [_held(image) for value in images for image in _as_list(value)] if images else None
                    yield SourceRecord(record_name(self.location, row, cells), cells, embedded)
                    row += 1


def _as_list(value: Any) -> list[Any]:
    """The images of a cell, without those that are null."""
    images = value if isinstance(value, list) else [value]
    return [image for image in images if image is not None]


def _held(image: Any) -> ImageReference:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return ImageReference(bytes=image) if isinstance(image, bytes) else ImageReference(path=image)


@dataclass(frozen=True)
class ConversationStream(RowStream):
    """Records of a source in order; a row holds one `SourceRecord` under "record"."""

    options: SourceOptions


def open_conversation_stream(options: SourceOptions) -> ConversationStream:
    """`.tar` shards, Parquet or JSON Lines: a file, a folder, or a glob pattern.

    Raises FileNotFoundError or ValueError naming what cannot be read.
    """
    units = _units(options.data)
    rows = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"units": units})
    return ConversationStream(options.data, rows, options)


def _units(location: str) -> list[Source]:
    """What is read as a whole by one process: shards, row groups, files."""
    path = Path(location)
    if (path / "dataset_info.json").is_file():
        raise ValueError(f"{location}: a saved data set is memory-mapped already; leave streaming out")
    if shards := tar_files(location):
        return [ShardSource(shard, [shard]) for shard in shards]
    pattern = glob.escape(location) + "/**/*.jsonl" if path.is_dir() else location
    files = [str(path)] if path.is_file() else sorted(glob.glob(pattern, recursive=True))
    if files and all(file.endswith((".jsonl", ".json")) for file in files):
        return [JsonSource(Path(file)) for file in files]
    groups: list[Source] = [RowGroup(*group) for file in parquet_files(location) for group in row_groups(file)]
    if not groups:
        raise ValueError(f"{location} holds no conversations: neither .tar shards, nor Parquet, nor .jsonl files")
    return groups


def _rows(units: Sequence[Source]) -> Iterator[dict[str, Any]]:
    for unit in units:
        for record in unit.records():
            yield {"record": record}


class ConversationReader(StreamReader):
    """The usable conversations of a stream, pass after pass.

    Args:
        stream: the data.
        seed: the run's.
        buffer_size: records that are shuffled at a time; 0 keeps the data's order.
        bad: says whether bad records end the run; those passed over travel with the next conversation.
    """

    def __init__(self, stream: ConversationStream, seed: int, buffer_size: int, bad: BadSamples) -> None:
        super().__init__(stream, seed, buffer_size, bad.policy, Counter())
        self.options = stream.options
        self.folder, self._bad = self.options.folder(), bad
        self._passed_over: list[BadSample] = []

    def _usable(self, row: dict[str, Any]) -> tuple[Conversation, tuple[BadSample, ...]] | None:
        record: SourceRecord = row["record"]
        try:
            conversation = self._conversation(record)
        except BadRecord as problem:
            message = str(problem) if str(problem).startswith(record.name) else f"{record.name}: {problem}"
            if self.on_bad_sample == "raise":
                raise ValueError(f"{self.options.data}: {message}") from problem
            self._passed_over.append(
                BadSample(self.options.data, record.name, problem.reason, message, found="in training")
            )
            if len(self._passed_over) > self._bad.allowed:  # do not read a large file to its end first
                self._bad.add(self._passed_over)
                self._bad.check()
            return None
        passed_over, self._passed_over = tuple(self._passed_over), []
        return conversation, passed_over

    def _conversation(self, record: SourceRecord) -> Conversation:
        if isinstance(record.value, BadRecord):
            raise record.value
        checked = check_record(record.value, record.name, record.embedded, self.options.repair)
        images = [self._image(image, f"{record.name}, image {place}") for place, image in enumerate(checked.images)]
        return Conversation(record.name, structured(checked.messages, iter(images)), self.options.data)

    def _image(self, image: ImageReference, name: str) -> str | StoredImage:
        if image.bytes is not None:
            return StoredImage(f"{self.options.data}: {name}", partial(same_bytes, image.bytes))
        assert image.path is not None
        if image.size is not None:
            read = partial(read_slice, image.path, image.offset or 0, image.size)
            return StoredImage(f"{self.options.data}: {name}", read)
        return self.folder.find(image.path)[0]


class ConversationSampler(StreamSampler):
    """The micro-batches of one process, each a list of `StreamedConversation`."""

    make = StreamedConversation


def streamed_batch(collate: ConversationCollator, samples: Sequence[StreamedConversation]) -> dict[str, torch.Tensor]:
    """The batch of a micro-batch's conversations, telling also of the records passed over."""
    batch = collate([sample.conversation for sample in samples], [sample.key for sample in samples])
    passed_over = [bad for sample in samples for bad in sample.passed_over]
    if passed_over:
        found = decode(batch[BAD_SAMPLES]) if BAD_SAMPLES in batch else []
        batch[BAD_SAMPLES] = encode([*passed_over, *found])
    return batch


def sampler_of(reader: ConversationReader, plan: BatchPlan, first: int, total: int, rank: int) -> ConversationSampler:
    """For `Stage.sampler`."""
    return ConversationSampler(reader, plan, first, total, rank)
