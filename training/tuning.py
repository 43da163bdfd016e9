"""What learns of a multimodal model, at which rate, and who saves it: from the arguments, with adapters or without."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn

from defocus_mllm import DefocusForConditionalGeneration, DefocusProcessor
from training.arguments import MultimodalArguments
from training.checkpointing import Savable
from training.lora import AdapterWriter, adapted_components, add_lora, is_adapted, trained_components


@dataclass(frozen=True)
class Tuning:
    """The fields of the same names of `training.stage.Stage`."""

    components: dict[str, list[nn.Module]]
    train: list[str]
    learning_rates: dict[str, float]
    writer: Savable | None


def choose_tuning(
    model: DefocusForConditionalGeneration, processor: DefocusProcessor, arguments: MultimodalArguments
) -> Tuning:
    """Put adapters into `model` if the arguments ask for them, and say what is to be trained.

    Raises `ValueError` for a model that cannot be adapted, or whose vocabulary has grown since it was saved.
    """
    writer = None
    if arguments.lora_rank:
        add_lora(model, processor, arguments, arguments.train)
        writer = AdapterWriter(model, os.path.abspath(arguments.model), arguments.quantization)
    components = components_of(model)
    rates = {
        "projector": arguments.projector_learning_rate,
        "vision_tower": arguments.vision_learning_rate,
        "vision_tower_lora": arguments.vision_learning_rate,
    }
    return Tuning(
        components,
        trained_components(components, arguments.train),
        {name: rate for name, rate in rates.items() if rate and name in components},
        writer,
    )


def components_of(model: DefocusForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The parts `train` can name, those with adapters cut in two. A language model's output layer belongs to it."""
    parts: dict[str, list[nn.Module]] = {
        "vision_tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language_model": [model.model.language_model, model.lm_head],
    }
    return adapted_components(parts) if is_adapted(model) else parts
