"""Flips, shifts and crops move pixels and invent none; a picture's draws come from its own generator."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.augmentation import Augmentation, erase, jitter, random_crop, to_image, to_pixels
from training.rand_augment import RandAugment


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(height: int, width: int) -> torch.Tensor:
    assert 3 * height * width <= 256
    return torch.arange(3 * height * width, dtype=torch.uint8).view(3, height, width)


def photograph(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=seeded(5))


def shift_by_hand(picture: torch.Tensor, down: int, right: int) -> torch.Tensor:
    _, height, width = picture.shape
    result = torch.empty_like(picture)
    for row in range(height):
        for column in range(width):
            source_row = min(max(row - down, 0), height - 1)
            source_column = min(max(column - right, 0), width - 1)
            result[:, row, column] = picture[:, source_row, source_column]
    return result


# --- flips and shifts -------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(0, 1000))
def test_a_shift_is_one_of_the_allowed_and_replicates_the_edge(max_shift, seed):
    picture = numbered(5, 4)
    shifted = Augmentation(max_shift=max_shift)(picture, seeded(seed))
    offsets = range(-max_shift, max_shift + 1)
    assert any(torch.equal(shifted, shift_by_hand(picture, down, right)) for down in offsets for right in offsets)


def test_every_shift_occurs_and_axes_are_independent():
    picture = numbered(9, 9)
    middle = [int(Augmentation(max_shift=1)(picture, seeded(seed))[0, 4, 4]) for seed in range(400)]
    assert sorted(set(middle)) == [30, 31, 32, 39, 40, 41, 48, 49, 50]


@pytest.mark.parametrize(("field", "dimension"), [("horizontal_flip", -1), ("vertical_flip", -2)])
def test_a_flip_mirrors_whole_pictures(field, dimension):
    picture = numbered(4, 5)
    flipped = [Augmentation(**{field: 0.5})(picture, seeded(seed)) for seed in range(200)]
    mirrored = [torch.equal(after, picture.flip(dimension)) for after in flipped]
    kept = [torch.equal(after, picture) for after in flipped]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130


def test_probabilities_zero_and_one():
    picture = numbered(3, 3)
    assert torch.equal(Augmentation()(picture, seeded(0)), picture)
    both = Augmentation(horizontal_flip=1.0, vertical_flip=1.0)
    assert torch.equal(both(picture, seeded(0)), picture.flip(-1).flip(-2))


def test_flips_and_shifts_are_those_of_the_published_results():
    """The draws of the easy-VQA recipes: four uniform numbers, in this order, whatever else is switched on."""
    picture = numbered(8, 8)
    for seed in range(20):
        draws = torch.rand(4, generator=seeded(seed))
        expected = picture.flip(-1) if draws[0] < 0.5 else picture
        down, right = ((draws[2:] * 5).floor().long() - 2).tolist()
        assert torch.equal(Augmentation(0.5, 0.0, 2)(picture, seeded(seed)), shift_by_hand(expected, down, right))


EVERYTHING = Augmentation(0.5, 0.5, 3, color_jitter=0.4, rand_augment=RandAugment(9.0))


def test_the_same_seed_gives_the_same_picture_and_the_input_stays():
    picture = photograph(20, 24)
    before = picture.clone()
    first = [EVERYTHING(picture, seeded(seed)) for seed in range(6)]
    torch.manual_seed(1)
    assert all(torch.equal(one, EVERYTHING(picture, seeded(seed))) for seed, one in enumerate(first))
    assert len({bytes(one.contiguous().numpy()) for one in first}) == 6
    assert torch.equal(picture, before)
    assert all((one.shape, one.dtype) == ((3, 20, 24), torch.uint8) for one in first)


# --- crops ------------------------------------------------------------------------------------------------------------


def test_a_crop_is_a_rectangle_of_allowed_area_and_aspect():
    """A picture whose colours are its coordinates says which part was cut out."""
    height, width = 200, 240
    rows, columns = numpy.meshgrid(numpy.arange(height), numpy.arange(width), indexing="ij")
    image = Image.fromarray(numpy.stack([rows, columns, 0 * rows], -1).astype(numpy.uint8))
    areas, aspects, tops = [], [], []
    for seed in range(300):
        crop = to_pixels(random_crop(image, 32, 0.08, seeded(seed))).float()
        # the ends are averages over the first and last thirty-second of the crop
        box_height = float(crop[0, -1].mean() - crop[0, 0].mean()) * 32 / 31
        box_width = float(crop[1, :, -1].mean() - crop[1, :, 0].mean()) * 32 / 31
        areas.append(box_height * box_width / (height * width))
        aspects.append(box_width / box_height)
        tops.append(float(crop[0, 0].mean()))
    assert 0.07 < min(areas) < 0.15
    assert 0.85 < max(areas) < 1.02
    assert 0.72 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.38
    assert min(tops) < 10
    assert max(tops) > 100


def test_a_crop_of_the_whole_picture_is_a_bicubic_resize():
    image = to_image(photograph(24, 24))
    whole = [
        seed
        for seed in range(200)
        if torch.equal(to_pixels(random_crop(image, 24, 0.99, seeded(seed))), to_pixels(image))
    ]
    assert whole
    square = random_crop(image, 12, 1.0, seeded(0))  # only the aspect 1 fits, and else the middle is taken
    assert numpy.array_equal(numpy.asarray(square), numpy.asarray(image.resize((12, 12), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10)])
def test_a_strip_that_no_draw_fits_gives_its_middle(height, width):
    rows, columns = numpy.meshgrid(numpy.arange(height), numpy.arange(width), indexing="ij")
    image = Image.fromarray(numpy.stack([rows, columns, 0 * rows], -1).astype(numpy.uint8))
    crop = to_pixels(random_crop(image, 8, 0.9, seeded(0))).float()
    assert crop[0].mean() == pytest.approx((height - 1) / 2, abs=1)
    assert crop[1].mean() == pytest.approx((width - 1) / 2, abs=1)
    longer = crop[1] if width > height else crop[0]
    assert longer.max() - longer.min() < 14  # 10 x 4/3


# --- colours ----------------------------------------------------------------------------------------------------------


def test_jitter_changes_brightness_within_its_limits():
    image = Image.new("RGB", (4, 4), (100, 100, 100))  # grey: contrast and saturation have nothing to change
    values = [jitter(image, 0.4, seeded(seed)).getpixel((0, 0))[0] for seed in range(300)]
    assert min(values) in range(59, 66)
    assert max(values) in range(134, 142)
    assert jitter(image, 0.0, seeded(0)) is image


def test_jitter_draws_contrast_and_saturation_too():
    image = to_image(photograph(8, 8))
    changed = numpy.stack([numpy.asarray(jitter(image, 0.4, seeded(seed))).astype(float) for seed in range(50)])
    spread = changed.std(axis=(1, 2, 3))
    colour = (changed.max(-1) - changed.min(-1)).mean(axis=(1, 2)) / changed.mean(axis=(1, 2, 3))
    assert spread.max() / spread.min() > 1.5
    assert colour.max() / colour.min() > 1.5


# --- erasing ----------------------------------------------------------------------------------------------------------


def test_erasing_puts_noise_into_one_rectangle():
    pixel_values = torch.full((3, 40, 50), 7.0)
    areas, noise = [], []
    for seed in range(300):
        erased = erase(pixel_values, 1.0, seeded(seed))
        changed = (erased != 7).all(0)
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        box_height, box_width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        assert int(changed.sum()) == box_height * box_width
        assert 0.25 < box_height / box_width < 4
        areas.append(box_height * box_width / 2000)
        noise.append(erased[:, changed].flatten())
    assert 0.015 < min(areas) < 0.03
    assert 0.31 < max(areas) < 0.35
    values = torch.cat(noise)
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    assert (pixel_values == 7).all()


def test_erasing_happens_as_often_as_asked():
    pixel_values = torch.zeros(3, 16, 16)
    times = sum(erase(pixel_values, 0.25, seeded(seed)) is not pixel_values for seed in range(1000))
    assert abs(times - 250) < 4 * math.sqrt(1000 * 0.25 * 0.75)
    assert erase(pixel_values, 0.0, seeded(0)) is pixel_values


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizontal_flip", 1.5),
        ("vertical_flip", -0.1),
        ("max_shift", -1),
        ("color_jitter", -0.1),
    ],
)
def test_values_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        Augmentation(**{field: value})
