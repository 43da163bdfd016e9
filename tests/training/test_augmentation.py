"""Flips and shifts move pixels and invent none; a picture's draws come from its own generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.augmentation import Augmentation


def seeded(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + number) for number in range(count)]


def numbered(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.arange(batch * 3 * height * width, dtype=torch.float32).view(batch, 3, height, width)


def shift_by_hand(picture: torch.Tensor, down: int, right: int) -> torch.Tensor:
    _, height, width = picture.shape
    result = torch.empty_like(picture)
    for row in range(height):
        for column in range(width):
            source_row = min(max(row - down, 0), height - 1)
            source_column = min(max(column - right, 0), width - 1)
            result[:, row, column] = picture[:, source_row, source_column]
    return result


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 6), st.integers(0, 1000))
def test_a_shift_is_one_of_the_allowed_and_replicates_the_edge(max_shift, seed):
    pixels = numbered(3, 5, 4)
    shifted = Augmentation(max_shift=max_shift)(pixels, seeded(3, seed))
    offsets = range(-max_shift, max_shift + 1)
    for before, after in zip(pixels, shifted, strict=True):
        assert any(torch.equal(after, shift_by_hand(before, down, right)) for down in offsets for right in offsets)


def test_every_shift_occurs_and_axes_are_independent():
    pixels = numbered(1, 9, 9).expand(400, -1, -1, -1)
    middle = Augmentation(max_shift=1)(pixels, seeded(400))[:, 0, 4, 4]
    assert sorted({int(value) for value in middle}) == [30, 31, 32, 39, 40, 41, 48, 49, 50]


@pytest.mark.parametrize(("field", "dimension"), [("horizontal_flip", -1), ("vertical_flip", -2)])
def test_a_flip_mirrors_whole_pictures(field, dimension):
    pixels = numbered(200, 4, 5)
    flipped = Augmentation(**{field: 0.5})(pixels, seeded(200))
    mirrored = [torch.equal(after, before.flip(dimension)) for before, after in zip(pixels, flipped, strict=True)]
    kept = [torch.equal(after, before) for before, after in zip(pixels, flipped, strict=True)]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130


def test_probabilities_zero_and_one():
    pixels = numbered(4, 3, 3)
    assert torch.equal(Augmentation()(pixels, seeded(4)), pixels)
    both = Augmentation(horizontal_flip=1.0, vertical_flip=1.0)
    assert torch.equal(both(pixels, seeded(4)), pixels.flip(-1).flip(-2))


def test_the_same_seed_gives_the_same_batch_and_the_input_stays():
    pixels = numbered(16, 8, 8)
    before = pixels.clone()
    augmentation = Augmentation(0.5, 0.5, 3)
    assert torch.equal(augmentation(pixels, seeded(16, 1)), augmentation(pixels, seeded(16, 1)))
    assert not torch.equal(augmentation(pixels, seeded(16, 1)), augmentation(pixels, seeded(16, 2)))
    assert torch.equal(pixels, before)


def test_a_picture_is_augmented_alike_in_any_batch():
    pixels = numbered(8, 6, 6)
    augmentation = Augmentation(0.5, 0.5, 2)
    whole = augmentation(pixels, seeded(8))
    halves = [augmentation(pixels[:3], seeded(8)[:3]), augmentation(pixels[3:], seeded(8)[3:])]
    assert torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize(("field", "value"), [("horizontal_flip", 1.5), ("vertical_flip", -0.1), ("max_shift", -1)])
def test_values_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        Augmentation(**{field: value})
