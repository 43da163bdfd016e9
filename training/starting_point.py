"""What stage 0 starts from: the weights of an earlier run, also at another resolution or for other classes.

The release goes from IN-22k at 192 pixels to IN-1k at 384 pixels this way: it loads the encoder, sets the scale factors
of the new resolution, and keeps those rows of the heads whose classes both have (tools/convert_22k_to_1k.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig, DefocusVisionModel
from defocus_mllm.loading import load_strictly

_PLACEHOLDER = re.compile(r"(LABEL_)?\d+")


def starting_config(folder: str, changes: Mapping[str, Any]) -> DefocusVisionConfig:
    """The configuration saved in `folder` with some fields changed.

    Another `image_size` brings the scale factors of the new resolution (`DefocusVisionConfig.for_image_size`), unless
    `changes` has them. Raises `FileNotFoundError` if the folder lacks it or the image processor, or `ValueError` if it
    holds another kind of model.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"model: {folder} holds no saved model (no config.json in it)")
    fields, _ = DefocusVisionConfig.get_config_dict(folder)
    if fields.get("model_type") != DefocusVisionConfig.model_type:
        raise ValueError(f"model: {folder} holds a {fields.get('model_type')!r}, not a De-focus encoder or classifier")
    if not (Path(folder) / "preprocessor_config.json").is_file():
        raise FileNotFoundError(
            f"model: {folder} has no preprocessor_config.json, so how its pixels were normalised is unknown"
        )
    if "preset" in changes:
        raise ValueError('vision_config: `model` has a configuration, so leave out "preset"')
    config = DefocusVisionConfig.from_pretrained(folder)
    if "image_size" in changes:
        config = config.for_image_size(changes["image_size"])
    return DefocusVisionConfig.from_dict({**config.to_dict(), **changes})


def load_start(model: DefocusForImageClassification, folder: str) -> list[str]:
    """Copy the weights saved in `folder` into `model`; what does not fit the new classes stays as initialised.

    Args:
        model: built from `starting_config`, with the labels of the new data.
        folder: an encoder or a classifier.

    Returns:
        Lines that say what was kept, interpolated, and left new.

    Raises:
        ValueError: a field of the configuration gives a parameter of the encoder another shape.
    """
    saved: Any = load_strictly(_saved_class(folder), folder, "model")
    encoder = saved.encoder if isinstance(saved, DefocusForImageClassification) else saved
    old_size, new_size = encoder.config.image_size, model.config.image_size
    lines = [f"model: encoder of {folder}"]
    if old_size != new_size:
        encoder.resize_images(new_size)
        lines[0] += f", images of {new_size} instead of {old_size} pixels (positions interpolated, if it has any)"
    try:
        model.encoder.load_state_dict(encoder.state_dict())
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"vision_config: its fields do not fit the encoder of {folder}: {detail}") from error
    names = _label_names(saved.config), _label_names(model.config)
    for head in ("head", "head2"):
        new, old = getattr(model, head), getattr(saved, head, None)
        if new is not None:
            lines.append(f"model: {head} " + _copy_head(new, old, *names))
    return lines


def kept_rows(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (row of the new head, row of the old one) of classes that are the same.

    By name; without names ("7", "LABEL_7") by number, if there are as many classes as before.
    """
    nameless = any(all(_PLACEHOLDER.fullmatch(name) for name in names) for names in (old, new))
    if nameless or list(old) == list(new):
        return [(number, number) for number in range(len(new))] if len(old) == len(new) else []
    numbers = {name: number for number, name in enumerate(old)}
    return [(number, numbers[name]) for number, name in enumerate(new) if name in numbers]


@torch.no_grad()
def _copy_head(new: nn.Module, old: nn.Module | None, old_names: Sequence[str], new_names: Sequence[str]) -> str:
    """Copy what fits; says what was done."""
    if old is None:
        return "is new: the checkpoint has none"
    if type(old) is not type(new):
        return "is new: the checkpoint's is of another type (head_type)"
    rows = kept_rows(old_names, new_names)
    if not rows:
        return f"is new: {len(new_names)} classes instead of {len(old_names)}, none of the same name"
    *hidden, (_, output) = [(name, layer) for name, layer in _linear_layers(new)]
    old_layers = dict(_linear_layers(old))
    for name, layer in hidden:
        layer.load_state_dict(old_layers[name].state_dict())
    targets, sources = (torch.tensor(column) for column in zip(*rows, strict=True))
    old_output = list(old_layers.values())[-1]
    output.weight[targets] = old_output.weight[sources]
    output.bias[targets] = old_output.bias[sources]
    return f"keeps {len(rows)} of {len(new_names)} classes (the checkpoint has {len(old_names)})"


def _linear_layers(head: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a head, the output layer last."""
    return [(name, layer) for name, layer in head.named_modules() if isinstance(layer, nn.Linear)]


def _label_names(config: DefocusVisionConfig) -> list[str]:
    """Names of the classes in the order of the heads' rows."""
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _saved_class(folder: str) -> type:
    """The class whose weights `folder` holds: an encoder's checkpoint has no heads."""
    architectures = DefocusVisionConfig.from_pretrained(folder).architectures or []
    return DefocusForImageClassification if "DefocusForImageClassification" in architectures else DefocusVisionModel
