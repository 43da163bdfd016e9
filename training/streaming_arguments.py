"""Arguments of data that is read as a stream instead of by position."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StreamingArguments:
    """Whether labelled images are read in order, and what of such data cannot be known beforehand."""

    streaming: bool = False
    """Read `data` in order (Parquet, WebDataset .tar shards, folders), without counting or keeping images."""
    shuffle_buffer: int = 10_000
    """Rows of a stream that wait, undecoded, to be drawn from at random; 0 keeps the data's order."""
    num_samples: int = 0
    """Images of a stream that make an epoch; 0: the whole run, of max_steps, is one."""
    num_labels: int = 0
    """Number of classes of a stream whose data does not name them."""

    def check_streaming(self, max_steps: int, repeats: int) -> None:
        """Raise `ValueError` for the first field that is out of range or cannot go with another."""
        for name in ("shuffle_buffer", "num_samples", "num_labels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        if not self.streaming:
            for name in ("num_samples", "num_labels"):
                if getattr(self, name):
                    raise ValueError(f"{name}: only for a stream (--streaming true); other data is counted")
        elif not self.num_samples and max_steps < 1:
            raise ValueError("streaming: the size of a stream is not known; give num_samples or max_steps")
        elif repeats > 1:
            raise ValueError("repeated_augmentation: must be 1 for a stream, which gives each image once")
