"""What stages 1 and 2 share: an MLLM loaded or put together, conversations, and the loss on their answers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from defocus_mllm import DefocusForConditionalGeneration, DefocusProcessor
from defocus_mllm.assemble import Assembly, assemble, change_template, load_encoder, load_language
from defocus_mllm.chat_templates import DEFAULT
from defocus_mllm.loading import load_strictly
from training.arguments import MultimodalArguments
from training.bad_samples import SAMPLE_ERRORS, BadSamples
from training.batching import Batching, choose_batching
from training.chat import check_chat
from training.conversations import Conversation, SourceOptions, format_report, open_conversations
from training.encoding import Example
from training.held_out import open_held_out
from training.labels import NAMED_IN_MESSAGE
from training.lora import quantization_options
from training.packing_checks import check_packing
from training.rehearsal import CheckedSamples, activation_estimate, clean_generation_config, tried_out
from training.sampling import SampleKey
from training.stage import Batch, Stage, count_supervised
from training.stages import usable_samples
from training.streamed_conversations import StreamedSamples
from training.supervision import ConversationCollator, describe_supervision, encode_conversation
from training.tuning import choose_tuning


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
        return Assembly(model, processor, _change_template(model, processor, arguments))
    return compose(arguments)


def _change_template(model: Any, processor: Any, arguments: MultimodalArguments) -> list[str]:
    if not arguments.chat_template:
        return []
    before = len(processor.tokenizer)
    notes = change_template(model, processor, arguments.chat_template)
    if arguments.lora_rank and len(processor.tokenizer) > before:
        raise ValueError(
            f"chat_template: {arguments.chat_template} needs tokens that {arguments.model} lacks, and an adapter has "
            "no room for them; name the template in stage 1, or when `defocus-mllm new` makes the model"
        )
    return notes


def compose(arguments: MultimodalArguments) -> Assembly:
    """Put an encoder and a causal language model together; only the projector between them is new."""
    vision = load_encoder(arguments.vision_model, "vision_model", torch.float32)
    language = load_language(arguments.language_model, "language_model", torch.float32)
    names = ("vision_model", "language_model")
    return assemble(vision, language, arguments.projector_type, names, arguments.chat_template or DEFAULT)


DRY_RUN_SAMPLES = 1_000
"""Conversations that a dry run encodes at most, so that it ends within a minute."""


@dataclass(frozen=True)
class Samples:
    """Conversations that were looked at, and how batches are made of them."""

    dataset: Sequence[Conversation]
    batching: Batching
    collate: ConversationCollator
    bad: BadSamples
    checked: CheckedSamples
    left_out: list[str]
    """Messages about those that were looked at and cannot be used."""
    report: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return len(self.batching.usable)

    def count_items(self, batch: Batch) -> int:
        """For `Stage.count_items`."""
        self.bad.take_from(batch)
        return count_supervised(batch)

    def first(self) -> Example:
        """The first one as it is trained on."""
        conversation = self.dataset[self.batching.usable[0]]
        messages = self.collate.choose_turns(conversation, SampleKey(0, 0))
        return encode_conversation(self.collate.processor, messages, conversation.record)

    def describe(self) -> list[str]:
        """Lines for the log."""
        left_out = [f"left out: {message}" for message in self.left_out]
        example = describe_supervision(self.collate.processor.tokenizer, self.first())
        return [
            format_report(self.report),
            *left_out,
            self.checked.describe(self.collate, self.num_samples),
            example,
        ]


def open_samples(processor: DefocusProcessor, arguments: MultimodalArguments) -> Samples:
    """Open the data and encode `check_images` conversations. Raises what a bad one, or too many of them, raise."""
    bad = BadSamples(arguments.on_bad_sample, arguments.max_bad_samples)
    sources = [SourceOptions(**source) for source in arguments.sources()]
    dataset = open_conversations(sources, bad, arguments.mixture_strategy, arguments.seed)
    collate = ConversationCollator(
        processor, arguments.shuffle_turns, arguments.max_turns or None, arguments.max_length, arguments.seed, bad.skips
    )
    checked = CheckedSamples()

    def load_one(index: int) -> None:
        conversation = dataset[index]
        try:
            checked.add(collate.example(conversation, SampleKey(0, index)))
        except SAMPLE_ERRORS as error:
            bad.add([dataclasses.replace(conversation.bad(error), found="before training")])
            raise ValueError(f"{conversation.source}: {error}") from error

    limit = min(arguments.check_images, DRY_RUN_SAMPLES) if arguments.dry_run else arguments.check_images
    usable, left_out = usable_samples(len(dataset), limit, load_one, arguments.on_bad_sample)
    bad.check()
    batching = choose_batching(arguments, dataset, usable, collate, bad)
    left_out = [*left_out, *batching.left_out][:NAMED_IN_MESSAGE]
    return Samples(dataset, batching, collate, bad, checked, left_out, dataset.report)


def build_multimodal(name: str, arguments: MultimodalArguments) -> Stage:
    """Model, conversations and loss of stage `name`."""
    parts = load_or_compose(arguments)
    model, processor = parts.model, parts.processor
    chat = check_chat(processor, arguments.chat_template, name)
    parts.notes += clean_generation_config(model)
    if arguments.image_fit:
        processor.image_processor.fit = arguments.image_fit
    tuning = choose_tuning(model, processor, arguments)
    if arguments.packing == "pack":
        check_packing(model)
    samples = StreamedSamples(processor, arguments) if arguments.streaming else open_samples(processor, arguments)
    compute_loss = answer_loss(model)
    held_out = open_held_out(model, processor, compute_loss, arguments)
    described = [held_out.describe()] if held_out else []
    return Stage(
        name=name,
        model=model,
        companions=[processor],
        components=tuning.components,
        train=tuning.train,
        learning_rates=tuning.learning_rates,
        writer=tuning.writer,
        num_samples=samples.num_samples,
        sampler=samples.batching.sampler,
        load_batch=samples.batching.load_batch,
        describe_plan=samples.batching.describe_plan,
        count_items=samples.count_items,
        bad_samples=samples.bad,
        compute_loss=compute_loss,
        validate=held_out,
        write_answers=held_out.write_answers if held_out and arguments.validation_answers else None,
        validation_steps=arguments.validation_steps,
        try_out=tried_out(processor, samples.first()),
        estimate_activations=activation_estimate(model, arguments, samples.checked),
        sample_text="\n".join([*parts.notes, *chat.lines, *described, *samples.describe()]),
        facts={
            "chat_template": chat.facts,
            "data_report": samples.report,
            "left_out": samples.left_out,
            "cut": dict(samples.collate.counts),
        },
        begin=partial(samples.bad.begin, arguments.output_dir),
        conclude=lambda: {"bad_samples": samples.bad.by_cause()},
    )


def answer_loss(model: DefocusForConditionalGeneration) -> Callable[[nn.Module, Batch, int], torch.Tensor]:
    """The loss on answers and ends of turn; a batch without images still runs the image side, to zero gradients.

    Otherwise a run that trains only the image side could not step, and processes whose batch has images would wait for
    those whose batch has none.
    """
    vision: Any = model.config.vision_config
    no_images = (0, vision.num_channels, vision.image_size, vision.image_size)

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        if "pixel_values" not in batch:
            batch = {**batch, "pixel_values": torch.zeros(no_images, device=batch["input_ids"].device)}
        return forward(**_model_inputs(batch), num_items_in_batch=items, use_cache=False).loss

    return compute_loss


def _model_inputs(batch: Batch) -> Batch:
    """Without the mask of packed rows: Transformers tells samples of a row apart by positions if it gets no mask."""
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask" or "position_ids" not in batch}
