"""Pictures are decoded once, as long as they fit the memory they are given, and look as the image processor says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from defocus_mllm import DefocusImageProcessor
from defocus_mllm.images import ImageError, load_image
from training import images
from training.images import PixelLoader, StoredImage


def noise(width: int, height: int) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    return Image.fromarray(numpy.asarray(values))


def test_the_cache_remembers_within_its_limit(tmp_path, processor, monkeypatch):
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (32, 32), (number * 80, 0, 0)).save(paths[-1])
    opened: list[Path] = []

    def count_and_load(path: Path) -> Image.Image:
        opened.append(path)
        return load_image(path)

    monkeypatch.setattr(images, "load_image", count_and_load)
    one_picture = 3 * 32 * 32
    loader = PixelLoader(processor.image_processor, cache_bytes=3 * one_picture - 1)
    assert loader.fits(2)
    assert not loader.fits(3)
    first = [loader(path) for path in paths]
    assert first[0].shape == (3, 32, 32)
    assert first[0].dtype == torch.float32
    for path, expected in zip(paths, first, strict=True):
        assert torch.equal(loader(path), expected)
    assert opened == [*paths, paths[2]]  # the last found no room


def test_animations_are_counted_and_stored_pictures_are_remembered_by_name(processor):
    buffer = io.BytesIO()
    noise(8, 8).save(buffer, format="GIF", save_all=True, append_images=[noise(8, 8)])
    loader = PixelLoader(processor.image_processor)
    one = loader(StoredImage("a.parquet[0]", buffer.getvalue))
    assert torch.equal(loader(StoredImage("a.parquet[0]", bytes)), one)  # not read again
    assert loader.num_animated == 1
    with pytest.raises(ImageError, match=r"a\.parquet\[1\]"):
        loader(StoredImage("a.parquet[1]", bytes))


def test_a_thin_picture_is_not_padded_to_gigabytes(monkeypatch):
    image_processor = DefocusImageProcessor(size={"height": 8, "width": 8}, fit="pad")
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    assert PixelLoader(image_processor).resize(noise(100, 1)).shape == (3, 8, 8)
    with pytest.raises(ImageError, match="101 x 1 pixels would be padded"):
        PixelLoader(image_processor).resize(noise(101, 1))


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (64, 5), (1, 1)])
@pytest.mark.parametrize("changes", [{}, {"resample": Image.Resampling.BILINEAR, "image_mean": [0.1, 0.2, 0.3]}])
def test_pixels_are_those_of_the_image_processor(size, changes):
    image_processor = DefocusImageProcessor(size={"height": 32, "width": 24}, **changes)
    loader = PixelLoader(image_processor)
    pictures = [noise(*size) for _ in range(2)]
    pixels = torch.stack([loader.resize(picture) for picture in pictures])
    assert pixels.dtype == torch.uint8
    expected = image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(loader.normalise(pixels), expected)
    assert torch.equal(loader.process(pictures[0]), expected[0])


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("size", [(64, 48), (31, 77), (50, 50), (1, 9), (33, 32)])
def test_every_fit_is_the_processors_bit_for_bit(fit: str, size: tuple[int, int], tmp_path: Path) -> None:
    DefocusImageProcessor(size={"height": 32, "width": 32}, fit=fit).save_pretrained(tmp_path)
    processor = DefocusImageProcessor.from_pretrained(tmp_path)
    noise = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    loader = PixelLoader(processor)
    ours = loader.normalise(loader.resize(image))
    assert torch.equal(ours, processor(images=[image], return_tensors="pt")["pixel_values"][0])
    assert torch.equal(ours, processor(images=[noise.numpy()], return_tensors="pt")["pixel_values"][0])


def test_crop_keeps_the_middle_and_pad_puts_bars_around_it() -> None:
    """A wide picture, thirds red, green and blue."""
    image = Image.new("RGB", (96, 32), (255, 0, 0))
    image.paste((0, 255, 0), (32, 0, 64, 32))
    image.paste((0, 0, 255), (64, 0, 96, 32))
    sides = {"size": {"height": 32, "width": 32}, "image_mean": [0.25, 0.5, 0.75]}
    cropped = PixelLoader(DefocusImageProcessor(fit="crop", **sides)).resize(image)
    assert cropped.unique(dim=2).flatten().tolist() == [0] * 32 + [255] * 32 + [0] * 32
    padded = PixelLoader(DefocusImageProcessor(fit="pad", **sides)).resize(image)
    assert padded[:, 0, 0].tolist() == padded[:, -1, -1].tolist() == [63, 127, 191]
    assert padded[:, 16, [4, 16, 28]].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_an_unknown_fit_is_named() -> None:
    with pytest.raises(ValueError, match="fit must be"):
        PixelLoader(DefocusImageProcessor(fit="squash")).resize(Image.new("RGB", (2, 3)))
