"""`defocus-mllm convert` and `defocus-mllm presets`: released checkpoints in and out, and the published sizes.

defocus-mllm convert --checkpoint defocus_mamba_base_cls.pth --output models/defocus_mamba_base
defocus-mllm convert --to-released --checkpoint models/defocus_mamba_base --output back.safetensors
"""

from __future__ import annotations

import argparse

from transformers.utils import logging as transformers_logging

from .configuration_defocus import PRESETS, DefocusVisionConfig
from .convert import Conversion, classifier_without_weights, convert_released, convert_to_released

# Option -> field of the configuration.
_OPTIONS = {
    "image_size": "image_size",
    "rope_scale": "rope_scale_factor",
    "delta_scale": "delta_scale_factor",
    "group_norm": "group_norm_size",
}


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `defocus-mllm convert`."""
    add = parser.add_argument
    add(
        "--checkpoint", metavar="F", required=True, help="released .pth or .safetensors (--to-released: a model folder)"
    )
    add(
        "--output",
        metavar="DIR",
        required=True,
        help="folder to create (--to-released: .pth or .safetensors to create)",
    )
    add("--image-size", type=int, metavar="N", help="pixels; default: the checkpoint's config, or 224")
    add("--rope-scale", type=float, metavar="X", help="rope_scale_factor; default: the checkpoint's config, or 1")
    add("--delta-scale", type=float, metavar="X", help="delta_scale_factor; default: the checkpoint's config, or 1")
    add("--group-norm", type=int, metavar="N", help="channels of a group norm; default: the checkpoint's config, or 64")
    add("--use-ema", action="store_true", help="convert the averaged weights (model_ema) of a .pth")
    add("--to-released", action="store_true", help="the other direction: a model folder to a file of the release")


def run_convert(arguments: argparse.Namespace) -> None:
    """Convert, and print what was made, with the source of every value that the tensors do not show."""
    transformers_logging.disable_progress_bar()
    given = {field: getattr(arguments, option) for option, field in _OPTIONS.items()}
    if arguments.to_released:
        if arguments.use_ema or any(value is not None for value in given.values()):
            raise ValueError("--to-released takes --checkpoint and --output alone; the rest stands in the config.json")
        conversion = convert_to_released(arguments.checkpoint, arguments.output)
    else:
        conversion = convert_released(arguments.checkpoint, arguments.output, given, arguments.use_ema)
    for line in _report(conversion):
        print(line)
    print(f"wrote {arguments.output}")


def _report(conversion: Conversion) -> list[str]:
    config = conversion.config
    lines = [
        f"De-focus Mamba: width {config.hidden_size}, {config.num_hidden_layers} blocks, {config.intermediate_size} "
        f"inner channels, {config.state_size} states, rank {config.time_step_rank}, kernel {config.conv_kernel}, "
        f"patches of {config.patch_size} pixels and {config.num_channels} channels",
        f"rotary {config.rotary}, class token {_yes(config.class_token)}, position embedding "
        f"{_yes(config.use_absolute_position_embeddings)}, patch order {config.patch_order}, {config.head_type} head, "
        f"auxiliary head {_yes(config.aux_loss != 'none')}, {config.num_labels} classes",
        f"{conversion.tensors} tensors ({conversion.weights}), {conversion.parameters:,} parameters, "
        f"{', '.join(conversion.dtypes)}",
        *(f"{setting.name} {setting.value} ({setting.source})" for setting in conversion.settings),
    ]
    if config.num_channels != 3:
        lines.append(f"no image processor: ImageNet's mean and deviation do not fit {config.num_channels} channels")
    if conversion.left:
        lines.append(f"not converted: {', '.join(conversion.left)}")
    return lines


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def run_presets(arguments: argparse.Namespace) -> None:
    """Print a table of the presets; parameters are counted on models without weights."""
    columns = "{:<20} {:<10} {:>6} {:>6} {:>6} {:>13} {:>24}"
    print(columns.format("preset", "mixer", "width", "blocks", "image", "encoder", "with both heads (1000)"))
    for name in PRESETS:
        config = DefocusVisionConfig.from_preset(name, num_labels=1000)
        model = classifier_without_weights(config)
        encoder, whole = (sum(p.numel() for p in module.parameters()) for module in (model.encoder, model))
        sizes = (config.hidden_size, config.num_hidden_layers, config.image_size)
        print(columns.format(name, config.mixer, *sizes, f"{encoder:,}", f"{whole:,}"))
