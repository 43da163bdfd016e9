"""From pixels to the tokens of the encoder: patches in their order, registers, class token, positions."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_defocus import DefocusVisionConfig
from .kernels_defocus import at_least_float32
from .patch_order_defocus import section_order


class DefocusEmbeddings(nn.Module):
    """Patches in the order of the configuration, then registers, then the class token."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, config.num_registers, config.hidden_size)) if config.num_registers else None
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.class_token else None
        # One row a token: the patches in raster order, whatever the patch order, then registers and class token.
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, config.num_image_tokens, config.hidden_size))
            if config.use_absolute_position_embeddings
            else None
        )

    def forward(self, pixel_values: torch.Tensor, any_size: bool = False) -> torch.Tensor:
        """Embed pixels.

        Args:
            pixel_values: (batch, channels, image_size, image_size); with `any_size` any height and width that are
                multiples of the patch size (in sections: of a section's), positions being interpolated.

        Returns:
            (batch, patches + registers + class token, hidden).

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        self._check_shape(pixel_values, any_size)
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        tail = [
            token.expand(len(tokens), -1, -1) for token in (self.register_tokens, self.cls_token) if token is not None
        ]
        tokens = torch.cat([tokens, *tail], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self._positions(height, width)
        if self.config.patch_order == "raster":
            return tokens
        order = section_order(height, width, self.config.section_size, tokens.device)
        return torch.cat([tokens[:, order], tokens[:, height * width :]], dim=1)

    def _check_shape(self, pixel_values: torch.Tensor, any_size: bool) -> None:
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if any_size and pixel_values.ndim == 4 and pixel_values.shape[1] == config.num_channels:
            unit = config.patch_size * (config.section_size or 1)
            height, width = pixel_values.shape[-2:]
            if height % unit or width % unit or not (height and width):
                raise ValueError(f"pixel_values: height {height} and width {width} must be multiples of {unit}")
        elif pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must have shape (batch, {expected[0]}, {expected[1]}, {expected[2]}), "
                f"not {tuple(pixel_values.shape)}"
            )

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings of a grid, (1, tokens, hidden): the learned ones, or interpolated from them."""
        assert self.pos_embed is not None
        side = self.config.image_size // self.config.patch_size
        if (height, width) == (side, side):
            return self.pos_embed
        patches, tail = self.pos_embed[:, : side**2], self.pos_embed[:, side**2 :]
        grid = at_least_float32(patches).transpose(1, 2).unflatten(-1, (side, side))
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([grid.flatten(2).transpose(1, 2).to(tail.dtype), tail], dim=1)

    @torch.no_grad()
    def resize(self, image_size: int) -> None:
        """Make the learned positions those of another image size; call before the configuration changes."""
        if self.pos_embed is not None:
            side = image_size // self.config.patch_size
            self.pos_embed = nn.Parameter(self._positions(side, side).clone(), self.pos_embed.requires_grad)
