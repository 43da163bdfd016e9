"""Contrastive pre-training (CLIP) with a De-focus encoder: images and their texts meet in one embedding space."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils.generic import can_return_tuple

from .checks_defocus import check_all
from .configuration_defocus_clip import DefocusCLIPConfig
from .kernels_defocus import at_least_float32
from .modeling_defocus_vision import DefocusVisionModel
from .precision_defocus import DefocusFloat32Model

# OpenCLIP keeps the factor on the similarities between 1 and 100 (training/train.py, after each step).
LOGIT_SCALE_RANGE = (0.0, math.log(100))


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE (CLIP, figure 3): each image among all texts, and each text among all images.

    Under torch.distributed the pairs of all processes are each other's negatives, and gradients flow to all of them.
    Every process compares its own rows only ("local loss" in OpenCLIP), so that nobody holds the whole matrix.

    Args:
        image_embeds, text_embeds: (pairs, width), of length 1; row i of both belong together.
        scale: factor on the similarities, scalar.

    Returns:
        The mean over this process's pairs. Its mean over the processes is the loss of the whole batch, and so is the
        mean of the gradients, which is what DistributedDataParallel computes, the gradient.

    Raises:
        ValueError: the processes have different numbers of pairs, or there are not as many images as texts.
    """
    if image_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"the loss needs one text an image, not {len(image_embeds)} images and {len(text_embeds)} texts"
        )
    all_images, all_texts, first = image_embeds, text_embeds, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        all_images, all_texts = _gather(image_embeds), _gather(text_embeds)
        first = len(image_embeds) * torch.distributed.get_rank()
    partners = torch.arange(first, first + len(image_embeds), device=image_embeds.device)
    image_loss = F.cross_entropy(scale * image_embeds @ all_texts.T, partners)
    text_loss = F.cross_entropy(scale * text_embeds @ all_images.T, partners)
    return (image_loss + text_loss) / 2


def _gather(embeds: torch.Tensor) -> torch.Tensor:
    """The rows of all processes in their order, (processes * rows, width), with gradients."""
    from torch.distributed._functional_collectives import all_gather_single  # what torch offers since 2.13

    group: Any = torch.distributed.group.WORLD
    # A tracer takes torch.tensor for a constant and gathers it while it traces, which not all processes do at once.
    counts = all_gather_single(torch.full((1,), len(embeds), device=embeds.device), 0, group)
    check_all(
        counts == len(embeds),
        "all processes need the same number of pairs",
        lambda: f"the processes have {counts.tolist()} pairs",
    )
    return all_gather_single(embeds.contiguous(), 0, group)


class DefocusCLIPPreTrainedModel(DefocusFloat32Model):
    """Weight initialisation and loading of the contrastive model."""

    config: DefocusCLIPConfig
    base_model_prefix = "clip"
    input_modalities = ["image", "text"]  # noqa: RUF012 - Transformers declares these as class attributes
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # 16 bits would quantise a logarithm of 4.6 in steps of 0.03.
    _keep_in_fp32_modules_strict = ["logit_scale"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The encoders initialise themselves; the projections as in CLIP.
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, DefocusCLIPModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init)


class DefocusCLIPModel(DefocusCLIPPreTrainedModel):
    """Vision encoder and text encoder, each with a projection to the common embedding space.

    An image's embedding is read off the class token, a text's off its last token that is no padding: in a causal
    sequence these have seen all of it.
    """

    def __init__(self, config: DefocusCLIPConfig) -> None:
        super().__init__(config)
        # The decay multiplies the logits; that is not implemented for other attention back ends.
        config.vision_config._attn_implementation = "eager"
        self.vision_model = DefocusVisionModel._from_config(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode and project images.

        Args:
            pixel_values: (images, channels, image_size, image_size).

        Returns:
            The encoder's output, whose `pooler_output` is replaced by the embeddings (images, projection_dim), not
            yet of length 1.
        """
        if pixel_values.ndim != 4:
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (images, channels, height, width), not {shape}")
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        outputs["pooler_output"] = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode and project texts.

        Args:
            input_ids: (texts, tokens), padded on either side.
            attention_mask: (texts, tokens), 0 for padding; None: there is none.
            position_ids: (texts, tokens); None: counted from the first token that is no padding.

        Returns:
            The encoder's output with `pooler_output` the embeddings (texts, projection_dim), not yet of length 1.

        Raises:
            ValueError: a text is nothing but padding.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_all((attention_mask != 0).any(dim=1), "a text has no token: its mask is 0 throughout")
        if position_ids is None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        outputs = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (columns * (attention_mask != 0)).argmax(dim=1)
        pooled = outputs.last_hidden_state[torch.arange(len(last), device=last.device), last]
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.text_projection(pooled),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> CLIPOutput:
        """Compare images with texts; see `get_image_features` and `get_text_features` for the inputs.

        Args:
            return_loss: also return `contrastive_loss`; under torch.distributed every process must ask for it.

        Returns:
            `logits_per_image` (images, texts) and its transpose `logits_per_text`: scaled cosine similarities of the
            inputs of this process; `image_embeds` and `text_embeds` of length 1, these four in at least float32; the
            encoders' outputs as `vision_model_output` and `text_model_output`.
        """
        vision_outputs = self.get_image_features(pixel_values, return_dict=True, **kwargs)
        text_outputs = self.get_text_features(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        with torch.autocast(pixel_values.device.type, enabled=False):
            image_embeds = F.normalize(at_least_float32(vision_outputs.pooler_output), dim=-1)
            text_embeds = F.normalize(at_least_float32(text_outputs.pooler_output), dim=-1)
            scale = self._scale()
            logits_per_image = scale * image_embeds @ text_embeds.T
            loss = contrastive_loss(image_embeds, text_embeds, scale) if return_loss else None
        return CLIPOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )

    def _scale(self) -> torch.Tensor:
        """The factor on the similarities, within `LOGIT_SCALE_RANGE`; in training the parameter is put back first.

        Clamping its use alone would leave a parameter outside without a gradient, and so outside for ever.
        """
        if self.training:
            with torch.no_grad():
                self.logit_scale.clamp_(*LOGIT_SCALE_RANGE)
        return self.logit_scale.clamp(*LOGIT_SCALE_RANGE).exp()


__all__ = ["DefocusCLIPModel", "DefocusCLIPPreTrainedModel"]
