"""A data set and models so small that a whole stage 2 takes seconds: for commands that prove something about training.

Pictures of one colour, questions about them, an encoder and a language model of two layers each with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from defocus_mllm import DefocusImageProcessor, DefocusVisionConfig, DefocusVisionModel
from training.tokenizer import train_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
SIDE = 16
"""Height and width of the pictures in pixels."""
VOCABULARY = 290
_LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_toy(folder: Path, seed: int) -> list[str]:
    """Write data and models into `folder`; returns the words that `python -m training.stage2` needs to use them.

    Attention of the language model has dropout, so that the state of the random generator matters.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number in range(16):
        colour = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (SIDE, SIDE), COLOURS[colour]).save(images / f"{number}.png")
        turns = [("<image>\nwhat color is it?", colour), (f"is it {colour}?", "yes"), ("is it black?", "no")]
        values = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        records.append({"id": number, "image": f"{number}.png", "conversations": values})
    data = folder / "conversations.json"
    data.write_text(json.dumps(records), encoding="utf-8")
    torch.manual_seed(seed)
    vision, language = folder / "vision", folder / "language"
    DefocusVisionModel(DefocusVisionConfig(image_size=SIDE, patch_size=8, **_LAYERS)).save_pretrained(vision)
    DefocusImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(vision)
    texts = [value["value"].replace("<image>", "") for record in records for value in record["conversations"]]
    tokenizer = train_tokenizer(texts, VOCABULARY, language)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.1, **_LAYERS, **ids)
    LlamaForCausalLM(config).save_pretrained(language)
    words = ["--vision_model", str(vision), "--language_model", str(language)]
    words += ["--data", str(data), "--image_root", str(images), "--shuffle_turns", "--cpu"]
    return [*words, "--train", "projector", "language_model", "vision_tower"]
