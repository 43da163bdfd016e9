"""Images to pixel tensors, with Pillow alone (no torchvision)."""

from typing import Any

import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling


class DefocusImageProcessor(PilBackend):
    """Resizes (bicubic), rescales to [0, 1] and normalises; gives `pixel_values` (images, 3, height, width).

    `size` must be the image size of the encoder's configuration. `fit` says how a picture gets its aspect: "stretch"
    (each side is scaled by itself), "crop" (the middle square, as CLIP's processor does) or "pad" (bars in the mean
    colour, centred, as LLaVA's expand2square in llava/mm_utils.py; they are near 0 when normalised).
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - Transformers declares it so
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012
    fit = "stretch"
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """As Transformers does (transparency on white), and 16-bit grey scaled to 8 bits instead of clipped."""
        if getattr(image, "mode", "").startswith("I;16"):
            image = image.point(lambda value: value * (1 / 257)).convert("L")
        return super().convert_to_rgb(image, input_data_format)

    def resize(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Resize an array (channels, height, width) after giving it the aspect that `fit` asks for."""
        channels, height, width = image.shape
        if self.fit == "stretch" or height == width:
            return super().resize(image, *args, **kwargs)
        left, top, side = square_of(width, height, self.fit)
        if self.fit == "crop":
            return super().resize(image[:, top : top + side, left : left + side], *args, **kwargs)
        given = torch.from_numpy(image)
        square = torch.tensor(self.bar_colour[:channels], dtype=given.dtype)[:, None, None].repeat(1, side, side)
        square[:, -top : height - top, -left : width - left] = given
        return super().resize(square.numpy(), *args, **kwargs)

    @property
    def bar_colour(self) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255, of the bars of `fit` "pad"."""
        red, green, blue = (int(255 * mean) for mean in self.image_mean)
        return red, green, blue


def square_of(width: int, height: int, fit: str) -> tuple[int, int, int]:
    """(left, top, side) of the square that a picture becomes; for "pad" it begins outside, at numbers not above 0.

    Raises `ValueError` for any other `fit` than "crop" and "pad".
    """
    if fit not in ("crop", "pad"):
        raise ValueError(f'fit must be "stretch", "crop" or "pad", not {fit!r}')
    if fit == "crop":
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side
    side = max(width, height)
    return -((side - width) // 2), -((side - height) // 2), side  # the smaller half of the bars in front


__all__ = ["DefocusImageProcessor", "square_of"]
