"""The order in which the patches of an image become a sequence: row by row, or section by section.

The detection release (`detection/`, `PatchEmbedChangeRes`) reads a large image as a series of square sections, each of
the size that the encoder was pre-trained with, so that within a section every row is as long as it was in pre-training.
"""

import torch


def section_order(height: int, width: int, section: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the raster index (y * width + x) of every patch of the sequence, in the order of the sequence.

    Sections are read row by row, and so are the patches of a section. `tokens[:, section_order(...)]` puts raster
    tokens in this order; `inverse_order` gives the way back. With a section of the size of the image, or of one patch,
    this is the raster order.

    Args:
        height, width: of the image, in patches; multiples of `section`.
        section: height and width of a section, in patches.
        device: where the result lies.

    Returns:
        A permutation of 0 .. height * width - 1, shape (height * width,), int64.

    Raises:
        ValueError: a size is below one, or no multiple of the section.
    """
    if section < 1 or height < 1 or width < 1:
        raise ValueError(f"height {height}, width {width} and section {section} must be positive, in patches")
    if height % section or width % section:
        raise ValueError(f"{height} x {width} patches do not divide into sections of {section} x {section}")
    raster = torch.arange(height * width, device=device)
    return raster.view(height // section, section, width // section, section).transpose(1, 2).flatten()


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """Return the permutation that undoes `order`, shape (n,): `tokens[order][inverse_order(order)]` is `tokens`.

    For `section_order` this is each patch's place in the sequence, in raster order of the patches.
    """
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
