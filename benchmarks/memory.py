"""Peak memory of one training step, each measured in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.encoders import CLIP
from benchmarks.isolation import isolated
from benchmarks.models import MIXER_NAMES, clip_encoder, defocus_encoder, random_images
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.sampling import Sample, observed_backends
from benchmarks.setting import Setting


def memory_races(setting: Setting) -> list[Race]:
    """Forward, backward and AdamW of whole encoders."""
    image_size, batch = setting.sizes.step_image
    mamba, vit = MIXER_NAMES["mamba"], MIXER_NAMES["attention"]
    models = {name: mixer for mixer, name in MIXER_NAMES.items()} | {CLIP: CLIP}
    config = setting.encoder_config("attention", image_size)
    return [
        Race(
            f"training step, {batch} x {config.num_image_tokens} tokens",
            lambda: [Contestant(name, _sampler(setting, model)) for name, model in models.items()],
            [
                Comparison(mamba, vit, "mamba_memory"),
                Comparison(mamba, CLIP, "mamba_memory"),
                Comparison(vit, CLIP),
                Comparison(MIXER_NAMES["retention"], CLIP),
            ],
            {"image": image_size, "batch": batch, "tokens": config.num_image_tokens, "steps": 2},
            unit="bytes",
            warm_up=False,
        )
    ]


def _sampler(setting: Setting, model: str) -> Any:
    def sample() -> Sample:
        measured = isolated(training_step_memory, model=model, **setting.arguments)
        return Sample(measured["peak"] - measured["before"], measured["backends"])

    return sample


def training_step_memory(model: str, **setting_arguments: Any) -> dict[str, Any]:
    """Two training steps of the encoder with mixer `model`, or of CLIP's; run in a process of its own.

    In the second one the optimizer's moments exist while the activations do, as in every later step.

    Returns:
        `peak` and, `before` the model was built, what was there already, in bytes; and the `backends` that ran.
    """
    setting = Setting.of(**setting_arguments)
    image_size, batch = setting.sizes.step_image
    before = memory_now(setting.device)
    made = clip_encoder(setting, image_size) if model == CLIP else defocus_encoder(setting, model, image_size)
    images = random_images(setting, batch, image_size)
    optimizer = torch.optim.AdamW(made.parameters())
    with observed_backends() as backends:
        for _ in range(2):
            _step(made.train(), optimizer, images)
    return {"peak": peak_memory(setting.device), "before": before, "backends": backends}


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    model(images).last_hidden_state.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def memory_now(device: str) -> int:
    """Bytes in use: allocated on a GPU, resident on the CPU."""
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else _status("VmRSS")


def peak_memory(device: str) -> int:
    """Most bytes that were in use so far: allocated on a GPU, resident on the CPU."""
    # `getrusage` will not do: in a process that was just started it is at least what its parent had.
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _status("VmHWM")


def _status(name: str) -> int:
    """A size of this process as Linux reports it, in bytes."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise OSError(f"{status}: the peak of resident memory is read from it, and only Linux has it")
    (size,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(size)
