"""`defocus-mllm new`: a multimodal model out of an encoder and a language model, ready for stage 1.

defocus-mllm new --vision outputs/quickstart/stage0_vision --language models/qwen3 --output models/mine
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging as transformers_logging

from .assemble import Assembly, assemble, load_encoder, load_language, new_encoder
from .configuration_defocus import PRESETS
from .files import refuse_existing, written_whole

_NAMES = ("--vision", "--language")
_HEADER = ("part", "", "from", "parameters")


def add_new_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `defocus-mllm new`."""
    add = parser.add_argument
    add("--vision", metavar="DIR", required=True, help="encoder: a folder, or a preset's name for random weights")
    add("--language", metavar="DIR", required=True, help="folder of any causal language model, with its tokenizer")
    add("--output", metavar="DIR", required=True, help="folder to create")
    add("--projector", choices=("mlp2x_gelu", "linear"), default="mlp2x_gelu", help="default: %(default)s")


def run_new(arguments: argparse.Namespace) -> None:
    """Assemble, check against the language model, write, and print a table of the parts."""
    transformers_logging.disable_progress_bar()
    refuse_existing(arguments.output)
    preset = arguments.vision in PRESETS and not Path(arguments.vision).exists()
    if not preset and not Path(arguments.vision).is_dir():
        raise FileNotFoundError(
            f"--vision: {arguments.vision} is neither a folder nor a preset; presets are {', '.join(PRESETS)}"
        )
    language = load_language(arguments.language, "--language", "auto")
    dtype = language[0].dtype
    vision = new_encoder(arguments.vision, dtype) if preset else load_encoder(arguments.vision, "--vision", dtype)
    assembly = assemble(vision, language, arguments.projector, _NAMES)
    with written_whole(arguments.output) as folder:
        assembly.model.save_pretrained(folder)
        assembly.processor.save_pretrained(folder)
    if preset:
        print(f"note: --vision: {arguments.vision} is a preset, its weights are random", file=sys.stderr)
    for note in assembly.notes:
        print(f"note: {note}", file=sys.stderr)
    for line in _table(assembly, arguments):
        print(line)
    print(f"wrote {arguments.output}; `{arguments.language}` and it give the same logits on words")


def _table(assembly: Assembly, arguments: argparse.Namespace) -> list[str]:
    """One line a part: what it is, where its weights come from, how many it has."""
    model: Any = assembly.model
    vision, text = model.config.vision_config, model.config.text_config
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    head = "the input embedding" if tied else f"{text.hidden_size} to {text.vocab_size:,}"
    projector = f"{model.config.projector_type}, {vision.hidden_size} to {text.hidden_size}"
    rows = [
        ("encoder", f"{vision.mixer}, {vision.num_image_tokens} tokens", arguments.vision, model.model.vision_tower),
        ("projector", projector, "new", model.model.multi_modal_projector),
        ("decoder", f"{text.model_type}, {text.vocab_size:,} rows", arguments.language, model.model.language_model),
        ("output layer", head, arguments.language, None if tied else model.lm_head),
        ("together", str(model.dtype).removeprefix("torch."), "", model),
    ]
    cells = [(part, what, source, f"{_count(module):,}") for part, what, source, module in rows]
    widths = [max(len(row[column]) for row in [_HEADER, *cells]) for column in range(4)]
    return ["  ".join((*map(str.ljust, row[:3], widths), row[3].rjust(widths[3]))) for row in [_HEADER, *cells]]


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
