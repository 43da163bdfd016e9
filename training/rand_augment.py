"""RandAugment on Pillow pictures: two random operations a picture, all at about the same magnitude.

Source: Cubuk et al., "RandAugment" (arXiv 1909.13719), in the variant that De-focus Attention Networks was trained with
(`rand-m9-mstd0.5-inc1` in classification/utils/config.py of the release, which names the variant of timm): 15
operations, two drawn with replacement, each left out with probability 1/2; the magnitude varies from operation to
operation by normal noise within 0 to 10; "increasing": a larger magnitude never changes a picture less. The libraries
that have RandAugment without torchvision do not fit: kornia draws from PyTorch's global generator, chooses one policy
for a whole batch and has neither noise nor the increasing variant; albumentations has none and brings OpenCV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageOps

Fill = tuple[int, int, int]
Operation = Callable[[Image.Image, float, Fill], Image.Image]
"""(picture, level from -1 to 1, colour of what comes into view) -> picture. Some operations know no direction."""

MAX_MAGNITUDE = 10.0
_OPERATIONS_A_PICTURE = 2
_PROBABILITY = 0.5

_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 0.45
"""Share of the picture's width or height."""
_MAX_ENHANCEMENT = 0.9
_MAX_ADDED = 110
"""Brightness that `solarize_add` adds to the darker half of the values."""


def _affine(image: Image.Image, coefficients: tuple[float, ...], fill: Fill) -> Image.Image:
    """Pixel (x, y) becomes what was at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=fill)


def _shear_x(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, level * _MAX_SHEAR, 0, 0, 1, 0), fill)


def _shear_y(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, level * _MAX_SHEAR, 1, 0), fill)


def _translate_x(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, level * _MAX_TRANSLATION * image.width, 0, 1, 0), fill)


def _translate_y(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, level * _MAX_TRANSLATION * image.height), fill)


def _rotate(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    return image.rotate(level * _MAX_DEGREES, Image.Resampling.BICUBIC, fillcolor=fill)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def operation(image: Image.Image, level: float, fill: Fill) -> Image.Image:
        return kind(image).enhance(1.0 + level * _MAX_ENHANCEMENT)

    return operation


def _posterize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Keep 4 to 1 of the 8 bits (the release goes down to 0 at full magnitude, which is a black picture)."""
    return ImageOps.posterize(image, max(1, 4 - int(abs(level) * 4)))


def _solarize(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    """Invert the values from a threshold on, which sinks from 256 to 0."""
    return ImageOps.solarize(image, 256 - int(abs(level) * 256))


def _solarize_add(image: Image.Image, level: float, fill: Fill) -> Image.Image:
    added = int(abs(level) * _MAX_ADDED)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, level, fill: ImageOps.equalize(image),
    "invert": lambda image, level, fill: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


@dataclass(frozen=True)
class RandAugment:
    """Two random operations on an RGB picture. Raises `ValueError` naming a field that is out of range."""

    magnitude: float
    """How much the operations change, from 0 to 10."""
    magnitude_std: float = 0.5
    """Standard deviation of the noise on the magnitude."""
    fill: Fill = (128, 128, 128)
    """Colour of what comes into view; the mean of the pixels, which becomes 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"rand_augment must be a magnitude from 0 to {MAX_MAGNITUDE:g}, not {self.magnitude}")
        if self.magnitude_std < 0:
            raise ValueError(f"rand_augment_std must not be negative, but is {self.magnitude_std}")

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """A picture of the same size; the draws come from `generator` alone, always as many of them."""
        operations = list(OPERATIONS.values())
        chosen = torch.randint(len(operations), (_OPERATIONS_A_PICTURE,), generator=generator).tolist()
        applied = torch.rand(_OPERATIONS_A_PICTURE, generator=generator).tolist()
        negative = torch.rand(_OPERATIONS_A_PICTURE, generator=generator).tolist()
        noise = torch.randn(_OPERATIONS_A_PICTURE, generator=generator).tolist()
        for index, number in enumerate(chosen):
            if applied[index] < _PROBABILITY:
                magnitude = self.magnitude + self.magnitude_std * noise[index]
                level = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
                image = operations[number](image, -level if negative[index] < 0.5 else level, self.fill)
        return image
