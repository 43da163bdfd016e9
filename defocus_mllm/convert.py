"""Released De-focus Mamba checkpoints to Transformers checkpoints, and back, tensor for tensor.

Every dimension comes from the tensors. What they do not show (image size, scale factors, size of the group norm) comes
from the caller, from the checkpoint's own configuration, or from the release's defaults, in this order, and the result
says which. Nothing is written unless all of it is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers import initialization as init
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_defocus import DefocusVisionConfig
from .files import refuse_existing, written_whole
from .image_processing_defocus import DefocusImageProcessor
from .loading import CheckpointError
from .modeling_defocus_vision import DefocusForImageClassification
from .patch_order_defocus import inverse_order, section_order
from .released import WRITTEN_SUFFIXES, ReleasedCheckpoint, read_released, write_released
from .released_layout import ReleasedLayout, problems, sizes_of

# Field here -> (where the release's configuration has it, value where nothing tells it). All released checkpoints have
# a group norm of 64; the release's own default of 0 does not run.
_SETTINGS: dict[str, tuple[tuple[str, ...], float]] = {
    "image_size": (("DATA", "IMG_SIZE"), 224),
    "delta_scale_factor": (("MODEL", "MAMBA", "delta_scale_factor"), 1.0),
    "rope_scale_factor": (("MODEL", "MAMBA", "rope_scale_factor"), 1.0),
    "group_norm_size": (("MODEL", "MAMBA", "group_norm_size"), 64),
    "rms_norm_eps": (("MODEL", "MAMBA", "layer_norm_epsilon"), 1e-5),
}
_SECTIONS = ("MODEL", "patch_embed_change_res")
_POSITIONS = "encoder.embeddings.pos_embed"

# What the released layout cannot say otherwise: field -> values that it can.
_EXPRESSIBLE: dict[str, tuple[Any, ...]] = {
    "mixer": ("mamba",),
    "decay": ("data_dependent",),
    "rotary": ("learnable", "none"),
    "num_registers": (0,),
    "aux_loss": ("per_token", "none"),
    "layer_norm_eps": (1e-6,),
}


@dataclass(frozen=True)
class Setting:
    """A value that the tensors do not show, and who said it: "command line", "checkpoint's config", or a default."""

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        config: the configuration of the encoder.
        settings: the values in it that the tensors do not show, with their sources.
        tensors: how many there are.
        parameters: how many numbers they hold.
        dtypes: number formats among them.
        weights: which weights of the file they are.
        left: what else the file holds.
    """

    config: DefocusVisionConfig
    settings: tuple[Setting, ...]
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    weights: str
    left: tuple[str, ...]


def convert_released(
    checkpoint: str | Path, output: str | Path, given: Mapping[str, Any] | None = None, use_ema: bool = False
) -> Conversion:
    """Write the released `checkpoint` as a Transformers checkpoint with its image processor, in a new folder `output`.

    Args:
        checkpoint: .pth or .safetensors of the release.
        output: folder to create; it appears complete or not at all.
        given: fields of `_SETTINGS` that the caller decides.
        use_ema: convert the averaged weights.

    Raises:
        FileNotFoundError: there is no `checkpoint`.
        FileExistsError: `output` exists.
        CheckpointError: see `read_released`; or tensors are missing, unknown or of a wrong shape (all are listed).
        ValueError, StrictDataclassError: the settings contradict the tensors or each other.
    """
    refuse_existing(output)
    released = read_released(checkpoint, use_ema)
    layout = ReleasedLayout.of(released.tensors)
    sizes = sizes_of(layout, released.tensors)
    if found := problems(layout, released.tensors, sizes):
        raise CheckpointError(f"{checkpoint} is not a De-focus Mamba as released; tensors {'; '.join(found)}")
    settings = _settings(released, layout, sizes, given or {})
    config = _config(released, layout, sizes, settings)
    # Copied: the file is only mapped into memory, and tensors may share a storage there.
    tensors = {here: released.tensors[name].detach().clone() for name, (here, _) in layout.entries().items()}
    if layout.positions:
        tensors[_POSITIONS] = _positions_here(tensors[_POSITIONS], config)
    model = classifier_without_weights(config)
    model.load_state_dict(tensors, assign=True)
    with written_whole(output) as partial:
        model.save_pretrained(partial)
        if config.num_channels == len(IMAGENET_DEFAULT_MEAN):
            image_processor(config).save_pretrained(partial)
    return _conversion(config, settings, released)


