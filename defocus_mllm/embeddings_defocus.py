"""From pixels to the tokens of the encoder: patches in their order, registers, class token, positions."""

import torch
import torch.nn.functional as F
from torch import nn

from .cache_defocus import DefocusImageProgress
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

    @property
    def section(self) -> int:
        """Height and width of a section, in patches; in raster order a patch is one."""
        return self.config.section_size or 1

    def forward(
        self,
        pixel_values: torch.Tensor,
        any_size: bool = False,
        image: DefocusImageProgress | None = None,
        final: bool | None = None,
    ) -> torch.Tensor:
        """Embed whole images, or with `image` the next piece of them, see `embed_piece`.

        Args:
            pixel_values: (batch, channels, image_size, image_size); with `any_size` any height and width that are
                multiples of the patch size (in sections: of a section's), positions being interpolated.

        Returns:
            (batch, patches + registers + class token, hidden).

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        if image is not None:
            return self.embed_piece(pixel_values, image, final)
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if not any_size and (pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected):
            raise ValueError(
                f"pixel_values must have shape (batch, {expected[0]}, {expected[1]}, {expected[2]}), "
                f"not {tuple(pixel_values.shape)}"
            )
        return self.embed_piece(pixel_values, DefocusImageProgress(*self._grid(pixel_values), section=self.section))

    def image_of(
        self,
        image: DefocusImageProgress | None,
        pixel_values: torch.Tensor,
        any_size: bool,
        image_size: tuple[int, int] | None,
        final: bool | None,
    ) -> DefocusImageProgress:
        """Return the image that a piece belongs to: `image`, or a new one if that is complete or None.

        Args:
            image: progress of the image before.
            pixel_values, any_size, image_size, final: see `DefocusVisionModel.forward`.

        Raises:
            ValueError: nothing says how high a new image is, its size does not divide into patches (sections), or
                `image_size` is another one than at the beginning of the image.
        """
        patch, section = self.config.patch_size, self.section
        if image is not None and not image.complete:
            if image_size not in (None, (patch * (image.rows or 0), patch * image.columns)):
                raise ValueError(f"image_size: {image_size} is not the size that the image began with")
            return image
        if image_size is None and any_size:
            if final is None:
                raise ValueError("any_size: say how high the image is (image_size), or if this piece ends it (final)")
            if self.pos_embed is not None and not final:
                raise ValueError("image_size: position embeddings depend on the image's height, so give its size first")
            return DefocusImageProgress(None, self._grid(pixel_values)[1], section)
        height, width = image_size or (self.config.image_size, self.config.image_size)
        unit = patch * section
        if height % unit or width % unit or height < 1 or width < 1:
            raise ValueError(f"image_size: height {height} and width {width} must be multiples of {unit}")
        return DefocusImageProgress(height // patch, width // patch, section)

    def embed_piece(
        self, pixel_values: torch.Tensor, image: DefocusImageProgress, final: bool | None = None
    ) -> torch.Tensor:
        """Embed the next piece of an image and bring `image` on.

        Args:
            pixel_values: (batch, channels, height, width): whole rows of patches or of sections, or the next sections
                of a row.
            image: what has arrived before.
            final: whether the piece ends the image; needed only while nobody has said how high that is.

        Returns:
            (batch, patches of the piece, hidden); behind the last patch of the image also registers and class token.

        Raises:
            ValueError: `pixel_values` is no such piece, or `final` contradicts the size of the image.
        """
        rows, columns = self._grid(pixel_values)
        row, column = image.place(rows, columns)
        if image.rows is None and final:
            image.rows = row + rows
        image.num_patches += rows * columns
        if final is not None and final != image.complete:
            missing = f"{image.missing_rows} of its {image.rows} rows of patches are missing"
            raise ValueError(f"final={final}, but " + (missing if final else "this piece ends the image"))
        patches = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        tokens = patches.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            tokens = tokens + self._positions_of(image)[0][:, row : row + rows, column : column + columns].flatten(1, 2)
        if image.section > 1:
            tokens = tokens[:, section_order(rows, columns, image.section, tokens.device)]
        return torch.cat([tokens, *self._tail(image, len(tokens))], dim=1) if image.complete else tokens

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Height and width of (batch, channels, height, width) in patches."""
        config, unit = self.config, self.config.patch_size * self.section
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {config.num_channels}, height, width), "
                f"not {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[-2:]
        if height % unit or width % unit or not (height and width):
            raise ValueError(f"pixel_values: height {height} and width {width} must be multiples of {unit}")
        return height // config.patch_size, width // config.patch_size

    def _tail(self, image: DefocusImageProgress, batch_size: int) -> list[torch.Tensor]:
        """Registers and class token that end the image, each (batch, tokens, hidden)."""
        tail: list[torch.Tensor] = [token for token in (self.register_tokens, self.cls_token) if token is not None]
        if self.pos_embed is not None and tail:
            tail = [torch.cat(tail, dim=1) + self._positions_of(image)[1]]
        return [token.expand(batch_size, -1, -1) for token in tail]

    def _positions_of(self, image: DefocusImageProgress) -> tuple[torch.Tensor, torch.Tensor]:
        """Position embeddings of an image's patches, (1, rows, columns, hidden), and of what follows them."""
        assert image.rows is not None, "image_of has seen to it"
        positions = self._positions(image.rows, image.columns) if image.positions is None else image.positions
        if positions is not self.pos_embed:
            image.positions = positions
        patches, tail = positions.tensor_split([image.rows * image.columns], dim=1)
        return patches.unflatten(1, (image.rows, image.columns)), tail

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
