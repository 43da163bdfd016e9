"""Our multimodal model against `LlavaForConditionalGeneration` with the same decoder and number of image tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.models import MIXER_NAMES, defocus_mllm, llava, question, random_images
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.sampling import Sample, Stopwatch, observed_backends
from benchmarks.setting import Setting

LLAVA = "LlavaForConditionalGeneration"


def mllm_races(setting: Setting) -> list[Race]:
    """Time to first token, and time of the tokens after it. The claims are about De-focus ViT, CLIP's counterpart."""
    image_size, answer = setting.sizes.mllm_image, setting.sizes.decoded_tokens
    tokens = setting.encoder_config("attention", image_size).num_image_tokens
    shapes: dict[str, Any] = {
        "batch": 1,
        "image": image_size,
        "image tokens": tokens,
        "words": setting.sizes.prompt_tokens,
    }
    shapes |= {"decoder": dict(setting.sizes.text)}
    ours = MIXER_NAMES["attention"]
    return [
        Race(
            f"time to first token, {tokens} image tokens",
            _builder(setting, _first_token, ("attention", "retention", "mamba")),
            [
                Comparison(ours, LLAVA, "first_token"),
                Comparison(MIXER_NAMES["retention"], LLAVA),
                Comparison(MIXER_NAMES["mamba"], LLAVA),
            ],
            shapes,
        ),
        Race(
            f"decoding, {answer} tokens after {tokens} image tokens",
            _builder(setting, _decoding, ("attention",)),
            [Comparison(ours, LLAVA, "decoding")],
            shapes,
            item="token",
        ),
    ]


def _builder(
    setting: Setting, measure: Callable[[Setting, str, Any], Contestant], mixers: Sequence[str]
) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        image_size = setting.sizes.mllm_image
        models: dict[str, Any] = {MIXER_NAMES[mixer]: defocus_mllm(setting, mixer, image_size) for mixer in mixers}
        models[LLAVA] = llava(setting, image_size)
        return [measure(setting, name, model) for name, model in models.items()]

    return build


def _inputs(setting: Setting) -> dict[str, Any]:
    image_size = setting.sizes.mllm_image
    ids = question(setting, setting.encoder_config("attention", image_size).num_image_tokens)
    images = random_images(setting, 1, image_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images, "do_sample": False}


def _first_token(setting: Setting, name: str, model: Any) -> Contestant:
    inputs = _inputs(setting)
    return Contestant(name, setting.stopwatch.timed(lambda: model.generate(**inputs, max_new_tokens=1)))


def _decoding(setting: Setting, name: str, model: Any) -> Contestant:
    inputs, answer = _inputs(setting), setting.sizes.decoded_tokens

    def sample() -> Sample:
        times = TokenTimes(setting.stopwatch)
        with observed_backends() as backends:
            model.generate(**inputs, max_new_tokens=answer + 1, streamer=times)
        return Sample(times.after_first(answer), backends)

    return Contestant(name, sample, items=answer)


class TokenTimes(BaseStreamer):
    """Notes when each token of one answer is there."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, and then with every token."""
        self._times.append(self._stopwatch.read())

    def end(self) -> None:
        """Called by `generate` after the last token."""

    def after_first(self, number: int) -> float:
        """Seconds that `number` tokens took after the first one. Raises `ValueError` if there were more or fewer."""
        _, first, *later = self._times
        if len(later) != number:
            raise ValueError(f"{len(later)} tokens came after the first one, not {number}")
        return later[-1] - first
