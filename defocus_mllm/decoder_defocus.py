"""What decoders do around their layers, outside the classes that the multimodal model takes from them.

Read from their configurations, by the names that all causal language models of Transformers 5.23 and 5.24 use for it.
"""

from typing import Any

import torch

_FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling",)  # Granite
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2 and later; RecurrentGemma

# Others scale embeddings inside, whoever looked them up; this one only those that it looks up itself.
_SCALES_OWN_EMBEDDINGS = ("falcon_h1",)


def scale_embeddings(inputs_embeds: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Scale embeddings, (..., hidden), where the decoder of `text_config` leaves that to who looks them up."""
    if text_config.model_type in _SCALES_OWN_EMBEDDINGS:
        return inputs_embeds * text_config.embedding_multiplier
    return inputs_embeds


def finish_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Scale and soft-cap what the output layer gives, as the causal language model of `text_config` does.

    Args:
        logits: (..., vocabulary).
        text_config: configuration of the decoder; a field that it lacks, or that is None, changes nothing.
    """
    for name in _FACTORS:
        if (factor := getattr(text_config, name, None)) is not None:
            logits = logits * factor
    for name in _DIVISORS:
        if (divisor := getattr(text_config, name, None)) is not None:
            logits = logits / divisor
    for name in _SOFT_CAPS:
        if (cap := getattr(text_config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits


__all__ = ["finish_logits", "scale_embeddings"]
