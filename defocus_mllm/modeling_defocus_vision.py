"""The De-focus vision encoder: an image read as one causal sequence of patches, left to right, top to bottom."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .bandpass_defocus import DefocusBandPass
from .configuration_defocus import DefocusVisionConfig
from .mixers_defocus import MIXERS


class DefocusEmbeddings(nn.Module):
    """Patches in raster order, then registers, then the class token: (batch, num_image_tokens, hidden)."""

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
        self.pos_embed = (
            nn.Parameter(torch.zeros(1, config.num_image_tokens, config.hidden_size))
            if config.use_absolute_position_embeddings
            else None
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed (batch, channels, image_size, image_size) pixels; `ValueError` for any other shape."""
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must have shape (batch, {expected[0]}, {expected[1]}, {expected[2]}), "
                f"not {tuple(pixel_values.shape)}"
            )
        tokens = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        tail = [
            token.expand(len(tokens), -1, -1) for token in (self.register_tokens, self.cls_token) if token is not None
        ]
        tokens = torch.cat([tokens, *tail], dim=1)
        return tokens if self.pos_embed is None else tokens + self.pos_embed


class DefocusDropPath(nn.Module):
    """Stochastic depth: drops the branch of a sample with probability `rate`, and scales the others by 1/(1-rate)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)


class DefocusMLP(nn.Module):
    """The feed-forward layer of a block."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class DefocusLayer(GradientCheckpointingLayer):
    """A pre-norm block: mixer, then feed-forward layer, each with drop path on its branch."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = MIXERS[config.mixer](config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = DefocusMLP(config)
        self.drop_path = DefocusDropPath()

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        mixed, _ = self.mixer(self.norm1(hidden_states))
        hidden_states = hidden_states + self.drop_path(mixed)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))


class DefocusVisionPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading shared by the models of the encoder."""

    config: DefocusVisionConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - Transformers declares these as class attributes
    supports_gradient_checkpointing = True
    _no_split_modules = ["DefocusLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": DefocusLayer}  # noqa: RUF012
    # lambda and theta are phases and rates: 16 bits would quantise them.
    _keep_in_fp32_modules_strict = ["band_pass"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DefocusBandPass):
            module.reset_parameters()
        elif isinstance(module, DefocusEmbeddings):
            for token in (module.register_tokens, module.cls_token, module.pos_embed):
                if token is not None:
                    init.trunc_normal_(token, std=std)


class DefocusVisionModel(DefocusVisionPreTrainedModel):
    """The encoder: patches to tokens, left to right."""

    _keys_to_ignore_on_load_unexpected = [r"^head2?\."]  # noqa: RUF012 - the heads of a classifier checkpoint

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = DefocusEmbeddings(config)
        self.layers = nn.ModuleList(DefocusLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.set_drop_path_rate(config.drop_path_rate)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embed

    def set_drop_path_rate(self, rate: float) -> None:
        """Set the rate of the last block; the first block gets 0 and the others lie evenly between.

        The released training calls this once an epoch with a rate that grows linearly over the epochs.
        """
        drop_paths = [module for module in self.modules() if isinstance(module, DefocusDropPath)]
        for drop_path, value in zip(drop_paths, torch.linspace(0, rate, len(drop_paths)).tolist(), strict=True):
            drop_path.rate = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch, channels, image_size, image_size), normalised.

        Returns:
            `last_hidden_state` (batch, patches + registers + class token, hidden) and `pooler_output` (batch, hidden):
            the class token, the one position that has seen the whole image (without it, the mean token).

        Raises:
            ValueError: `pixel_values` has another shape.
        """
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.norm(hidden_states)
        pooled = hidden_states[:, -1] if self.config.class_token else hidden_states.mean(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


@dataclass
class DefocusImageClassifierOutput(ModelOutput):
    """Output of `DefocusForImageClassification`.

    Attributes:
        loss: main loss, plus the auxiliary loss if there is one; scalar.
        logits: main head on the class token, (batch, num_labels).
        main_loss, aux_loss: the two parts, scalars.
        aux_logits: auxiliary head, (batch, num_labels) "pooled" or (batch, patches, num_labels) "per_token".
        hidden_states: one (batch, tokens, hidden) per block if asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    aux_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Cross-entropy over the labels that are known.

    Args:
        logits: (..., num_labels).
        labels: (...,) class indices, negative = unknown; for "multi_label_classification" (..., num_labels) with 1, 0,
            or a negative number where the label is unknown.
        problem_type: "multi_label_classification", or anything else for a single label.

    Returns:
        The mean over known labels, in float32; 0 if none is known.
    """
    logits = logits.float()
    if problem_type == "multi_label_classification":
        known = labels >= 0
        losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
        losses = losses * known
    else:
        known = labels >= 0
        losses = F.cross_entropy(logits.flatten(0, -2), labels.masked_fill(~known, -100).flatten(), reduction="none")
    return losses.sum() / known.sum().clamp(min=1)


class DefocusForImageClassification(DefocusVisionPreTrainedModel):
    """Encoder with the main head on the class token and the auxiliary head on the patch tokens (paper, section 4.3)."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__(config)
        self.encoder = DefocusVisionModel(config)
        num_labels = len(config.id2label or {})
        self.head = nn.Linear(config.hidden_size, num_labels)
        self.head2 = nn.Linear(config.hidden_size, num_labels) if config.aux_loss != "none" else None
        self.post_init()

    def set_drop_path_rate(self, rate: float) -> None:
        """See `DefocusVisionModel.set_drop_path_rate`."""
        self.encoder.set_drop_path_rate(rate)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> DefocusImageClassifierOutput:
        """Classify images; with `labels`, also return the losses (see `classification_loss` for their form).

        The two losses are added with equal weights: their sum as in the paper ("pooled"), their mean as in the released
        code ("per_token").
        """
        outputs = self.encoder(pixel_values, **kwargs)
        logits, aux_logits = self.head(outputs.pooler_output), None
        if self.head2 is not None:
            patches = outputs.last_hidden_state[:, : self.config.num_patches]
            aux_logits = self.head2(patches.mean(dim=1) if self.config.aux_loss == "pooled" else patches)
        losses = {} if labels is None else self._losses(logits, aux_logits, labels)
        return DefocusImageClassifierOutput(
            logits=logits, aux_logits=aux_logits, hidden_states=outputs.hidden_states, **losses
        )

    def _losses(
        self, logits: torch.Tensor, aux_logits: torch.Tensor | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        problem_type = self.config.problem_type
        main_loss = classification_loss(logits, labels, problem_type)
        if aux_logits is None:
            return {"loss": main_loss, "main_loss": main_loss}
        if self.config.aux_loss == "pooled":
            aux_loss = classification_loss(aux_logits, labels, problem_type)
            return {"loss": main_loss + aux_loss, "main_loss": main_loss, "aux_loss": aux_loss}
        per_token = labels.unsqueeze(1).expand(aux_logits.shape[:2] + labels.shape[1:])
        aux_loss = classification_loss(aux_logits, per_token, problem_type)
        return {"loss": (main_loss + aux_loss) / 2, "main_loss": main_loss, "aux_loss": aux_loss}


__all__ = ["DefocusForImageClassification", "DefocusVisionModel", "DefocusVisionPreTrainedModel"]
