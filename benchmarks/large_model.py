"""A model larger than the memory it gets: initialised on meta, saved in shards, loaded with most of it on disk.

    python -m benchmarks.large_model [--layers 22] [--memory 900MB] [--folder DIR]

Prints after each step how much memory the process has taken at most.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import local_torch_dtype

from benchmarks.isolation import isolated
from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig


def report(text: str) -> None:
    """Print `text` and the largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"{text:84}  peak {peak:5.2f} GiB", flush=True)


def build_config(layers: int, hidden_size: int = 2048) -> DefocusConfig:
    """De-focus ViT-Base in front of a Llama of TinyLlama's shape (1.2 B parameters with 22 layers)."""
    text_config = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": 11 * hidden_size // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    }
    return DefocusConfig(vision_config=DefocusVisionConfig.from_preset("defocus_vit_base"), text_config=text_config)


def save_random(layers: int, hidden_size: int, folder: str, shard_size: str) -> None:
    """Write random weights in bfloat16; shards are of at most `shard_size`."""
    with local_torch_dtype(torch.bfloat16, DefocusForConditionalGeneration.__name__):
        model = DefocusForConditionalGeneration(build_config(layers, hidden_size))
    model.save_pretrained(folder, max_shard_size=shard_size)
    report(f"written in {len(list(Path(folder).glob('*.safetensors')))} shards")


def answer_offloaded(layers: int, hidden_size: int, folder: str, memory: str) -> dict[Any, int]:
    """Load with `memory` for weights and the rest on disk, answer once; returns how many modules lie where."""
    config = build_config(layers, hidden_size)
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=Path(folder) / "offload"
    ).eval()
    places = dict(Counter(model.hf_device_map.values()))
    report(f"loaded in {time.perf_counter() - start:.1f} s, modules: {places}")
    ids = torch.full((1, config.num_image_tokens + 2), 7)
    ids[:, 1:-1] = config.image_token_id
    size = config.vision_config.image_size  # type: ignore[union-attr]
    start = time.perf_counter()
    model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, size, size), max_new_tokens=2, do_sample=False)
    report(f"2 tokens about an image in {time.perf_counter() - start:.1f} s")
    return places


def main(arguments: list[str] | None = None) -> None:
    """Run the steps; see the head of this file."""
    from benchmarks import large_model  # another process finds functions by this name, which `__main__` is not

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="layers of the language model")
    parser.add_argument("--hidden_size", type=int, default=2048, help="its width")
    parser.add_argument("--memory", default="900MB", help="what the weights may take")
    parser.add_argument("--shard_size", default="300MB", help="largest file of weights")
    parser.add_argument("--folder", type=Path, help="where the weights go; a temporary folder unless given")
    options = parser.parse_args(arguments)
    config = build_config(options.layers, options.hidden_size)
    with torch.device("meta"):
        model = DefocusForConditionalGeneration(config)
    report(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters on meta")
    shape = {"layers": options.layers, "hidden_size": options.hidden_size}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # Each in a process of its own, whose peak is its own.
        isolated(large_model.save_random, **shape, folder=folder, shard_size=options.shard_size)
        isolated(large_model.answer_offloaded, **shape, folder=folder, memory=options.memory)


if __name__ == "__main__":
    main()
