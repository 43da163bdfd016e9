"""Images to pixel tensors, with Pillow alone (no torchvision)."""

from typing import Any

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling


class DefocusImageProcessor(PilBackend):
    """Resizes (bicubic), rescales to [0, 1] and normalises; gives `pixel_values` (images, 3, height, width).

    `size` must be the image size of the encoder's configuration.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - Transformers declares it so
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """As Transformers does (transparency on white), and 16-bit grey scaled to 8 bits instead of clipped."""
        if getattr(image, "mode", "").startswith("I;16"):
            image = image.point(lambda value: value * (1 / 257)).convert("L")
        return super().convert_to_rgb(image, input_data_format)


__all__ = ["DefocusImageProcessor"]
