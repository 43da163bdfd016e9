"""The encoder as a backbone for detection and segmentation: feature maps of images of any height and width.

As in the detection release (`detection/`), the patches of a large image are read section by section, each section of
the size that the encoder was pre-trained with, and a simple feature pyramid (ViTDet) makes maps of four scales.
"""

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_defocus import PYRAMID_LEVELS, DefocusVisionConfig
from .modeling_defocus_vision import DefocusVisionModel, DefocusVisionPreTrainedModel
from .patch_order_defocus import inverse_order, section_order

# Cells of a level's map to a patch, in one direction.
_CELLS_PER_PATCH = dict(zip(PYRAMID_LEVELS, (4, 2, 1, 0.5), strict=True))


class DefocusMapNorm(nn.LayerNorm):
    """Layer norm over the channels of every cell of a (batch, channels, height, width) map."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def pyramid_level(config: DefocusVisionConfig, level: str) -> nn.Sequential:
    """Build one level of the simple feature pyramid (`detection/`, SimpleFPN; a map of patches in).

    The map is resampled ("fpn1": 4 times the cells in each direction, "fpn2": twice, "fpn3": as many, "fpn4": half),
    then a 1x1 and a 3x3 convolution, each with a norm, make `fpn_channels` of its channels.
    """
    width, eps = config.hidden_size, config.layer_norm_eps
    resample: nn.Module
    if level == "fpn1":
        channels = width // 4
        resample = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2),
            DefocusMapNorm(width // 2, eps=eps),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, channels, kernel_size=2, stride=2),
        )
    elif level == "fpn2":
        channels = width // 2
        resample = nn.ConvTranspose2d(width, channels, kernel_size=2, stride=2)
    else:
        channels = width
        # An odd number of patches keeps its border: the release's pooling would drop it (even numbers: no difference).
        resample = nn.Identity() if level == "fpn3" else nn.MaxPool2d(kernel_size=2, ceil_mode=True)
    return nn.Sequential(
        OrderedDict(
            resample=resample,
            lateral=nn.Conv2d(channels, config.fpn_channels, kernel_size=1, bias=False),
            lateral_norm=DefocusMapNorm(config.fpn_channels, eps=eps),
            output=nn.Conv2d(config.fpn_channels, config.fpn_channels, kernel_size=3, padding=1, bias=False),
            output_norm=DefocusMapNorm(config.fpn_channels, eps=eps),
        )
    )


def in_sections(config: DefocusVisionConfig) -> DefocusVisionConfig:
    """The configuration with the sectioned patch order: one section for the image it was trained with, if in raster.

    For that image nothing changes: a single section is read row by row.
    """
    if config.patch_order == "sections":
        return config
    config = copy.deepcopy(config)
    config.section_size = config.image_size // config.patch_size
    config.patch_order = "sections"
    return config


class DefocusBackbone(BackboneMixin, DefocusVisionPreTrainedModel):
    """Feature maps for the heads of Transformers (`backbone_config=DefocusVisionConfig(...)`).

    `out_features` chooses them by the names of `config.stage_names`: "fpn1" to "fpn4", the feature pyramid, with
    `fpn_channels` channels and cells of 1/4, 1/2, 1 and 2 patches; "stem" and "stage1" ... the patch tokens after so
    many blocks and the encoder's final norm, for heads that bring a neck of their own. Unless told, all of the pyramid.

    The encoder stays causal: a cell of a stage has seen the patches before it in the order of the sections, no others.
    The class token and the registers end the sequence, as in pre-training, so that a causal encoder's maps do not
    depend on them.
    """

    has_attentions = False

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__(in_sections(config))
        self.encoder = DefocusVisionModel(self.config)
        self.pyramid = nn.ModuleDict(
            {level: pyramid_level(self.config, level) for level in PYRAMID_LEVELS if level in self.out_features}
        )
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.num_features += [config.fpn_channels] * len(PYRAMID_LEVELS)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.ConvTranspose2d):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        """Compute the maps of `out_features`.

        Args:
            pixel_values: (batch, channels, height, width), normalised; zeros are added at the bottom and on the right
                until height and width are multiples of a section's, and what they become is cut off again.
            output_hidden_states: also return the tokens before the first and after every block (the last normed),
                in the order of the sequence.

        Returns:
            `feature_maps`, in the order of `out_features`: (batch, channels, rows, columns), rows and columns being
            height and width divided by the width of a cell, rounded up.

        Raises:
            ValueError: `pixel_values` has another shape, or `out_features` was changed to a level of the pyramid that
                this model was not built with.
        """
        channels, patch = self.config.num_channels, self.config.patch_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not pixel_values.numel():
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (batch, {channels}, height, width), not {shape}")
        unbuilt = [stage for stage in self.out_features if stage in PYRAMID_LEVELS and stage not in self.pyramid]
        if unbuilt:
            raise ValueError(f"out_features: this backbone was built without {unbuilt}; build it with them")
        height, width = pixel_values.shape[-2:]
        section = patch * self.config.section_size
        padded = F.pad(pixel_values, (0, -width % section, 0, -height % section))
        hidden_states = self.encoder(padded, any_size=True, **kwargs).hidden_states
        last = self._patch_map(hidden_states[-1], height, width)
        maps = []
        for stage in self.out_features:
            if stage in PYRAMID_LEVELS:
                rows, columns = (math.ceil(size * _CELLS_PER_PATCH[stage] / patch) for size in (height, width))
                maps.append(self.pyramid[stage](last)[..., :rows, :columns])
            elif stage == f"stage{self.config.num_hidden_layers}":
                maps.append(last)
            else:
                tokens = hidden_states[self.stage_names.index(stage)]
                norm = self.encoder.norm
                maps.append(self._patch_map(norm(tokens.to(norm.weight.dtype)), height, width))
        return BackboneOutput(feature_maps=tuple(maps), hidden_states=hidden_states)

    def _patch_map(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The patch tokens of an image of `height` x `width` pixels as a map, without padding and other tokens."""
        patch, section = self.config.patch_size, self.config.section_size
        rows, columns = (math.ceil(size / (patch * section)) * section for size in (height, width))
        place = inverse_order(section_order(rows, columns, section, tokens.device))
        feature_map = tokens[:, place].transpose(1, 2).unflatten(2, (rows, columns))
        return feature_map[..., : math.ceil(height / patch), : math.ceil(width / patch)]


__all__ = ["DefocusBackbone"]
