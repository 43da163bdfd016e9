"""What stages 1 and 2 share: an MLLM loaded or put together, conversations, and the loss on their answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from defocus_mllm import DefocusForConditionalGeneration
from defocus_mllm.assemble import Assembly, assemble, load_encoder, load_language
from defocus_mllm.loading import load_strictly
from training.arguments import MultimodalArguments
from training.bad_samples import SAMPLE_ERRORS, BadSamples
from training.conversations import SourceOptions, format_report, open_conversations
from training.encoding import encoder_for
from training.labels import NAMED_IN_MESSAGE
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
    bad = BadSamples(arguments.on_bad_sample, arguments.max_bad_samples)
    sources = [SourceOptions(**source) for source in arguments.sources()]
    dataset = open_conversations(sources, bad, arguments.mixture_strategy, arguments.seed)
    collate = ConversationCollator(
        processor, arguments.shuffle_turns, arguments.max_turns or None, arguments.max_length, arguments.seed, bad.skips
    )
    lengths: list[int] = []

    def load_one(index: int) -> None:
        conversation = dataset[index]
        try:
            lengths.append(len(collate.example(conversation, SampleKey(0, index))["input_ids"]))
        except SAMPLE_ERRORS as error:
            bad.add([dataclasses.replace(conversation.bad(error), found="before training")])
            raise ValueError(f"{conversation.source}: {error}") from error

    usable, left_out = usable_samples(len(dataset), arguments.check_images, load_one, arguments.on_bad_sample)
    bad.check()

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return collate([dataset[usable[key.sample]] for key in keys], keys)

    def count_items(batch: Batch) -> int:
        bad.take_from(batch)
        return count_supervised(batch)

    first = dataset[usable[0]]
    example = encode_conversation(processor, collate.choose_turns(first, SampleKey(0, 0)), first.record)
    left_out = left_out[:NAMED_IN_MESSAGE]
    lines = [*parts.notes, format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    lines += [describe_check(lengths, collate), describe_supervision(processor.tokenizer, example)]
    return Stage(
        name=name,
        model=model,
        companions=[processor],
        components=components_of(model),
        num_samples=len(usable),
        load_batch=load_batch,
        count_items=count_items,
        compute_loss=answer_loss(model),
        sample_text="\n".join(lines),
        facts={"data_report": dataset.report, "left_out": left_out, "cut": dict(collate.counts)},
        begin=partial(bad.begin, arguments.output_dir),
        conclude=lambda: {"bad_samples": bad.by_cause()},
    )


def describe_check(lengths: Sequence[int], collate: ConversationCollator) -> str:
    """What came out of collating conversations of these lengths, once each."""
    if not lengths:
        return "no conversation was checked"
    counts, animated = collate.counts, encoder_for(collate.processor).pixels.num_animated
    return (
        f"{len(lengths):,} conversations checked: {min(lengths)} to {max(lengths)} tokens; in one epoch "
        f"{counts['over_max_length']:,} pairs are over max_length and {counts['over_max_turns']:,} over max_turns; "
        f"{counts['kept_in_order']:,} conversations cannot be shuffled; {animated:,} images are animated, of which the "
        "first frame is used"
    )


def answer_loss(model: DefocusForConditionalGeneration) -> Callable[[nn.Module, Batch, int], torch.Tensor]:
    """The loss on answers and ends of turn; a batch without images gives the image side zero gradients.

    Without any gradient a run that trains only the image side could not step, and other processes would wait for it.
    """
    image_side = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        loss = forward(**batch, num_items_in_batch=items, use_cache=False).loss
        if "pixel_values" not in batch:
            loss = loss + sum(0.0 * parameter.sum() for parameter in image_side if parameter.requires_grad)
        return loss

    return compute_loss
