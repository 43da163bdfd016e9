"""Pictures by position at the encoder's size: what labelled and captioned images have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image

from defocus_mllm.images import ImageError
from training.images import PixelLoader
from training.labelled_data import Pictures


class PictureSet:
    """Pictures whose errors name file and record.

    Args:
        pictures: the pictures.
        report: what was found and left out; `file` says where the pictures come from.
        loader: brings them to the encoder's size and remembers them.
    """

    def __init__(self, pictures: Pictures, report: dict[str, Any], loader: PixelLoader) -> None:
        self.pictures, self.report, self.loader = pictures, report, loader

    def pixel_values(self, indices: Iterable[int]) -> torch.Tensor:
        """(pictures, 3, height, width), float32, normalised. Raises what `image` raises."""
        return self.loader.normalise(torch.stack([self.pixels(index) for index in indices]))

    def pixels(self, index: int) -> torch.Tensor:
        """(3, height, width) uint8, the size the encoder's. Raises what `image` raises."""
        return self.loader.pixels(index, lambda: self.image(index))

    def image(self, index: int) -> Image.Image:
        """The picture itself. Raises `ImageError` or `FileNotFoundError` naming file and record."""
        try:
            return self.pictures.load(index)
        except (ImageError, FileNotFoundError) as error:
            raise type(error)(f"{self.report['file']}: {self.pictures.name(index)}: {error}") from error
