"""Conversations about images, from one or several sources, checked before training starts.

A sample is looked up by number; what it holds lies in memory-mapped files, so that neither the number of records nor
that of processes and workers costs memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm

from training.bad_samples import BadSample, BadSamples, cause_of
from training.conversation_index import ConversationIndex, open_index
from training.conversation_records import BadRecord, ImageReference, structured
from training.conversation_sources import read_slice
from training.image_folder import ImageFolder
from training.images import StoredImage
from training.labels import NAMED_IN_MESSAGE
from training.mixtures import MixtureStrategy, Part, mix

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """One training sample."""

    record: str
    """Where it comes from, for messages: `conversations.json[12] (id 12)`."""
    messages: list[Message]
    """Hugging Face structured messages; image parts hold a path, `{"type": "image", "image": "/data/coco/0.jpg"}`, or a
    `StoredImage`."""
    source: str = ""
    """The data it stands in, as the user named it."""

    def bad(self, error: BaseException) -> BadSample:
        """This conversation as one that cannot be used because of `error`, found in training."""
        return BadSample(self.source, self.record, cause_of(error), str(error), found="in training")


@dataclass(frozen=True)
class SourceOptions:
    """One source and how it is read."""

    data: str
    """Any location `open_source` takes."""
    image_root: str = ""
    """Folder that image paths start from; empty: the folder of `data`."""
    weight: float = 1.0
    """Its share in a mixture that is weighted."""
    limit: int = 0
    """Only the first so many usable conversations; 0 takes all."""
    repair: bool = False
    """See `check_record`."""
    follow_links: bool = False
    """See `ImageFolder`."""
    any_extension: bool = False
    """See `ImageFolder`."""
    cache: str = ""
    """See `open_index`."""

    def folder(self) -> ImageFolder:
        """The image root."""
        path = Path(self.data)
        root = self.image_root or (path if path.is_dir() else path.parent)
        return ImageFolder(root, self.follow_links, self.any_extension)


class SourceConversations(Sequence[Conversation]):
    """The usable conversations of one source; made by `open_conversations`."""

    def __init__(self, options: SourceOptions, index: ConversationIndex) -> None:
        self.options, self.indexed = options, index
        self.folder = options.folder()
        self.rows: range | numpy.ndarray = range(len(index))
        """The rows of the index that are used."""
        self.num_other_extension = 0
        """Images that were found under another extension than the record's."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Conversation:  # type: ignore[override]  # slices are of no use here
        row = int(self.rows[number])
        name = self.indexed.name(row)
        images = self.indexed.images(row)
        parts = [self._image(reference, row, f"{name}, image {place}") for place, reference in enumerate(images)]
        return Conversation(name, structured(self.indexed.messages(row), iter(parts)), self.options.data)

    def _image(self, reference: ImageReference, row: int, name: str) -> str | StoredImage:
        if reference.path is not None and reference.size is None:
            path = self.folder.path(reference.path)
            return self.folder.find(reference.path)[0] if self.folder.any_extension else path
        name = f"{self.options.data}: {name}"
        if reference.path is not None:
            return StoredImage(name, partial(read_slice, reference.path, reference.offset or 0, reference.size or 0))
        if reference.bytes is not None:
            return StoredImage(name, partial(same_bytes, reference.bytes))
        position = self.indexed.position(row)
        return StoredImage(name, partial(self.indexed.source.read_image, position, reference.offset or 0))

    def leave_out(self, bad: BadSamples) -> dict[str, Any]:
        """Check all records and images, keep the rows that can be used, and return what stands in the report.

        Raises ValueError or FileNotFoundError for the first problem unless `bad` skips, and `TooManyBadSamples`.
        """
        examples = _Examples()
        location = self.options.data
        if self.indexed.num_problems and not bad.skips:
            examples.refuse(location, next(self.indexed.problems()).message, self.indexed.num_problems)
        for problem in self.indexed.problems():
            examples.add(problem.reason, problem.message)
            bad.add([BadSample(location, problem.name, problem.reason, problem.message)])
            bad.check()
        unusable = self._check_images(bad, examples)
        if unusable:
            self.rows = numpy.setdiff1d(numpy.arange(len(self.indexed), dtype=numpy.int32), unusable)
        if self.options.limit:
            self.rows = self.rows[: self.options.limit]
        report = {"file": location, "records": self.indexed.facts["records"], "used": len(self)}
        if not len(self):
            first = "; ".join(message for messages in examples.first.values() for message in messages[:1])
            raise ValueError(f"{location} holds no usable conversation of {report['records']}: {first}")
        return report | {"left_out": examples.as_report(), "other_extension": self.num_other_extension}

    def _check_images(self, bad: BadSamples, examples: _Examples) -> list[int]:
        """The rows with an image that is missing or lies outside the image root."""
        location, unusable, refused = self.options.data, [], _Examples()
        bar = tqdm(self.indexed.named_images(), "looking for images", len(self.indexed), delay=2, unit="record")
        for row, names in bar:
            missing, problem = [], None
            for name in names:
                try:
                    self.num_other_extension += self.folder.find(name)[1]
                except BadRecord as error:
                    if error.reason == "image missing":
                        missing.append(str(error))
                    problem = problem or error
            if problem is None:
                continue
            record = self.indexed.name(row)
            message = f"{record}: {', '.join(missing) or problem}"
            if not bad.skips:
                refused.add(problem.reason, message)
                continue
            unusable.append(row)
            examples.add(problem.reason, message)
            bad.add([BadSample(location, record, problem.reason, message)])
            bad.check()
        refused.refuse_images(location)
        return unusable

    def column(self, name: str) -> numpy.ndarray:
        """(conversations,) int32: a column of the index."""
        return self.indexed.column(name)[numpy.asarray(self.rows)]


