"""From the last row of pixels to the first token of the answer: a stream against the batch path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.models import MIXER_NAMES, defocus_mllm, question, random_images
from benchmarks.races import Comparison, Contestant, Race
from benchmarks.setting import Setting

STREAM, BATCH = "stream", "batch"


def first_answer_races(setting: Setting) -> list[Race]:
    """A race for each mixer. All rows but the last have been pushed when the clock starts; the batch path has none."""
    image_size = setting.sizes.answer_image
    races = []
    for mixer, name in MIXER_NAMES.items():
        config = setting.encoder_config(mixer, image_size)
        shapes: dict[str, Any] = {"batch": 1, "image": image_size, "patches": config.num_patches}
        shapes |= {"words": setting.sizes.prompt_tokens, "decoder": dict(setting.sizes.text)}
        races.append(
            Race(
                f"last row to first answer token, {name}, {config.num_patches:,} patches",
                _builder(setting, mixer),
                [Comparison(STREAM, BATCH, "first_answer")],
                shapes,
            )
        )
    return races


def _builder(setting: Setting, mixer: str) -> Callable[[], Sequence[Contestant]]:
    def build() -> Sequence[Contestant]:
        image_size = setting.sizes.answer_image
        model = defocus_mllm(setting, mixer, image_size)
        pixels = random_images(setting, 1, image_size)
        ids = question(setting, model.config.num_image_tokens)
        words = ids[:, model.config.num_image_tokens :]
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

        patch_size = model.config.vision_config.patch_size
        stream = model.open_stream()
        for top in range(0, image_size - patch_size, patch_size):
            stream.push(pixels[:, :, top : top + patch_size])

        def answer(fork: Any) -> torch.Tensor:
            fork.push(pixels[:, :, -patch_size:])
            return fork.ask(words, max_new_tokens=1, do_sample=False)

        def answer_at_once() -> torch.Tensor:
            return model.generate(**whole, max_new_tokens=1, do_sample=False)[:, ids.shape[1] :]

        if not torch.equal(answer(stream.fork()), answer_at_once()) and setting.dtype == torch.float32:
            raise ValueError(f"{mixer}: stream and batch path answer differently, so their times say nothing")
        timed = setting.stopwatch.timed
        return [Contestant(STREAM, timed(answer, prepare=stream.fork)), Contestant(BATCH, timed(answer_at_once))]

    return build
