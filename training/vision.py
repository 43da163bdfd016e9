"""The vision half of stage 0: the encoder learns to classify, with the paper's two losses and drop path schedule."""

from __future__ import annotations

import torch
from torch import nn

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor, DefocusVisionConfig
from training.arguments import Stage0VisionArguments
from training.augmented_batches import AugmentedBatches
from training.labelled_images import format_report, load_labelled_images
from training.loop import Batch, Stage
from training.stages import usable_samples
from training.starting_point import load_start, starting_config


def build_vision(arguments: Stage0VisionArguments) -> Stage:
    """Encoder with main and auxiliary head, labelled images, augmentation and the drop path schedule."""
    config = vision_config(arguments)
    image_processor = build_image_processor(arguments, config.image_size)
    dataset = load_labelled_images(arguments.data, image_processor, arguments.on_bad_sample)
    config.problem_type = dataset.problem_type  # type: ignore[assignment]  # one of the two it may be
    config.id2label = dataset.id2label
    config.label2id = {name: number for number, name in dataset.id2label.items()}
    usable, left_out = usable_samples(
        len(dataset), arguments.check_images, dataset.__getitem__, arguments.on_bad_sample
    )
    model = DefocusForImageClassification(config)
    start = load_start(model, arguments.model) if arguments.model else []
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    batches = AugmentedBatches(dataset, usable, arguments, arguments.seed)

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        # the model returns the mean over the micro-batch's known labels
        return forward(**batch).loss * (batches.count_known(batch) / items)

    def begin_epoch(epoch: int, num_epochs: int) -> None:
        model.set_drop_path_rate(drop_path_rate_at(epoch, num_epochs, arguments))

    lines = [*start, format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    lines.append(f"{dataset.paths[usable[0]]}: {dataset.labels[usable[0]].tolist()} of {dataset.label_names}")
    return Stage(
        name="stage0_vision",
        model=model,
        companions=[image_processor],
        components={
            "encoder": [model.encoder],
            "heads": [head for head in (model.head, model.head2) if head is not None],
        },
        num_samples=len(usable),
        repeats=arguments.repeated_augmentation,
        load_batch=batches,
        count_items=batches.count_known,
        compute_loss=compute_loss,
        begin_epoch=begin_epoch,
        sample_text="\n".join(lines),
        facts={"data_report": dataset.report, "left_out": left_out, "start": start},
    )


def vision_config(arguments: Stage0VisionArguments) -> DefocusVisionConfig:
    """The encoder's configuration: a preset's or a checkpoint's fields, overridden by the recipe's.

    Raises `ValueError` for a drop path rate in `vision_config`, which the arguments of the same name would override.
    """
    schedule = {name: getattr(arguments, name) for name in ("drop_path_rate", "min_drop_path_rate")}
    for name in schedule:
        if name in arguments.vision_config:
            raise ValueError(f"vision_config: {name} is a field of the stage itself; move it out of vision_config")
    fields = {**arguments.vision_config, **schedule}
    if arguments.model:
        return starting_config(arguments.model, fields)
    preset = fields.pop("preset", None)
    return DefocusVisionConfig.from_preset(preset, **fields) if preset else DefocusVisionConfig(**fields)


def build_image_processor(arguments: Stage0VisionArguments, image_size: int) -> DefocusImageProcessor:
    """What normalises the pixels: as the arguments say, else as for the checkpoint that training starts from."""
    size = {"height": image_size, "width": image_size}
    given = {name: getattr(arguments, name) for name in ("image_mean", "image_std") if getattr(arguments, name)}
    if arguments.model:
        return DefocusImageProcessor.from_pretrained(arguments.model, **{"size": size, **given})
    return DefocusImageProcessor(**{"size": size, **given})


def drop_path_rate_at(epoch: int, num_epochs: int, arguments: Stage0VisionArguments) -> float:
    """Rate of the deepest block in an epoch: linear from the minimum in the first to the maximum in the last epoch.

    Source: De-focus Attention Networks, the released training loop (constant inside an epoch).
    """
    progress = epoch / (num_epochs - 1) if num_epochs > 1 else 1.0
    span = arguments.drop_path_rate - arguments.min_drop_path_rate
    return arguments.min_drop_path_rate + span * min(1.0, progress)