def same_bytes(content: bytes) -> bytes:
    """What a `StoredImage` reads that is in memory already."""
    return content


class _Examples:
    """Messages by cause: all are counted, few are kept."""

    def __init__(self) -> None:
        self.first: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, cause: str, message: str) -> None:
        self.counts[cause] = self.counts.get(cause, 0) + 1
        if self.counts[cause] <= NAMED_IN_MESSAGE:
            self.first.setdefault(cause, []).append(message)

    def as_report(self) -> dict[str, dict[str, Any]]:
        return {cause: {"count": count, "first": self.first[cause]} for cause, count in self.counts.items()}

    def refuse(self, location: str, message: str, count: int) -> None:
        others = f"; {count - 1} more bad record(s)" if count > 1 else ""
        raise ValueError(f"{location}: {message}{others}; mend the data {_REMEDY}")

    def refuse_images(self, location: str) -> None:
        """Raise for the first image outside the root or, if there is none, for all missing ones together."""
        for cause in self.counts:
            if cause != "image missing":
                self.refuse(location, self.first[cause][0], sum(self.counts.values()))
        if count := self.counts.get("image missing"):
            listed = self.first["image missing"]
            others = f"; and {count - len(listed)} more" if count > len(listed) else ""
            raise FileNotFoundError(
                f"{location}: images of {count} record(s) do not exist: {'; '.join(listed)}{others}; check image_root "
                + _REMEDY
            )


_REMEDY = 'or leave such records out with on_bad_sample: "skip"'


class ConversationDataset(Sequence[Conversation]):
    """The samples of an epoch; made by `load_conversations` or `open_conversations`."""

    def __init__(self, sources: Sequence[SourceConversations], parts: Sequence[Part], report: dict[str, Any]) -> None:
        self._sources, self._parts = sources, parts
        self._starts = numpy.cumsum([0, *(len(part.samples) for part in parts)])
        self.report = report
        """What was found and what was left out; see `format_report`."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]  # slices are of no use here
        number = int(numpy.searchsorted(self._starts, index, side="right")) - 1
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._sources[number][int(self._parts[number].samples[index - int(self._starts[number])])]

    @cached_property
    def num_images(self) -> numpy.ndarray:
        """(samples,) int32: images of each sample."""
        return self._column("num_images")

    @cached_property
    def num_characters(self) -> numpy.ndarray:
        """(samples,) int32: characters of each sample's texts; for English about four a token."""
        return self._column("num_characters")

    def _column(self, name: str) -> numpy.ndarray:
        pairs = zip(self._sources, self._parts, strict=True)
        return numpy.concatenate([source.column(name)[numpy.asarray(part.samples)] for source, part in pairs])


