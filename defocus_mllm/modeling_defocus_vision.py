"""The De-focus vision encoder: an image read as one causal sequence of patches, left to right, top to bottom."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .bandpass_defocus import DefocusBandPass
from .cache_defocus import CACHE_NAME, DefocusVisionCache
from .configuration_defocus import DefocusVisionConfig
from .embeddings_defocus import DefocusEmbeddings
from .host_defocus import refuse_dropped_patch  # noqa: F401 - importing it is what makes PyTorch call it
from .layers_defocus import (
    DefocusContextBroadcasting,
    DefocusDropPath,
    DefocusLayer,
    DefocusMambaLayer,
    DefocusRMSNorm,
)
from .mixers_defocus import DefocusAttentionWeights, DefocusMamba
from .precision_defocus import DefocusFloat32Model

if TYPE_CHECKING:
    # Transformers saves a class with the files that its own file names. Naming this one puts the backbone's code beside
    # every encoder, where AutoBackbone looks for it.
    from .modeling_defocus_backbone import DefocusBackbone  # noqa: F401


class DefocusVisionPreTrainedModel(DefocusFloat32Model):
    """Weight initialisation and loading shared by the models of the encoder."""

    config: DefocusVisionConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - Transformers declares these as class attributes
    supports_gradient_checkpointing = True
    _no_split_modules = ["DefocusLayer", "DefocusMambaLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": [DefocusLayer, DefocusMambaLayer],
        "attentions": DefocusAttentionWeights,
    }
    # Only a name: whichever is asked for, `attention_core_defocus` chooses, PyTorch's fused kernels included.
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if (
                module.bias is not None
                and isinstance(module, nn.Conv2d)
                and not self.config.use_absolute_position_embeddings
            ):
                # As in the release, PyTorch's default. With zeros a black patch would be a token of exactly zero,
                # which no norm can scale: its gradient explodes.
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
            elif module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DefocusRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, DefocusContextBroadcasting) and module.scale is not None:
            init.zeros_(module.scale)
        elif isinstance(module, DefocusBandPass | DefocusMamba):
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
        layer = DefocusMambaLayer if config.mixer == "mamba" else DefocusLayer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.set_drop_path_rate(config.drop_path_rate)
        # Phases, rates and what they multiply: 16 bits would quantise them.
        present = {part for name in self.state_dict() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = present & {"band_pass", "A_log", "D", "theta", "decay_bias"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embed

    def set_drop_path_rate(self, rate: float) -> None:
        """Set the rate of the last block; the first block gets 0 and the others lie evenly between.

        The released training calls this once an epoch with a rate that grows linearly over the epochs.
        """
        drop_paths = [module for module in self.modules() if isinstance(module, DefocusDropPath)]
        for depth, drop_path in enumerate(drop_paths):
            drop_path.rate = rate * depth / max(1, len(drop_paths) - 1)

    def resize_images(self, image_size: int) -> None:
        """Prepare for images of another size, in place: scale factors by `for_image_size`, positions interpolated.

        Args:
            image_size: new height and width, in pixels.

        Raises:
            ValueError: `image_size` is not a multiple of the patch size (in sections: of a section's).
        """
        resized = self.config.for_image_size(image_size)
        self.embeddings.resize(image_size)
        for name in ("image_size", "delta_scale_factor", "rope_scale_factor"):
            setattr(self.config, name, getattr(resized, name))

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        any_size: bool = False,
        use_cache: bool | None = None,
        past_key_values: DefocusVisionCache | None = None,
        cache: DefocusVisionCache | None = None,
        image_size: tuple[int, int] | None = None,
        final: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Encode images, sequences of frames, or the next piece of either.

        Args:
            pixel_values: (batch, channels, image_size, image_size), normalised, or (batch, frames, channels, ...): one
                causal sequence of whole images, in which absolute positions repeat. With a cache, four dimensions are
                the next piece: whole rows of patches (of sections), or sections that continue a row.
            any_size: accept other heights and widths, see `DefocusEmbeddings.forward`; the scale factors stay.
            use_cache: return a cache; without one given, a sequence begins.
            past_key_values, cache: the cache of the pieces so far, by either name; it is brought on.
            image_size: height and width in pixels of an image in pieces, if not the configuration's; at its first.
            final: whether this piece ends its image; with `any_size` it can stand for `image_size`.

        Returns:
            `last_hidden_state` (batch, tokens, hidden), patches, and after an image's last one registers and class
            token; `pooler_output` (batch, hidden), or (batch, frames, hidden): the class token, the one position that
            has seen the whole image (without it, the mean token), None before; `past_key_values`: the cache, if used.

        Raises:
            ValueError: `pixel_values` has another shape or is not the next piece; the encoder is not causal, or the
                cache not its own.
        """
        given = past_key_values if cache is None else cache
        state = self._open_cache(pixel_values, use_cache, given)
        kwargs.setdefault("output_attentions", self.config.output_attentions)
        hidden_states = self._embed(pixel_values, any_size, image_size, final, state)
        layer_states = [None] * len(self.layers) if state is None else state.layers
        for layer, layer_state in zip(self.layers, layer_states, strict=True):
            hidden_states = layer(hidden_states, state=layer_state, **kwargs)
        hidden_states = self.norm(hidden_states.to(self.norm.weight.dtype))
        pooled = self._pool(hidden_states, pixel_values, state)
        if given is not None and state is not None:  # only now: after an error the cache is what it was
            given.become(state)
            state = given
        output_cache: dict[str, Any] = {CACHE_NAME: state}
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=pooled, **output_cache
        )

    def _open_cache(
        self, pixel_values: torch.Tensor, use_cache: bool | None, given: DefocusVisionCache | None
    ) -> DefocusVisionCache | None:
        """The cache that this call may write to: a fork of the given one, a new one, or None."""
        frames, with_cache = pixel_values.ndim == 5, bool(use_cache) or given is not None
        if (frames or with_cache) and not self.config.causal:
            raise ValueError("causal=False: this encoder sees whole images only; it takes neither pieces nor frames")
        if not with_cache:
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("past_key_values: a cache does not survive the recomputation of gradient checkpointing")
        state = DefocusVisionCache() if given is None else given.fork()
        state.start([layer.mixer for layer in self.layers], len(pixel_values))
        if frames and state.image is not None and state.in_image:
            raise ValueError(
                f"pixel_values: frames are whole images, but the current one lacks {state.image.missing_rows} rows"
            )
        return state

    def _embed(
        self,
        pixel_values: torch.Tensor,
        any_size: bool,
        image_size: tuple[int, int] | None,
        final: bool | None,
        state: DefocusVisionCache | None,
    ) -> torch.Tensor:
        """The tokens that go through the blocks; `state.image` is brought on."""
        if state is not None and pixel_values.ndim == 4:
            state.image = self.embeddings.image_of(state.image, pixel_values, any_size, image_size, final)
            return self.embeddings(pixel_values, image=state.image, final=final)
        if image_size is not None or final is not None:
            raise ValueError("image_size and final are for pieces of an image: use_cache=True, four dimensions")
        if pixel_values.ndim != 5:
            return self.embeddings(pixel_values, any_size)
        frames = self.embeddings(pixel_values.flatten(0, 1), any_size)
        return frames.unflatten(0, pixel_values.shape[:2]).flatten(1, 2)

    def _pool(
        self, hidden_states: torch.Tensor, pixel_values: torch.Tensor, state: DefocusVisionCache | None
    ) -> torch.Tensor | None:
        """The class token, or the mean token, of every image that is complete; `state` counts them."""
        if state is None or pixel_values.ndim == 5:
            num_images = pixel_values.shape[1] if pixel_values.ndim == 5 else 1
            images = hidden_states.unflatten(1, (num_images, -1))
            pooled = images[:, :, -1] if self.config.class_token else images.mean(dim=2)
            if state is not None:
                state.num_images += num_images
            return pooled if pixel_values.ndim == 5 else pooled[:, 0]
        return state.pool_piece(hidden_states, self.config.class_token)


