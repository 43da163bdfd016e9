"""A model larger than the memory it gets: initialised on meta, saved in shards, loaded with most of it on disk.

    python -m benchmarks.large_model [--layers 22] [--memory 900MB] [--folder DIR] [--output docs/results]

Prints after each step how much memory its process has taken at most, and writes large_model.json and large_model.md.
"""

from __future__ import annotations

import argparse
import resource
import shlex
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
from defocus_mllm.files import write_json_atomically, write_text_atomically
from defocus_mllm.provenance import commit, hardware, versions

SEED = 0


def report(text: str) -> dict[str, Any]:
    """Print and return `text` and the largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    print(f"{text:84}  peak {peak:5.2f} GiB", flush=True)
    return {"step": text, "peak_gib": round(peak, 2)}


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


def save_random(layers: int, hidden_size: int, folder: str, shard_size: str) -> list[dict[str, Any]]:
    """Write random weights in bfloat16, in shards of at most `shard_size`; returns the step that was reported."""
    torch.manual_seed(SEED)
    with local_torch_dtype(torch.bfloat16, DefocusForConditionalGeneration.__name__):
        model = DefocusForConditionalGeneration(build_config(layers, hidden_size))
    model.save_pretrained(folder, max_shard_size=shard_size)
    files = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    return [report(f"written in {len(files)} shards, {sum(files) / 2**30:.2f} GiB")]


def answer_offloaded(layers: int, hidden_size: int, folder: str, memory: str) -> list[dict[str, Any]]:
    """Load with `memory` for weights and the rest on disk, answer once; the first step says which modules lie where."""
    torch.manual_seed(SEED)
    config = build_config(layers, hidden_size)
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=Path(folder) / "offload"
    ).eval()
    places = dict(Counter(model.hf_device_map.values()))
    loaded = report(f"loaded in {time.perf_counter() - start:.1f} s, modules: {places}")
    ids = torch.full((1, config.num_image_tokens + 2), 7)
    ids[:, 1:-1] = config.image_token_id
    size = config.vision_config.image_size  # type: ignore[union-attr]
    start = time.perf_counter()
    model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, size, size), max_new_tokens=2, do_sample=False)
    return [loaded | {"places": places}, report(f"2 tokens about an image in {time.perf_counter() - start:.1f} s")]


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    machine = record["hardware"]
    rows = [f"| {step['step']} | {step['peak_gib']:.2f} GiB |" for step in record["steps"]]
    return "\n".join(
        [
            "# A model larger than the memory it gets",
            "",
            f"`{record['command']}`, commit {record['commit']}, seed {record['seed']}; {machine['processor']}, "
            f"{machine['cores']} cores, torch {record['versions']['torch']}, "
            f"transformers {record['versions']['transformers']}. Random weights in bfloat16.",
            "",
            f"The weights may take {record['memory']} when they are loaded. The peak is the resident memory of the "
            "step's own process, libraries included.",
            "",
            "| Step | Peak |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the steps; see the head of this file."""
    from benchmarks import large_model  # another process finds functions by this name, which `__main__` is not

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="layers of the language model")
    parser.add_argument("--hidden_size", type=int, default=2048, help="its width")
    parser.add_argument("--memory", default="900MB", help="what the weights may take")
    parser.add_argument("--shard_size", default="300MB", help="largest file of weights")
    parser.add_argument("--folder", type=Path, help="where the weights go; a temporary folder unless given")
    parser.add_argument("--output", type=Path, help="folder for large_model.json and large_model.md")
    options = parser.parse_args(arguments)
    with torch.device("meta"):
        model = DefocusForConditionalGeneration(build_config(options.layers, options.hidden_size))
    steps = [report(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters on meta")]
    shape = {"layers": options.layers, "hidden_size": options.hidden_size}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # Each in a process of its own, whose peak is its own.
        steps += isolated(large_model.save_random, **shape, folder=folder, shard_size=options.shard_size)
        steps += isolated(large_model.answer_offloaded, **shape, folder=folder, memory=options.memory)
    if options.output:
        words = sys.argv[1:] if arguments is None else arguments
        record = {
            "command": shlex.join(["python", "-m", "benchmarks.large_model", *words]),
            "commit": commit(Path(__file__).parent),
            "seed": SEED,
            "hardware": hardware(),
            "versions": versions(),
            "memory": options.memory,
            "steps": steps,
        }
        write_json_atomically(options.output / "large_model.json", record)
        write_text_atomically(options.output / "large_model.md", page(record))


if __name__ == "__main__":
    main()