def convert_to_released(checkpoint: str | Path, output: str | Path) -> Conversion:
    """Write the Transformers checkpoint in the folder `checkpoint` as a file in the released layout.

    The file carries the settings that tensors do not show in the places where the release's configuration has them, so
    that it converts back to the same model. Every tensor keeps its bits; numbers are never converted.

    Args:
        checkpoint: folder of a `DefocusForImageClassification`.
        output: .pth or .safetensors to create; it appears complete or not at all.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: `output` exists.
        CheckpointError: the checkpoint is damaged, or holds what the released layout cannot express; all is listed.
    """
    refuse_existing(output)
    suffix = Path(output).suffix
    if suffix not in WRITTEN_SUFFIXES:
        raise CheckpointError(f"{output}: the released layout is written as {' or '.join(WRITTEN_SUFFIXES)}")
    config = _read_config(Path(checkpoint))
    layout = _layout_of(checkpoint, config)
    tensors = _read_weights(Path(checkpoint))
    if layout.positions and _POSITIONS in tensors:
        tensors[_POSITIONS] = _positions_there(checkpoint, tensors[_POSITIONS], config)
    names = {here: released for released, (here, _) in layout.entries().items()}
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    if found := problems(layout, tensors, _sizes_in(config)):
        raise CheckpointError(f"{checkpoint} does not fit its config.json; tensors {'; '.join(found)}")
    tensors = {name: tensors[name] for name in layout.entries()}  # in the release's order
    with written_whole(output) as partial:
        write_released(partial, tensors, _release_config(config), suffix)
    settings = tuple(Setting(name, getattr(config, name), "config.json") for name in _SETTINGS)
    return _conversion(config, settings, ReleasedCheckpoint(Path(checkpoint), tensors, {}, "model.safetensors", ()))


def image_processor(config: DefocusVisionConfig) -> DefocusImageProcessor:
    """The release's normalisation: mean and deviation of ImageNet, bicubic (classification/data/build.py)."""
    size = {"height": config.image_size, "width": config.image_size}
    return DefocusImageProcessor(size=size, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)


def classifier_without_weights(config: DefocusVisionConfig) -> DefocusForImageClassification:
    """The encoder with its heads, on the meta device: shapes and names only, at no cost of memory or time."""
    with torch.device("meta"), init.no_init_weights():
        return DefocusForImageClassification(config)


def _conversion(config: DefocusVisionConfig, settings: tuple[Setting, ...], released: ReleasedCheckpoint) -> Conversion:
    tensors = released.tensors.values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    parameters = sum(tensor.numel() for tensor in tensors)
    return Conversion(config, settings, len(tensors), parameters, tuple(dtypes), released.weights, released.left)


def _settings(
    released: ReleasedCheckpoint, layout: ReleasedLayout, sizes: Mapping[str, int], given: Mapping[str, Any]
) -> tuple[Setting, ...]:
    """What the tensors do not show, each from the first that tells: caller, checkpoint's config, default."""
    settings = []
    for name, (keys, default) in _SETTINGS.items():
        found = _look_up(released.config, keys)
        if given.get(name) is not None:
            settings.append(Setting(name, given[name], "command line"))
        elif found is not None:
            value = _number(found, type(default), f"{released.path}: {'.'.join(keys)} of its config")
            settings.append(Setting(name, value, "config in the checkpoint"))
        else:
            settings.append(Setting(name, default, "default"))
    if layout.positions:
        settings[0] = _image_size_of_positions(sizes, settings[0])
    return tuple(settings)


def _image_size_of_positions(sizes: Mapping[str, int], setting: Setting) -> Setting:
    """The image size that a position embedding shows; `CheckpointError` if it contradicts `setting`."""
    side = math.isqrt(sizes["patches"])
    if side**2 != sizes["patches"]:
        raise CheckpointError(f"pos_embed has {sizes['patches']} rows, which is no square of patches")
    image_size = side * sizes["patch"]
    if setting.source != "default" and setting.value != image_size:
        raise CheckpointError(
            f"image_size {setting.value} ({setting.source}) contradicts pos_embed, whose {side} x {side} patches of "
            f"{sizes['patch']} pixels make {image_size}; convert at {image_size} and use resize_images afterwards"
        )
    return Setting(setting.name, image_size, "pos_embed")


