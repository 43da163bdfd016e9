"""The append-only file of finished predictions, from which an interrupted run resumes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from eval.files import json_line, parse_row
from eval.samples import Prediction

_SECONDS_BETWEEN_SYNCS = 5.0


class PredictionJournal:
    """Predictions on disk as soon as they are made, one JSON line each, flushed after every batch.

    Every line carries the key of what produced it (model, prompt, images, settings, environment). On opening, lines
    with the expected key are `finished`; those of the same samples with another key are counted in `other_keys`. They
    stay in the file, where a later run that expects their key finds them. Only a last line torn by a kill is cut off.

    One process at a time may hold a journal; the lock goes with the process, however it ends.

    Args:
        path: the file; created if missing.
        keys: sample id -> the key an answer must carry to be reused.

    Raises:
        ValueError: a malformed line before the last one (the message names file and line), or another run holds it.
    """

    def __init__(self, path: Path, keys: Mapping[str, str]) -> None:
        self._keys = keys
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        try:
            self._lock(path)
            entries = _drop_torn_line_and_read(path)
        except BaseException:
            self._file.close()
            raise
        asked = [(prediction, key == keys[prediction.id]) for prediction, key in entries if prediction.id in keys]
        self.finished = {prediction.id: prediction for prediction, has_key in asked if has_key}
        self.other_keys = sum(not has_key for _, has_key in asked)
        self._synced = time.monotonic()

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path}: another run is writing here: wait for it, or give another --output") from error

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write a batch of predictions and hand it to the operating system (to the disk every few seconds)."""
        for prediction in predictions:
            self._file.write(json_line(prediction.to_row() | {"key": self._keys[prediction.id]}))
            self.finished[prediction.id] = prediction
        self._hand_over(to_disk=time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS)

    def _hand_over(self, to_disk: bool) -> None:
        try:
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:  # a full disk says nothing about which
            error.filename = self._file.name
            raise

    def __enter__(self) -> PredictionJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hand_over(to_disk=True)
        self._file.close()


def _drop_torn_line_and_read(path: Path) -> list[tuple[Prediction, str | None]]:
    """The (prediction, key) pairs of the whole lines; what a kill left after the last newline is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")
    if torn:
        os.truncate(path, len(content) - len(torn))
    entries = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        row = parse_row(line, where)
        entries.append((Prediction.from_row(row, where), row.get("key")))
    return entries
