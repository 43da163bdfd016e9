"""A step of stage 2 with LoRA: our encoders and LLaVA-1.5's with the same decoder, tokens/s and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.isolation import isolated
from benchmarks.memory import memory_now, peak_memory
from benchmarks.models import IMAGE_TOKEN, MIXER_NAMES, defocus_mllm, llava, question, random_images
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.sampling import Sample, observed_backends
from benchmarks.setting import Setting

LLAVA = "LLaVA-1.5 architecture"
_MODELS = {MIXER_NAMES["attention"]: "attention", MIXER_NAMES["mamba"]: "mamba", LLAVA: LLAVA}
_COMPARISONS = [Comparison(MIXER_NAMES["attention"], LLAVA), Comparison(MIXER_NAMES["mamba"], LLAVA)]
# LLaVA's recipe: every linear layer of the decoder, alpha twice the rank.
_LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def stage2_races(setting: Setting) -> list[Race]:
    """The time of a step in one process, and its peak memory in a process each."""
    sizes = setting.sizes
    image_tokens = setting.encoder_config("attention", sizes.mllm_image).num_image_tokens
    shapes: dict[str, Any] = {"batch": sizes.step_batch, "image tokens": image_tokens, "words": sizes.step_text}
    shapes |= {"decoder": dict(sizes.text), "LoRA rank": sizes.lora_rank, "gradient checkpointing": "decoder"}
    tokens = sizes.step_batch * (image_tokens + sizes.step_text)
    name = f"stage-2 step, {sizes.step_batch} x {image_tokens + sizes.step_text:,} tokens"
    return [
        Race(name, _timed(setting, tokens), _COMPARISONS, shapes, item="token"),
        Race(
            f"{name}, memory",
            lambda: [Contestant(title, _memory(setting, model)) for title, model in _MODELS.items()],
            _COMPARISONS,
            shapes,
            unit="bytes",
            warm_up=False,
        ),
    ]


def _timed(setting: Setting, tokens: int) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        steps = {title: training_step(setting, model) for title, model in _MODELS.items()}
        return [Contestant(title, setting.stopwatch.timed(step), items=tokens) for title, step in steps.items()]

    return build


def _memory(setting: Setting, model: str) -> Callable[[], Sample]:
    def sample() -> Sample:
        measured = isolated(stage2_memory, model=model, **setting.arguments)
        return Sample(measured["peak"] - measured["before"], measured["backends"])

    return sample


def stage2_memory(model: str, **setting_arguments: Any) -> dict[str, Any]:
    """Like `memory.training_step_memory`, for a step of stage 2; run in a process of its own."""
    setting = Setting.of(**setting_arguments)
    before = memory_now(setting.device)
    step = training_step(setting, model)
    with observed_backends() as backends:
        for _ in range(2):
            step()
    return {"peak": peak_memory(setting.device), "before": before, "backends": backends}


def training_step(setting: Setting, model: str) -> Callable[[], None]:
    """Forward, backward and AdamW as LLaVA trains with LoRA: encoder frozen, projector and LoRA matrices trained."""
    sizes = setting.sizes
    made = llava(setting, sizes.mllm_image) if model == LLAVA else defocus_mllm(setting, model, sizes.mllm_image)
    trained = with_lora(made, sizes.lora_rank)
    tokens = setting.encoder_config("attention", sizes.mllm_image).num_image_tokens
    ids = question(setting, tokens, sizes.step_batch, sizes.step_text)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    batch |= {"labels": ids.masked_fill(ids == IMAGE_TOKEN, -100)}
    batch |= {"pixel_values": random_images(setting, sizes.step_batch, sizes.mllm_image)}
    optimizer = torch.optim.AdamW(parameter for parameter in trained.parameters() if parameter.requires_grad)
    mixed = torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32)

    def step() -> None:
        with mixed:
            loss = trained(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def with_lora(model: Any, rank: int) -> torch.nn.Module:
    """`model` with LoRA matrices in its decoder, which is checkpointed; of the rest only the projector is trained."""
    model.model.language_model.activation_checkpointing_enable()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LORA_TARGETS)
    trained = get_peft_model(model, config)
    model.model.multi_modal_projector.requires_grad_(True)
    return trained.train()
