"""What stages 1 and 2 share: an MLLM loaded or put together, conversations, and the loss on their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from defocus_mllm import DefocusForConditionalGeneration
from defocus_mllm.assemble import Assembly, assemble, load_encoder, load_language
from defocus_mllm.loading import load_strictly
from training.arguments import MultimodalArguments
from training.conversations import format_report, load_conversations
from training.sampling import SampleKey
from training.stage import Batch, Stage, count_supervised
from training.stages import usable_samples
from training.supervision import ConversationCollator, describe_supervision, encode_conversation


def load_or_compose(arguments: MultimodalArguments) -> Assembly:
    """The model `arguments` name, in float32: from `model`, or from `vision_model` and `language_model`.

    Raises `FileNotFoundError` or `ValueError` naming the argument and the folder.
    """
    if arguments.model:
        model = load_strictly(AutoModelForImageTextToText, arguments.model, "model")
        processor = AutoProcessor.from_pretrained(arguments.model)
        if not isinstance(model, DefocusForConditionalGeneration):
            raise ValueError(f"model: {arguments.model} holds a {type(model).__name__}, not a De-focus MLLM")
        return Assembly(model, processor, [])
    return compose(arguments)


def compose(arguments: MultimodalArguments) -> Assembly:
    """Put an encoder and a causal language model together; only the projector between them is new."""
    vision = load_encoder(arguments.vision_model, "vision_model", torch.float32)
    language = load_language(arguments.language_model, "language_model", torch.float32)
    return assemble(vision, language, arguments.projector_type, ("vision_model", "language_model"))


def components_of(model: DefocusForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The parts `train` can name. A language model's output layer belongs to it."""
    return {
        "vision_tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language_model": [model.model.language_model, model.lm_head],
    }


def build_multimodal(name: str, arguments: MultimodalArguments) -> Stage:
    """Model, conversations and loss of stage `name`."""
    parts = load_or_compose(arguments)
    model, processor = parts.model, parts.processor
    dataset = load_conversations(arguments.data, arguments.image_root or None, arguments.on_bad_sample)
    collate = ConversationCollator(
        processor, arguments.shuffle_turns, arguments.max_turns or None, arguments.max_length, arguments.seed
    )
    lengths: list[int] = []

    def load_one(index: int) -> None:
        try:
            lengths.append(collate([dataset[index]], [SampleKey(0, index)])["input_ids"].shape[1])
        except ValueError as error:
            raise ValueError(f"{arguments.data}: {error}") from error

    usable, left_out = usable_samples(len(dataset), arguments.check_images, load_one, arguments.on_bad_sample)

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return collate([dataset[usable[key.sample]] for key in keys], keys)

    first = dataset[usable[0]]
    example = encode_conversation(processor, collate.choose_turns(first, SampleKey(0, 0)), first.record)
    lines = [*parts.notes, format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    lines += [describe_check(lengths, collate), describe_supervision(processor.tokenizer, example)]
    return Stage(
        name=name,
        model=model,
        companions=[processor],
        components=components_of(model),
        num_samples=len(usable),
        load_batch=load_batch,
        count_items=count_supervised,
        compute_loss=answer_loss(model),
        sample_text="\n".join(lines),
        facts={"data_report": dataset.report, "left_out": left_out, "cut": dict(collate.counts)},
    )


def describe_check(lengths: Sequence[int], collate: ConversationCollator) -> str:
    """What came out of collating conversations of these lengths, once each."""
    if not lengths:
        return "no conversation was checked"
    counts = collate.counts
    return (
        f"{len(lengths):,} conversations checked: {min(lengths)} to {max(lengths)} tokens; in one epoch "
        f"{counts['over_max_length']:,} pairs are over max_length and {counts['over_max_turns']:,} over max_turns; "
        f"{counts['kept_in_order']:,} conversations cannot be shuffled"
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
        return forward(**batch, num_items_in_batch=items, use_cache=False).loss

    return compute_loss
