"""Images of a benchmark: decoded once, kept within a memory budget, identified by their bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from defocus_mllm.images import load_image
from eval.files import first_of

_BYTE_BUDGET = 512 * 2**20


class ImageCache:
    """Decoded images by path; the least recently used leave when their pixels exceed `byte_budget` bytes."""

    def __init__(self, byte_budget: int = _BYTE_BUDGET) -> None:
        self._byte_budget = byte_budget
        self._bytes_held = 0
        self._images: OrderedDict[Path, Image.Image] = OrderedDict()

    def load(self, path: Path) -> Image.Image:
        """The image at `path`, 8-bit RGB. Raises what `load_image` raises."""
        if path in self._images:
            self._images.move_to_end(path)
            return self._images[path]
        image = load_image(path)
        self._images[path] = image
        self._bytes_held += _size_in_bytes(image)
        while self._bytes_held > self._byte_budget and len(self._images) > 1:
            _, oldest = self._images.popitem(last=False)
            self._bytes_held -= _size_in_bytes(oldest)
        return image


def _size_in_bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


def check_images_exist(paths: Iterable[Path]) -> None:
    """Raise one FileNotFoundError that counts the missing files and names the first of them."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} images are missing: {first_of(map(str, missing))}")
