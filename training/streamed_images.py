"""Micro-batches from a stream of labelled pictures: read by each process in order, decoded where batches are prepared.

The stream takes the place of positions in the plan of `training.sampling`. An epoch is `num_samples` usable rows, the
same number for each process, out of a pass (or more) over the data in an order of the epoch's own. To resume, the rows
of the current epoch that were seen are read once more, but not decoded; neither that nor workers change what comes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from defocus_mllm.images import ImageError
from training.image_stream import ImageStream, RowStream
from training.images import PixelLoader
from training.labelled_data import LabelledData
from training.labelled_images import LabelledImageDataset
from training.labels import raise_first
from training.sampling import BatchPlan, SampleKey, StepSampler, mix_seed
from training.table_images import label_problem, open_picture

_STREAM = 5
"""What a seed is for: the order of a pass."""
UNKNOWN_CLASS = -1
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class StreamedSample:
    """A row that was read, and which visit it is."""

    key: SampleKey
    image: dict[str, Any]
    label: int
    name: str


class StreamReader:
    """Reads the rows of a stream, leaving out those without a class.

    Args:
        stream: the data.
        seed: the run's.
        buffer_size: rows that are shuffled at a time; 0 keeps the data's order.
        on_bad_sample: "raise" ends the run with a `ValueError` naming file and row; "skip" counts.
        skipped: counts by cause.
    """

    def __init__(
        self, stream: RowStream, seed: int, buffer_size: int, on_bad_sample: str, skipped: Counter[str]
    ) -> None:
        self.stream, self.seed, self.buffer_size = stream, seed, buffer_size
        self.on_bad_sample, self.skipped = on_bad_sample, skipped

    def rows(self, epoch: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Any, ...]]:
        """(image, class, name) of the rows of an epoch that are this process's, pass after pass without end.

        Raises `ValueError` if a whole pass has none.
        """
        number = 0
        while True:
            found = False
            seed = mix_seed(self.seed, _STREAM, epoch, number)
            for row in self.stream.one_pass(seed, self.buffer_size, rank, world_size):
                usable = self._usable(row)
                if usable:
                    found = True
                    yield usable
            if not found:
                raise ValueError(f"{self.stream.where} holds nothing usable for process {rank} of {world_size}")
            number += 1

    def _usable(self, row: dict[str, Any]) -> tuple[Any, ...] | None:
        assert isinstance(self.stream, ImageStream)
        columns, names = self.stream.columns, self.stream.label_names
        name, label = self.stream.name(row), row[columns.label]
        problem = label_problem(label, names)
        if not problem:
            return row[columns.image], label, name
        if self.on_bad_sample == "raise":
            raise_first(self.stream.where, [f"{name}: {columns.label!r} {problem}"])
        self.skipped["bad label"] += 1
        return None


class StreamSampler(StepSampler[list[Any]]):
    """The micro-batches of one process from `first_step` to `total_steps`, as `MicroBatchSampler` gives positions."""

    make: Callable[..., Any] = StreamedSample
    """(key, what the reader gave) -> a sample."""

    def __init__(self, reader: StreamReader, plan: BatchPlan, first_step: int, total_steps: int, rank: int) -> None:
        super().__init__(plan, first_step, total_steps, rank)
        self.reader = reader

    def __iter__(self) -> Iterator[list[Any]]:
        plan = self.plan
        first_epoch = int(plan.epoch_at(self.first_step))
        epoch = -1
        rows: Iterator[tuple[Any, ...]] = iter(())
        for step in range(first_epoch * plan.num_samples // plan.global_batch_size, self.total_steps):
            for micro_step in range(plan.accumulation_steps):
                samples = []
                for position in plan.positions(step, micro_step, self.rank):
                    key = SampleKey(*divmod(position, plan.num_samples))
                    if key.epoch > epoch:
                        epoch = key.epoch
                        rows = self.reader.rows(epoch, self.rank, plan.world_size)
                    samples.append(type(self).make(key, *next(rows)))
                if step >= self.first_step:
                    yield samples


class StreamedBatches:
    """Samples -> a micro-batch; what `Stage.load_batch` asks for.

    Args:
        augment: (pictures, their positions, their keys) -> the batch.
        loader: brings pictures to the encoder's size.
        stream: where they come from.
        on_bad_sample: "raise", or "skip": a picture that cannot be decoded keeps its place, grey and of unknown class,
            from which nothing is learned, so that every batch is full.
    """

    def __init__(
        self,
        augment: Callable[[LabelledImageDataset, Sequence[int], Sequence[SampleKey]], dict[str, torch.Tensor]],
        loader: PixelLoader,
        stream: ImageStream,
        on_bad_sample: str,
    ) -> None:
        self.augment, self.loader, self.stream, self.on_bad_sample = augment, loader, stream, on_bad_sample
        self._told: set[str] = set()

    def __call__(self, samples: Sequence[StreamedSample]) -> dict[str, torch.Tensor]:
        """The batch, with the number of pictures that could not be decoded under `UNREADABLE`, (), long."""
        images, labels = [], []
        for sample in samples:
            image = self.decode(sample)
            images.append(image or Image.new("RGB", (1, 1), "grey"))
            labels.append(sample.label if image else UNKNOWN_CLASS)
        names = [sample.name for sample in samples]
        data = LabelledData(
            DecodedPictures(images, names), torch.tensor(labels), self.stream.label_names, {"file": self.stream.where}
        )
        batch = self.augment(
            LabelledImageDataset(data, self.loader), range(len(samples)), [sample.key for sample in samples]
        )
        return {**batch, UNREADABLE: torch.tensor(labels.count(UNKNOWN_CLASS))}

    def decode(self, sample: StreamedSample) -> Image.Image | None:
        """The picture, or None if it is damaged and such are left out. Raises `ImageError` naming file and row."""
        try:
            return open_picture(sample.image, self.stream.may_name_files)
        except (ImageError, FileNotFoundError) as error:
            message = f"{self.stream.where}: {sample.name}: {error}"
            if self.on_bad_sample == "raise":
                raise type(error)(message) from error
            if sample.name not in self._told:
                self._told.add(sample.name)
                print(f"left out: {message}", file=sys.stderr, flush=True)
            return None


class DecodedPictures:
    """The pictures of one micro-batch."""

    def __init__(self, images: list[Image.Image], names: list[str]) -> None:
        self._images, self._names = images, names

    def name(self, index: int) -> str:
        """Its row, as messages call it."""
        return self._names[index]

    def load(self, index: int) -> Image.Image:
        """The picture."""
        return self._images[index]
