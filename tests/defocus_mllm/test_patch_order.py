"""The sectioned patch order: a permutation, the release's closed formula, an exact way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defocus_mllm.patch_order_defocus import inverse_order, section_order

grids = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6)).map(
    lambda grid: (grid[0] * grid[2], grid[1] * grid[2], grid[2])
)


def test_an_image_of_two_by_three_sections_by_hand():
    order = section_order(4, 6, 2)
    assert order.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    assert order.dtype == torch.int64


@given(grids)
def test_every_patch_stands_where_the_release_puts_it(grid):
    height, width, section = grid
    place = inverse_order(section_order(height, width, section))
    for y in range(height):
        for x in range(width):
            number = (y // section) * (width // section) + x // section
            expected = number * section * section + (y % section) * section + x % section
            assert place[y * width + x] == expected


@given(grids)
def test_it_is_a_permutation_and_its_inverse_is_exact(grid):
    order = section_order(*grid)
    raster = torch.arange(grid[0] * grid[1])
    assert torch.equal(order.sort().values, raster)
    assert torch.equal(raster[order][inverse_order(order)], raster)
    assert torch.equal(raster[inverse_order(order)][order], raster)


@given(st.integers(1, 8), st.integers(1, 8))
def test_one_section_or_sections_of_one_patch_are_the_raster_order(height, width):
    assert torch.equal(section_order(height, width, 1), torch.arange(height * width))
    assert torch.equal(section_order(height, height, height), torch.arange(height * height))


@pytest.mark.parametrize("grid", [(4, 6, 4), (6, 4, 4), (0, 4, 2), (4, 4, 0), (4, 4, -2)])
def test_what_does_not_divide_is_refused(grid):
    with pytest.raises(ValueError, match="section"):
        section_order(*grid)