@dataclass
class DefocusImageClassifierOutput(ModelOutput):
    """Output of `DefocusForImageClassification`.

    Attributes:
        loss: main loss, plus the auxiliary loss if there is one; scalar.
        logits: main head on the class token, (batch, num_labels).
        main_loss, aux_loss: the two parts, scalars.
        aux_logits: auxiliary head, (batch, num_labels) "pooled" or (batch, patches, num_labels) "per_token".
        hidden_states: if asked for, (batch, tokens, hidden) before the first block, after every block but the last, and
            after the final norm.
        attentions: if asked for, of attention's blocks (batch, heads, tokens, tokens); no other mixer has any.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    main_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    aux_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Cross-entropy over the labels that are known; for "regression" the mean squared error.

    Args:
        logits: (..., num_labels).
        labels: (...,) class indices, negative = unknown; or (..., num_labels) class probabilities (mixed or smoothed
            labels), negative throughout = unknown; for "multi_label_classification" (..., num_labels) with 1, 0, or a
            negative number where the label is unknown; for "regression" (..., num_labels) numbers, all known (one
            output: the last dimension may be missing).
        problem_type: "multi_label_classification", "regression", or anything else for a single label.

    Returns:
        The mean over known labels, in float32; 0 if none is known.
    """
    logits = logits.float()
    if problem_type == "regression":
        return F.mse_loss(logits, labels.to(logits.dtype).reshape(logits.shape))
    known = labels >= 0
    if problem_type == "multi_label_classification":
        losses = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), reduction="none")
        losses = losses * known
    elif labels.ndim == logits.ndim:
        known = known.all(dim=-1)
        targets = labels.to(logits.dtype).masked_fill(~known[..., None], 0)
        losses = F.cross_entropy(logits.movedim(-1, 1), targets.movedim(-1, 1), reduction="none")
    else:
        losses = F.cross_entropy(logits.flatten(0, -2), labels.masked_fill(~known, -100).flatten(), reduction="none")
    return losses.sum() / known.sum().clamp(min=1)


