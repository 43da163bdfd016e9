"""Chat templates by name, and the change from one to another; a processor's `chat_template` is what holds afterwards.

`plain`, `vicuna_v1` and `llama_2` write what LLaVA writes, byte for byte (llava/conversation.py; an image is moved to
the front as by its preprocess_multimodal). LLaVA leaves the beginning token to the tokenizer; where this has one, other
than its end token, and does not add it, the template writes it. `</s>` and `<s>` stand for the tokenizer's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processing_defocus import DEFAULT_CHAT_TEMPLATE, PARTS_MACRO

IMAGE_TOKEN = "<image>"
DEFAULT = "defocus"
TOKENIZER = "tokenizer"

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)

# The image of a message that has one stands in front, and the message is stripped, as LLaVA does. It takes no more than
# one image a message; several stay where they are written.
_ASKED_MACRO = """\
{%- macro asked(content) -%}
{%- set images = [] if content is string else content | selectattr('type', 'equalto', 'image') | list -%}
{%- if images | length == 1 -%}
{{- ('<image>\\n' ~ (parts(content | rejectattr('type', 'equalto', 'image') | list) | trim)) | trim -}}
{%- else -%}{{- parts(content) -}}
{%- endif -%}
{%- endmacro -%}
"""
_DIALOGUE = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = parts(messages[0]['content']) -%}{%- set dialogue = messages[1:] -%}
{%- else -%}
{%- set system = default_system -%}{%- set dialogue = messages -%}
{%- endif -%}
{%- for message in dialogue -%}
{%- if message['role'] != ('user', 'assistant')[loop.index0 % 2] -%}
{{ raise_exception('user and assistant must take turns, behind at most one system message') }}
{%- endif -%}
{%- endfor -%}
"""
_VICUNA_V1 = (
    PARTS_MACRO
    + _ASKED_MACRO
    + f'{{%- set default_system = "{VICUNA_SYSTEM}" -%}}\n'
    + _DIALOGUE
    + """\
{{- system ~ ' ' -}}
{%- for message in dialogue -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' ~ asked(message['content']) ~ ' ' -}}
{%- else -%}
{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' ~ parts(message['content']) ~ eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)
_LLAMA_2 = (
    PARTS_MACRO
    + _ASKED_MACRO
    + '{%- set default_system = "'
    + LLAMA_2_SYSTEM.replace("\n", "\\n")
    + '" -%}\n'
    + _DIALOGUE
    + """\
{%- set begin = bos_token if bos_token is defined and bos_token and bos_token != eos_token else '' -%}
{%- for message in dialogue -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] <<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if loop.first else begin ~ '[INST] ' -}}
{{- asked(message['content']) ~ ' [/INST]' -}}
{%- else -%}
{%- generation -%}{{- ' ' ~ parts(message['content']) ~ ' ' ~ eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
)
# The standard form, with a line break behind each turn; LLaVA's chatml_direct has none.
_CHATML = (
    PARTS_MACRO
    + """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- parts(message['content']) ~ '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- elif message['role'] in ('system', 'user') -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ parts(message['content']) ~ '<|im_end|>\\n' -}}
{%- else -%}{{ raise_exception('roles are system, user and assistant, not ' ~ message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)
# A caption behind its image and nothing else: what the question says is left out, and there is no end token.
_PLAIN = (
    PARTS_MACRO
    + """\
{%- if messages | map(attribute='role') | list not in (['user'], ['user', 'assistant']) -%}
{{ raise_exception('the template plain takes one image with its caption, not a conversation') }}
{%- endif -%}
{%- set content = messages[0]['content'] -%}
{%- set images = [] if content is string else content | selectattr('type', 'equalto', 'image') | list -%}
{%- if not images -%}{{ raise_exception('the template plain needs an image') }}{%- endif -%}
{%- for image in images -%}{{ '<image>' }}{%- endfor -%}
{%- if messages | length == 2 -%}
{%- generation -%}{{- parts(messages[1]['content']) ~ '\\n' -}}{%- endgeneration -%}
{%- endif -%}
"""
)
# Templates of language models take a text, so parts become one; everything else is the template's own.
_FLATTEN = (
    PARTS_MACRO
    + """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set flat.messages = flat.messages + [dict(message, content=parts(message['content']))] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}{{- '' }}"""
)
_BEGIN = "{{- bos_token -}}\n"
_BUILT_IN = {
    DEFAULT: DEFAULT_CHAT_TEMPLATE,
    "plain": _PLAIN,
    "vicuna_v1": _VICUNA_V1,
    "chatml": _CHATML,
    "llama_2": _LLAMA_2,
}
_TOKENS = {DEFAULT: ("<|user|>", "<|assistant|>", "<|system|>"), "chatml": ("<|im_start|>", "<|im_end|>")}
NAMES = (*_BUILT_IN, TOKENIZER)
CHAT_TOKENS = tuple(token for tokens in _TOKENS.values() for token in tokens)
"""Special tokens that templates may have added to a vocabulary."""


@dataclass(frozen=True)
class ChosenTemplate:
    """A template for one tokenizer."""

    name: str
    text: str
    """Jinja, with `<image>` for an image."""
    tokens: tuple[str, ...]
    """Special tokens it writes that not every tokenizer has, `<image>` included."""


def choose_template(name: str, tokenizer: Any, argument: str = "chat_template") -> ChosenTemplate:
    """The template that `name` stands for: one of `NAMES`, or a file `*.jinja`.

    Raises ValueError or FileNotFoundError that begins with `argument`.
    """
    if name == TOKENIZER:
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError(
                f"{argument}: this tokenizer has no chat template of its own; take one of "
                f"{', '.join(_BUILT_IN)}, or a file with one (*.jinja)"
            )
        return ChosenTemplate(name, _FLATTEN + tokenizer.chat_template, (IMAGE_TOKEN,))
    if name.endswith(".jinja"):
        return ChosenTemplate(name, _read(Path(name), argument), (IMAGE_TOKEN,))
    if name not in _BUILT_IN:
        raise ValueError(f"{argument}: {name!r} is none of {', '.join(NAMES)}, nor a file *.jinja")
    text = _BUILT_IN[name]
    if name != DEFAULT and _has_to_write_begin(tokenizer, name):
        text = _BEGIN + text
    return ChosenTemplate(name, text, (IMAGE_TOKEN, *_TOKENS.get(name, ())))


def name_of(template: str, image_token: str = IMAGE_TOKEN) -> str:
    """The name of a built-in template, or "of its own"."""
    text = template.replace(image_token, IMAGE_TOKEN).removeprefix(_BEGIN)
    return next((name for name, known in _BUILT_IN.items() if known == text), "of its own")


def end_ids(processor: Any) -> int | list[int]:
    """The tokens at which generation stops: those that end answers, and the tokenizer's end token.

    A list if there are several, as a generation configuration holds them.
    """
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    chat = processor.encode_chat([question, {"role": "assistant", "content": "A bus."}])
    ends = dict.fromkeys([*(end for end in chat.ends if end is not None), processor.tokenizer.eos_token_id])
    return list(ends) if len(ends) > 1 else next(iter(ends))


def _has_to_write_begin(tokenizer: Any, name: str) -> bool:
    """Whether there is a beginning token that the tokenizer does not write, nor the template as its first mark."""
    begin = tokenizer.bos_token
    if begin is None or begin == tokenizer.eos_token or (name == "chatml" and begin == "<|im_start|>"):
        return False
    return tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]


def _read(path: Path, argument: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {path}")
    text = path.read_text(encoding="utf-8")
    if "messages" not in text:
        raise ValueError(f"{argument}: {path} is no chat template; it does not mention `messages`")
    return text
