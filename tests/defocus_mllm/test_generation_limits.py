"""What generation keeps out of answers, and what it refuses in one line instead of answering wrongly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from defocus_mllm.cache_defocus import CACHE_NAME

sys.path.insert(0, str(Path(__file__).parent))

from generation_cases import GREEDY, RAGGED, Cell, answers, build_cell, build_language, encode


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    return build_cell("attention", "llama", build_language(tmp_path_factory.mktemp("llama") / "language", "llama"))


@pytest.fixture
def wants_images(llama: Cell) -> Any:
    """The model, whose output layer now prefers the placeholder of an image to all else."""

    def prefer(module: Any, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., llama.processor.image_token_id] += 1000
        return logits

    hook = llama.model.lm_head.register_forward_hook(prefer)
    yield llama
    hook.remove()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True},
        {"suppress_tokens": [7]},
        {"generation_config": GenerationConfig(**GREEDY, suppress_tokens=[7])},
    ],
)
def test_an_answer_holds_no_image_placeholder(options: dict[str, Any], wants_images: Cell) -> None:
    inputs = encode(wants_images, RAGGED)
    plain = {} if "generation_config" in options else GREEDY
    answer = wants_images.model.generate(**inputs, **{**plain, **options})[:, inputs["input_ids"].shape[1] :]
    assert wants_images.processor.image_token_id not in answer
    assert 7 not in answer or "suppress_tokens" not in str(options)


def test_the_callers_settings_stay_as_they_are(llama: Cell) -> None:
    config = GenerationConfig(**GREEDY, suppress_tokens=[7])
    llama.model.generate(**encode(llama, RAGGED), generation_config=config)
    assert config.suppress_tokens == [7]
    assert llama.model.generation_config.suppress_tokens is None


def test_embeddings_in_chunks_are_refused(llama: Cell) -> None:
    words = llama.model.get_input_embeddings()(encode(llama, RAGGED[2:])["input_ids"])
    with pytest.raises(ValueError, match="prefill_chunk_size: inputs_embeds cannot be read in chunks"):
        llama.model.generate(inputs_embeds=words, prefill_chunk_size=2, **GREEDY)


def second_turn(cell: Cell, conversations: list[Any]) -> dict[str, Any]:
    """Inputs that go on from the cache of an answer with one more image a row, whose pixels are those of row 0."""
    inputs = encode(cell, conversations)
    first = cell.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    count = cell.processor.num_image_tokens
    added = torch.full((len(conversations), count + 1), cell.processor.image_token_id)
    added[:, -1] = 5
    ids = torch.cat([first.sequences, added], dim=1)
    pixels = inputs["pixel_values"][:1].expand(len(conversations), -1, -1, -1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        CACHE_NAME: first[CACHE_NAME],
    }


def test_a_cache_goes_on_with_new_images_alone(llama: Cell) -> None:
    turn = second_turn(llama, RAGGED[1:2])
    with pytest.raises(ValueError, match=r"5 image placeholders but the images give 10 tokens.*a cache holds already"):
        answers(llama, {**turn, "pixel_values": turn["pixel_values"].repeat(2, 1, 1, 1)})


def test_a_new_placeholder_needs_its_image_with_a_cache_too(llama: Cell) -> None:
    turn = second_turn(llama, RAGGED[1:2])
    del turn["pixel_values"]
    with pytest.raises(ValueError, match="the text has image placeholders, but no image was given"):
        answers(llama, turn)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_several_sequences_do_not_go_on_from_a_cache_with_new_images(options: dict[str, Any], llama: Cell) -> None:
    turn = second_turn(llama, RAGGED[1:2])
    with pytest.raises(ValueError, match="with new images, several sequences cannot go on from one cache"):
        answers(llama, turn, **options)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_images_and_placeholders_must_match_in_beams_too(num_beams: int, llama: Cell) -> None:
    inputs = encode(llama, RAGGED[:1])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(ValueError, match=r"image.*use one <image> per image"):
        answers(llama, inputs, num_beams=num_beams)


def test_image_tokens_of_another_model_are_refused(llama: Cell) -> None:
    inputs = encode(llama, RAGGED[:1])
    encoded = llama.model.get_image_features(inputs.pop("pixel_values"))
    encoded.pooler_output = [tokens[:, :16].detach() for tokens in encoded.pooler_output]
    with pytest.raises(ValueError, match="image tokens have 16 channels, but words have 32"):
        answers(llama, inputs, mm_encoder_outputs={"image": encoded})


def test_a_decoder_that_forgets_is_refused_where_its_prompt_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = build_cell("mamba", "falcon_h1", build_language(tmp_path / "language", "falcon_h1"))
    inputs = encode(cell, RAGGED)
    expected = answers(cell, inputs)
    # As Bamba's plain torch path does in Transformers 5.23: what went before is not there when several tokens follow.
    monkeypatch.setattr(
        "transformers.cache_utils.LinearAttentionLayer.update_conv_state", lambda self, states, *_, **__: states
    )
    with pytest.raises(ValueError, match="'falcon_h1': with a cache it does not read several tokens as it reads them"):
        answers(cell, inputs, prefill_chunk_size=4)
    monkeypatch.undo()
    assert answers(cell, inputs, prefill_chunk_size=4) == expected
