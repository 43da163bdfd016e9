"""What stages 1 and 2 share: an MLLM loaded or put together, conversations, and the loss on their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from defocus_mllm import (
    DefocusCLIPConfig,
    DefocusCLIPModel,
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusImageProcessor,
    DefocusProcessor,
    DefocusVisionModel,
)
from defocus_mllm.loading import load_strictly
from training.arguments import MultimodalArguments
from training.conversations import format_report, load_conversations
from training.sampling import SampleKey
from training.stage import Batch, Stage, count_supervised
from training.stages import usable_samples
from training.supervision import ConversationCollator, describe_supervision, encode_conversation

CHAT_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")


@dataclass
class Multimodal:
    """A model, its processor, and what had to be added to make them fit."""

    model: DefocusForConditionalGeneration
    processor: DefocusProcessor
    notes: list[str]


def load_or_compose(arguments: MultimodalArguments) -> Multimodal:
    """The model `arguments` name, in float32: from `model`, or from `vision_model` and `language_model`.

    Raises `FileNotFoundError` or `ValueError` naming the argument and the folder.
    """
    if arguments.model:
        model = load_strictly(AutoModelForImageTextToText, arguments.model, "model")
        processor = AutoProcessor.from_pretrained(arguments.model)
        if not isinstance(model, DefocusForConditionalGeneration):
            raise ValueError(f"model: {arguments.model} holds a {type(model).__name__}, not a De-focus MLLM")
        return Multimodal(model, processor, [])
    return compose(arguments)


def compose(arguments: MultimodalArguments) -> Multimodal:
    """Put an encoder and a causal language model together; only the projector between them is new."""
    vision = load_encoder(arguments.vision_model)
    language = load_strictly(AutoModelForCausalLM, arguments.language_model, "language_model")
    tokenizer = AutoTokenizer.from_pretrained(arguments.language_model)
    tokenizer.padding_side = "left"  # what generation needs, and what is saved; training pads on the right by itself
    notes = complete_tokenizer(tokenizer, language)
    config = DefocusConfig(
        vision_config=vision.config,
        text_config=language.config,
        projector_type=arguments.projector_type,
        image_token_id=tokenizer.get_vocab()["<image>"],
    )
    model = DefocusForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.base_model.state_dict())
    model.lm_head.load_state_dict(language.get_output_embeddings().state_dict(), strict=False)
    check_head(model, language)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    image_processor = DefocusImageProcessor.from_pretrained(arguments.vision_model)
    processor = DefocusProcessor(image_processor, tokenizer, num_image_tokens=config.num_image_tokens)
    return Multimodal(model, processor, notes)


def load_encoder(folder: str) -> DefocusVisionModel:
    """The encoder in `folder`: saved alone, with classification heads, or as a part of a contrastive model.

    Raises `FileNotFoundError` or `CheckpointError`.
    """
    config = Path(folder) / "config.json"
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if kind == DefocusCLIPConfig.model_type:
        return load_strictly(DefocusCLIPModel, folder, "vision_model").vision_model
    return load_strictly(DefocusVisionModel, folder, "vision_model")


def check_head(model: DefocusForConditionalGeneration, language: PreTrainedModel) -> None:
    """Raise `ValueError` unless the composed model gives the language model's own logits on words.

    Some decoders do more than one matrix product after the last layer (a bias, scaled or soft-capped logits); composed
    without it they would silently be another model.
    """
    input_ids = torch.arange(4, 12).remainder(language.config.vocab_size)[None]
    input_ids[input_ids == model.config.image_token_id] = 0
    with torch.no_grad():
        own, composed = language.eval()(input_ids).logits, model.eval()(input_ids).logits
    # small logits hardly show a soft cap, so it is asked for too
    capped = getattr(language.config, "final_logit_softcapping", None) is not None
    if capped or not torch.allclose(own, composed, rtol=1e-3, atol=1e-4 * own.abs().max().item()):
        raise ValueError(
            f"language_model: the output layer of {language.config.model_type!r} does more than a matrix product, "
            "which is not supported; choose another language model"
        )


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, language: PreTrainedModel) -> list[str]:
    """Add the special tokens that our chat template needs and a foreign language model lacks; returns log lines.

    The embedding grows with the vocabulary if it must. Raises `ValueError` for a tokenizer without an end of turn.
    """
    if tokenizer.eos_token is None:
        raise ValueError("language_model: its tokenizer has no eos_token, which ends every turn")
    missing = [token for token in ("<image>", *CHAT_TOKENS) if token not in tokenizer.get_vocab()]
    added: dict[str, Any] = {"extra_special_tokens": missing} if missing else {}
    if tokenizer.pad_token is None:
        added["pad_token"] = "<pad>"
    notes = []
    if tokenizer.chat_template:
        notes.append("the chat template of language_model is replaced by the one of De-focus MLLM")
        tokenizer.chat_template = None
    if added:
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
        if len(tokenizer) > language.get_input_embeddings().weight.size(0):  # type: ignore[operator, union-attr]
            language.resize_token_embeddings(len(tokenizer))
        names = [*missing, *(["<pad>"] if "pad_token" in added else [])]
        notes.append(f"added to the tokenizer of language_model: {', '.join(names)} ({len(tokenizer)} tokens now)")
    return notes


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
