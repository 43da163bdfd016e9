"""How long every conversation is in tokens, counted once, without opening an image, and kept for the next run."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from defocus_mllm.files import written_whole
from training.batches import load_batches
from training.conversations import Conversation
from training.encoding import message_parts
from training.supervision import ConversationCollator

UNUSABLE = 0
"""Length of a conversation from which no example can be made."""
_AT_ONCE = 256
_LAYOUT = 1  # of the files in the cache; part of their names


def measure_lengths(
    dataset: Sequence[Conversation], collate: ConversationCollator, num_workers: int, cache: Path | None = None
) -> array[int]:
    """Count the tokens of every conversation, or read what an earlier run counted.

    The main process does it for all.

    Args:
        dataset: the conversations.
        collate: its processor and limits decide; turns are in the order they are written in.
        num_workers: processes that count.
        cache: the folder where the lengths are kept; None: that of this user.

    Returns:
        Tokens of each, in the data set's order, image tokens included, after turns beyond the limits are left out;
        `UNUSABLE` where nothing is left.
    """
    found: list[array[int] | None] = [None]
    if PartialState().is_main_process:
        found[0] = _measure(dataset, collate, num_workers, cache or cache_folder())
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def cache_folder() -> Path:
    """Where lengths are kept: `defocus_mllm/lengths` in XDG_CACHE_HOME or in the user's `.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "defocus_mllm" / "lengths"


def _measure(
    dataset: Sequence[Conversation], collate: ConversationCollator, num_workers: int, cache: Path
) -> array[int]:
    path = cache / f"{_identity(dataset, collate)}.npy"
    lengths = _read(path, len(dataset))
    if lengths is None:
        lengths = array("q", _count(dataset, collate, num_workers))
        _keep(path, lengths)
    return lengths


def _count(dataset: Sequence[Conversation], collate: ConversationCollator, num_workers: int) -> Iterator[int]:
    def count(indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([_length(dataset[index], collate) for index in indices])}

    parts = [range(begin, min(begin + _AT_ONCE, len(dataset))) for begin in range(0, len(dataset), _AT_ONCE)]
    with tqdm(desc="counting tokens", total=len(dataset), delay=2, mininterval=0.5) as bar:
        for part in load_batches(count, parts, num_workers, pin_memory=False):
            lengths = part["tokens"].tolist()
            bar.update(len(lengths))
            yield from lengths


def _length(conversation: Conversation, collate: ConversationCollator) -> int:
    try:
        return collate.count_tokens(conversation)
    except ValueError:
        return UNUSABLE


def _identity(dataset: Sequence[Conversation], collate: ConversationCollator) -> str:
    """Digest of all that a length depends on."""
    processor = collate.processor
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, Any] = {
        "layout": _LAYOUT,
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "special": tokenizer.special_tokens_map,
        "chat_template": processor.chat_template,
        "num_image_tokens": processor.num_image_tokens,
        "limits": [collate.max_turns, collate.max_length],
    }
    digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
    for index in range(len(dataset)):
        for message in dataset[index].messages:
            parts = [(part["type"], part.get("text")) for part in message_parts(message)]
            digest.update(json.dumps([message["role"], parts]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _read(path: Path, count: int) -> array[int] | None:
    """The lengths kept at `path`; None if there are none, or something else."""
    try:
        lengths = numpy.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array("q", lengths.tolist()) if lengths.shape == (count,) and lengths.dtype == numpy.int64 else None


def _keep(path: Path, lengths: array[int]) -> None:
    try:
        path.unlink(missing_ok=True)  # damaged, or it would have been read
        with written_whole(path) as partial, partial.open("wb") as stream:
            numpy.save(stream, numpy.asarray(lengths, dtype=numpy.int64), allow_pickle=False)
    except OSError as error:  # another run may have been faster, or the folder cannot be written
        print(f"the lengths of the conversations are not kept for the next run: {error}", flush=True)
