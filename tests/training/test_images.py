"""Pictures are decoded once, as long as they fit the memory they are given."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from defocus_mllm.images import load_image
from training import images
from training.images import PixelLoader


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
    one_picture = 3 * 32 * 32 * 4
    loader = PixelLoader(processor.image_processor, cache_bytes=2 * one_picture)
    first = [loader(path) for path in paths]
    assert first[0].shape == (3, 32, 32)
    assert first[0].dtype == torch.float32
    assert torch.equal(loader(paths[2]), first[2])
    assert len(opened) == 3
    assert torch.equal(loader(paths[0]), first[0])  # the oldest had to go
    assert opened[3] == paths[0]