class DefocusClassificationHead(nn.Module):
    """Linear, tanh, linear: the head of the released IN-22k models, three times as wide inside."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 3 * hidden_size)
        self.fc2 = nn.Linear(3 * hidden_size, num_labels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(hidden_states)))


class DefocusForImageClassification(DefocusVisionPreTrainedModel):
    """Encoder with the main head on the class token and the auxiliary head on the patch tokens (paper, section 4.3)."""

    def __init__(self, config: DefocusVisionConfig) -> None:
        super().__init__(config)
        self.encoder = DefocusVisionModel(config)
        num_labels = len(config.id2label or {})
        head = DefocusClassificationHead if config.head_type == "mlp" else nn.Linear
        self.head = head(config.hidden_size, num_labels)
        self.head2 = head(config.hidden_size, num_labels) if config.aux_loss != "none" else None
        self.post_init()

    def set_drop_path_rate(self, rate: float) -> None:
        """See `DefocusVisionModel.set_drop_path_rate`."""
        self.encoder.set_drop_path_rate(rate)

    def resize_images(self, image_size: int) -> None:
        """See `DefocusVisionModel.resize_images`."""
        self.encoder.resize_images(image_size)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> DefocusImageClassifierOutput:
        """Classify images; with `labels`, also return the losses (see `classification_loss` for their form).

        The two losses are added with equal weights: their sum as in the paper ("pooled"), their mean as in the released
        code ("per_token").
        """
        if pixel_values.ndim != 4:
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (batch, channels, height, width), not {shape}")
        outputs = self.encoder(pixel_values, **kwargs)
        logits, aux_logits = self.head(outputs.pooler_output), None
        if self.head2 is not None:
            patches = outputs.last_hidden_state[:, : self.config.num_patches]
            aux_logits = self.head2(patches.mean(dim=1) if self.config.aux_loss == "pooled" else patches)
        losses = {} if labels is None else self._losses(logits, aux_logits, labels)
        return DefocusImageClassifierOutput(
            logits=logits,
            aux_logits=aux_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **losses,
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
