"""Augmentations of one picture, drawn from a random generator of its own.

In this order: `random_crop` of the picture as it was decoded, `Augmentation` of its 8-bit pixels at the encoder's size,
`erase` of normalised ones. Mixing pictures with one another is in `training.mixing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch
from PIL import Image, ImageEnhance

from training.rand_augment import RandAugment

Range = tuple[float, float]

CROP_ASPECT: Range = (3 / 4, 4 / 3)
"""Width to height of a random crop (Inception's, as everywhere since)."""
ERASED_AREA: Range = (0.02, 1 / 3)
"""Share of the picture that random erasing covers (Zhong et al., arXiv 1708.04896; timm's upper bound)."""
ERASED_ASPECT: Range = (0.3, 1 / 0.3)
_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """Random changes of one 8-bit picture (3, height, width). Raises ValueError naming a field out of range."""

    horizontal_flip: float = 0.0
    """Probability of mirroring left and right."""
    vertical_flip: float = 0.0
    """Probability of mirroring top and bottom."""
    max_shift: int = 0
    """Largest shift in pixels, along each axis, in either direction; what comes into view repeats the edge."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by 1 - this to 1 + this, in random order."""
    rand_augment: RandAugment | None = None
    """RandAugment, after everything else."""

    def __post_init__(self) -> None:
        for field in ("horizontal_flip", "vertical_flip"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must be a probability from 0 to 1, not {getattr(self, field)}")
        for field in ("max_shift", "color_jitter"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, but is {getattr(self, field)}")

    def __call__(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The picture changed, (3, height, width) uint8; `picture` itself stays as it is."""
        draws = torch.rand(4, generator=generator)
        if draws[0] < self.horizontal_flip:
            picture = picture.flip(-1)
        if draws[1] < self.vertical_flip:
            picture = picture.flip(-2)
        if self.max_shift:
            down, right = ((draws[2:] * (2 * self.max_shift + 1)).floor().long() - self.max_shift).tolist()
            picture = shift(picture, down, right)
        if self.color_jitter or self.rand_augment:
            image = jitter(to_image(picture), self.color_jitter, generator)
            picture = to_pixels(self.rand_augment(image, generator) if self.rand_augment else image)
        return picture


def shift(picture: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Move (channels, height, width) by whole pixels, edges replicated."""
    height, width = picture.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return picture[:, rows][:, :, columns]


def random_crop(image: Image.Image, size: int, min_area: float, generator: torch.Generator) -> Image.Image:
    """A random part of `image`, at least `min_area` of it, resized (bicubic) to (size, size).

    If ten draws do not fit, the largest part in the middle whose aspect is allowed.
    """
    box = _random_box(image.height, image.width, (min_area, 1.0), CROP_ASPECT, generator)
    if box is None:
        aspect = min(max(image.width / image.height, CROP_ASPECT[0]), CROP_ASPECT[1])
        height = min(image.height, round(image.width / aspect))
        width = min(image.width, round(image.height * aspect))
        box = (image.height - height) // 2, (image.width - width) // 2, height, width
    top, left, height, width = box
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def jitter(image: Image.Image, strength: float, generator: torch.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by factors from 1 - strength (at least 0) to 1 + strength."""
    if not strength:
        return image
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in torch.randperm(len(kinds), generator=generator).tolist():
        image = kinds[number](image).enhance(_uniform((max(0.0, 1 - strength), 1 + strength), generator))
    return image


def erase(pixel_values: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """With `probability`, normal noise in place of a random rectangle of (channels, height, width) normalised pixels.

    Source: Zhong et al., "Random Erasing" (arXiv 1708.04896), with a value for each pixel (`REMODE: pixel` in the
    release). Returns the argument itself where nothing is erased, otherwise a copy.
    """
    if _uniform((0.0, 1.0), generator) >= probability:
        return pixel_values
    height, width = pixel_values.shape[-2:]
    box = _random_box(height, width, ERASED_AREA, ERASED_ASPECT, generator)
    if box is None:
        return pixel_values
    top, left, height, width = box
    erased = pixel_values.clone()
    noise = torch.randn(len(erased), height, width, generator=generator)
    erased[:, top : top + height, left : left + width] = noise.to(erased.dtype)
    return erased


def to_image(picture: torch.Tensor) -> Image.Image:
    """(3, height, width) uint8 as a Pillow picture."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB Pillow picture as (3, height, width) uint8."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _random_box(
    height: int, width: int, area: Range, aspect: Range, generator: torch.Generator
) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of a rectangle inside the picture; None when ten draws do not fit.

    Its share of the area is uniform, its aspect (width to height) log-uniform, its place uniform.
    """
    for _ in range(_ATTEMPTS):
        box_area = height * width * _uniform(area, generator)
        box_aspect = math.exp(_uniform((math.log(aspect[0]), math.log(aspect[1])), generator))
        box_height, box_width = round(math.sqrt(box_area / box_aspect)), round(math.sqrt(box_area * box_aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(torch.randint(height - box_height + 1, (), generator=generator))
            left = int(torch.randint(width - box_width + 1, (), generator=generator))
            return top, left, box_height, box_width
    return None


def _uniform(limits: Range, generator: torch.Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(torch.rand((), generator=generator))
