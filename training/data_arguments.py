"""Arguments of the conversations that stages 1 and 2 learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from training.bad_samples import parse_limit
from training.json_fields import JsonDict

MIXTURE_FIELDS = {"data": str, "image_root": str, "weight": float, "limit": int}


@dataclass
class DataArguments:
    """Which conversations, where their images are, and what happens to those that cannot be used."""

    data: str = ""
    """Conversations: LLaVA's JSON or JSON Lines, `messages`, Parquet, .tar shards, a folder written by save_to_disk."""
    image_root: str = ""
    """Folder the conversations' image paths start from; empty: the folder of `data`."""
    mixture: list[JsonDict] = field(default_factory=list)
    """Several sources instead of `data`, each with "data" and, if wanted, "image_root", "weight" and "limit"."""
    mixture_strategy: Literal["concatenate", "without_repetition", "with_repetition"] = "concatenate"
    """All sources once an epoch, or by weight: until the first source is used up, or until the last one is."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What to do with a sample that cannot be used: stop, or leave it out, count it and list it."""
    max_bad_samples: str = "1%"
    """How many samples may be left out, such as "100" or "1%" of the records; with more the run ends."""
    check_images: int = 10_000
    """Conversations encoded and images decoded before training starts, evenly spaced over the data."""
    repair: bool = False
    """Mend what LLaVA's files are known to have (an answer first, a question last, empty turns), and count it."""
    follow_links: bool = False
    """Accept symbolic links in the image root that lead out of it, such as a folder on another disk."""
    any_image_extension: bool = False
    """Where an image does not exist, take the only file of that name with another extension, and count it."""

    index_cache: str = ""
    """Folder of the indexes of the conversations, one for all processes; empty: in HF_DATASETS_CACHE."""

    streaming: bool = False
    """Read `data` in order (.tar shards, Parquet, JSON Lines), without an index, a check or a count beforehand."""
    shuffle_buffer: int = 10_000
    """Records of a stream that wait to be drawn from at random; 0 keeps the data's order."""
    num_samples: int = 0
    """Conversations of a stream that make an epoch; 0: the whole run, of max_steps, is one."""

    def check_data(self, max_steps: int) -> None:
        """Raise `ValueError` for the first field that is out of range or cannot go with another."""
        if bool(self.data) == bool(self.mixture):
            raise ValueError("data: required, a file of conversations; or `mixture`, several of them, instead")
        if self.mixture and self.image_root:
            raise ValueError("image_root: with `mixture` each source has its own")
        for number, source in enumerate(self.mixture):
            _check_source(source, f"mixture[{number}]")
        if self.mixture_strategy == "concatenate" and any("weight" in source for source in self.mixture):
            raise ValueError(
                "mixture_strategy: concatenate takes every sample once whatever its weight; choose another"
            )
        parse_limit(self.max_bad_samples, 1)
        if self.check_images < 0:
            raise ValueError(f"check_images: must not be negative, got {self.check_images}")
        self._check_streaming(max_steps)

    def _check_streaming(self, max_steps: int) -> None:
        for name in ("shuffle_buffer", "num_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if self.streaming and self.mixture:
            raise ValueError("streaming: reads one source, `data`; a mixture is read by position")
        if self.streaming and not self.num_samples and max_steps < 1:
            raise ValueError("streaming: the size of a stream is not known; give num_samples or max_steps")
        if self.num_samples and not self.streaming:
            raise ValueError("num_samples: only for a stream (--streaming true); other data is counted")

    def sources(self) -> list[dict[str, Any]]:
        """Each source with the fields of `training.conversations.SourceOptions`."""
        given: Sequence[dict[str, Any]] = self.mixture or [{"data": self.data, "image_root": self.image_root}]
        rules: dict[str, Any] = {"repair": self.repair, "follow_links": self.follow_links}
        rules |= {"any_extension": self.any_image_extension, "cache": self.index_cache}
        return [{**source, **rules} for source in given]


def _check_source(source: dict[str, Any], where: str) -> None:
    for name, value in source.items():
        if name not in MIXTURE_FIELDS:
            raise ValueError(f"{where}: unknown field {name!r}; valid are {', '.join(MIXTURE_FIELDS)}")
        kind = MIXTURE_FIELDS[name]
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{where}: {name} must be a {kind.__name__}, not {value!r}")
    if not source.get("data"):
        raise ValueError(f"{where}: data is required, a file of conversations")
    if source.get("weight", 1) <= 0 or source.get("limit", 0) < 0:
        raise ValueError(f"{where}: weight must be positive, limit not negative")


def data_locations(arguments: Any) -> dict[str, str]:
    """Argument -> the source it names, for every source of a mixture; empty for arguments without one."""
    mixture = getattr(arguments, "mixture", [])
    return {f"mixture[{number}]": source["data"] for number, source in enumerate(mixture)}
