"""Configurations of the De-focus vision encoder and of the multimodal LLM built on it."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .fields_defocus import DefocusConfigReader, refuse_unknown_fields
from .parallel_defocus import encoder_plan, projector_plan

# Where each Auto class finds its class in a checkpoint that carries its own code.
_VISION_AUTO_MAP = {
    "AutoConfig": "configuration_defocus.DefocusVisionConfig",
    "AutoBackbone": "modeling_defocus_backbone.DefocusBackbone",
    "AutoModel": "modeling_defocus_vision.DefocusVisionModel",
    "AutoModelForImageClassification": "modeling_defocus_vision.DefocusForImageClassification",
}
_AUTO_MAP = {
    "AutoConfig": "configuration_defocus.DefocusConfig",
    "AutoModel": "modeling_defocus.DefocusModel",
    "AutoModelForImageTextToText": "modeling_defocus.DefocusForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_defocus.DefocusForConditionalGeneration",
}

# The feature pyramid of `DefocusBackbone`, by the release's names: maps of cells of 1/4, 1/2, 1 and 2 patches' width.
PYRAMID_LEVELS = ("fpn1", "fpn2", "fpn3", "fpn4")

# What all released De-focus Mamba encoders share (classification/utils/config.py and the YAML files of the release).
_RELEASED_MAMBA: dict[str, Any] = {
    "mixer": "mamba",
    "num_hidden_layers": 24,
    "intermediate_size": 1536,
    "use_absolute_position_embeddings": False,
    "aux_loss": "per_token",
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
    "defocus_retnet_tiny": {
        "mixer": "retention",
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "image_size": 64,
        "patch_size": 8,
        "initializer_range": 0.1,
    },
    # The block of De-focus RetNet is unpublished; this one has the parameters that paper and release report.
    "defocus_retnet_base": {"mixer": "retention", "use_absolute_position_embeddings": False},
    "defocus_mamba_tiny": {
        **_RELEASED_MAMBA,
        "hidden_size": 96,
        "num_hidden_layers": 6,
        "intermediate_size": 192,
        "time_step_rank": 6,
        "image_size": 64,
        "patch_size": 8,
        "initializer_range": 0.1,
    },
    "defocus_mamba_small": {**_RELEASED_MAMBA, "hidden_size": 384, "intermediate_size": 768},
    "defocus_mamba_base": {**_RELEASED_MAMBA},
    "defocus_mamba_large": {
        **_RELEASED_MAMBA,
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "intermediate_size": 2048,
        "head_type": "mlp",
        "image_size": 384,
        "delta_scale_factor": 2.0,
        "rope_scale_factor": 4.0,
    },
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@strict
class DefocusVisionConfig(DefocusConfigReader, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of the 1D causal vision encoder; the defaults are De-focus ViT-Base (paper, section 5.1).

    `decay` and `rotary` reduce an encoder to its plain counterpart: with "none" for both, or for a plain Mamba with
    `rotary="none"`. Every row of the paper's Table 5a is one pair of values with `mixer="mamba"`.

    `out_features` (or `out_indices`) names the maps that `DefocusBackbone` returns, out of `stage_names`; unless given,
    the whole feature pyramid. None, as everywhere in Transformers, is the last stage.

    Raises:
        ValueError: a field is unknown.
        StrictDataclassError: (of huggingface_hub) a value is of the wrong type or out of range, or two fields
            contradict each other. Every message names the field.
    """

    model_type = "defocus_vision"
    base_config_key = "vision_config"
    # Parts that are called by themselves: the plan of plain decoders names others.
    base_model_fsdp_plan = {"embeddings": "free_full_weight", "layers.*": "free_full_weight"}  # noqa: RUF012

    mixer: Literal["attention", "retention", "mamba"] = "attention"
    """Token mixer of every block: De-focus ViT (eq. 8), De-focus RetNet (eq. 4) or De-focus Mamba (eq. 9)."""
    causal: bool = True
    """Whether token t sees only tokens s <= t; only attention can do without."""
    decay: Literal["learnable", "fixed", "none", "data_dependent"] | None = None
    """The decay: trained, kept at its initial value, absent, or (mamba) following the token; None: the mixer's own."""
    rotary: Literal["learnable", "fixed", "none"] = "learnable"
    """The rotary frequencies theta: trained, kept at their initial values, or absent."""
    hidden_size: int = 768
    """Width of a token."""
    num_hidden_layers: int = 12
    """Number of blocks."""
    num_attention_heads: int = 12
    """Number of heads of attention and retention; each has one decay and its own frequencies."""
    intermediate_size: int = 3072
    """Width of a block's feed-forward layer; for mamba, whose blocks have none, of the mixer's inner channels."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward layer."""
    state_size: int = 16
    """Mamba: states of a channel; each has its own decay and its own rotary frequency."""
    time_step_rank: int = 48
    """Mamba: rank of the projection to the time steps Delta."""
    conv_kernel: int = 4
    """Mamba: width of the causal convolution before the scan, in tokens."""
    group_norm_size: int = 64
    """Mamba: channels normalised together after the scan; 0 turns the norm off."""
    delta_scale_factor: float | int = 1.0
    """Divides the time step Delta (1 for attention and retention) and with it every decay; see `for_image_size`."""
    rope_scale_factor: float | int = 1.0
    """Divides the positions that the rotary frequencies see; see `for_image_size`."""
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
    patch_order: Literal["raster", "sections"] = "raster"
    """Patches row by row, or square sections row by row with the patches of a section row by row inside it."""
    section_size: int = 0
    """Height and width of a section, in patches (for `patch_order="sections"`)."""
    context_broadcasting: Literal["none", "mean", "scaled"] = "none"
    """Attention and retention: what a block's feed-forward layer adds of the mean token, see arXiv 2210.08457."""
    drop_path_rate: float | int = 0.0
    """Drop path rate of the last block (the first has 0, linear in between); the end of the training schedule."""
    min_drop_path_rate: float | int = 0.0
    """Drop path rate of the last block at the start of a scheduled training."""
    aux_loss: Literal["pooled", "per_token", "none"] = "pooled"
    """Auxiliary loss of classification: on the mean patch token (paper) or on every patch token (released code)."""
    head_type: Literal["linear", "mlp"] = "linear"
    """Classification heads: one linear layer (IN-1k), or linear, tanh, linear with three times the width (IN-22k)."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every layer norm."""
    rms_norm_eps: float = 1e-5
    """Mamba: epsilon of the norm before every mixer."""
    fpn_channels: int = 256
    """Channels of the maps of `DefocusBackbone`'s feature pyramid."""
    initializer_range: float | int = 0.02
    """Standard deviation of the truncated normal that initialises weights."""

    def __post_init__(self, **kwargs: Any) -> None:
        stages = {name: kwargs.pop(name) for name in ("out_features", "out_indices") if name in kwargs}
        refuse_unknown_fields(self, kwargs)
        stages = stages or {"out_features": list(PYRAMID_LEVELS)}
        self.set_output_features_output_indices(stages.get("out_features"), stages.get("out_indices"))
        if self.decay is None:
            self.decay = "data_dependent" if self.mixer == "mamba" else "learnable"
        super().__post_init__(**{"auto_map": dict(_VISION_AUTO_MAP), **kwargs})

    def validate_architecture(self) -> None:
        """Called by the strict dataclass once all fields are set."""
        for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("num_channels", "fpn_channels", "delta_scale_factor", "rope_scale_factor"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        _require(self.num_registers >= 0, f"num_registers must not be negative, not {self.num_registers}")
        _require(self.hidden_act in ACT2FN, f"hidden_act {self.hidden_act!r} is unknown; there are {', '.join(ACT2FN)}")
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}",
        )
        for name in ("drop_path_rate", "min_drop_path_rate"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), not {getattr(self, name)}")
        _require(
            self.aux_loss == "none" or self.class_token,
            f"aux_loss={self.aux_loss!r} trains beside a class token: set class_token or aux_loss='none'",
        )
        self._validate_sections()
        if self.mixer == "mamba":
            self._validate_mamba()
        else:
            self._validate_heads()

    def _validate_sections(self) -> None:
        if self.patch_order == "raster":
            _require(self.section_size == 0, "section_size is for patch_order='sections'")
            return
        _require(self.section_size >= 1, "patch_order='sections' needs section_size, in patches")
        grid = self.image_size // self.patch_size
        _require(
            grid % self.section_size == 0,
            f"section_size {self.section_size} must divide the {grid} patches of a row (image_size / patch_size)",
        )

    def _validate_heads(self) -> None:
        heads = self.num_attention_heads
        _require(self.causal or self.mixer == "attention", f"causal=False: mixer {self.mixer!r} is always causal")
        _require(self.decay != "data_dependent", "decay='data_dependent' is for mixer='mamba'")
        _require(heads >= 1, f"num_attention_heads must be positive, not {heads}")
        _require(
            self.hidden_size % heads == 0,
            f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads}",
        )
        _require(
            self.rotary == "none" or (self.hidden_size // heads) % 2 == 0,
            "rotary rotates pairs of channels: hidden_size / num_attention_heads must be even, "
            f"not {self.hidden_size // heads}",
        )

    def _validate_mamba(self) -> None:
        _require(self.causal, "causal=False: mixer 'mamba' is always causal")
        _require(
            self.context_broadcasting == "none",
            "context_broadcasting follows a feed-forward layer, which blocks with mixer 'mamba' do not have",
        )
        for name in ("state_size", "time_step_rank", "conv_kernel"):
            _require(getattr(self, name) >= 1, f"{name} must be positive, not {getattr(self, name)}")
        _require(
            self.rotary == "none" or self.state_size % 2 == 0,
            f"rotary rotates pairs of states: state_size must be even, not {self.state_size}",
        )
        size = self.group_norm_size
        _require(
            size == 0 or (size > 0 and self.intermediate_size % size == 0),
            f"group_norm_size {size} must be 0 or divide intermediate_size {self.intermediate_size}",
        )

    @property
    def stage_names(self) -> list[str]:
        """What `DefocusBackbone` can return: the embedded patches, the maps after every block, the feature pyramid."""
        return ["stem", *(f"stage{depth}" for depth in range(1, self.num_hidden_layers + 1)), *PYRAMID_LEVELS]

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image, as the encoder returns them and the processor reserves them in the text."""
        return self.num_patches + self.num_registers + int(self.class_token)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How tensor parallelism splits the linear layers, see `parallel_defocus`."""
        return encoder_plan(self.mixer)

    def for_image_size(self, image_size: int) -> "DefocusVisionConfig":
        """The same encoder for another resolution, by the rule that the released configurations follow.

        With `ratio` = new size / old size an image has ratio^2 times as many tokens, `ratio` times as many in a row:
        `delta_scale_factor` is multiplied by `ratio`, `rope_scale_factor` by ratio^2 (384 / 192: 2 and 4; 1024 / 224:
        4.57 and 20.9). Sections keep the size in patches that the encoder was trained with.
        """
        ratio = image_size / self.image_size
        scaled = {
            "image_size": image_size,
            "delta_scale_factor": self.delta_scale_factor * ratio,
            "rope_scale_factor": self.rope_scale_factor * ratio**2,
        }
        return type(self).from_dict({**self.to_dict(), **scaled})

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DefocusVisionConfig":
        """Return the configuration of a published (or laptop-sized) model, with some fields overridden."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; available: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


@strict
class DefocusConfig(DefocusConfigReader, PreTrainedConfig):
    """Configuration of the multimodal LLM: encoder, projector and any in-tree decoder-only LLM.

    Raises:
        ValueError: a field is unknown, or `image_token_id` lies outside the vocabulary.
    """

    model_type = "defocus"
    sub_configs_defaults = {  # noqa: RUF012 - Transformers declares it so
        "vision_config": SubConfigSpec(config_class=DefocusVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    # What Trainer does not collect over an evaluation.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states", "image_outputs"]  # noqa: RUF012
    # Encoder and language model bring plans of their own.
    base_model_fsdp_plan = {"multi_modal_projector": "free_full_weight"}  # noqa: RUF012

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
    lm_head_bias: bool = False
    """Whether the output layer has a bias, which no field of `text_config` tells (Phi has one)."""

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(self, kwargs)
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

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How tensor parallelism splits the projector; encoder and language model have plans of their own."""
        return projector_plan(self.projector_type)


# `transformers serve` finds a model that brings its own code by its name in this table.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(DefocusConfig.model_type, "DefocusForConditionalGeneration")

__all__ = ["PRESETS", "DefocusConfig", "DefocusVisionConfig"]
