"""What stages 1 and 2 share: an MLLM loaded or put together, conversations, and the loss on their answers."""

from __future__ import annotations

from collections.abc import Sequence
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
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusImageProcessor,
    DefocusProcessor,
    DefocusVisionModel,
)
from training.arguments import MultimodalArguments
from training.checkpointing import load_strictly
from training.conversations import format_report, load_conversations
from training.loop import Batch, Stage, count_supervised
from training.sampling import SampleKey
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
        require_model_folder("model", arguments.model)
        model = load_strictly(AutoModelForImageTextToText, arguments.model, "model")
        processor = AutoProcessor.from_pretrained(arguments.model)
        if not isinstance(model, DefocusForConditionalGeneration):
            raise ValueError(f"model: {arguments.model} holds a {type(model).__name__}, not a De-focus MLLM")
        return Multimodal(model, processor, [])
    return compose(arguments)


def compose(arguments: MultimodalArguments) -> Multimodal:
    """Put an encoder and a causal language model together; only the projector between them is new."""
    require_model_folder("vision_model", arguments.vision_model)
    require_model_folder("language_model", arguments.language_model)
    vision = load_strictly(DefocusVisionModel, arguments.vision_model, "vision_model")
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
    model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    image_processor = DefocusImageProcessor.from_pretrained(arguments.vision_model)
    processor = DefocusProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        chat_template=None if set(CHAT_TOKENS) <= set(tokenizer.get_vocab()) else tokenizer.chat_template,
    )
    return Multimodal(model, processor, notes)


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, language: PreTrainedModel) -> list[str]:
    """Add the special tokens a De-focus MLLM needs and a foreign language model lacks; returns a line for the log.

    These are `<image>`, and the turn markers of our chat template where the tokenizer has no template of its own. The
    language model's embedding grows with the vocabulary if it must.
    """
    needed = ["<image>"]
    if not tokenizer.chat_template:
        needed += CHAT_TOKENS
    for role in ("bos_token", "eos_token"):
        if getattr(tokenizer, role) is None:
            raise ValueError(f"language_model: its tokenizer has no {role}, which the chat template needs")
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    added: dict[str, Any] = {"extra_special_tokens": missing} if missing else {}
    if tokenizer.pad_token is None:
        added["pad_token"] = "<pad>"
    if not added:
        return []
    tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    if len(tokenizer) > language.get_input_embeddings().weight.size(0):  # type: ignore[operator, union-attr]
        language.resize_token_embeddings(len(tokenizer))
    names = [*missing, *(["<pad>"] if "pad_token" in added else [])]
    return [f"added to the tokenizer of language_model: {', '.join(names)} ({len(tokenizer)} tokens now)"]


def require_model_folder(argument: str, path: str) -> None:
    """Raise `FileNotFoundError` unless `path` is a folder with a saved model (a hub name is not looked up)."""
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{argument}: {path} holds no trained model (no config.json in it)")


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
    num_pairs = 0

    def load_one(index: int) -> None:
        nonlocal num_pairs
        conversation = dataset[index]
        num_pairs += sum(message["role"] == "assistant" for message in conversation.messages)
        try:
            lengths.append(collate([conversation], [SampleKey(0, index)])["input_ids"].shape[1])
        except ValueError as error:
            raise ValueError(f"{arguments.data}: {conversation.record}: {error}") from error

    usable, left_out = usable_samples(len(dataset), arguments.check_images, load_one, arguments.on_bad_sample)

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return collate([dataset[usable[key.sample]] for key in keys], keys)

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        return forward(**batch, num_items_in_batch=items).loss

    first = collate.choose_turns(dataset[usable[0]], SampleKey(0, 0))
    lines = [*parts.notes, format_report(dataset.report), *(f"left out: {message}" for message in left_out)]
    if lengths:
        counts = collate.counts
        lines.append(
            f"{len(lengths):,} conversations checked: {min(lengths)} to {max(lengths)} tokens; of their {num_pairs:,} "
            f"pairs {counts['over_max_length']:,} are over max_length and {counts['over_max_turns']:,} over max_turns; "
            f"{counts['kept_in_order']:,} conversations cannot be shuffled"
        )
    lines.append(
        describe_supervision(processor.tokenizer, encode_conversation(processor, first, dataset[usable[0]].record))
    )
    return Stage(
        name=name,
        model=model,
        companions=[processor],
        components=components_of(model),
        num_samples=len(usable),
        load_batch=load_batch,
        count_items=count_supervised,
        compute_loss=compute_loss,
        sample_text="\n".join(lines),
        facts={"data_report": dataset.report, "left_out": left_out, "cut": dict(collate.counts)},
    )