def _look_up(config: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _number(value: Any, kind: type, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
        raise CheckpointError(f"{where} is {value!r}, not a number of type {kind.__name__}")
    return kind(value)


def _config(
    released: ReleasedCheckpoint, layout: ReleasedLayout, sizes: Mapping[str, int], settings: tuple[Setting, ...]
) -> DefocusVisionConfig:
    fields: dict[str, Any] = {
        "mixer": "mamba",
        "rotary": "learnable" if layout.rotary else "none",
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": layout.depth,
        "intermediate_size": sizes["inner"],
        "state_size": sizes["states"],
        "time_step_rank": sizes["rank"],
        "conv_kernel": sizes["kernel"],
        "patch_size": sizes["patch"],
        "num_channels": sizes["channels"],
        "class_token": layout.class_token,
        "use_absolute_position_embeddings": layout.positions,
        "aux_loss": "per_token" if layout.two_heads else "none",
        "head_type": layout.head_type,
        "num_labels": sizes["classes"],
        **{setting.name: setting.value for setting in settings},
    }
    if _look_up(released.config, _SECTIONS):
        # PatchEmbedChangeRes of the classification release: two by two sections.
        fields |= {"patch_order": "sections", "section_size": fields["image_size"] // sizes["patch"] // 2}
    try:
        return DefocusVisionConfig(**fields)
    except (ValueError, StrictDataclassError) as error:
        sources = ", ".join(f"{setting.name} {setting.value} ({setting.source})" for setting in settings)
        raise CheckpointError(f"{released.path}: {error}; set by options, not by tensors: {sources}") from error


def _sizes_in(config: DefocusVisionConfig) -> dict[str, int]:
    """The sizes of the table of tensors, as a configuration states them."""
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "states": config.state_size,
        "rank": config.time_step_rank,
        "kernel": config.conv_kernel,
        "patch": config.patch_size,
        "channels": config.num_channels,
        "patches": config.num_patches,
        "classes": len(config.id2label or {}),
    }


def _raster_to_sequence(config: DefocusVisionConfig) -> torch.Tensor:
    side = config.image_size // config.patch_size
    return section_order(side, side, config.section_size or side)


def _positions_here(positions: torch.Tensor, config: DefocusVisionConfig) -> torch.Tensor:
    """The release has one row a patch, in the order of the sequence; here they are in raster order, then class token.

    The release adds no position to its class token: a row of zeros.
    """
    positions = positions[:, inverse_order(_raster_to_sequence(config))]
    return torch.cat([positions, torch.zeros_like(positions[:, : int(config.class_token)])], dim=1)


def _positions_there(checkpoint: str | Path, positions: torch.Tensor, config: DefocusVisionConfig) -> torch.Tensor:
    """Undo of `_positions_here`; a tensor of a wrong shape is left for `problems` to report."""
    if positions.shape != (1, config.num_image_tokens, config.hidden_size):
        return positions
    if positions[:, config.num_patches :].any():
        raise CheckpointError(
            f"{checkpoint}: the class token has a position embedding, which the released layout has no place for; add "
            "its row of embeddings.pos_embed to embeddings.cls_token and set the row to zero"
        )
    return positions[:, _raster_to_sequence(config)]


def _read_config(directory: Path) -> DefocusVisionConfig:
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no saved model (no config.json in it)")
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not isinstance(config, DefocusVisionConfig):
        raise CheckpointError(
            f"{directory}: model_type is {config.model_type!r}, not {DefocusVisionConfig.model_type!r}"
        )
    return config


def _layout_of(checkpoint: str | Path, config: DefocusVisionConfig) -> ReleasedLayout:
    """The layout of an encoder of this configuration; `CheckpointError` lists what the release cannot express."""
    faults = [
        f"{name}={getattr(config, name)!r} (the release has {' or '.join(map(repr, allowed))})"
        for name, allowed in _EXPRESSIBLE.items()
        if getattr(config, name) not in allowed
    ]
    if config.section_size and config.section_size * 2 != config.image_size // config.patch_size:
        faults.append(f"section_size={config.section_size} (the release has two by two sections)")
    if faults:
        raise CheckpointError(f"{checkpoint}: the released layout cannot express {', '.join(faults)}")
    return ReleasedLayout(
        depth=config.num_hidden_layers,
        rotary=config.rotary != "none",
        class_token=config.class_token,
        positions=config.use_absolute_position_embeddings,
        head_type=config.head_type,
        two_heads=config.aux_loss != "none",
    )


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's `model*.safetensors`, one file or several shards."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} holds no weights (no model.safetensors in it)")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error})") from error
    return tensors


def _release_config(config: DefocusVisionConfig) -> dict[str, Any]:
    """The settings in the places where the release's configuration has them, beside what describes the model there."""
    kind = "IN22k" if config.head_type == "mlp" else "IN1k"
    release: dict[str, Any] = {
        "DATA": {},
        "MODEL": {
            "TYPE": "mamba",
            "NUM_CLASSES": len(config.id2label or {}),
            "depth": config.num_hidden_layers,
            "use_rope": config.rotary != "none",
            "use_pos_embed": config.use_absolute_position_embeddings,
            "use_aux_loss": config.aux_loss != "none",
            "head_type": f"{kind}_{'cls' if config.class_token else 'avg'}",
            "patch_embed_change_res": config.section_size > 0,
            "MAMBA": {
                "state_size": config.state_size,
                "conv_kernel": config.conv_kernel,
                "intermediate_size": config.intermediate_size,
                "time_step_rank": config.time_step_rank,
            },
        },
    }
    for name, (keys, _) in _SETTINGS.items():
        node = release
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = getattr(config, name)
    return release
