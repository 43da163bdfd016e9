"""A batch is a function of seed and keys; its pictures and labels go through every device that is switched on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from defocus_mllm import DefocusImageProcessor
from training.augmentation_arguments import AugmentationArguments
from training.augmented_batches import AugmentedBatches
from training.labelled_images import LabelledImageDataset, load_labelled_images
from training.sampling import SampleKey

SIZE = 16
OFF = {"horizontal_flip": 0.0}
EVERYTHING = {
    "vertical_flip": 0.5,
    "max_shift": 2,
    "crop_min_area": 0.2,
    "color_jitter": 0.3,
    "rand_augment": 9.0,
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "repeated_augmentation": 3,
}
KEYS = [SampleKey(1, 3), SampleKey(1, 0), SampleKey(1, 0, 1), SampleKey(2, 4)]


@pytest.fixture
def dataset(tmp_path: Path) -> LabelledImageDataset:
    return load(tmp_path, [{"label": number % 3} for number in range(6)])


def load(folder: Path, labels: list[dict[str, Any]]) -> LabelledImageDataset:
    generator = numpy.random.default_rng(0)
    lines = []
    for number, label in enumerate(labels):
        pixels = generator.integers(0, 256, (24, 40, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", **label}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    processor = DefocusImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    return load_labelled_images(folder / "metadata.jsonl", processor)


def batches(dataset: LabelledImageDataset, seed: int = 0, **fields: Any) -> AugmentedBatches:
    return AugmentedBatches(dataset, [5, 4, 3, 2, 1], AugmentationArguments(**{**OFF, **fields}), seed)


def test_with_everything_off_it_is_the_data_set(dataset: LabelledImageDataset) -> None:
    batch = batches(dataset)(KEYS)
    expected = dataset.batch([2, 5, 5, 1])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["labels"], expected["labels"])


def test_seed_and_keys_decide(dataset: LabelledImageDataset) -> None:
    first = batches(dataset, **EVERYTHING)(KEYS)
    torch.manual_seed(5)
    again = batches(dataset, **EVERYTHING)(KEYS)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["pixel_values"].shape == (4, 3, SIZE, SIZE)
    assert first["labels"].shape == (4, 3)
    for other in (batches(dataset, seed=1, **EVERYTHING)(KEYS), batches(dataset, **EVERYTHING)(KEYS[::-1])):
        assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_without_mixing_a_picture_is_augmented_alike_in_any_batch(dataset: LabelledImageDataset) -> None:
    load_batch = batches(dataset, **{**EVERYTHING, "mixup": 0.0, "cutmix": 0.0})
    whole = load_batch(KEYS)
    parts = [load_batch(KEYS[:1]), load_batch(KEYS[1:])]
    for name in whole:
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


def test_visits_to_a_picture_differ(dataset: LabelledImageDataset) -> None:
    load_batch = batches(dataset, rand_augment=9.0, crop_min_area=0.2)
    keys = [SampleKey(epoch, 0, copy) for epoch in range(2) for copy in range(3)]
    pictures = load_batch(keys)["pixel_values"]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("horizontal_flip", 1.0), ("vertical_flip", 1.0), ("max_shift", 3), ("crop_min_area", 0.1)),
        *(("color_jitter", 0.4), ("rand_augment", 9.0), ("random_erasing", 1.0), ("mixup", 0.8), ("cutmix", 1.0)),
    ],
)
def test_every_field_reaches_the_pixels(dataset: LabelledImageDataset, name: str, value: float) -> None:
    keys = [SampleKey(epoch, sample) for epoch in range(4) for sample in range(5)]
    plain, changed = batches(dataset)(keys)["pixel_values"], batches(dataset, **{name: value})(keys)["pixel_values"]
    assert not torch.equal(plain, changed)


def test_a_crop_comes_from_the_picture_in_the_file(dataset: LabelledImageDataset) -> None:
    """At its full size: resized first, a picture of noise would have lost most of its contrast."""
    keys = [SampleKey(epoch, 0) for epoch in range(30)]
    cropped = batches(dataset, crop_min_area=0.08)(keys)["pixel_values"]
    assert cropped.std(dim=(1, 2, 3)).max() > 1.1 * batches(dataset)(keys)["pixel_values"].std(dim=(1, 2, 3)).max()


def test_rand_augment_fills_with_the_mean_which_becomes_0(dataset: LabelledImageDataset) -> None:
    load_batch = batches(dataset, rand_augment=10.0, rand_augment_std=0.0)
    keys = [SampleKey(epoch, 0) for epoch in range(60)]
    near_mean = (load_batch(keys)["pixel_values"].abs() < 0.01).all(dim=1).float().mean(dim=(1, 2))
    assert near_mean.max() > 0.2  # translated by 45 % of the width


def test_known_labels_are_counted_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "classes").mkdir()
    (tmp_path / "attributes").mkdir()
    classes = load(tmp_path / "classes", [{"label": number % 3} for number in range(6)])
    for fields in ({}, {"label_smoothing": 0.1}, {"mixup": 0.8}):
        load_batch = batches(classes, **fields)
        assert load_batch.count_known(load_batch(KEYS)) == 4
    mixed = batches(classes, label_smoothing=0.1)
    assert mixed.count_known({"labels": torch.tensor([[0.5, 0.5, 0.0], [-1.0, -1.0, -1.0]])}) == 1
    attributes = load(tmp_path / "attributes", [{"labels": {"red": 1, "blue": None}}] * 6)
    load_batch = batches(attributes)
    assert load_batch.count_known(load_batch(KEYS)) == 4


@pytest.mark.parametrize("name", ["mixup", "cutmix", "label_smoothing"])
def test_attributes_cannot_be_mixed(tmp_path: Path, name: str) -> None:
    attributes = load(tmp_path, [{"labels": {"red": 1, "blue": None}}] * 6)
    with pytest.raises(ValueError, match=rf"{name}: needs one class an image; .*metadata\.jsonl has attributes"):
        batches(attributes, **{name: 0.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("horizontal_flip", 1.5), ("random_erasing", -0.1), ("mixing_probability", 2.0), ("crop_min_area", 1.1)),
        *(("max_shift", -1), ("color_jitter", -1.0), ("rand_augment", 11.0), ("rand_augment", -1.0)),
        *(("rand_augment_std", -1.0), ("mixup", -0.1), ("cutmix", -0.1), ("label_smoothing", 1.0)),
        *(("repeated_augmentation", 0), ("cutmix_probability", 1.1)),
    ],
)
def test_arguments_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: must .* got {value}"):
        AugmentationArguments(**{name: value}).check_augmentation()
