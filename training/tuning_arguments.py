"""Arguments of how the parts of a multimodal model learn: learning rates of their own, adapters, quantised weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass
class TuningArguments:
    """Learning rates by component, LoRA and QLoRA."""

    projector_learning_rate: float = 0.0
    """Peak learning rate of the projector if it is trained; 0 means learning_rate."""
    vision_learning_rate: float = 0.0
    """Peak learning rate of the vision tower if it is trained; 0 means learning_rate."""
    lora_rank: int = 0
    """Rank of LoRA adapters for the language model's linear layers, which then are frozen; 0 trains it whole."""
    lora_alpha: int = 0
    """What LoRA's result is multiplied with, divided by lora_rank; 0 means twice lora_rank."""
    lora_dropout: float = 0.0
    """Dropout on what LoRA adapters read."""
    lora_vision: bool = False
    """If the vision tower is trained: by LoRA too, instead of whole."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 keeps the frozen language model under LoRA in 4 bits (QLoRA); needs bitsandbytes and a CUDA GPU."""

    def check_tuning(self, train: Sequence[str], model: str) -> None:
        """Raise `ValueError` for the first field that does not go with `train` and `model`."""
        for name, component in (("projector_learning_rate", "projector"), ("vision_learning_rate", "vision_tower")):
            rate = getattr(self, name)
            if rate < 0:
                raise ValueError(f"{name}: must not be negative")
            if rate and component not in train:
                raise ValueError(f"{name}: set, but `train` does not name {component}")
        if self.lora_rank < 0 or self.lora_alpha < 0:
            raise ValueError("lora_rank, lora_alpha: must not be negative")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: must lie in [0, 1), got {self.lora_dropout}")
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_dropout", "lora_vision"):
                if getattr(self, name):
                    raise ValueError(f"{name}: set, but lora_rank is 0")
            if self.quantization != "none":
                raise ValueError("quantization: weights in 4 bits cannot be trained; set lora_rank as well")
            return
        if "language_model" not in train:
            raise ValueError("lora_rank: set, but `train` does not name language_model")
        if self.lora_vision and "vision_tower" not in train:
            raise ValueError("lora_vision: set, but `train` does not name vision_tower")
        if not model:
            raise ValueError(
                "lora_rank: needs `model`, since an adapter is saved without the model that it belongs to; "
                "`defocus-mllm new` makes one from vision_model and language_model"
            )
