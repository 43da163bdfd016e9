"""Each operation against values worked out by hand; the draws come from the picture's generator alone."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
import torch
from PIL import Image

from training import rand_augment
from training.rand_augment import OPERATIONS, RandAugment

GREY = (128, 128, 128)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photograph(size: int = 20, seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=numpy.uint8))


def apply(name: str, image: Image.Image, level: float) -> numpy.ndarray:
    return numpy.asarray(OPERATIONS[name](image, level, GREY))


def test_there_are_fifteen_operations() -> None:
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [-1.0, -0.45, 0.0, 0.9, 1.0])
def test_every_operation_keeps_size_and_mode_and_its_argument(name: str, level: float) -> None:
    image = photograph()
    before = numpy.array(image)
    after = OPERATIONS[name](image, level, GREY)
    assert (after.size, after.mode) == (image.size, "RGB")
    assert numpy.array_equal(numpy.array(image), before)


@pytest.mark.parametrize(
    "name",
    [
        *("rotate", "solarize", "solarize_add", "color", "contrast", "brightness", "sharpness"),
        *("shear_x", "shear_y", "translate_x", "translate_y"),
    ],
)
def test_level_0_changes_nothing(name: str) -> None:
    image = photograph()
    assert numpy.array_equal(apply(name, image, 0.0), numpy.asarray(image))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("auto_contrast", "equalize", "invert")])
def test_a_larger_magnitude_changes_more(name: str) -> None:
    # smooth, so that moving it further moves it further from itself
    ramp = numpy.stack(numpy.broadcast_arrays(numpy.arange(64)[:, None] * 2, numpy.arange(64) * 2, 60), -1)
    image = Image.fromarray(ramp.astype(numpy.uint8))
    changes = [
        numpy.abs(apply(name, image, level).astype(int) - numpy.asarray(image)).mean() for level in (0.1, 0.5, 0.9)
    ]
    assert changes == sorted(changes)
    assert changes[0] < changes[-1] or name == "sharpness"  # a ramp has nothing to sharpen


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("invert", 0.5, [255, 155, 127, 55, 0]),
        ("posterize", 0.5, [0, 64, 128, 192, 192]),  # 2 bits
        ("posterize", 1.0, [0, 0, 128, 128, 128]),  # 1 bit
        ("solarize", 0.5, [0, 100, 127, 55, 0]),  # from 128 on
        ("solarize", -0.5, [0, 100, 127, 55, 0]),
        ("solarize_add", 0.5, [55, 155, 128, 200, 255]),
        ("brightness", 1.0, [0, 190, 243, 255, 255]),
        ("brightness", -1.0, [0, 10, 12, 20, 25]),
        ("auto_contrast", 0.5, [0, 100, 128, 200, 255]),
    ],
)
def test_values_by_hand(name: str, level: float, expected: list[int]) -> None:
    row = numpy.array([[0, 100, 128, 200, 255]], dtype=numpy.uint8)
    image = Image.fromarray(numpy.stack([row] * 3, -1))
    assert apply(name, image, level)[0, :, 0].tolist() == expected


def test_auto_contrast_and_equalize_use_the_whole_range() -> None:
    image = Image.fromarray(numpy.array([[[90] * 3, [100] * 3, [110] * 3]], dtype=numpy.uint8))
    assert apply("auto_contrast", image, 0.5)[0, :, 0].tolist() == [0, 127, 255]
    levels = apply("equalize", photograph(64), 0.5)
    assert (levels.min(), levels.max()) == (0, 255)


def test_colour_and_contrast_move_away_from_grey() -> None:
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    luminance = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    stronger = apply("color", image, 0.5)[0, 0].astype(int)
    expected = [min(255, max(0, round(luminance + 1.45 * (value - luminance)))) for value in (200, 100, 50)]
    assert numpy.abs(stronger - expected).max() <= 1
    two = Image.fromarray(numpy.array([[[100] * 3, [200] * 3]], dtype=numpy.uint8))
    assert numpy.abs(apply("contrast", two, -0.5)[0, :, 0].astype(int) - [122, 177]).max() <= 1


@pytest.mark.parametrize(("name", "axis"), [("translate_x", 1), ("translate_y", 0)])
@pytest.mark.parametrize("pixels", [9, -9])
def test_translation_by_whole_pixels(name: str, axis: int, pixels: int) -> None:
    image = photograph(20)
    moved = apply(name, image, pixels / 9)  # 0.45 x 20 pixels at full level
    picture = numpy.moveaxis(numpy.asarray(image), axis, 0)
    moved = numpy.moveaxis(moved, axis, 0)
    kept = slice(0, 20 - 9) if pixels > 0 else slice(9, 20)
    source = slice(9, 20) if pixels > 0 else slice(0, 20 - 9)
    assert numpy.array_equal(moved[kept], picture[source])
    emptied = slice(20 - 9, 20) if pixels > 0 else slice(0, 9)
    assert (moved[emptied] == 128).all()


@pytest.mark.parametrize(("name", "axis"), [("shear_x", 1), ("shear_y", 0)])
def test_shear_moves_each_line_further(name: str, axis: int) -> None:
    columns = numpy.zeros((40, 40, 3), dtype=numpy.uint8)
    columns[:, 20] = 255
    picture = columns if axis == 1 else columns.transpose(1, 0, 2)
    sheared = apply(name, Image.fromarray(picture), 1.0)
    sheared = sheared if axis == 1 else sheared.transpose(1, 0, 2)
    places = [int(sheared[row, :, 0].astype(int).argmax()) for row in (1, 11, 21)]
    assert [place - places[0] for place in places] == [0, -3, -6]


def test_rotation_is_30_degrees_and_mirrors() -> None:
    image = photograph(41)
    assert numpy.array_equal(
        apply("rotate", image, 1.0), numpy.asarray(image.rotate(30, Image.Resampling.BICUBIC, fillcolor=GREY))
    )
    bar = numpy.zeros((41, 41, 3), dtype=numpy.uint8)
    bar[20, :] = 255
    left, right = (apply("rotate", Image.fromarray(bar), level).astype(int) for level in (1.0, -1.0))
    assert numpy.abs(left[:, ::-1] - right).max() <= 1
    rows = left[:, 37, 0].argmax(), left[:, 3, 0].argmax()
    assert rows[1] - rows[0] == pytest.approx(34 * numpy.tan(numpy.pi / 6), abs=1)


def test_the_generator_decides_and_nothing_else() -> None:
    image, augment = photograph(), RandAugment(9.0)
    torch.manual_seed(1)
    first = [numpy.asarray(augment(image, seeded(seed))) for seed in range(20)]
    torch.manual_seed(2)
    second = [numpy.asarray(augment(image, seeded(seed))) for seed in range(20)]
    assert all(numpy.array_equal(one, two) for one, two in zip(first, second, strict=True))
    assert len({picture.tobytes() for picture in first}) > 8


def test_two_operations_each_left_out_half_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[tuple[str, float]] = []

    def recorder(name: str) -> rand_augment.Operation:
        def operation(image: Image.Image, level: float, fill: rand_augment.Fill) -> Image.Image:
            applied.append((name, level))
            assert fill == (1, 2, 3)
            return image

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, recorder(name))
    image, augment = photograph(2), RandAugment(9.0, 0.5, fill=(1, 2, 3))
    counts: Counter[int] = Counter()
    for seed in range(3000):
        before = len(applied)
        augment(image, seeded(seed))
        counts[len(applied) - before] += 1
    assert counts[0] / 3000 == pytest.approx(0.25, abs=0.03)
    assert counts[2] / 3000 == pytest.approx(0.25, abs=0.03)
    uses = Counter(name for name, _ in applied)
    assert len(uses) == 15
    assert min(uses.values()) > 130
    assert max(uses.values()) < 270
    levels = torch.tensor([level for _, level in applied])
    assert (levels > 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert levels.abs().mean().item() == pytest.approx(0.898, abs=0.01)  # noise above 10 is cut off
    assert levels.abs().std().item() == pytest.approx(0.048, abs=0.005)
    assert levels.abs().max() == 1.0


@pytest.mark.parametrize(("field", "value"), [("magnitude", 11.0), ("magnitude", -1.0), ("magnitude_std", -0.1)])
def test_values_out_of_range_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="rand_augment"):
        RandAugment(**{"magnitude": 9.0, field: value})
