"""What stages 1 and 2 share: an MLLM loaded or put together, conversations, and the loss on their answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from defocus_mllm import DefocusForConditionalGeneration
from defocus_mllm.assemble import Assembly, assemble, change_template, load_encoder, load_language
from defocus_mllm.chat_templates import DEFAULT
from defocus_mllm.loading import load_strictly
from training.arguments import MultimodalArguments
from training.checkpointing import Savable
from training.chat import check_chat
from training.conversations import format_report, load_conversations
from training.lora import (
    AdapterWriter,
    adapted_components,
    add_lora,
    is_adapted,
    quantization_options,
    trained_components,
)
from training.rehearsal import CheckedSamples, activation_estimate, clean_generation_config, tried_out
from training.sampling import SampleKey
from training.stage import Batch, Stage, count_supervised
from training.stages import usable_samples
from training.supervision import ConversationCollator, describe_supervision, encode_conversation


def load_or_compose(arguments: MultimodalArguments) -> Assembly:
    """The model `arguments` name, in float32: from `model`, or from `vision_model` and `language_model`.

    Raises `FileNotFoundError` or `ValueError` naming the argument and the folder.
    """
    if arguments.model:
        # absolute, since an adapter's checkpoint says where its base model is
        folder = os.path.abspath(arguments.model)
        options = quantization_options(arguments.quantization)
        model = load_strictly(AutoModelForImageTextToText, folder, "model", **options)
        processor = AutoProcessor.from_pretrained(folder)
        if not isinstance(model, DefocusForConditionalGeneration):
            raise ValueError(f"model: {arguments.model} holds a {type(model).__name__}, not a De-focus MLLM")
        named = arguments.chat_template
        return Assembly(model, processor, change_template(model, processor, named) if named else [])
    return compose(arguments)


def compose(arguments: MultimodalArguments) -> Assembly:
    """Put an encoder and a causal language model together; only the projector between them is new."""
    vision = load_encoder(arguments.vision_model, "vision_model", torch.float32)
    language = load_language(arguments.language_model, "language_model", torch.float32)
    names = ("vision_model", "language_model")
    return assemble(vision, language, arguments.projector_type, names, arguments.chat_template or DEFAULT)


def components_of(model: DefocusForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The parts `train` can name, those with adapters cut in two. A language model's output layer belongs to it."""
    parts: dict[str, list[nn.Module]] = {
        "vision_tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language_model": [model.model.language_model, model.lm_head],
    }
    return adapted_components(parts) if is_adapted(model) else parts


def build_multimodal(name: str, arguments: MultimodalArguments) -> Stage:
    """Model, conversations and loss of stage `name`."""
    parts = load_or_compose(arguments)
    model, processor = parts.model, parts.processor
    chat = check_chat(processor, arguments.chat_template, name)
    parts.notes += clean_generation_config(model)
    writer: Savable = model
    if arguments.lora_rank:
        add_lora(model, processor, arguments, arguments.train)
        writer = AdapterWriter(model, os.path.abspath(arguments.model), arguments.quantization)
    components = components_of(model)
    dataset = load_conversations(arguments.data, arguments.image_root or None, arguments.on_bad_sample)
    collate = ConversationCollator(
        processor, arguments.shuffle_turns, arguments.max_turns or None, arguments.max_length, arguments.seed
    )
    checked = CheckedSamples()

    def load_one(index: int) -> None:
        try:
            checked.add(collate([dataset[index]], [SampleKey(0, index)]))
        except ValueError as error:
            raise ValueError(f"{arguments.data}: {error}") from error

    usable, left_out = usable_samples(len(dataset), arguments.check_images, load_one, arguments.on_bad_sample)

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return collate([dataset[usable[key.sample]] for key in keys], keys)

    first = dataset[usable[0]]
    example = encode_conversation(processor, collate.choose_turns(first, SampleKey(0, 0)), first.record)
    lines = [
        *parts.notes,
        *chat.lines,
        format_report(dataset.report),
        *(f"left out: {message}" for message in left_out),
    ]
    lines += [checked.describe(collate.counts, len(usable)), describe_supervision(processor.tokenizer, example)]
    return Stage(
        name=name,
        model=model,
        companions=[processor],
        writer=writer,
        components=components,
        train=trained_components(components, arguments.train),
        learning_rates={
            name: rate
            for name, rate in (
                ("projector", arguments.projector_learning_rate),
                ("vision_tower", arguments.vision_learning_rate),
                ("vision_tower_lora", arguments.vision_learning_rate),
            )
            if rate and name in components
        },
        num_samples=len(usable),
        load_batch=load_batch,
        count_items=count_supervised,
        compute_loss=answer_loss(model),
        try_out=tried_out(processor, example),
        estimate_activations=activation_estimate(model, arguments, checked),
        sample_text="\n".join(lines),
        facts={
            "chat_template": chat.facts,
            "data_report": dataset.report,
            "left_out": left_out,
            "cut": dict(collate.counts),
        },
    )


def answer_loss(model: DefocusForConditionalGeneration) -> Callable[[nn.Module, Batch, int], torch.Tensor]:
    """The loss on answers and ends of turn; a batch without images still runs the image side, to zero gradients.

    Otherwise a run that trains only the image side could not step, and processes whose batch has images would wait for
    those whose batch has none.
    """
    vision = model.config.vision_config
    no_images = (0, vision.num_channels, vision.image_size, vision.image_size)

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        if "pixel_values" not in batch:
            batch = {**batch, "pixel_values": torch.zeros(no_images, device=batch["input_ids"].device)}
        return forward(**batch, num_items_in_batch=items, use_cache=False).loss

    return compute_loss
