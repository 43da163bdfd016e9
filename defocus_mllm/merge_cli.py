"""`defocus-mllm merge`: an ordinary model out of a LoRA adapter and its base model, written only if it is the same.

defocus-mllm merge outputs/llava15/stage2_lora --output models/merged
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging as transformers_logging

from .adapter_base import check_base
from .assemble_checks import random_words
from .files import refuse_existing, written_whole
from .loading import load_strictly

TOLERANCE = 1e-5
"""Largest difference of a logit that is still rounding, as a share of the largest logit."""


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `defocus-mllm merge`."""
    parser.add_argument("adapter", metavar="DIR", help="folder of an adapter: a run's output_dir or a checkpoint of it")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to create")


def run_merge(arguments: argparse.Namespace) -> None:
    """Merge in float32, compare, write, read back, compare again.

    Raises:
        FileNotFoundError, CheckpointError: adapter or base model are not there, or not whole.
        ValueError: the base model has changed since the adapter was trained, or the merged model gives other logits;
            nothing is written then.
        FileExistsError: there is something at the place to write to.
    """
    from peft import PeftConfig  # takes seconds, which no other command should wait for

    from .adapters import load_adapter

    transformers_logging.disable_progress_bar()
    refuse_existing(arguments.output)
    model: Any = load_adapter(arguments.adapter).eval()
    base = str(PeftConfig.from_pretrained(arguments.adapter).base_model_name_or_path)
    notes = check_base(arguments.adapter, base)
    own = (Path(arguments.adapter) / "processor_config.json").is_file()
    processor = AutoProcessor.from_pretrained(arguments.adapter if own else base, local_files_only=True)
    probe = random_inputs(model)
    expected = logits_of(model, probe)
    with written_whole(arguments.output) as folder:
        merged = model.merge_and_unload()
        if (Path(arguments.adapter) / "generation_config.json").is_file():
            merged.generation_config = GenerationConfig.from_pretrained(arguments.adapter)
        difference = check_same(merged, probe, expected, "the merged model")
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        del model, merged  # the next one is as large
        again = load_strictly(AutoModelForImageTextToText, folder, "the merged model").eval()
        check_same(again, probe, expected, "the merged model read from its files")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"wrote {arguments.output}: on random words and pixels its logits differ from those of the adapter on {base} "
        f"by {difference:.1e} of the largest at most"
    )


def random_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Two sequences of random words around a picture of noise each, the same in every run."""
    config = model.config
    words, vision = random_words(model), config.vision_config
    middle = words.size(1) // 2
    pictures = torch.full((len(words), config.num_image_tokens), config.image_token_id)
    generator = torch.Generator().manual_seed(0)
    size = (len(words), vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": torch.cat([words[:, :middle], pictures, words[:, middle:]], dim=1),
        "pixel_values": torch.randn(size, generator=generator),
    }


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, tokens, vocabulary)"""
    return model(**inputs).logits


def check_same(model: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor, name: str) -> float:
    """The largest difference of the logits of `model` from `expected`, as a share of the largest logit.

    Raises `ValueError`, beginning with `name`, if it is above `TOLERANCE` or not a number.
    """
    difference = ((logits_of(model, inputs) - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{name} gives other logits than the adapter on its base model (by {difference:.1e} of the largest, more "
            f"than {TOLERANCE:.0e}); nothing was written"
        )
    return difference
