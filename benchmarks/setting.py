"""Where a suite runs and how large everything is in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.races import Rules
from benchmarks.sampling import Stopwatch
from defocus_mllm import DefocusVisionConfig
from defocus_mllm.configuration_defocus import PRESETS

SUITES = ("cpu", "gpu")


@dataclass(frozen=True)
class Sizes:
    """The shapes of a suite."""

    encoders: Mapping[str, Mapping[str, Any]]
    """Mixer -> fields of the `DefocusVisionConfig` of its encoder."""
    core: tuple[int, int, int]
    """Attention core: batch, heads, channels of a head."""
    core_lengths: tuple[int, ...]
    """Attention core: tokens."""
    images: tuple[tuple[int, int], ...]
    """Encoders: (height and width in pixels, batch)."""
    encoder_backward: bool
    """Whether encoders are measured forward + backward too."""
    matmul: int
    """Side of the square matrices whose product shows what the machine can do."""
    step_image: tuple[int, int]
    """Memory of a training step: (height and width in pixels, batch)."""
    growth_batch: int
    growth_lengths: tuple[int, ...]
    """Growth: tokens."""
    row_tokens: int
    """Stream: tokens of a row."""
    rows: tuple[int, int]
    """Stream: the early and the late row."""
    attention_window: int
    """Stream: tokens that a bounded state of attention keeps exactly."""
    answer_image: int
    """Stream of the MLLM: height and width of its image, in pixels."""
    mllm_image: int
    """MLLM against LLaVA: height and width of its image, in pixels."""
    text: Mapping[str, Any]
    """Fields of the decoder's `LlamaConfig`."""
    prompt_tokens: int
    """Words of the question."""
    decoded_tokens: int
    """Words of the answer, where decoding is measured."""
    step_text: int
    """Stage-2 step: words of a sample."""
    step_batch: int
    """Stage-2 step: samples."""
    lora_rank: int
    """Stage-2 step: rank of the LoRA matrices."""


_LARGE_VIT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_SMALL_LLAMA = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
_LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
}

CPU_SIZES = Sizes(
    encoders={
        "attention": PRESETS["defocus_vit_base"],
        "retention": PRESETS["defocus_retnet_base"],
        "mamba": PRESETS["defocus_mamba_base"],
    },
    core=(4, 12, 64),
    core_lengths=(197, 577, 1025, 2305),
    images=((224, 4),),
    encoder_backward=False,
    matmul=2048,
    step_image=(224, 4),
    growth_batch=1,
    growth_lengths=(1024, 2048, 4096, 8192, 16384),
    row_tokens=32,
    rows=(2, 100),
    attention_window=256,
    answer_image=512,
    mllm_image=224,
    text=_SMALL_LLAMA,
    prompt_tokens=32,
    decoded_tokens=32,
    step_text=128,
    step_batch=2,
    lora_rank=128,
)
GPU_SIZES = Sizes(
    encoders={
        "attention": _LARGE_VIT,
        "retention": {**PRESETS["defocus_retnet_base"], **_LARGE_VIT},
        "mamba": PRESETS["defocus_mamba_large"],
    },
    core=(16, 16, 64),
    core_lengths=(577, 2305),
    images=((384, 16), (768, 4)),
    encoder_backward=True,
    matmul=8192,
    step_image=(384, 8),
    growth_batch=4,
    growth_lengths=(1024, 2048, 4096, 8192, 16384),
    row_tokens=32,
    rows=(2, 100),
    attention_window=256,
    answer_image=512,
    mllm_image=384,
    text=_LLAMA_7B,
    prompt_tokens=32,
    decoded_tokens=64,
    step_text=512,
    step_batch=8,
    lora_rank=128,
)
_TOY = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
TOY_SIZES = Sizes(
    encoders={
        "attention": {**PRESETS["defocus_vit_tiny"], **_TOY},
        "retention": {**PRESETS["defocus_retnet_tiny"], **_TOY},
        "mamba": {**PRESETS["defocus_mamba_tiny"], **_TOY},
    },
    core=(1, 2, 8),
    core_lengths=(17, 33),
    images=((32, 2),),
    encoder_backward=True,
    matmul=64,
    step_image=(32, 2),
    growth_batch=1,
    growth_lengths=(16, 32),
    row_tokens=4,
    rows=(2, 4),
    attention_window=4,
    answer_image=32,
    mllm_image=32,
    text={**_TOY, "num_attention_heads": 2, "vocab_size": 64},
    prompt_tokens=4,
    decoded_tokens=3,
    step_text=6,
    step_batch=2,
    lora_rank=2,
)
"""So small that a suite takes seconds; such numbers say nothing but that everything runs."""


@dataclass(frozen=True)
class Setting:
    """What every benchmark needs to know."""

    suite: str
    toy: bool
    sizes: Sizes
    device: str
    dtype: torch.dtype
    rules: Rules

    @classmethod
    def of(cls, suite: str, toy: bool, repeats: int = 5, seed: int = 0) -> Setting:
        """The setting of a suite; `toy` means toy sizes on the CPU.

        Raises `ValueError` where the suite needs a GPU and there is none.
        """
        dtype = torch.float32 if suite == "cpu" else torch.bfloat16
        if toy:
            return cls(suite, toy, TOY_SIZES, "cpu", dtype, Rules(repeats, seconds=0, seed=seed, judge=False))
        if suite == "gpu" and not torch.cuda.is_available():
            raise ValueError("--suite gpu needs a CUDA device and PyTorch sees none; --toy tries its code on the CPU")
        sizes, device = (CPU_SIZES, "cpu") if suite == "cpu" else (GPU_SIZES, "cuda")
        return cls(suite, toy, sizes, device, dtype, Rules(repeats, seed=seed))

    @property
    def arguments(self) -> dict[str, Any]:
        """What `of` made this from, for another process."""
        return {"suite": self.suite, "toy": self.toy, "repeats": self.rules.repeats, "seed": self.rules.seed}

    @property
    def stopwatch(self) -> Stopwatch:
        """Measures seconds on this device."""
        return Stopwatch(self.device, self.rules.clock)

    def encoder_config(self, mixer: str, image_size: int, **fields: Any) -> DefocusVisionConfig:
        """The configuration of this suite's encoder with `mixer` inside, for images of `image_size` pixels."""
        return DefocusVisionConfig(**{**self.sizes.encoders[mixer], "image_size": image_size, **fields})
