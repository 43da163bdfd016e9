"""What flows through an evaluation: samples in, predictions out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval.files import sha256_of_json, shown
from eval.stored_images import StoredImages


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    `images` are paths relative to the data's `image_root` (none for a text-only question); samples of one `cluster`
    (usually one image) are not independent, which the confidence interval must know; `categories` are the columns
    by which results are broken down (a tuple of labels where a question may have several, or none). `answers` are all
    accepted answers where a question has several (`target` is then the most frequent or first one), `choices` the
    options of a multiple-choice question, without their letters, and `details` whatever else the prompt, the scoring
    rule or the submission needs (OCR tokens, a hint, official keys).
    """

    id: str
    images: tuple[str, ...]
    question: str
    target: str
    cluster: str
    categories: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def labels_of(category: str | Sequence[str]) -> tuple[str, ...]:
    """The labels of one entry of `Sample.categories`, which is a string if there is exactly one."""
    return (category,) if isinstance(category, str) else tuple(category)


@dataclass(frozen=True)
class Origin:
    """Where data come from that are not read from the official files: a dataset of the Hugging Face Hub.

    `repository` and `revision` are None where the folder does not tell; `differs` says what is not as in the official
    files, and `counts` are the numbers of samples that are accepted beside the official one.
    """

    repository: str | None
    revision: str | None
    differs: str = ""
    counts: tuple[int, ...] = ()

    def __str__(self) -> str:
        revision = f"@{self.revision[:12]}" if self.revision else ""
        return f"datasets cache {self.repository}{revision}" if self.repository else "a dataset in the data folder"


@dataclass(frozen=True)
class BenchmarkData:
    """The samples of a benchmark in their official order, and the folder that its files lie in.

    `compared` are the fields of a sample that the fingerprint covers: not those that differ between the layouts in
    which the same data are installed. `stored_images` are images that stand in a table; None where they are files.
    `origin` is None for the official files.
    """

    root: Path
    samples: tuple[Sample, ...]
    compared: tuple[str, ...] = ("id", "question", "target", "images", "answers", "choices")
    stored_images: StoredImages | None = None
    origin: Origin | None = None

    @property
    def image_root(self) -> Path:
        """The folder that image paths are relative to."""
        return self.root if self.stored_images is None else self.stored_images.folder

    def provide_images(self, names: Iterable[str]) -> None:
        """Make sure that images which stand in a table are files under `image_root`; errors as `StoredImages.provide`.

        Whoever is about to read images calls it with just those; scoring needs none.
        """
        if self.stored_images is not None:
            self.stored_images.provide(names)

    def fingerprint(self) -> str:
        """sha256 over what the samples ask and accept, sorted by id: equal wherever the same data are installed."""
        rows = [self._identity(sample) for sample in self.samples]
        return sha256_of_json(sorted(rows, key=lambda row: str(row[0])))

    def _identity(self, sample: Sample) -> list[Any]:
        values = {name: getattr(sample, name) for name in self.compared}
        return [value for name, value in values.items() if value or name not in ("answers", "choices")]


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one sample.

    `finish` is "stop" (the model ended its turn) or "length" (cut at the token limit); `n_in` and `n_out` count prompt
    and answer tokens; `secs` is this sample's share of its batch's wall time; `ll` maps each option to its
    log-likelihood, if that was asked for. None where a predictions file is silent.
    """

    id: str
    text: str
    finish: str | None = None
    n_in: int | None = None
    n_out: int | None = None
    secs: float | None = None
    ll: Mapping[str, float] | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Prediction:
        """Read a row of a predictions file; further keys are ignored. ValueError names `where` and the field."""
        for name in ("id", "text"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{where}: {name!r} must be a string, found {shown(row.get(name))}")
        known: dict[str, Any] = {name: row.get(name) for name in cls.__dataclass_fields__}
        return cls(**known)

    def to_row(self) -> dict[str, Any]:
        """The prediction as a JSON object; `ll` only where there is one."""
        row = asdict(self)
        return row if self.ll is not None else {name: value for name, value in row.items() if name != "ll"}
