"""Every mixer joined to every decoder, tiny, and the conversations that generation is tested with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from defocus_mllm import DefocusImageProcessor, DefocusVisionConfig, DefocusVisionModel
from defocus_mllm.assemble import assemble, load_language

sys.path.insert(0, str(Path(__file__).parent))

from decoders import save_decoder

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {},
    "retention": {},
    "mamba": {"state_size": 4, "time_step_rank": 2, "conv_kernel": 2, "group_norm_size": 8},
}
NEW_TOKENS = 5
LENGTH = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
GREEDY: dict[str, Any] = {**LENGTH, "do_sample": False}
NAMES = ("--vision", "--language")


@dataclass
class Cell:
    """One combination: the multimodal model, its processor and the language model whose decoder it shares."""

    mixer: str
    decoder: str
    model: Any
    processor: Any
    language: Any


def build_encoder(mixer: str) -> tuple[Any, Any]:
    """A random encoder of 16 x 16 pixels in 5 tokens, whose outputs differ much from image to image."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    shape: dict[str, Any] = {"image_size": 16, "patch_size": 8, "initializer_range": 0.4, "mixer": mixer}
    config = DefocusVisionConfig(**sizes, **shape, **MIXERS[mixer])
    return DefocusVisionModel(config), DefocusImageProcessor(size={"height": 16, "width": 16})


def build_language(folder: Path, decoder: str) -> tuple[Any, Any]:
    """A random decoder with an output layer and its tokenizer, for all mixers."""
    torch.manual_seed(0)
    return load_language(str(save_decoder(folder, decoder)), NAMES[1], torch.float32)


def build_cell(mixer: str, decoder: str, language: tuple[Any, Any]) -> Cell:
    """The multimodal model of this mixer around `language`."""
    torch.manual_seed(1)
    assembly = assemble(build_encoder(mixer), language, "linear", NAMES)
    return Cell(mixer, decoder, assembly.model.eval(), assembly.processor, language[0])


def picture(number: int) -> Image.Image:
    """The same coloured noise for the same number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def message(*parts: str | int, role: str = "user") -> dict[str, Any]:
    """Texts, and the numbers of pictures, in the order in which they stand in the message."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": picture(part)}
        for part in parts
    ]
    return {"role": role, "content": content}


RAGGED = [
    [message("word1 word2", 0, "word3", 1, "word4")],
    [message(2, "word5 word6 word7")],
    [message("word8 word9")],
]
"""Three conversations with two, one and no images, of different lengths."""
CHAT = [
    message(3, "word1 word2"),
    message("word3", role="assistant"),
    message("word4", 4, 5, "word5 word6"),
    message("word7 word3", role="assistant"),
    message("word8"),
]
"""Turns with images between words. What ends it ended an earlier turn too, and there an image followed."""


def encode(cell: Cell, conversations: list[Any]) -> dict[str, torch.Tensor]:
    """The inputs of `generate`, padded on the left."""
    inputs = cell.processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return dict(inputs)


def answers(cell: Cell, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """What `generate` adds to each row."""
    sequences = cell.model.generate(**inputs, **{**GREEDY, **options})
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def answers_alone(cell: Cell, conversations: list[Any], **options: Any) -> list[list[int]]:
    """What `generate` adds to each conversation when it is the only one."""
    return [row for conversation in conversations for row in answers(cell, encode(cell, [conversation]), **options)]
