"""Tiny causal language models of many architectures, saved with a tokenizer that knows nothing of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(37))]
ROWS = 45
"""Rows of the embeddings: five are padding, the tokens of the chat template take them."""

# A wide initialisation makes soft caps and scales visible; few states keep recurrent decoders fast.
_SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "initializer_range": 0.4, "vocab_size": ROWS},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 3.0}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"num_key_value_heads": None},
    "olmo2": {},
    "smollm3": {},
    "falcon_h1": {
        **{"mamba_d_ssm": 64, "head_dim": 8, **_MAMBA2},
        **{"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    },
}
"""The ten whose every use is tested."""
QUIRKS: dict[str, dict[str, Any]] = {
    "phi": {},  # a bias
    "granite": {"logits_scaling": 5.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.5},
    "gpt2": {"num_key_value_heads": None},
}
"""Further output layers that are more than a matrix product, or named differently."""


def save_tokenizer(folder: Path, **special: str | None) -> None:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"eos_token": "</s>", "unk_token": "<unk>", **special}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)


def save_decoder(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A decoder of this `model_type` with random weights, biases and norms included, and its tokenizer."""
    fields = {**_SIZES, **DECODERS.get(kind, {}), **QUIRKS.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
