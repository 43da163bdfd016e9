"""Everything the benchmarks measure, built in one place: our cores and models, and peers of equal shapes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaModel,
    PreTrainedModel,
)

from benchmarks.setting import Setting
from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig, DefocusVisionModel
from defocus_mllm.attention_core_defocus import defocus_attention
from defocus_mllm.bandpass_defocus import LAMBDA_HAT_RANGE, DefocusBandPass
from defocus_mllm.retention_core_defocus import rotated_retention

MIXER_NAMES = {"attention": "De-focus ViT", "retention": "De-focus RetNet", "mamba": "De-focus Mamba"}

FILTERS = {
    "initial filter": LAMBDA_HAT_RANGE,
    "weakly decaying heads": (-9.2, -7.0),  # lambda from -1e-4 to -1e-3
    "strongly decaying heads": (-1.5, 1.6),  # lambda from -0.22 to -5
}
"""What the heads of an attention core may have learned: the range of lambda_hat, spread evenly over them."""
STRONG = "strongly decaying heads"


class _Core(nn.Module):
    """What a mixer does between its first and its last projection, on queries and keys that are not yet rotated."""

    def __init__(self, setting: Setting, lambda_hat_range: tuple[float, float] = LAMBDA_HAT_RANGE) -> None:
        super().__init__()
        _, num_heads, channels = setting.sizes.core
        self.scaling = channels**-0.5
        with torch.device(setting.device):
            self.band_pass = DefocusBandPass(num_heads, channels // 2, "learnable", "learnable")
            if self.band_pass.lambda_hat is not None:
                self.band_pass.lambda_hat.data = torch.linspace(*lambda_hat_range, num_heads)


class AttentionCore(_Core):
    """De-focus attention (eq. 8) with its rotation and decay; (batch, heads, tokens, channels) in and out."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        decay, theta = self.band_pass()
        return defocus_attention(query, key, value, decay, theta, self.scaling)


class RetentionCore(_Core):
    """Retention (eq. 4) with its rotation and decay; (batch, heads, tokens, channels) in and out."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        decay, theta = self.band_pass()
        return rotated_retention(query, key, value, decay, theta, self.scaling)[0]


class PlainCore(nn.Module):
    """`scaled_dot_product_attention`, causal or bidirectional; (batch, heads, tokens, channels) in and out."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


def random_heads(setting: Setting, batch: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as a mixer's one projection leaves them: three views of one tensor."""
    _, num_heads, channels = setting.sizes.core
    generator = torch.Generator(setting.device).manual_seed(setting.rules.seed)
    shape = (batch, num_tokens, 3, num_heads, channels)
    projected = torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype)
    return projected.permute(2, 0, 3, 1, 4).unbind(0)


def build(make: Callable[[], PreTrainedModel], setting: Setting) -> Any:
    """A model with the setting's seed, device and dtype, in evaluation mode.

    What a model says must stay in float32 (phases and rates) does.
    """
    torch.manual_seed(setting.rules.seed)
    with torch.device(setting.device), _default_dtype(setting.dtype):
        model = make()
    kept: set[str] = set()
    for module in model.modules():
        kept.update(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if kept.intersection(name.split(".")):
            tensor.data = tensor.data.float()
    return model.eval()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def defocus_encoder(setting: Setting, mixer: str, image_size: int) -> DefocusVisionModel:
    """Our encoder."""
    return build(lambda: DefocusVisionModel(setting.encoder_config(mixer, image_size)), setting)


def defocus_mixer(setting: Setting, mixer: str) -> nn.Module:
    """The mixer of one layer of our encoder."""
    config = setting.encoder_config(mixer, setting.sizes.images[0][0], num_hidden_layers=1)
    return build(lambda: DefocusVisionModel(config), setting).layers[0].mixer


def random_tokens(setting: Setting, mixer: str, batch: int, num_tokens: int) -> torch.Tensor:
    """What a mixer reads, (batch, tokens, hidden)."""
    hidden_size = setting.encoder_config(mixer, setting.sizes.images[0][0]).hidden_size
    generator = torch.Generator(setting.device).manual_seed(setting.rules.seed)
    shape = (batch, num_tokens, hidden_size)
    return torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype)


def clip_config(setting: Setting, image_size: int) -> CLIPVisionConfig:
    """CLIP's vision tower with the shapes of our attention encoder."""
    config = setting.encoder_config("attention", image_size)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return CLIPVisionConfig(**{name: getattr(config, name) for name in names})


def clip_encoder(setting: Setting, image_size: int) -> CLIPVisionModel:
    """The peer of an encoder."""
    return build(lambda: CLIPVisionModel(clip_config(setting, image_size)), setting)


def mamba_peer(setting: Setting, config: DefocusVisionConfig) -> MambaModel:
    """Transformers' Mamba with the layers of our mamba encoder; it reads embedded tokens."""
    shapes: dict[str, Any] = {
        "expand": config.intermediate_size // config.hidden_size,
        "vocab_size": 8,  # never used
        "use_cache": False,
    }
    names = ("hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "time_step_rank")
    shapes |= {name: getattr(config, name) for name in names}
    return build(lambda: MambaModel(MambaConfig(**shapes)), setting)


def random_images(setting: Setting, batch: int, height: int, width: int | None = None) -> torch.Tensor:
    """Normalised pixels, (batch, 3, height, width); square unless a width is given."""
    generator = torch.Generator(setting.device).manual_seed(setting.rules.seed)
    shape = (batch, 3, height, height if width is None else width)
    return torch.rand(shape, generator=generator, device=setting.device).mul_(2).sub_(1).to(setting.dtype)


IMAGE_TOKEN = 4


def text_config(setting: Setting) -> LlamaConfig:
    """The decoder of both multimodal models; it never ends an answer by itself."""
    return LlamaConfig(**setting.sizes.text, pad_token_id=0, bos_token_id=1, eos_token_id=None)


def defocus_mllm(setting: Setting, mixer: str, image_size: int) -> DefocusForConditionalGeneration:
    """Our encoder, projector and decoder."""
    config = DefocusConfig(
        vision_config=setting.encoder_config(mixer, image_size),
        text_config=text_config(setting),
        image_token_id=IMAGE_TOKEN,
    )
    return build(lambda: DefocusForConditionalGeneration(config), setting)


def llava(setting: Setting, image_size: int) -> LlavaForConditionalGeneration:
    """The architecture of LLaVA-1.5 with the same decoder; it keeps CLIP's class token, so image tokens are as many."""
    config = LlavaConfig(
        vision_config=clip_config(setting, image_size),
        text_config=text_config(setting),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
    )
    return build(lambda: LlavaForConditionalGeneration(config), setting)


def question(setting: Setting, num_image_tokens: int, batch: int = 1, words: int | None = None) -> torch.Tensor:
    """Ids of a picture's placeholders and of the words after it, (batch, image tokens + words)."""
    words = setting.sizes.prompt_tokens if words is None else words
    placeholders = torch.full((batch, num_image_tokens), IMAGE_TOKEN)
    generator = torch.Generator().manual_seed(setting.rules.seed)
    after = torch.randint(IMAGE_TOKEN + 1, setting.sizes.text["vocab_size"], (batch, words), generator=generator)
    return torch.cat((placeholders, after), dim=1).to(setting.device)
