"""The benchmarks by name, and what runs each of them."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.attention import attention_races
from benchmarks.encoders import encoder_races
from benchmarks.first_answer import first_answer_races
from benchmarks.growth import growth_races
from benchmarks.memory import memory_races
from benchmarks.mllm import mllm_races
from benchmarks.pushes import push_races
from benchmarks.races import Race, run_race
from benchmarks.setting import SUITES, Setting
from benchmarks.stage2 import stage2_races
from defocus_mllm.console import one_line


@dataclass(frozen=True)
class Benchmark:
    """Races that belong together."""

    name: str
    description: str
    races: Callable[[Setting], list[Race]]
    shows: tuple[str, ...] = ()
    """The claims it judges."""
    suites: tuple[str, ...] = SUITES


_ALL = (
    Benchmark(
        "attention",
        "the attention core against scaled_dot_product_attention, forward and forward + backward",
        attention_races,
        ("attention_short", "attention_long", "attention_bidirectional", "attention_backward"),
    ),
    Benchmark(
        "encoders",
        "whole encoders against CLIPVisionModel and MambaModel",
        encoder_races,
        ("vit_forward", "mamba_plain", "mamba_compiled", "mamba_forward"),
    ),
    Benchmark("memory", "peak memory of one training step of an encoder", memory_races, ("mamba_memory",)),
    Benchmark(
        "growth",
        "time per token from short to long sequences",
        growth_races,
        ("growth_retention", "growth_mamba", "growth_attention"),
    ),
    Benchmark("stream", "what the next row of a stream costs", push_races, ("push_retention", "push_mamba")),
    Benchmark(
        "first_answer",
        "from the last row of an image to the first answer token, stream against batch path",
        first_answer_races,
        ("first_answer",),
    ),
    Benchmark(
        "mllm",
        "time to first token and decoding against LlavaForConditionalGeneration",
        mllm_races,
        ("first_token", "decoding"),
    ),
    Benchmark("stage2", "a training step with LoRA against the LLaVA-1.5 architecture", stage2_races, suites=("gpu",)),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
"""Every benchmark by its name, in the order in which they run."""


def benchmarks_of(suite: str) -> list[Benchmark]:
    """The benchmarks of a suite."""
    return [benchmark for benchmark in BENCHMARKS.values() if suite in benchmark.suites]


def perform(benchmark: str, **setting_arguments: Any) -> list[dict[str, Any]]:
    """Run every race of a benchmark, in this process.

    Args:
        benchmark: its name.
        setting_arguments: see `Setting.of`.

    Returns:
        What `results.json` holds of the races; one that could not even begin has an `error`.
    """
    setting = Setting.of(**setting_arguments)
    results = []
    for race in BENCHMARKS[benchmark].races(setting):
        try:
            results.append(run_race(race, setting.rules))
        except Exception as error:
            traceback.print_exc()
            results.append({"title": race.title, "error": f"{type(error).__name__}: {one_line(error)}"})
        gc.collect()
        if setting.device != "cpu":
            torch.cuda.empty_cache()
    facts = {"device": setting.device, "dtype": str(setting.dtype).removeprefix("torch.")}
    return [{**result, **facts, "threads": torch.get_num_threads()} for result in results]