def load_conversations(
    path: str | Path, image_root: str | Path | None = None, on_bad_sample: str = "raise", **options: Any
) -> ConversationDataset:
    """The conversations of one source, which may be of any kind that `open_source` knows.

    Image paths are taken relative to `image_root` (default: the file's folder) and must stay inside it. With
    `on_bad_sample="raise"` a bad record is a ValueError naming file and record, all missing images being listed in one
    FileNotFoundError; with "skip" bad records are left out before training starts, and counted and named in the
    dataset's `report`. A malformed JSON list and a file without one usable record are errors either way. `options` are
    further fields of `SourceOptions`.
    """
    source = SourceOptions(str(path), str(image_root or ""), **options)
    return open_conversations([source], BadSamples(on_bad_sample))


def open_conversations(
    sources: Sequence[SourceOptions], bad: BadSamples, strategy: MixtureStrategy = "concatenate", seed: int = 0
) -> ConversationDataset:
    """The conversations of several sources, mixed as `mix` says; what is left out goes to `bad`.

    Raises ValueError or FileNotFoundError naming source and record, and `TooManyBadSamples`.
    """
    indexes = [open_index(options.data, options.repair, options.cache) for options in sources]
    opened = [SourceConversations(options, index) for options, index in zip(sources, indexes, strict=True)]
    bad.num_records += sum(source.indexed.facts["records"] for source in opened)
    reports = [source.leave_out(bad) for source in opened]
    parts = mix([len(source) for source in opened], [options.weight for options in sources], strategy, seed)
    for source, part, report in zip(opened, parts, reports, strict=True):
        facts = source.indexed.facts
        counts = numpy.unique_counts(source.column("num_images"))
        report |= {
            "turns": int(source.column("num_answers").sum()),
            "images_per_conversation": dict(zip(counts.values.tolist(), counts.counts.tolist(), strict=True)),
            "distinct_images": facts["distinct_images"],
            "repaired": facts["repaired"],
            "samples": len(part.samples),
            "epochs": round(part.epochs, 4),
        }
    return ConversationDataset(opened, parts, reports[0] if len(reports) == 1 else {"sources": reports})


def format_report(report: dict[str, Any]) -> str:
    """The report of a dataset in a few lines for the log; of each cause some records left out are named."""
    if "sources" in report:
        total = sum(source["samples"] for source in report["sources"])
        lines = []
        for source in report["sources"]:
            share = f"{source['samples']:,} samples ({source['samples'] / total:.1%}), {source['epochs']:g} epoch(s)"
            lines.append(f"{format_report(source)}\n  in each epoch of the mixture: {share}")
        return "\n".join([*lines, f"mixture: {total:,} samples an epoch"])
    counts = ", ".join(f"{count} with {number} image(s)" for number, count in report["images_per_conversation"].items())
    lines = [
        f"{report['file']}: {report['records']} records, {report['used']} used ({counts or 'none'}),"
        f" {report['turns']} question/answer pairs, {report['distinct_images']} distinct images"
    ]
    lines += [f"repaired, {kind}: {count}" for kind, count in report["repaired"].items()]
    if report["other_extension"]:
        lines.append(f"found under another extension: {report['other_extension']} images")
    for reason, found in report["left_out"].items():
        lines.append(f"left out, {reason}: {found['count']}")
        lines += [f"  {message}" for message in found["first"]]
        if found["count"] > len(found["first"]):
            lines.append(f"  and {found['count'] - len(found['first'])} more")
    return "\n".join(lines)
