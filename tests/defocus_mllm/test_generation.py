"""{3 mixers} x {10 decoders} x {ways to generate}: each gives the answer of the plain way, or says that it cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from defocus_mllm.cache_defocus import CACHE_NAME

sys.path.insert(0, str(Path(__file__).parent))

from decoders import DECODERS
from generation_cases import (
    CHAT,
    GREEDY,
    LENGTH,
    MIXERS,
    NEW_TOKENS,
    RAGGED,
    Cell,
    answers,
    answers_alone,
    build_cell,
    build_language,
    encode,
    message,
    picture,
)

CANNOT_ROLL_BACK = "assisted generation is not supported with stateful models"
REFUSED = {
    # The states of a recurrent layer are sums, from which rejected drafts cannot be taken out again.
    ("falcon_h1", "assisted"): CANNOT_ROLL_BACK,
    ("falcon_h1", "prompt lookup"): CANNOT_ROLL_BACK,
}
"""What Transformers cannot do with a decoder, whoever asks, and the words in which it says so."""


@pytest.fixture(scope="module", params=DECODERS)
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return request.param, build_language(tmp_path_factory.mktemp(request.param) / "language", request.param)


@pytest.fixture(scope="module", params=MIXERS)
def cell(request: pytest.FixtureRequest, language: tuple[str, Any]) -> Cell:
    return build_cell(request.param, *language)


@contextmanager
def refused_or_not(cell: Cell, mode: str) -> Iterator[None]:
    """Expects the error of `REFUSED`, or none."""
    if (message := REFUSED.get((cell.decoder, mode))) is None:
        yield
    else:
        with pytest.raises(ValueError, match=message):
            yield


@contextmanager
def lengths_read(cell: Cell) -> Iterator[list[int]]:
    """How many tokens the language model reads in each of its calls."""
    lengths: list[int] = []
    hook = cell.model.model.language_model.register_forward_pre_hook(
        lambda module, arguments, options: lengths.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        yield lengths
    finally:
        hook.remove()


@torch.no_grad()
def test_greedy_with_a_cache_is_greedy_without_and_depends_on_the_images(cell: Cell) -> None:
    inputs = encode(cell, [CHAT])
    assert answers(cell, inputs) == answers(cell, inputs, use_cache=False)
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    logits, others = (cell.model(**given, logits_to_keep=1).logits for given in (inputs, swapped))
    assert (logits - others).abs().max() > 1e-2


def test_rows_with_different_numbers_of_images_answer_as_if_alone(cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    assert len(inputs["pixel_values"]) == 3
    assert (inputs["attention_mask"][1:, 0] == 0).all()
    assert answers(cell, inputs) == answers_alone(cell, RAGGED)


def test_beams_of_such_rows_are_those_of_each_row_alone(cell: Cell) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    together = answers(cell, encode(cell, RAGGED), **options)
    assert together == answers_alone(cell, RAGGED, **options)
    assert together[:2] == answers_alone(cell, RAGGED[:1], **options, use_cache=False)
    assert together[0] != together[1]


@torch.no_grad()
def test_samples_are_drawn_from_the_logits_of_each_row_alone(cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    options = {**LENGTH, "do_sample": True, "temperature": 5.0, "num_return_sequences": 2}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(cell.model.generate(**inputs, **options))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert not torch.equal(drawn[0].sequences, drawn[2].sequences)
    for number, tokens in enumerate(drawn[0].sequences[:, -NEW_TOKENS:]):
        alone = encode(cell, [RAGGED[number // 2]])
        read = torch.cat([alone["input_ids"], tokens[None, :-1]], dim=1)
        logits = cell.model(input_ids=read, pixel_values=alone.get("pixel_values")).logits[0, -NEW_TOKENS:]
        shown = torch.stack([step[number] for step in drawn[0].logits])
        torch.testing.assert_close(shown, logits, rtol=1e-3, atol=1e-3)


def test_one_candidate_to_sample_from_is_greedy(cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    assert answers(cell, inputs, do_sample=True, top_k=1) == answers(cell, inputs)


def test_a_static_cache_answers_as_a_growing_one(cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    assert answers(cell, inputs, cache_implementation="static") == answers(cell, inputs)


@pytest.mark.parametrize("size", [2, 7])
def test_a_prompt_read_in_chunks_is_the_prompt_read_at_once(size: int, cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    with lengths_read(cell) as lengths:
        in_chunks = answers(cell, inputs, prefill_chunk_size=size)
    assert in_chunks == answers(cell, inputs)
    prompt = inputs["input_ids"].shape[1]
    chunks = [size] * (prompt // size) + ([prompt % size] if prompt % size else [])
    assert lengths[-len(chunks) - NEW_TOKENS + 1 :] == chunks + [1] * (NEW_TOKENS - 1)


def test_a_language_model_that_drafts_changes_nothing(cell: Cell) -> None:
    inputs = encode(cell, [CHAT])
    with refused_or_not(cell, "assisted"):
        assert answers(cell, inputs, assistant_model=cell.language) == answers(cell, inputs)


def test_an_assistant_that_sees_the_images_drafts_what_the_model_says(cell: Cell) -> None:
    inputs = encode(cell, [CHAT])
    prompt = inputs["input_ids"].shape[1]
    cell.model.generation_config.assistant_confidence_threshold = 0.0
    expected = answers(cell, inputs)
    with refused_or_not(cell, "assisted"), lengths_read(cell) as lengths:
        assert answers(cell, inputs, assistant_model=cell.model) == expected
        drafts = NEW_TOKENS - 1
        assert lengths == [prompt, *[1] * (drafts - 1), prompt + drafts]  # drafted, then verified in one call


def test_prompt_lookup_drafts_words_but_never_images(cell: Cell) -> None:
    chat = encode(cell, [CHAT])
    image_next = dict(cell.processor(text="word1 <image> word2 word1", images=[picture(0)], return_tensors="pt"))
    for inputs in (chat, image_next):
        expected = answers(cell, inputs)
        with refused_or_not(cell, "prompt lookup"), lengths_read(cell) as lengths:
            assert answers(cell, inputs, prompt_lookup_num_tokens=6) == expected
            # After the words that end the chat's prompt came "word3" in an earlier turn; images came after "word1".
            assert lengths[0] == inputs["input_ids"].shape[1] + (inputs is chat)


def test_a_second_turn_with_images_goes_on_from_the_cache(cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    first = cell.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    cached = first[CACHE_NAME].get_seq_length()
    new = cell.processor(
        text=["word1 <image> word2"] * 3, images=[picture(number) for number in (6, 7, 8)], return_tensors="pt"
    )
    turns = {
        "input_ids": torch.cat([first.sequences, new["input_ids"]], dim=1),
        "attention_mask": torch.nn.functional.pad(
            inputs["attention_mask"], (0, NEW_TOKENS + new["input_ids"].shape[1]), value=1
        ),
    }
    old = inputs["pixel_values"]
    images = torch.cat([old[:2], new["pixel_values"][:1], old[2:], new["pixel_values"][1:]])
    expected = answers(cell, {**turns, "pixel_values": images})
    with lengths_read(cell) as lengths:
        gone_on = answers(cell, {**turns, "pixel_values": new["pixel_values"]}, **{CACHE_NAME: first[CACHE_NAME]})
    assert gone_on == expected
    assert turns["input_ids"].shape[1] - cached in lengths
    assert turns["input_ids"].shape[1] not in lengths


@torch.no_grad()
def test_embeddings_answer_as_ids_with_images_in_place_or_to_be_put_there(cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    words = cell.model.get_input_embeddings()(ids)
    tokens = torch.cat(cell.model.get_image_features(inputs["pixel_values"]).pooler_output)
    merged = words.masked_scatter((ids == cell.processor.image_token_id).unsqueeze(-1), tokens)
    for options in ({}, {"num_beams": 2}):
        expected = answers(cell, inputs, **options)
        plain = {"attention_mask": mask, **GREEDY, **options}
        assert cell.model.generate(inputs_embeds=merged, **plain).tolist() == expected
        placed = cell.model.generate(inputs_embeds=words, pixel_values=inputs["pixel_values"], **plain)
        assert placed.tolist() == expected


@torch.no_grad()
def test_encoded_images_serve_many_calls(cell: Cell) -> None:
    inputs = encode(cell, RAGGED)
    encoded = {"image": cell.model.get_image_features(inputs["pixel_values"])}
    given = {name: value for name, value in inputs.items() if name != "pixel_values"}
    expected = answers(cell, inputs, num_beams=2)
    for _ in range(2):
        assert answers(cell, given, num_beams=2, mm_encoder_outputs=encoded) == expected


def test_frames_of_one_sequence_take_the_same_way(cell: Cell) -> None:
    inputs = encode(cell, [CHAT])
    inputs["pixel_values"] = inputs["pixel_values"][None]
    expected = answers(cell, inputs, use_cache=False)
    assert answers(cell, inputs) == answers(cell, inputs, prefill_chunk_size=5) == expected
    for options in ({}, {"use_cache": False}):
        assert answers(cell, inputs, num_beams=2, **options) == answers(cell, inputs, num_beams=2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_without_images_it_is_the_language_model(options: dict[str, Any], cell: Cell) -> None:
    inputs = encode(cell, [[message("word1 word2 word3 word4 word5")], [message("word6")]])
    assert "pixel_values" not in inputs
    alike = {"suppress_tokens": [cell.processor.image_token_id], "pad_token_id": cell.processor.tokenizer.pad_token_id}
    expected = cell.language.generate(**inputs, **GREEDY, **alike, **options)
    assert answers(cell, inputs, **options) == expected[:, inputs["input_ids"].shape[1] :].tolist()
