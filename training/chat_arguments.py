"""Arguments of how conversations are written; one dataclass that the stages on conversations share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ChatArguments:
    """The chat template."""

    chat_template: str = ""
    """plain, vicuna_v1, chatml, llama_2, defocus, tokenizer (its own), FILE.jinja; empty: the model's, or defocus."""
