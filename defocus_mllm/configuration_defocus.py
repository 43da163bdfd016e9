"""Configurations of the De-focus vision encoder and of the multimodal LLM built on it."""

import difflib
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

# Keys that Transformers itself passes beside the declared fields; everything else that is undeclared is a typo.
_KEYS_OF_TRANSFORMERS = frozenset(
    {"attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels"}
    | {"output_attentions", "per_layer_config", "quantization_config", "torch_dtype"}
)

# Where each Auto class finds its class in a checkpoint that carries its own code.
_VISION_AUTO_MAP = {
    "AutoConfig": "configuration_defocus.DefocusVisionConfig",
    "AutoModel": "modeling_defocus_vision.DefocusVisionModel",
    "AutoModelForImageClassification": "modeling_defocus_vision.DefocusForImageClassification",
}
_AUTO_MAP = {
    "AutoConfig": "configuration_defocus.DefocusConfig",
    "AutoModel": "modeling_defocus.DefocusModel",
    "AutoModelForImageTextToText": "modeling_defocus.DefocusForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_defocus.DefocusForConditionalGeneration",
}

PRESETS: dict[str, dict[str, Any]] = {
    "defocus_vit_tiny": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "image_size": 64,
        "patch_size": 8,
        # About 1 / sqrt(hidden_size): 0.02 is too little for a model this narrow (docs/results/easy_vqa.md).
        "initializer_range": 0.1,
    },
    "defocus_vit_small": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    },
    "defocus_vit_base": {},
}


def _refuse_unknown_fields(config: PreTrainedConfig, extras: dict[str, Any]) -> None:
    """Raise `ValueError` for a field that neither the config nor Transformers knows (a typo must not be ignored)."""
    for name in extras:
        if name.startswith("_") or name in _KEYS_OF_TRANSFORMERS:
            continue
        nearest = difflib.get_close_matches(name, type(config).__dataclass_fields__, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{type(config).__name__}: unknown field {name!r}{hint}")


@strict
class DefocusVisionConfig(PreTrainedConfig):
    """Configuration of the 1D causal vision encoder; the defaults are De-focus ViT-Base (paper, section 5.1).

    Raises:
        ValueError: a field is unknown.
        StrictDataclassError: (of huggingface_hub) a value is of the wrong type or out of range, or two fields
            contradict each other. Every message names the field.
    """

    model_type = "defocus_vision"
    base_config_key = "vision_config"

    mixer: Literal["attention"] = "attention"
    """Token mixer of every block: "attention" is De-focus ViT (eq. 8)."""
    causal: bool = True
    """Whether token t sees only tokens s <= t."""
    decay: Literal["learnable", "fixed", "none"] = "learnable"
    """The per-head decay lambda = -exp(lambda_hat): trained, kept at its initial value, or absent."""
    rotary: Literal["learnable", "fixed", "none"] = "learnable"
    """The rotary frequencies theta: trained, kept at their initial values, or absent."""
    hidden_size: int = 768
    """Width of a token."""
    num_hidden_layers: int = 12
    """Number of blocks."""
    num_attention_heads: int = 12
    """Number of heads; each has one decay and its own frequencies."""
    intermediate_size: int = 3072
    """Width of the feed-forward layer of a block."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward layer."""
    image_size: int = 224
    """Height and width of an image, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    num_channels: int = 3
    """Channels of an image."""
    class_token: bool = True
    """Whether a class token ends the sequence: like registers, and unlike most patches, it has seen the whole image."""
    num_registers: int = 0
    """Learnable tokens between the patches and the class token."""
    use_absolute_position_embeddings: bool = True
    """Whether a learned embedding of the absolute position is added to every token."""
    drop_path_rate: float | int = 0.0
    """Drop path rate of the last block (the first has 0, linear in between); the end of the training schedule."""
    min_drop_path_rate: float | int = 0.0
    """Drop path rate of the last block at the start of a scheduled training."""
    aux_loss: Literal["pooled", "per_token", "none"] = "pooled"
    """Auxiliary loss of classification: on the mean patch token (paper) or on every patch token (released code)."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every layer norm."""
    initializer_range: float | int = 0.02
    """Standard deviation of the truncated normal that initialises weights."""

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown_fields(self, kwargs)
        super().__post_init__(**{"auto_map": dict(_VISION_AUTO_MAP), **kwargs})

    def validate_architecture(self) -> None:
        """Called by the strict dataclass once all fields are set."""
        positive = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")
        for name in (*positive, "patch_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_registers < 0:
            raise ValueError(f"num_registers must not be negative, not {self.num_registers}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown; Transformers has {', '.join(ACT2FN)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.rotary != "none" and (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                "rotary rotates pairs of channels: hidden_size / num_attention_heads must be even, "
                f"not {self.hidden_size // self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        for name in ("drop_path_rate", "min_drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.aux_loss != "none" and not self.class_token:
            raise ValueError(
                f"aux_loss={self.aux_loss!r} trains beside a class token: set class_token or aux_loss='none'"
            )

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image, as the encoder returns them and the processor reserves them in the text."""
        return self.num_patches + self.num_registers + int(self.class_token)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DefocusVisionConfig":
        """Return the configuration of a published (or laptop-sized) model, with some fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; available: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


@strict
class DefocusConfig(PreTrainedConfig):
    """Configuration of the multimodal LLM: encoder, projector and any in-tree decoder-only LLM.

    Raises:
        ValueError: a field is unknown, or `image_token_id` lies outside the vocabulary.
    """

    model_type = "defocus"
    sub_configs_defaults = {  # noqa: RUF012 - Transformers declares it so
        "vision_config": SubConfigSpec(config_class=DefocusVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    # The plan of plain decoders does not fit a composite model.
    base_model_fsdp_plan = {}  # noqa: RUF012

    vision_config: dict | PreTrainedConfig | None = None
    """Configuration of the encoder."""
    text_config: dict | PreTrainedConfig | None = None
    """Configuration of the language model; `model_type` chooses it, Llama by default."""
    projector_type: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """How encoder tokens become word embeddings: one linear layer, or two with a GELU between (LLaVA-1.5)."""
    image_token_id: int = 4
    """Id of the placeholder that image tokens replace."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the input embedding; follows `text_config` when that ties them."""

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown_fields(self, kwargs)
        super().__post_init__(**{"auto_map": dict(_AUTO_MAP), **kwargs})
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        vocab_size = getattr(self.text_config, "vocab_size", None)
        if vocab_size is not None and not 0 <= self.image_token_id < vocab_size:
            raise ValueError(f"image_token_id {self.image_token_id} lies outside the vocabulary of {vocab_size} tokens")

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes in the sequence of the language model."""
        return self.vision_config.num_image_tokens


__all__ = ["PRESETS", "DefocusConfig", "DefocusVisionConfig"]
