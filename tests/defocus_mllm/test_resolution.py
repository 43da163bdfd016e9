"""Sectioned patches, and an encoder trained at one resolution that runs at another."""

import pytest
import torch

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig, DefocusVisionModel
from defocus_mllm.embeddings_defocus import DefocusEmbeddings
from defocus_mllm.fold_defocus import scale_tokens

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MAMBA = {"state_size": 4, "time_step_rank": 3, "group_norm_size": 16}


def build_config(**fields):
    return DefocusVisionConfig(**{"image_size": 32, "patch_size": 8, **SIZES, **MAMBA, **fields})


def coloured(labels, size):
    """Noise, (images, 3, size, size), in which the channel that the label names is brighter."""
    brighter = torch.nn.functional.one_hot(labels, 3).float()
    return torch.randn(len(labels), 3, size, size) + brighter[:, :, None, None]


def test_sections_reorder_the_patches_and_leave_the_tail():
    torch.manual_seed(0)
    raster = DefocusEmbeddings(build_config(num_registers=1))
    sections = DefocusEmbeddings(build_config(num_registers=1, patch_order="sections", section_size=2))
    sections.load_state_dict(raster.state_dict())
    for name in ("pos_embed", "cls_token", "register_tokens"):
        torch.nn.init.normal_(getattr(raster, name))
        getattr(sections, name).data.copy_(getattr(raster, name))
    pixels = torch.randn(2, 3, 32, 32)
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(sections(pixels), raster(pixels)[:, [*order, 16, 17]])


@pytest.mark.parametrize("mixer", ["attention", "retention", "mamba"])
def test_an_encoder_trained_at_one_size_runs_at_another(mixer, tmp_path):
    config = build_config(mixer=mixer, num_labels=3)
    model = DefocusForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = torch.arange(30) % 3
    for _ in range(30):
        optimizer.zero_grad()
        model(coloured(labels, 32), labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    assert (model(coloured(labels, 32)).logits.argmax(-1) == labels).all()
    model.resize_images(64)
    large = coloured(labels, 64)
    assert (model(large).logits.argmax(-1) == labels).all(), "it still knows what it was taught"
    assert (model.config.delta_scale_factor, model.config.rope_scale_factor) == (2.0, 4.0)
    model.save_pretrained(tmp_path)
    again = DefocusForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(large).logits, model(large).logits)


def test_the_same_size_changes_nothing():
    model = DefocusVisionModel(build_config()).eval()
    pixels = torch.randn(1, 3, 32, 32)
    before = model(pixels).last_hidden_state
    model.resize_images(32)
    assert torch.equal(model(pixels).last_hidden_state, before)


def test_scaled_positions_are_those_of_a_sequence_with_tokens_left_out():
    """With a factor of 2, tokens 2 t of the longer sequence turn against each other as tokens t do."""
    plain, scaled = (
        DefocusVisionModel(build_config(rope_scale_factor=factor)).layers[0].mixer.double() for factor in (1, 2)
    )
    scaled.load_state_dict(plain.state_dict())
    tokens = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    time = torch.arange(5, dtype=torch.float64)
    slow = scale_tokens(tokens, None, scaled.rates()[1], 2 * time[:1])
    torch.testing.assert_close(slow, scale_tokens(tokens, None, plain.rates()[1], time[:1]))
    torch.testing.assert_close(2 * scaled.rates()[1], plain.rates()[1])


def test_any_size_takes_what_fits_and_refuses_what_does_not():
    model = DefocusVisionModel(build_config(patch_order="sections", section_size=2)).eval()
    assert model(torch.randn(1, 3, 16, 48), any_size=True).last_hidden_state.shape == (1, 2 * 6 + 1, 32)
    with pytest.raises(ValueError, match="height 16 and width 40 must be multiples of 16"):
        model(torch.randn(1, 3, 16, 40), any_size=True)
    with pytest.raises(ValueError, match=r"\(batch, 3, 32, 32\)"):
        model(torch.randn(1, 3, 16, 48))


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(Exception, match="image_size 36 must be a multiple of patch_size 8"):
        DefocusVisionModel(build_config()).resize_images(36)
