"""The labelled images stage 0 learns from, held or streamed, as the training loop takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from training.arguments import Stage0VisionArguments
from training.augmented_batches import AugmentedBatches
from training.batches import Batch
from training.image_stream import ImageStream, open_stream
from training.images import PixelLoader
from training.labelled_data import LabelledData
from training.labelled_images import LabelledImageDataset, format_report, load_labelled_images
from training.sampling import BatchPlan, MicroBatchSampler, SampleKey
from training.stages import usable_samples
from training.streamed_images import (
    UNREADABLE,
    DecodedPictures,
    StreamedBatches,
    StreamedSample,
    StreamReader,
    StreamSampler,
)
from training.table_images import Columns


@dataclass(frozen=True)
class TrainingImages:
    """Where a stage's micro-batches come from; the fields are those of `training.stage.Stage`, and the labels."""

    labels: LabelledImageDataset
    """Knows the names and the kind of the labels (a stream's holds no picture)."""
    num_samples: int
    sampler: Callable[[BatchPlan, int, int, int], Any]
    load_batch: Callable[[Any], Batch]
    count_items: Callable[[Batch], int]
    lines: list[str]
    """For the log: what was found, what was left out, and one sample."""
    facts: dict[str, Any]
    begin: Callable[[], None] | None = None
    conclude: Callable[[], dict[str, Any]] | None = None


def held_images(arguments: Stage0VisionArguments, image_processor: Any) -> TrainingImages:
    """All pictures of `data` by position, checked."""
    cropped = arguments.crop_min_area > 0
    dataset, usable, left_out = load_checked(arguments.data, image_processor, arguments, cropped)
    batches = AugmentedBatches(dataset, usable, arguments, arguments.seed)
    lines = [format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    lines.append(f"{dataset.pictures.name(usable[0])}: {dataset.labels[usable[0]].tolist()} of {dataset.label_names}")
    return TrainingImages(
        labels=dataset,
        num_samples=len(usable),
        sampler=MicroBatchSampler,
        load_batch=batches,
        count_items=batches.count_known,
        lines=lines,
        facts={"data_report": dataset.report, "left_out": left_out},
    )


def streamed_images(arguments: Stage0VisionArguments, image_processor: Any) -> TrainingImages:
    """The pictures of `data` in the order they are read in; the first one is looked at now."""
    stream = open_stream(arguments.data, Columns(arguments.image_column, arguments.label_column), arguments.num_labels)
    loader = PixelLoader(image_processor, cache_bytes=0)
    nothing = torch.empty(0, dtype=torch.long)
    no_data = LabelledData(DecodedPictures([], []), nothing, stream.label_names, {"file": stream.where})
    labels = LabelledImageDataset(no_data, loader)
    augmented = AugmentedBatches(labels, [], arguments, arguments.seed)
    batches = StreamedBatches(augmented.made_of, loader, stream, arguments.on_bad_sample)
    reader = StreamReader(stream, arguments.seed, arguments.shuffle_buffer, arguments.on_bad_sample, Counter())

    def count_items(batch: Batch) -> int:
        if UNREADABLE in batch:  # taken out when the batch arrives; the model has no use for it
            reader.skipped[UNREADABLE] += int(batch.pop(UNREADABLE))
        return augmented.count_known(batch)

    return TrainingImages(
        labels=labels,
        num_samples=arguments.num_samples or arguments.max_steps * arguments.global_batch_size,
        sampler=partial(StreamSampler, reader),
        load_batch=batches,
        count_items=count_items,
        lines=[f"{stream.where}: a stream of {stream.rows.num_shards} shards", first_sample(stream, batches)],
        facts={},
        begin=reader.skipped.clear,  # what the preflight saw comes again
        conclude=lambda: {"skipped": dict(sum(gather_object([+reader.skipped]), Counter()))},
    )


def first_sample(stream: ImageStream, batches: StreamedBatches) -> str:
    """The first usable row, decoded, in a line. Raises `ValueError` where a bad one ends a run."""
    reader = StreamReader(stream, 0, 0, batches.on_bad_sample, Counter())
    row = next(reader.rows(0))
    image = batches.decode(StreamedSample(SampleKey(0, 0), *row))
    size = f"{image.width} x {image.height} pixels" if image else "unreadable"
    return f"{row[2]}: {size}, {row[1]} of {stream.label_names}"


def load_checked(
    data: str, image_processor: Any, arguments: Stage0VisionArguments, cropped: bool = False
) -> tuple[LabelledImageDataset, Sequence[int], list[str]]:
    """Labelled images, which of them can be used, and a message for each other one.

    `cropped` pictures are used at the size they have in their files, so they are not remembered.
    """
    columns = Columns(arguments.image_column, arguments.label_column)
    cache_bytes = arguments.image_cache_megabytes * 1024**2
    dataset = load_labelled_images(data, image_processor, arguments.on_bad_sample, cache_bytes, columns)
    load: Callable[[int], Any] = dataset.image if cropped else dataset.pixels
    count = arguments.check_images
    if not cropped and dataset.loader.fits(len(dataset)):
        count = len(dataset)  # decoded now, while workers can still inherit it
    usable, left_out = usable_samples(len(dataset), count, load, arguments.on_bad_sample)
    return dataset, usable, left_out
