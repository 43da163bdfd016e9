"""Does an assembled model still speak like the language model it was made of, and can it be read from left to right?"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .cache_defocus import CACHE_NAME

_LENGTH = 12
_LARGE_LOGIT = 100.0


def random_words(model: Any) -> torch.Tensor:
    """Ids of two sequences of words, (2, tokens), the same in every run; none is the placeholder of an image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.text_config.vocab_size - 1, (2, _LENGTH), generator=generator)
    return ids + (ids >= model.config.image_token_id)


@torch.no_grad()
def check_logits(model: Any, language: PreTrainedModel, name: str) -> None:
    """Hold the logits of `model` on random words against those of `language`, whose parts it shares.

    Some decoders do more after the last layer than one matrix product. Soft caps show only in logits far larger than an
    untrained model's, so the comparison is repeated with the output layer's result magnified.

    Raises:
        ValueError: the logits differ; begins with `name`.
    """
    words = random_words(model)
    own = language(words).logits
    head: Any = language.get_output_embeddings()
    gain = _LARGE_LOGIT / own.abs().max().item()
    same = _close(model(input_ids=words).logits, own, 1e-5, 1e-2)
    hook = head.register_forward_hook(lambda module, arguments, logits: logits * gain)
    try:
        same = same and _close(model(input_ids=words).logits, language(words).logits, 1e-5, 1e-2)
    finally:
        hook.remove()
    if not same:
        raise ValueError(
            f"{name}: {language.config.model_type!r} does something to its logits that De-focus MLLM does not know, so "
            "it would become another model; choose another language model"
        )


@torch.no_grad()
def check_reading(model: Any, language: PreTrainedModel, name: str) -> None:
    """Refuse a decoder in which a word changes earlier ones, or that reads differently with its cache than without.

    Raises:
        ValueError: it is one of them; begins with `name`.
    """
    words, kind = random_words(model), language.config.model_type
    whole = language(words).logits
    changed = words.clone()
    changed[:, -1] = (words[:, -1] + 1) % language.config.vocab_size
    if not _close(language(changed).logits[:, :-1], whole[:, :-1], 1e-3, 5e-2):
        raise ValueError(f"{name}: {kind!r} is not causal as it is configured: a word changes what stands before it")
    try:
        begun = model(input_ids=words[:, :-1], use_cache=True)
        begun[CACHE_NAME].get_seq_length()  # generation and streams ask it
        last = model(input_ids=words[:, -1:], use_cache=True, **{CACHE_NAME: begun[CACHE_NAME]}).logits
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(f"{name}: {kind!r} cannot go on from a cache, so it cannot answer: {error}") from error
    if not _close(last[:, -1], whole[:, -1], 1e-3, 5e-2):
        raise ValueError(f"{name}: {kind!r} gives other logits with its cache than without")


def _close(actual: torch.Tensor, expected: torch.Tensor, rtol: float, rtol_16_bits: float) -> bool:
    """Whether two tensors of logits are equal but for rounding, relative to the largest logit."""
    if actual.shape != expected.shape:
        return False
    tolerance = rtol if expected.dtype in (torch.float32, torch.float64) else rtol_16_bits
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())
