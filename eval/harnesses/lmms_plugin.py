"""What lmms-eval finds by the entry point `lmms_eval.models` of this package: the model `defocus_mllm`.

Interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, `lmms_eval/models/registry_v2.py`. lmms-eval is imported when it asks.
"""

from __future__ import annotations

from typing import Any

MODEL_NAME = "defocus_mllm"
MODEL_CLASS = "eval.harnesses.lmms_model.DefocusMllm"


def manifest() -> Any:
    """The `ModelManifest` of our chat model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_NAME, chat_class_path=MODEL_CLASS)
