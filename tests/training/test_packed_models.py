"""Packed rows in real decoders: loss and gradients of separate samples, nothing of one sample in another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig
from training.encoding import IGNORED, Example
from training.multimodal import answer_loss
from training.packing_checks import check_packing
from training.stage import count_supervised
from training.supervision import pack_examples, pad_examples

sys.path.insert(0, str(Path(__file__).parents[1] / "defocus_mllm"))
from decoders import DECODERS, QUIRKS, ROWS, save_decoder

HYBRID = "falcon_h1"
PACKABLE = sorted({*DECODERS, *QUIRKS} - {HYBRID})
IMAGE_TOKEN, PAD = ROWS - 1, 0
VISION: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 32}


def make_model(
    folder: Path, kind: str, attention: str | None = None, **changes: Any
) -> DefocusForConditionalGeneration:
    """An MLLM with a tiny decoder of this kind, of random weights."""
    vision = DefocusVisionConfig(num_hidden_layers=1, num_attention_heads=2, **VISION)
    text = AutoConfig.from_pretrained(save_decoder(folder, kind, **changes))
    config = DefocusConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    if attention:
        config._attn_implementation = {"text_config": attention}
    return DefocusForConditionalGeneration(config).eval()


def example(words: int, images: int, seed: int, image_tokens: int) -> Example:
    """Images, then words of which the second half is learnt; longer than the sliding windows of the decoders."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, ROWS - 6, (words,), generator=generator)
    ids = torch.cat([torch.full((images * image_tokens,), IMAGE_TOKEN), text])
    labels = ids.clone()
    labels[: len(ids) - words // 2] = IGNORED
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if images:
        made["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator)
    return made


def examples_for(model: DefocusForConditionalGeneration) -> list[list[Example]]:
    """Rows of examples with one image, none and two; the second row is padded."""
    image_tokens = model.config.vision_config.num_image_tokens
    made = [
        example(*sizes, seed, image_tokens) for seed, sizes in enumerate([(12, 1), (9, 0), (14, 2), (7, 0), (11, 1)])
    ]
    return [made[:3], made[3:]]


def with_pictures(batch: Example, examples: list[Example]) -> Example:
    return {**batch, "pixel_values": torch.cat([one["pixel_values"] for one in examples if "pixel_values" in one])}


def loss_and_gradients(
    model: DefocusForConditionalGeneration, batch: Example, items: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = answer_loss(model)(model, batch, items)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_loss_and_gradients_equal_those_of_separate_samples(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind)
    rows = examples_for(model)
    flat = [one for row in rows for one in row]
    padded, packed = pad_examples(flat, PAD), pack_examples(rows, PAD)
    items = count_supervised(padded)
    assert items == count_supervised(packed) > 0
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    expected, gradients = loss_and_gradients(model, with_pictures(padded, flat), items)
    loss, packed_gradients = loss_and_gradients(model, with_pictures(packed, flat), items)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == packed_gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        difference = (packed_gradients[name] - gradient).abs().max()
        assert difference <= 1e-4 * largest, name


@pytest.mark.parametrize(
    ("kind", "attention"),
    [*((kind, None) for kind in PACKABLE), *((kind, "eager") for kind in ("llama", "mistral", "gemma3_text"))],
)
def test_nothing_of_a_sample_reaches_the_others_of_its_row(kind: str, attention: str | None, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind, attention)
    assert attention in (None, model.model.language_model.config._attn_implementation)
    rows = examples_for(model)
    changed = [[one.copy() for one in row] for row in rows]
    changed[0][0]["input_ids"] = torch.where(changed[0][0]["input_ids"] == IMAGE_TOKEN, IMAGE_TOKEN, 5)
    changed[0][0]["pixel_values"] = -changed[0][0]["pixel_values"]
    logits = [
        model(
            **{name: tensor for name, tensor in batch.items() if name not in ("attention_mask", "labels")},
            use_cache=False,
        ).logits
        for batch in (
            with_pictures(pack_examples(of, PAD), [one for row in of for one in row]) for of in (rows, changed)
        )
    ]
    end = len(rows[0][0]["input_ids"])
    assert not torch.equal(logits[0][0, :end], logits[1][0, :end])
    assert torch.equal(logits[0][0, end:], logits[1][0, end:])
    assert torch.equal(logits[0][1], logits[1][1])
    check_packing(model)


def test_flex_attention_separates_samples_too(tmp_path: Path) -> None:
    """It gets a block mask instead of a dense one."""
    model = make_model(tmp_path, "llama")
    rows = examples_for(model)
    batch = with_pictures(pack_examples(rows, PAD), [one for row in rows for one in row])
    items = count_supervised(batch)
    with torch.no_grad():
        expected = answer_loss(model)(model, batch, items)
        model.model.language_model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(answer_loss(model)(model, batch, items), expected)


def test_a_mask_would_hide_from_transformers_that_rows_are_packed(tmp_path: Path) -> None:
    """Why the loss leaves `attention_mask` out; should this change, the tests above would still hold."""
    model = make_model(tmp_path, "llama")
    rows = examples_for(model)
    flat = [one for row in rows for one in row]
    batch = with_pictures(pack_examples(rows, PAD), flat)
    items = count_supervised(batch)
    with_mask = model(**batch, num_items_in_batch=items, use_cache=False).loss
    without, _ = loss_and_gradients(model, batch, items)
    assert (with_mask - without).abs() > 1e-3


def test_what_begins_a_sample_is_not_learnt_from_the_one_before() -> None:
    one = {"input_ids": torch.tensor([4, 5]), "attention_mask": torch.ones(2, dtype=torch.long)}
    one["labels"] = one["input_ids"]
    packed = pack_examples([[one, one], [one]], PAD)
    assert packed["labels"].tolist() == [[IGNORED, 5, IGNORED, 5], [IGNORED, 5, IGNORED, IGNORED]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert packed["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert count_supervised(packed) == count_supervised(pad_examples([one, one, one], PAD)) == 3
    assert one["labels"].tolist() == [4, 5]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (HYBRID, {}),
        ("mamba", {"state_size": 8}),
    ],
)
def test_decoders_whose_state_runs_on_are_refused(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^packing: in a {kind} decoder a sample sees those before it.*none"):
        check_packing(make_model(tmp_path, kind, **fields))


def test_flash_attention_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama")
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"^packing: flash_attention_2 tells samples apart in a batch of one row only"):
        check_packing(model)


def test_a_decoder_that_ignores_positions_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path, "gpt2")
    decoder = model.model.language_model
    forward = decoder.forward
    counted = torch.arange(20)[None]

    def positions_run_on(inputs_embeds: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        learned = decoder.wpe(counted[:, : position_ids.shape[1]]) - decoder.wpe(position_ids)
        return forward(inputs_embeds=inputs_embeds + learned, position_ids=position_ids, **kwargs)

    decoder.forward = positions_run_on
    with pytest.raises(ValueError, match=r"comes out differently in a packed row \(its positions"):
        check_packing(model)


def test_the_check_leaves_no_trace(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama").train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    before = torch.random.get_rng_state()
    check_packing(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
