"""Configuration of the contrastive model: a De-focus vision encoder and a text encoder with one embedding space."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_defocus import DefocusVisionConfig
from .fields_defocus import DefocusConfigReader, refuse_unknown_fields

_AUTO_MAP = {
    "AutoConfig": "configuration_defocus_clip.DefocusCLIPConfig",
    "AutoModel": "modeling_defocus_clip.DefocusCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_defocus_clip.DefocusCLIPModel",
}


@strict
class DefocusCLIPConfig(DefocusConfigReader, PreTrainedConfig):
    """Configuration of the contrastive model.

    The text encoder's defaults are those of CLIP B/32 (width 512, 12 layers, 8 heads, 77 tokens, quick GELU), which are
    also those of OpenCLIP's model of that name trained on Laion-400M (model_configs/ViT-B-32-quickgelu.json).

    Raises:
        ValueError: a field is unknown.
        StrictDataclassError: (of huggingface_hub) a value is of the wrong type or out of range.
    """

    model_type = "defocus_clip"
    sub_configs_defaults = {  # noqa: RUF012 - Transformers declares it so
        "vision_config": SubConfigSpec(config_class=DefocusVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
    }
    # The plan of plain decoders does not fit a composite model.
    base_model_fsdp_plan = {}  # noqa: RUF012

    vision_config: dict | PreTrainedConfig | None = None
    """Configuration of the vision encoder."""
    text_config: dict | PreTrainedConfig | None = None
    """Configuration of the text encoder; `model_type` chooses it: "clip_text_model", or any decoder-only model."""
    projection_dim: int = 512
    """Width of the embeddings in which images and texts are compared."""
    logit_scale_init: float | int = math.log(1 / 0.07)
    """Initial logarithm of the factor on the cosine similarities (CLIP, section 2.5)."""

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(self, kwargs)
        super().__post_init__(**{"auto_map": dict(_AUTO_MAP), **kwargs})
        if getattr(self.text_config, "use_cache", False):
            self.text_config.use_cache = False  # each text is read once

    def validate_architecture(self) -> None:
        """Called by the strict dataclass once all fields are set."""
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be positive, not {self.projection_dim}")


__all__ = ["DefocusCLIPConfig"]
