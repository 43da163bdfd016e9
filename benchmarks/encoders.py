"""Whole encoders against CLIP's vision tower and Transformers' Mamba of equal shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.models import (
    MIXER_NAMES,
    clip_encoder,
    defocus_encoder,
    mamba_peer,
    random_images,
    random_tokens,
)
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.setting import Setting
from defocus_mllm import DefocusVisionConfig, DefocusVisionModel

CLIP, MAMBA_MODEL = "CLIPVisionModel", "MambaModel"
CEILING = "square matrix product"
COMPILED, PLAIN = "De-focus Mamba, compiled core", "De-focus Mamba, no compiler"
_KERNELS = {COMPILED: "compiled", PLAIN: "chunked"}


def encoder_races(setting: Setting) -> list[Race]:
    """A race of our three encoders with CLIP for each image size and pass, and one of our Mamba with `MambaModel`."""
    races = []
    for image_size, batch in setting.sizes.images:
        for backward in (False, True) if setting.sizes.encoder_backward else (False,):
            config = setting.encoder_config("attention", image_size)
            shapes = {"image": image_size, "batch": batch, "tokens": config.num_image_tokens, **_shapes(config)}
            name = f"{'forward + backward' if backward else 'forward'}, {batch} x {config.num_image_tokens:,} tokens"
            races.append(
                Race(
                    f"encoders, {name}",
                    _with_clip(setting, image_size, batch, backward),
                    [
                        Comparison(MIXER_NAMES["attention"], CLIP, None if backward else "vit_forward"),
                        Comparison(MIXER_NAMES["mamba"], CLIP, None if backward else "mamba_forward"),
                        Comparison(MIXER_NAMES["retention"], CLIP),
                    ],
                    shapes,
                )
            )
            shapes = {**shapes, **_shapes(setting.encoder_config("mamba", image_size))}
            races.append(
                Race(
                    f"mamba encoders, {name}",
                    _with_mamba_model(setting, image_size, batch, backward),
                    _mamba_comparisons(setting, backward),
                    shapes,
                )
            )
    return races


def _shapes(config: DefocusVisionConfig) -> dict[str, int]:
    return {"hidden_size": config.hidden_size, "layers": config.num_hidden_layers}


def _with_clip(setting: Setting, image_size: int, batch: int, backward: bool) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        images = random_images(setting, batch, image_size)
        contestants = []
        for mixer, name in MIXER_NAMES.items():
            model = defocus_encoder(setting, mixer, image_size)
            flops = count_flops(model, batch, backward)
            contestants.append(_contestant(setting, name, model, backward, flops=flops, pixel_values=images))
        clip = clip_encoder(setting, image_size)
        # the same shapes, so the same arithmetic
        contestants.append(_contestant(setting, CLIP, clip, backward, flops=contestants[0].flops, pixel_values=images))
        return [*contestants, _ceiling(setting)]

    return build


def _with_mamba_model(
    setting: Setting, image_size: int, batch: int, backward: bool
) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        images = random_images(setting, batch, image_size)
        model = defocus_encoder(setting, "mamba", image_size)
        contestants = [
            _contestant(setting, name, model, backward, kernel=kernel, pixel_values=images)
            for name, kernel in _kernels(setting).items()
        ]
        tokens = random_tokens(setting, "mamba", batch, model.config.num_image_tokens)
        peer = mamba_peer(setting, model.config)
        return [*contestants, _contestant(setting, MAMBA_MODEL, peer, backward, inputs_embeds=tokens)]

    return build


def _kernels(setting: Setting) -> dict[str, str | None]:
    """Contestant -> what `DEFOCUS_KERNEL` is for it; only float32 on the CPU has a compiled core."""
    if setting.device == "cpu" and setting.dtype == torch.float32:
        return dict(_KERNELS)
    return {MIXER_NAMES["mamba"]: None}


def _mamba_comparisons(setting: Setting, backward: bool) -> list[Comparison]:
    shows = {} if backward else {COMPILED: "mamba_compiled", PLAIN: "mamba_plain"}
    return [Comparison(name, MAMBA_MODEL, shows.get(name)) for name in _kernels(setting)]


def _contestant(
    setting: Setting,
    name: str,
    model: PreTrainedModel,
    backward: bool,
    kernel: str | None = None,
    flops: int | None = None,
    **inputs: torch.Tensor,
) -> Contestant:
    """A model's forward pass, or its forward and backward pass with the gradients of all parameters."""

    def forward() -> torch.Tensor:
        return model(**inputs).last_hidden_state

    def both() -> None:
        forward().float().square().mean().backward()

    def forget() -> None:
        model.zero_grad(set_to_none=True)

    timed = setting.stopwatch.timed
    if not backward:
        return Contestant(name, timed(torch.no_grad()(forward), kernel=kernel), flops=flops)
    model.train()
    return Contestant(name, timed(lambda _: both(), prepare=forget, kernel=kernel), flops=flops)


def count_flops(model: DefocusVisionModel, batch: int, backward: bool) -> int:
    """Floating-point operations of the matrix products, by the usual count.

    Two for each weight and token, with attention's products over all pairs of tokens (also where causality needs half
    of them); a backward pass counts twice a forward pass. The scan of mamba and the states of retention do not count.
    """
    config = model.config
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    weights = sum(layer.weight.numel() for layer in layers)
    tokens = config.num_image_tokens
    pairs = 2 * config.num_hidden_layers * config.hidden_size * tokens**2 if config.mixer == "attention" else 0
    return 2 * batch * (weights * tokens + pairs) * (3 if backward else 1)


def _ceiling(setting: Setting) -> Contestant:
    """The product of two square matrices: about the most floating-point operations a second that there are."""
    side = setting.sizes.matmul
    left, right = (torch.randn(side, side, device=setting.device).to(setting.dtype) for _ in range(2))
    return Contestant(CEILING, setting.stopwatch.timed(lambda: left @ right), flops=2 * side**3)
