"""The language half of stage 0: a small decoder-only model learns to read, where no pre-trained one is given."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from defocus_mllm import DefocusImageProcessor, DefocusProcessor
from training.argument_parsing import check_names
from training.arguments import Stage0LanguageArguments
from training.conversations import Conversation, load_conversations
from training.encoding import Example, message_parts
from training.sampling import SampleKey
from training.stage import Batch, Stage, count_supervised
from training.supervision import describe_supervision, encode_conversation, pad_examples
from training.tokenizer import read_texts, train_tokenizer

CONVERSATION_SUFFIXES = (".json", ".jsonl")


def build_language(arguments: Stage0LanguageArguments) -> Stage:
    """A decoder-only model built from `text_config`, a tokenizer, and the text.

    Raises `ValueError` naming the file, or the sample that is longer than `max_length`.
    """
    samples: Sequence[str | Conversation]
    if Path(arguments.text).suffix in CONVERSATION_SUFFIXES:
        samples = read_dialogues(arguments.text)
    else:
        samples = read_texts(arguments.text)
    corpus = [line for sample in samples for line in lines_of(sample)]
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    else:
        with tempfile.TemporaryDirectory(prefix="defocus-tokenizer-") as folder:
            tokenizer = train_tokenizer(corpus, arguments.vocab_size, folder)
    examples = [encode_sample(sample, tokenizer) for sample in samples]
    for sample, example in zip(samples, examples, strict=True):
        if len(example["input_ids"]) > arguments.max_length:
            name = getattr(sample, "record", f"the sample {str(sample)[:60]!r}")
            raise ValueError(
                f"{arguments.text}: {name} has {len(example['input_ids'])} tokens, more than max_length "
                f"{arguments.max_length}; split it or raise max_length"
            )
    model = AutoModelForCausalLM.from_config(language_config(arguments.text_config, tokenizer))

    def load_batch(keys: Sequence[SampleKey]) -> Batch:
        return pad_examples([examples[key.sample] for key in keys], tokenizer.pad_token_id)

    def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        return forward(**batch, num_items_in_batch=items, use_cache=False).loss

    return Stage(
        name="stage0_language",
        model=model,
        companions=[tokenizer],
        components={"language_model": [model]},
        num_samples=len(examples),
        load_batch=load_batch,
        count_items=count_supervised,
        compute_loss=compute_loss,
        unit="tokens",
        sample_text=describe_supervision(tokenizer, examples[0]),
        facts={"samples": len(samples), "vocabulary": len(tokenizer)},
    )


def read_dialogues(path: str) -> list[Conversation]:
    """Conversations without images. Raises `ValueError` naming the file and the first record that shows one."""
    dataset = load_conversations(path)
    for dialogue in dataset:
        if any(part["type"] == "image" for message in dialogue.messages for part in message_parts(message)):
            raise ValueError(f"{path}: {dialogue.record} shows an image; a language model learns from text alone")
    return list(dataset)


def lines_of(sample: str | Conversation) -> list[str]:
    """The lines of all its texts, which is what a tokenizer is trained on."""
    if isinstance(sample, str):
        return [sample]
    texts = [part["text"] for message in sample.messages for part in message_parts(message)]
    return [line for text in texts for line in text.splitlines() if line]


def encode_sample(sample: str | Conversation, tokenizer: Any) -> Example:
    """`input_ids` and `labels`, each (tokens,): of a text, which is learnt whole, or of a dialogue's answers."""
    if isinstance(sample, Conversation):
        processor = _text_processor(tokenizer)
        return encode_conversation(processor, sample.messages, sample.record)
    ids = tokenizer(sample, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    input_ids = torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}


@lru_cache(maxsize=1)
def _text_processor(tokenizer: Any) -> DefocusProcessor:
    """Renders dialogues as stages 1 and 2 will; its image side is not used."""
    return DefocusProcessor(DefocusImageProcessor(), tokenizer)


def language_config(text_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration `text_config` describes, with the tokenizer's vocabulary and special tokens.

    Raises `ValueError` naming a field that this kind of model does not have.
    """
    fields = dict(text_config)
    kind = fields.pop("model_type")
    try:
        valid = AutoConfig.for_model(kind).to_dict()
    except ValueError as error:
        raise ValueError(f"text_config: unknown model_type {kind!r}") from error
    check_names(fields, sorted(valid), "text_config")
    fields.setdefault("vocab_size", len(tokenizer))
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(f"text_config: vocab_size {fields['vocab_size']} is below the tokenizer's {len(tokenizer)}")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(kind, **{**special, **fields})
