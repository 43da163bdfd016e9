"""The vision half of stage 0: the encoder learns to classify, with the paper's two losses and drop path schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor, DefocusVisionConfig
from training.arguments import Stage0ContrastiveArguments, Stage0VisionArguments
from training.labelled_images import LabelledImageDataset, format_report
from training.labels import check_same_labels
from training.stage import Batch, Stage
from training.starting_point import load_start, starting_config
from training.training_images import held_images, load_checked, streamed_images
from training.validation import Validation


def build_vision(arguments: Stage0VisionArguments) -> Stage:
    """Encoder with main and auxiliary head, labelled images, augmentation and the drop path schedule."""
    config = vision_config(arguments)
    image_processor = build_image_processor(arguments, config.image_size)
    images = (streamed_images if arguments.streaming else held_images)(arguments, image_processor)
    model, start = build_model(config, images.labels, arguments)

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        # the model returns the mean over the micro-batch's known labels
        return forward(**batch).loss * (images.count_items(batch) / items)

    def begin_epoch(epoch: int, num_epochs: int) -> None:
        model.set_drop_path_rate(drop_path_rate_at(epoch, num_epochs, arguments))

    lines, facts = [*start, *images.lines], {**images.facts, "start": start}
    validate = None
    if arguments.validation_data:
        validate, more_lines, more_facts = build_validation(
            model, images.labels.label_names, image_processor, arguments
        )
        lines, facts = lines + more_lines, facts | more_facts
    return Stage(
        name="stage0_vision",
        model=model,
        companions=[image_processor],
        components={
            "encoder": [model.encoder],
            "heads": [head for head in (model.head, model.head2) if head is not None],
        },
        num_samples=images.num_samples,
        sampler=images.sampler,
        repeats=arguments.repeated_augmentation,
        load_batch=images.load_batch,
        count_items=images.count_items,
        compute_loss=compute_loss,
        begin_epoch=begin_epoch,
        sample_text="\n".join(lines),
        facts=facts,
        validate=validate,
        validation_steps=arguments.validation_steps,
        begin=images.begin,
        conclude=images.conclude,
    )


def build_model(
    config: DefocusVisionConfig, dataset: LabelledImageDataset, arguments: Stage0VisionArguments
) -> tuple[DefocusForImageClassification, list[str]]:
    """A classifier for the data set's classes, and lines that say which weights it starts from other than random."""
    config.problem_type = dataset.problem_type  # type: ignore[assignment]  # one of the two it may be
    config.id2label = dataset.id2label
    config.label2id = {name: number for number, name in dataset.id2label.items()}
    model = DefocusForImageClassification(config)
    return model, load_start(model, arguments.model) if arguments.model else []


def build_validation(
    model: DefocusForImageClassification,
    label_names: Sequence[str],
    image_processor: DefocusImageProcessor,
    arguments: Stage0VisionArguments,
) -> tuple[Validation, list[str], dict[str, Any]]:
    """The validation pass, lines about its data for the log, and facts for run.json.

    Raises `ValueError` naming both data sets if their labels differ.
    """
    dataset, usable, left_out = load_checked(arguments.validation_data, image_processor, arguments)
    check_same_labels(label_names, arguments.data, dataset.label_names, arguments.validation_data)
    if not (dataset.labels[usable] >= 0).any():
        raise ValueError(f"validation_data: {arguments.validation_data} holds no known label")
    size = arguments.per_device_batch_size or max(1, arguments.global_batch_size // PartialState().num_processes)
    validate = Validation(model, dataset, usable, size, arguments.dataloader_num_workers)
    lines = [f"validation: {format_report(dataset.report)}", *(f"left out: {message}" for message in left_out)]
    return validate, lines, {"validation_report": dataset.report, "validation_left_out": left_out}


def vision_config(arguments: Stage0VisionArguments | Stage0ContrastiveArguments) -> DefocusVisionConfig:
    """The encoder's configuration: a preset's or a checkpoint's fields, overridden by the recipe's.

    Raises `ValueError` for a drop path rate in `vision_config`, which the arguments of the same name would override.
    """
    schedule = {name: getattr(arguments, name) for name in ("drop_path_rate", "min_drop_path_rate")}
    for name in schedule:
        if name in arguments.vision_config:
            raise ValueError(f"vision_config: {name} is a field of the stage itself; move it out of vision_config")
    fields = {**arguments.vision_config, **schedule}
    if isinstance(arguments, Stage0VisionArguments) and arguments.model:
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


def drop_path_rate_at(
    epoch: int, num_epochs: int, arguments: Stage0VisionArguments | Stage0ContrastiveArguments
) -> float:
    """Rate of the deepest block in an epoch: linear from the minimum in the first to the maximum in the last epoch.

    Source: De-focus Attention Networks, the released training loop (constant inside an epoch).
    """
    progress = epoch / (num_epochs - 1) if num_epochs > 1 else 1.0
    span = arguments.drop_path_rate - arguments.min_drop_path_rate
    return arguments.min_drop_path_rate + span * min(1.0, progress)
