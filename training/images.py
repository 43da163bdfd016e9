"""What the encoder sees of a picture: decoded and resized once, remembered as bytes, normalised batch by batch."""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from defocus_mllm.image_processing_defocus import square_of
from defocus_mllm.images import ANIMATED, MAX_PIXELS, ImageError, decode_image, load_image

CACHE_BYTES = 1024**3


@dataclass(frozen=True)
class StoredImage:
    """A picture inside a larger file: a row of a table, a member of a shard, a data URL."""

    name: str
    """Says where it is, and is no other picture's."""
    read: Callable[[], bytes] = field(compare=False, repr=False)
    """Its bytes, read anew each time."""

    def load(self) -> Image.Image:
        """The picture. Raises `ImageError`."""
        return decode_image(io.BytesIO(self.read()), self.name)


class PixelLoader:
    """Pictures at the encoder's size as 8-bit pixels, remembered up to `cache_bytes`.

    Decoding and resizing a small picture costs as much as a training step on it, and every epoch would pay again. Once
    the memory is full nothing is forgotten: when each epoch has a new order, no other choice finds more. The memory is
    of one process; workers inherit what it holds when they start.

    `image_processor` is a `DefocusImageProcessor`, whose results are repeated bit for bit.
    """

    def __init__(self, image_processor: Any, cache_bytes: int = CACHE_BYTES) -> None:
        self.image_processor = image_processor
        self.size: tuple[int, int] = (image_processor.size["height"], image_processor.size["width"])
        self._normalised = _normalised_values(image_processor)
        self._capacity = cache_bytes // (3 * self.size[0] * self.size[1])
        self._cache: dict[Hashable, torch.Tensor] = {}
        self.num_animated = 0
        """Pictures decoded so far that are the first frame of several."""

    def __call__(self, image: str | Path | StoredImage) -> torch.Tensor:
        """`pixel_values` (3, height, width), float32, of a file or a stored image. Raises what `load_image` raises."""
        if isinstance(image, StoredImage):
            return self.normalise(self.pixels(image, image.load))
        return self.normalise(self.pixels(str(image), lambda: load_image(image)))

    def process(self, image: Image.Image) -> torch.Tensor:
        """`pixel_values` (3, height, width), float32, of a picture of any mode, which is not remembered."""
        return self.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]

    def fits(self, num_images: int) -> bool:
        """Whether this many pictures can be remembered at once."""
        return num_images <= self._capacity

    def pixels(self, key: Hashable, load: Callable[[], Image.Image]) -> torch.Tensor:
        """(3, height, width) uint8 of the RGB picture `load` gives, which `key` stands for; treat it as read-only."""
        if key in self._cache:
            return self._cache[key]
        image = load()
        self.num_animated += bool(image.info.get(ANIMATED))
        pixels = self.resize(image)
        if len(self._cache) < self._capacity:
            self._cache[key] = pixels
        return pixels

    def resize(self, image: Image.Image) -> torch.Tensor:
        """(3, height, width) uint8 of a decoded RGB picture, resized as the image processor does."""
        height, width = self.size
        resized = self._squared(image).resize((width, height), self.image_processor.resample)
        flat = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        return flat.view(height, width, 3).permute(2, 0, 1).contiguous()

    def _squared(self, image: Image.Image) -> Image.Image:
        fit = self.image_processor.fit
        if fit == "stretch" or image.width == image.height:
            return image
        left, top, side = square_of(image.width, image.height, fit)
        if fit == "crop":
            return image.crop((left, top, left + side, top + side))
        if side * side > MAX_PIXELS:
            raise ImageError(
                f"an image of {image.width} x {image.height} pixels would be padded to more than {MAX_PIXELS}; cut or "
                'scale it, or set image_fit: "crop"'
            )
        square = Image.new("RGB", (side, side), self.image_processor.bar_colour)
        square.paste(image, (-left, -top))
        return square

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """`pixel_values` (..., 3, height, width), float32, of 8-bit pixels of the same shape."""
        return self._normalised[torch.arange(3)[:, None, None], pixels.long()]


def _normalised_values(image_processor: Any) -> torch.Tensor:
    """(3, 256): what rescaling and normalising make of each 8-bit value, as the image processor itself does it."""
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 1, 256).numpy()
    values = image_processor(
        images=[ramp], do_resize=False, do_convert_rgb=False, input_data_format="channels_first", return_tensors="pt"
    )
    return values["pixel_values"][0, :, 0]
