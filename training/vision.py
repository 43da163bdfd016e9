"""The vision half of stage 0: the encoder learns to classify, with the paper's two losses and drop path schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from defocus_mllm import DefocusForImageClassification, DefocusImageProcessor, DefocusVisionConfig
from training.arguments import Stage0ContrastiveArguments, Stage0VisionArguments
from training.augmentation import Augmentation
from training.labelled_images import LabelledImageDataset, format_report, load_labelled_images
from training.labels import check_same_labels
from training.loop import Batch, Stage
from training.sampling import SampleKey, mix_seed
from training.stages import usable_samples
from training.table_images import Columns
from training.validation import Validation


def build_vision(arguments: Stage0VisionArguments) -> Stage:
    """Encoder with main and auxiliary head, labelled images, augmentation and the drop path schedule."""
    config = vision_config(arguments)
    image_processor = DefocusImageProcessor(size={"height": config.image_size, "width": config.image_size})
    dataset, usable, left_out = load_checked(arguments.data, image_processor, arguments)
    config.problem_type = dataset.problem_type  # type: ignore[assignment]  # one of the two it may be
    config.id2label = dataset.id2label
    config.label2id = {name: number for number, name in dataset.id2label.items()}
    model = DefocusForImageClassification(config)
    augmentation = Augmentation(arguments.horizontal_flip, arguments.vertical_flip, arguments.max_shift)

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        batch = dataset.batch([usable[key.sample] for key in keys])
        generators = [torch.Generator().manual_seed(mix_seed(arguments.seed, 2, *key)) for key in keys]
        return {**batch, "pixel_values": augmentation(batch["pixel_values"], generators)}

    def count_known(batch: Batch) -> int:
        return int((batch["labels"] >= 0).sum())

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        # the model returns the mean over the micro-batch's known labels
        return forward(**batch).loss * (count_known(batch) / items)

    def begin_epoch(epoch: int, num_epochs: int) -> None:
        model.set_drop_path_rate(drop_path_rate_at(epoch, num_epochs, arguments))

    lines = [format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    facts: dict[str, Any] = {"data_report": dataset.report, "left_out": left_out}
    validate = None
    if arguments.validation_data:
        validate, more_lines, more_facts = build_validation(model, dataset.label_names, image_processor, arguments)
        lines, facts = lines + more_lines, facts | more_facts
    lines.append(f"{dataset.pictures.name(usable[0])}: {dataset.labels[usable[0]].tolist()} of {dataset.label_names}")
    return Stage(
        name="stage0_vision",
        model=model,
        companions=[image_processor],
        components={
            "encoder": [model.encoder],
            "heads": [head for head in (model.head, model.head2) if head is not None],
        },
        num_samples=len(usable),
        load_batch=load_batch,
        count_items=count_known,
        compute_loss=compute_loss,
        begin_epoch=begin_epoch,
        sample_text="\n".join(lines),
        facts=facts,
        validate=validate,
        validation_steps=arguments.validation_steps,
    )


def load_checked(
    data: str, image_processor: DefocusImageProcessor, arguments: Stage0VisionArguments
) -> tuple[LabelledImageDataset, list[int], list[str]]:
    """Labelled images, which of them can be used, and a message for each other one."""
    columns = Columns(arguments.image_column, arguments.label_column)
    cache_bytes = arguments.image_cache_megabytes * 1024**2
    dataset = load_labelled_images(data, image_processor, arguments.on_bad_sample, cache_bytes, columns)
    # what fits the cache is decoded now, while workers can still inherit it
    count = len(dataset) if dataset.loader.fits(len(dataset)) else arguments.check_images
    usable, left_out = usable_samples(len(dataset), count, dataset.pixels, arguments.on_bad_sample)
    return dataset, usable, left_out


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
    """The encoder's configuration: a preset's fields, overridden by the recipe's.

    Raises `ValueError` for a drop path rate in `vision_config`, which the arguments of the same name would override.
    """
    schedule = {name: getattr(arguments, name) for name in ("drop_path_rate", "min_drop_path_rate")}
    for name in schedule:
        if name in arguments.vision_config:
            raise ValueError(f"vision_config: {name} is a field of the stage itself; move it out of vision_config")
    fields = {**arguments.vision_config, **schedule}
    preset = fields.pop("preset", None)
    return DefocusVisionConfig.from_preset(preset, **fields) if preset else DefocusVisionConfig(**fields)


def drop_path_rate_at(
    epoch: int, num_epochs: int, arguments: Stage0VisionArguments | Stage0ContrastiveArguments
) -> float:
    """Rate of the deepest block in an epoch: linear from the minimum in the first to the maximum in the last epoch.

    Source: De-focus Attention Networks, the released training loop (constant inside an epoch).
    """
    progress = epoch / (num_epochs - 1) if num_epochs > 1 else 1.0
    span = arguments.drop_path_rate - arguments.min_drop_path_rate
    return arguments.min_drop_path_rate + span * min(1.0, progress)
