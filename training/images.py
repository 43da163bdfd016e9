"""What the encoder sees of a picture on disk, remembered."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from defocus_mllm.images import load_image


class PixelLoader:
    """Path -> what the encoder sees, remembered up to `cache_bytes`.

    Decoding and resizing a small picture costs as much as a training step on it, and every epoch would pay again. The
    least recently used pictures are forgotten first. The memory is of one process: each data loader worker has its own.
    """

    def __init__(self, image_processor: Any, cache_bytes: int = 512 * 1024**2) -> None:
        self.image_processor = image_processor
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._cached_bytes = 0

    def __call__(self, path: str | Path) -> torch.Tensor:
        """`pixel_values` (3, height, width), float32; treat it as read-only. Raises what `load_image` raises."""
        key = str(path)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        pixels = self.process(load_image(path))
        self._cache[key] = pixels
        self._cached_bytes += pixels.nbytes
        while self._cached_bytes > self.cache_bytes:
            _, forgotten = self._cache.popitem(last=False)
            self._cached_bytes -= forgotten.nbytes
        return pixels

    def process(self, image: Image.Image) -> torch.Tensor:
        """`pixel_values` (3, height, width) of a decoded picture."""
        return self.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
