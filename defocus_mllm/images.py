"""Pictures from disk: opened by content, made 8-bit RGB in one documented way, with errors that name the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a few kilobytes of PNG can ask for gigabytes of memory."""
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "AVIF")
"""Others are refused: Pillow hands EPS to Ghostscript, for one, which a file from a stranger should not start."""
ANIMATED = "animated"
"""True under this name in a picture's `info` if it is the first frame of several."""

_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file and says why."""


def load_image(path: str | Path) -> Image.Image:
    """The picture in the file `path`, as `decode_image` gives it. Raises FileNotFoundError, or `ImageError`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    return decode_image(path, str(path))


def decode_image(source: Path | BinaryIO, name: str) -> Image.Image:
    """The picture in `source` as 8-bit RGB; messages call it `name`.

    The format, one of `FORMATS`, is told by content, whatever the file's name; of an animation the first frame counts
    (and `ANIMATED` is noted in the picture's `info`). The orientation that cameras write into EXIF is applied,
    transparency is composited on white, 16-bit grey is scaled to 8 bits.
    Raises `ImageError` if the source is no picture, is truncated or corrupt, has more than `MAX_PIXELS` pixels, or
    holds values of a range nobody knows (32 bits) or of a colour space that Pillow cannot convert.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size, which is checked here, and about damaged metadata
            with Image.open(source, formats=FORMATS) as image:
                _check_size(image, name)
                animated = image.format in _ANIMATED_FORMATS and getattr(image, "is_animated", False)
                image.load()
                picture = to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is too large: {error}") from error
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise ImageError(f"image {name} is not a picture of a known format ({kinds}); replace or remove it") from error
    except Exception as error:  # decoders report damage with whatever exception their parser runs into
        raise ImageError(f"image {name} is truncated or corrupt ({error}); replace or remove it") from error
    if animated:
        picture.info[ANIMATED] = True
    return picture


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"image {name} has {width} x {height} pixels, more than {MAX_PIXELS}; scale it down first")


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A decoded picture as 8-bit RGB, by the rules of `decode_image`; `ImageError` calls it `name`."""
    if image.mode in ("I", "F"):
        raise ImageError(f"image {name} has 32-bit values (mode {image.mode}) of unknown range; convert it to 8 bits")
    if image.mode in _SIXTEEN_BIT_MODES:
        grey = numpy.asarray(image).astype(numpy.float64) / 257  # 65535 / 257 == 255
        image = Image.fromarray(numpy.rint(grey).astype(numpy.uint8))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
