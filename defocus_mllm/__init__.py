"""De-focus MLLM: pixels and words as one causal sequence.

Importing this package registers its classes with the Auto classes of Transformers, and makes every checkpoint that it
saves carry its own code (`trust_remote_code=True` loads it where this package is not installed).
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPProcessor,
)

from .cache_defocus import DefocusVisionCache
from .configuration_defocus import DefocusConfig, DefocusVisionConfig
from .configuration_defocus_clip import DefocusCLIPConfig
from .image_processing_defocus import DefocusImageProcessor
from .modeling_defocus import DefocusForConditionalGeneration, DefocusModel
from .modeling_defocus_backbone import DefocusBackbone
from .modeling_defocus_clip import DefocusCLIPModel
from .modeling_defocus_vision import DefocusForImageClassification, DefocusVisionModel
from .processing_defocus import DEFAULT_CHAT_TEMPLATE, DefocusProcessor
from .stream_defocus import DefocusStream

__version__ = "0.1.0"


def _register() -> None:
    for config in (DefocusVisionConfig, DefocusConfig, DefocusCLIPConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": DefocusImageProcessor}, exist_ok=True)
        config.register_for_auto_class("AutoConfig")
    for auto_class, config, model in (
        (AutoBackbone, DefocusVisionConfig, DefocusBackbone),
        (AutoModel, DefocusVisionConfig, DefocusVisionModel),
        (AutoModelForImageClassification, DefocusVisionConfig, DefocusForImageClassification),
        (AutoModel, DefocusConfig, DefocusModel),
        (AutoModelForImageTextToText, DefocusConfig, DefocusForConditionalGeneration),
        (AutoModelForMultimodalLM, DefocusConfig, DefocusForConditionalGeneration),
        (AutoModel, DefocusCLIPConfig, DefocusCLIPModel),
        (AutoModelForZeroShotImageClassification, DefocusCLIPConfig, DefocusCLIPModel),
    ):
        auto_class.register(config, model, exist_ok=True)
        # A class remembers one Auto class; those beyond it stand in the auto_map of the configuration.
        if auto_class not in (AutoModelForMultimodalLM, AutoModelForZeroShotImageClassification):
            model.register_for_auto_class(auto_class.__name__)
    AutoProcessor.register(DefocusConfig, DefocusProcessor, exist_ok=True)
    AutoProcessor.register(DefocusCLIPConfig, CLIPProcessor, exist_ok=True)
    DefocusImageProcessor.register_for_auto_class("AutoImageProcessor")
    DefocusProcessor.register_for_auto_class("AutoProcessor")


_register()

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "DefocusBackbone",
    "DefocusCLIPConfig",
    "DefocusCLIPModel",
    "DefocusConfig",
    "DefocusForConditionalGeneration",
    "DefocusForImageClassification",
    "DefocusImageProcessor",
    "DefocusModel",
    "DefocusProcessor",
    "DefocusStream",
    "DefocusVisionCache",
    "DefocusVisionConfig",
    "DefocusVisionModel",
]
