"""A batch's answers and likelihoods are those of each question alone, for decoders that padding could disturb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusProcessor, DefocusVisionConfig
from eval.generator import Request, TransformersGenerator
from tests.conftest import SIZES

_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},  # absolute positions
    "falcon_h1": {**_HEADS, **_MAMBA},  # states of a Mamba
    "qwen3_next": {  # states of linear attention
        **{**_HEADS, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
        "layer_types": ["linear_attention", "full_attention"],
    },
}
OPTIONS = ("yes", "a blue rectangle")


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_answers_as_each_question_alone(
    decoder: str,
    vision_config: DefocusVisionConfig,
    processor: DefocusProcessor,
    image: Any,
    tmp_path: Path,
) -> None:
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"model_type": decoder, "vocab_size": len(tokenizer), "initializer_range": 0.4, **SIZES, **ids}
    text_config = {**text, **DECODERS[decoder]}
    config = DefocusConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=tokenizer.image_token_id
    )
    DefocusForConditionalGeneration(config).eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image.save(tmp_path / "1.png")
    image.rotate(90).save(tmp_path / "2.png")
    one, two = tmp_path / "1.png", tmp_path / "2.png"
    asked = [
        Request("short", "what?", (one,), OPTIONS),
        Request("long", "is there a red circle in the image? does the image contain it?", (two,), OPTIONS),
        Request("two images", "is it red?", (one, two), OPTIONS),
        Request("words alone", "what color is the shape?", (), OPTIONS),
    ]
    generator = TransformersGenerator(tmp_path, "cpu")
    batch = generator.generate(asked, 6)
    assert len({answer.n_in for answer in batch}) == len(asked), "every prompt but the longest is padded"
    assert len({answer.text for answer in batch}) > 1
    for request, together in zip(asked, batch, strict=True):
        (alone,) = generator.generate([request], 6)
        assert (together.text, together.finish, together.n_out) == (alone.text, alone.finish, alone.n_out)
        assert together.ll == pytest.approx(alone.ll, abs=1e-4)
