"""Samples that cannot be trained on: left out within a limit, counted by cause, and listed in the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from defocus_mllm.files import write_text_atomically
from defocus_mllm.images import ImageError

BAD_SAMPLES_FILE = "bad_samples.jsonl"
BAD_SAMPLES = "bad_samples"
"""Name of a batch's entry that tells which of its samples are bad; absent if none is."""
SAMPLE_ERRORS = (ValueError, FileNotFoundError)
"""What a sample that cannot be used raises."""
POLICIES = ("raise", "skip")


class TooManyBadSamples(ValueError):
    """More samples are bad than `max_bad_samples` allows."""


@dataclass(frozen=True)
class BadSample:
    """One of them."""

    source: str
    """The data it comes from, as the user named it."""
    record: str
    """How messages call it: `conversations.json[12] (id 12)`."""
    cause: str
    """The kind of problem in a few words, for counting."""
    message: str
    """Names the record and says how to mend it."""
    found: str = "before training"
    """When: "before training" or "in training"."""


def cause_of(error: BaseException) -> str:
    """The kind of problem that encoding a conversation ran into."""
    if isinstance(error, FileNotFoundError):
        return "image missing"
    return "image unreadable" if isinstance(error, ImageError) else "cannot be encoded"


def parse_limit(limit: str, num_records: int) -> int:
    """How many of `num_records` a limit allows: `"100"` are 100, `"1%"` is a hundredth, rounded up.

    Raises `ValueError` for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", limit.strip())
    if not match or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
        raise ValueError(f'max_bad_samples: must be a number such as "100" or a share such as "1%", not {limit!r}')
    return math.ceil(round(float(match[1]) * num_records / 100, 9)) if match[2] else int(match[1])


class BadSamples:
    """What was left out so far, the same on all processes.

    Args:
        policy: "raise" or "skip"; the former ends the run where the first one is found, so nothing comes here.
        limit: see `parse_limit`.

    Raises `ValueError` for an unknown policy or limit.
    """

    def __init__(self, policy: str = "raise", limit: str = "100%") -> None:
        if policy not in POLICIES:
            raise ValueError(f'on_bad_sample must be "raise" or "skip", not {policy!r}')
        parse_limit(limit, 1)
        self.policy, self.limit = policy, limit
        self.num_records = 0
        """Records of the data, of which the limit may be a share."""
        self._found: dict[tuple[str, str], BadSample] = {}
        self._heard: list[BadSample] = []
        self._file: Path | None = None

    @property
    def skips(self) -> bool:
        """Whether bad samples are left out instead of ending the run."""
        return self.policy == "skip"

    def __len__(self) -> int:
        return len(self._found)

    def by_cause(self) -> dict[str, int]:
        """How many, most frequent cause first."""
        return dict(Counter(sample.cause for sample in self._found.values()).most_common())

    def add(self, samples: Iterable[BadSample]) -> None:
        """Remember (and, once training has begun, write down) those that are new."""
        new = {(sample.source, sample.record): sample for sample in samples}
        new = {key: sample for key, sample in new.items() if key not in self._found}
        self._found.update(new)
        if self._file and new:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write("".join(map(_line, new.values())))

    @property
    def allowed(self) -> int:
        """How many there may be."""
        return parse_limit(self.limit, self.num_records)

    def check(self) -> None:
        """Raise `TooManyBadSamples`, naming the most frequent cause, if there are more than the limit allows."""
        if len(self) > self.allowed:
            last = next(reversed(self._found.values()))
            causes = ", ".join(f"{cause}: {count}" for cause, count in self.by_cause().items())
            raise TooManyBadSamples(
                f"{len(self):,} of {self.num_records:,} samples are bad ({causes}), more than max_bad_samples "
                f"{self.limit} ({self.allowed:,}) allows; the last: {last.source}: {last.message}; mend the data or "
                "raise max_bad_samples"
            )

    def begin(self, output_dir: str | Path) -> None:
        """Write the list to `output_dir` and keep it up to date from now on (the main process only).

        What an earlier part of the run found in training stays in it.
        """
        path, state = Path(output_dir) / BAD_SAMPLES_FILE, PartialState()
        known = [_read(path) if state.is_main_process else []]
        if state.num_processes > 1:
            broadcast_object_list(known)
        self.add(sample for sample in known[0] if sample.found == "in training")
        if not state.is_main_process:
            return
        if self._found:
            write_text_atomically(path, "".join(map(_line, self._found.values())))
        else:
            path.unlink(missing_ok=True)
        self._file = path

    def take_from(self, batch: dict[str, torch.Tensor]) -> None:
        """Take what a micro-batch tells about its samples out of it, to be shared."""
        if BAD_SAMPLES in batch:
            self._heard += decode(batch.pop(BAD_SAMPLES))

    @property
    def num_heard(self) -> int:
        """Bad samples this process knows of and has not shared."""
        return len(self._heard)

    def share(self) -> None:
        """Tell all processes of what each has heard; they call this together, when one of them has heard something.

        Raises `TooManyBadSamples` on all of them alike.
        """
        heard, self._heard = self._heard, []
        self.add(gather_object(heard) if PartialState().num_processes > 1 else heard)
        self.check()


def encode(samples: Sequence[BadSample]) -> torch.Tensor:
    """(bytes,) uint8: samples as an entry of a batch, which holds tensors alone."""
    text = json.dumps([dataclasses.asdict(sample) for sample in samples])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def decode(encoded: torch.Tensor) -> list[BadSample]:
    """The inverse of `encode`."""
    return [BadSample(**fields) for fields in json.loads(bytes(encoded.tolist()))]


def _line(sample: BadSample) -> str:
    return json.dumps(dataclasses.asdict(sample), ensure_ascii=False) + "\n"


def _read(path: Path) -> list[BadSample]:
    """The lines that are whole; a kill may have torn the last one."""
    samples = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            samples.append(BadSample(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return samples
