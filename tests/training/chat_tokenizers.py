"""Small tokenizers of the four kinds that language models bring, built here and offline; each with its own template."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from defocus_mllm import DefocusImageProcessor, DefocusProcessor
from defocus_mllm.chat_templates import TOKENIZER, choose_template

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is it? ASSISTANT: A bus.",
    "[INST] <<SYS>> You are a helpful, respectful and honest assistant. <</SYS>> Colour? [/INST] Red. \n\n",
    "system user assistant\n\nWhat is it?\nA bus.\nColour?\n\nRed.\nassistant\n\nuser\n\n",
] * 3
# How Llama 3 and Qwen part texts into words (tokenizer.json of either).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% else %}{{ raise_exception('no system message') }}"
    "{% endif %}{% endfor %}"
)
_LLAMA_3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@lru_cache(maxsize=8)
def _trained(kind: str) -> str:
    """A trained tokenizer as JSON."""
    words: Any = {
        "llama_3": pre_tokenizers.Split(Regex(_WORDS), "isolated"),
        "qwen": pre_tokenizers.Split(Regex(_WORDS.replace("{1,3}", "")), "isolated"),
    }
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind.startswith("llama_2"), fuse_unk=True, unk_token=None))
    special: list[Any] = []
    if kind.startswith("llama_2"):
        special = ["<unk>", "<s>", "</s>", *(f"<0x{code:02X}>" for code in range(256))]
        space: list[Any] = [normalizers.Replace(" ", "▁")]
        if kind == "llama_2_legacy":  # a space before every stretch of text, also behind special tokens
            space.insert(0, normalizers.Prepend("▁"))
        else:  # only before the first one
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.normalizer = normalizers.Sequence(space)
        alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif kind == "gpt_2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words[kind], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    if not kind.startswith("llama_2"):
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.decoder = decoders.ByteLevel()
    texts = [word for text in TEXTS for word in text.replace("\n", " ").split()] if special else TEXTS
    size = len(special) + len(alphabet) + 60
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    saved = json.loads(tokenizer.to_str())
    # The bytes are ordinary tokens.
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(saved)


def build_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A new tokenizer: "llama_2", "llama_2_legacy", "llama_3", "qwen" or "gpt_2"."""
    backend = Tokenizer.from_str(_trained(kind))
    named, more, template = {
        "llama_2": ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, [], _LLAMA_2_TEMPLATE),
        "llama_2_legacy": ({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, [], _LLAMA_2_TEMPLATE),
        "llama_3": (
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
            _LLAMA_3_TEMPLATE,
        ),
        "qwen": ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, ["<|im_start|>"], _QWEN_TEMPLATE),
        "gpt_2": ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, [], None),
    }[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=more, **named)
    if kind == "qwen":  # words that its templates use as marks
        tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    if named.get("bos_token") and kind != "gpt_2":
        begin = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.chat_template = template
    return tokenizer


def build_processor(kind: str, template: str, num_image_tokens: int = 2) -> DefocusProcessor:
    """A processor with that tokenizer and chat template, both completed as `assemble` does."""
    tokenizer = build_tokenizer(kind)
    chosen = choose_template(template, tokenizer)
    added: dict[str, Any] = {"extra_special_tokens": [t for t in chosen.tokens if t not in tokenizer.get_vocab()]}
    if tokenizer.pad_token is None:
        added["pad_token"] = "<pad>"
    tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    tokenizer.chat_template = None
    image_processor = DefocusImageProcessor(size={"height": 8, "width": 8})
    return DefocusProcessor(image_processor, tokenizer, num_image_tokens, chosen.text)


KINDS = ("llama_2", "llama_2_legacy", "llama_3", "qwen", "gpt_2")
TEMPLATES = ("defocus", "plain", "vicuna_v1", "chatml", "llama_2", TOKENIZER)
PAIRS = [
    (kind, template) for kind in KINDS for template in TEMPLATES if not (kind == "gpt_2" and template == TOKENIZER)
]
"""Every kind of tokenizer with every template; GPT-2 has none of its own."""
