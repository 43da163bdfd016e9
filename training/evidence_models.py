"""The models that the evidence compares: each is a few configuration fields above a recipe that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from defocus_mllm import DefocusForImageClassification
from training.arguments import EvidenceArguments, Stage0VisionArguments
from training.vision import vision_config

LARGEST_SIZE_RATIO = 1.02


@dataclass(frozen=True)
class EvidenceModel:
    """One row of a table."""

    name: str
    """Name on the command line and of the run's folder."""
    title: str
    """What tables and figures call it."""
    mixer: Literal["attention", "retention", "mamba"]
    """Which sizes of the recipe it takes, and its token mixer."""
    vision_config: Mapping[str, Any]
    """Fields of `DefocusVisionConfig` that make it what it is."""
    arguments: Mapping[str, float] = field(default_factory=dict)
    """Fields of stage 0 that make it what it is."""


@dataclass(frozen=True)
class Study:
    """One table: its models and which of them are compared."""

    title: str
    models: tuple[EvidenceModel, ...]
    comparisons: tuple[tuple[str, str], ...]
    """(model, reference): the table shows the accuracy of the first minus that of the second."""


def _fields(decay: str, rotary: str, aux_loss: str = "pooled", **others: Any) -> dict[str, Any]:
    return {"decay": decay, "rotary": rotary, "aux_loss": aux_loss, **others}


# Paper, Table 1. A plain row has neither the learnable filter nor the auxiliary loss; RetNet's own filter is fixed,
# Mamba's own decay follows the token.
_PLAIN = _fields("none", "none", aux_loss="none")
_LEARNABLE = _fields("learnable", "learnable")
_DEFOCUS_MAMBA = EvidenceModel("defocus_mamba", "De-focus Mamba", "mamba", _fields("data_dependent", "learnable"))

_MAIN = (
    EvidenceModel("causal_vit", "causal ViT", "attention", _PLAIN),
    EvidenceModel("defocus_vit", "De-focus ViT", "attention", _LEARNABLE),
    EvidenceModel("noncausal_vit", "non-causal ViT", "attention", {**_PLAIN, "causal": False}),
    EvidenceModel("noncausal_defocus_vit", "non-causal De-focus ViT", "attention", {**_LEARNABLE, "causal": False}),
    EvidenceModel("causal_retnet", "causal RetNet", "retention", _fields("fixed", "fixed", aux_loss="none")),
    EvidenceModel("defocus_retnet", "De-focus RetNet", "retention", _LEARNABLE),
    EvidenceModel("causal_mamba", "causal Mamba", "mamba", _fields("data_dependent", "none", aux_loss="none")),
    _DEFOCUS_MAMBA,
)
_MAIN_COMPARISONS = (
    ("defocus_vit", "causal_vit"),
    ("noncausal_defocus_vit", "noncausal_vit"),
    ("defocus_retnet", "causal_retnet"),
    ("defocus_mamba", "causal_mamba"),
    ("causal_vit", "noncausal_vit"),
    ("defocus_vit", "noncausal_vit"),
)

# Paper, Table 5a, in its order; the last row is De-focus Mamba itself.
_FILTERS = (
    *(("none", "none"), ("none", "fixed"), ("fixed", "none"), ("fixed", "fixed")),
    *(("fixed", "learnable"), ("learnable", "none"), ("learnable", "learnable")),
)
_FILTER_MODELS = tuple(
    EvidenceModel(f"mamba_decay_{decay}_rotary_{rotary}", f"decay {decay}, rotary {rotary}", "mamba", fields)
    for decay, rotary in _FILTERS
    for fields in [_fields(decay, rotary)]
)

# Paper, Table 5b: (first epoch, last epoch).
_DROP_PATHS = ((0.1, 0.1), (0.4, 0.4), (0.7, 0.7), (0.1, 0.7))
_DROP_PATH_MODELS = tuple(
    EvidenceModel(
        f"mamba_drop_path_{first:g}" + (f"_to_{last:g}" if first != last else ""),
        f"drop path {first:g}" + (f", linear to {last:g}" if first != last else ""),
        "mamba",
        _DEFOCUS_MAMBA.vision_config,
        {"min_drop_path_rate": first, "drop_path_rate": last},
    )
    for first, last in _DROP_PATHS
)

# Paper, Table 5c, without its concatenation of both tokens, which no published model has; and the release's own form.
_LOSS_MODELS = (
    EvidenceModel(
        "mamba_loss_class_token",
        "loss on the class token",
        "mamba",
        _fields("data_dependent", "learnable", aux_loss="none"),
    ),
    EvidenceModel(
        "mamba_loss_mean",
        "loss on the mean of the patches, no class token",
        "mamba",
        _fields("data_dependent", "learnable", aux_loss="none", class_token=False),
    ),
    EvidenceModel(
        "mamba_loss_per_token",
        "class token, and auxiliary loss on every patch",
        "mamba",
        _fields("data_dependent", "learnable", aux_loss="per_token"),
    ),
)


def _against_defocus_mamba(title: str, models: tuple[EvidenceModel, ...]) -> Study:
    comparisons = tuple((_DEFOCUS_MAMBA.name, model.name) for model in models)
    return Study(title, (*models, _DEFOCUS_MAMBA), comparisons)


STUDIES: dict[str, Study] = {
    "main": Study("Main table (paper, Table 1)", _MAIN, _MAIN_COMPARISONS),
    "ablation_filter": _against_defocus_mamba("Decay and rotary (paper, Table 5a)", _FILTER_MODELS),
    "ablation_drop_path": _against_defocus_mamba("Drop path (paper, Table 5b)", _DROP_PATH_MODELS),
    "ablation_auxiliary_loss": _against_defocus_mamba("Auxiliary loss (paper, Table 5c)", _LOSS_MODELS),
}
"""The tables; drop path and auxiliary loss are those of De-focus Mamba unless a study varies them."""


def chosen_models(arguments: EvidenceArguments) -> list[EvidenceModel]:
    """The study's models, or those that `models` names. Raises `ValueError` for a name that the study lacks."""
    known = {model.name: model for model in STUDIES[arguments.study].models}
    for name in arguments.models:
        if name not in known:
            raise ValueError(f"models: study {arguments.study!r} has no {name!r}; it has {', '.join(known)}")
    return [known[name] for name in arguments.models or known]


def model_fields(model: EvidenceModel, shared: Mapping[str, Any], sizes: EvidenceArguments) -> dict[str, Any]:
    """All fields of the model's `DefocusVisionConfig`: shared ones, those of its mixer, its own."""
    return {**shared, **getattr(sizes, model.mixer), "mixer": model.mixer, **model.vision_config}


def count_parameters(arguments: Stage0VisionArguments, num_labels: int) -> int:
    """Parameters of the classifier that these arguments of stage 0 train, heads included."""
    config = vision_config(arguments)
    config.num_labels = num_labels
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DefocusForImageClassification(config).parameters())


def check_equal_sizes(parameters: Mapping[str, int]) -> None:
    """Raise `ValueError` when the largest model has over 2 % more parameters than the smallest: an unequal contest."""
    smallest, largest = min(parameters, key=parameters.__getitem__), max(parameters, key=parameters.__getitem__)
    if parameters[largest] > LARGEST_SIZE_RATIO * parameters[smallest]:
        raise ValueError(
            f"models differ by more than 2 % in size: {smallest} has {parameters[smallest]:,} parameters, {largest} "
            f"{parameters[largest]:,}; change the sizes in the recipe's section evidence"
        )
