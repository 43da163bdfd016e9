"""The encoder reads an image left to right; its classifier's two losses; drop path; saving and loading."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForImageClassification

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig, DefocusVisionModel
from defocus_mllm.layers_defocus import DefocusContextBroadcasting
from defocus_mllm.modeling_defocus_vision import classification_loss

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


MIXERS = ("attention", "retention", "mamba")


def build_config(**fields):
    mamba = {"state_size": 4, "time_step_rank": 3, "group_norm_size": 16}
    return DefocusVisionConfig(**{"image_size": 32, "patch_size": 8, **SIZES, **mamba, **fields})


def test_shapes_order_and_pooling():
    config = build_config(num_registers=2)
    output = DefocusVisionModel(config).eval()(torch.randn(3, 3, 32, 32), output_hidden_states=True)
    assert output.last_hidden_state.shape == (3, 16 + 2 + 1, 32)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, -1])
    assert len(output.hidden_states) == config.num_hidden_layers + 1


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_later_patch_changes_no_earlier_output_and_only_the_tail_has_seen_all(mixer):
    model = DefocusVisionModel(build_config(mixer=mixer, num_registers=1)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, 8:16, 16:24] += 1  # row 1, column 2: patch 6
    before, after = model(pixels).last_hidden_state, model(changed).last_hidden_state
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()


def test_a_non_causal_encoder_sees_later_patches():
    model = DefocusVisionModel(build_config(causal=False)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, -8:, -8:] += 1
    assert (model(pixels).last_hidden_state[:, 0] != model(changed).last_hidden_state[:, 0]).any()


def test_another_image_size_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, 3, 32, 32\), not \(1, 3, 32, 40\)"):
        DefocusVisionModel(build_config())(torch.randn(1, 3, 32, 40))


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_learns(mixer, head_type):
    config = build_config(mixer=mixer, head_type=head_type, num_labels=3, num_registers=2)
    model = DefocusForImageClassification(config)
    model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("causal", [True, False])
def test_context_broadcasting_adds_the_mean_token(causal):
    tokens = torch.randn(2, 5, 32, dtype=torch.float64)
    plain = DefocusContextBroadcasting(build_config(causal=causal, context_broadcasting="mean"))(tokens)
    scaled = DefocusContextBroadcasting(build_config(causal=causal, context_broadcasting="scaled")).double()
    assert torch.equal(scaled(tokens), tokens), "it starts without"
    torch.nn.init.normal_(scaled.scale)
    for t in range(5):
        mean = tokens[:, : t + 1 if causal else 5].mean(dim=1)
        torch.testing.assert_close(plain[:, t], (tokens[:, t] + mean) / 2)
        torch.testing.assert_close(scaled(tokens)[:, t], tokens[:, t] + scaled.scale * mean)


def test_context_broadcasting_keeps_the_encoder_causal():
    model = DefocusVisionModel(build_config(context_broadcasting="mean")).eval()
    pixels = torch.randn(1, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, -8:, -8:] += 1
    before, after = model(pixels).last_hidden_state, model(changed).last_hidden_state
    assert torch.equal(before[:, :15], after[:, :15])
    assert (before != DefocusVisionModel(build_config()).eval()(pixels).last_hidden_state).any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_black_patch_does_not_explode_the_gradient(mixer):
    config = build_config(mixer=mixer, num_labels=3, use_absolute_position_embeddings=False)
    model = DefocusForImageClassification(config)
    pixels = torch.randn(2, 3, 32, 32)
    pixels[:, :, :16] = 0
    model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    assert max(parameter.grad.abs().max() for parameter in model.parameters()) < 1e3


@pytest.mark.parametrize("aux_loss", ["pooled", "per_token", "none"])
def test_the_losses_are_those_of_paper_and_release(aux_loss):
    model = DefocusForImageClassification(build_config(num_labels=5, num_registers=1, aux_loss=aux_loss)).eval()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 4, 2, 1])
    output, encoded = model(pixels, labels=labels), model.encoder(pixels).last_hidden_state
    main = F.cross_entropy(model.head(encoded[:, -1]), labels)
    if aux_loss == "pooled":
        expected = main + F.cross_entropy(model.head2(encoded[:, :16].mean(dim=1)), labels)
    elif aux_loss == "per_token":
        every_token = model.head2(encoded[:, :16]).flatten(0, 1)
        expected = (main + F.cross_entropy(every_token, labels.repeat_interleave(16))) / 2
    else:
        expected = main
        assert model.head2 is None
    torch.testing.assert_close(output.loss, expected)


def test_unknown_labels_are_left_out():
    logits = torch.randn(4, 3)
    known = classification_loss(logits[:2], torch.tensor([2, 0]), None)
    torch.testing.assert_close(classification_loss(logits, torch.tensor([2, 0, -100, -100]), None), known)
    assert classification_loss(logits, torch.full((4,), -100), None) == 0
    labels = torch.tensor([[1.0, 0.0, -100.0]] * 4)
    expected = F.binary_cross_entropy_with_logits(logits[:, :2], labels[:, :2])
    torch.testing.assert_close(classification_loss(logits, labels, "multi_label_classification"), expected)


def test_class_probabilities_as_labels():
    logits = torch.randn(4, 3, requires_grad=True)
    soft = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [-1.0, -1.0, -1.0], [0.0, 0.6, 0.4]])
    expected = -(soft[[0, 1, 3]] * logits[[0, 1, 3]].log_softmax(-1)).sum(-1).mean()
    loss = classification_loss(logits, soft, "single_label_classification")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[2].any()
    assert gradient[[0, 1, 3]].all()
    one_hot = F.one_hot(torch.tensor([2, 0]), 3).float()
    torch.testing.assert_close(
        classification_loss(logits[:2], one_hot, None), classification_loss(logits[:2], torch.tensor([2, 0]), None)
    )
    assert classification_loss(logits, torch.full((4, 3), -1.0), None) == 0
    assert classification_loss(logits.bfloat16(), soft.bfloat16(), None).dtype == torch.float32


@pytest.mark.parametrize("aux_loss", ["pooled", "per_token"])
def test_the_auxiliary_loss_takes_class_probabilities_too(aux_loss):
    model = DefocusForImageClassification(build_config(num_labels=3, aux_loss=aux_loss)).eval()
    pixels, soft = torch.randn(3, 3, 32, 32), torch.tensor([[0.1, 0.2, 0.7], [-1.0] * 3, [0.5, 0.5, 0.0]])
    output = model(pixels, labels=soft)
    logits = output.aux_logits if aux_loss == "per_token" else output.aux_logits[:, None]
    expected = -(soft[[0, 2], None] * logits[[0, 2]].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(output.aux_loss, expected)
    hard = model(pixels, labels=torch.tensor([2, -1, 0]))
    one_hot = torch.tensor([[0.0, 0.0, 1.0], [-1.0] * 3, [1.0, 0.0, 0.0]])
    torch.testing.assert_close(model(pixels, labels=one_hot).loss, hard.loss)


def test_drop_path_grows_linearly_with_depth_and_keeps_the_mean():
    model = DefocusVisionModel(build_config(num_hidden_layers=4, drop_path_rate=0.6))
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    model.set_drop_path_rate(0.3)
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    drop_path = model.layers[-1].drop_path.train()
    branch = drop_path(torch.ones(20_000, 1, 1))
    assert branch.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert branch.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop_path.eval()(branch), branch)


def test_save_and_load_by_auto_class_gives_identical_outputs(tmp_path):
    config = build_config(num_labels=7, problem_type="multi_label_classification")
    model = DefocusForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(encoder, DefocusVisionModel)
    assert torch.equal(encoder(pixels).last_hidden_state, model.encoder(pixels).last_hidden_state)


def test_band_pass_stays_in_float32_when_the_rest_is_half(tmp_path):
    DefocusVisionModel(build_config()).save_pretrained(tmp_path)
    model = DefocusVisionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert kinds["lambda_hat"] == kinds["theta"] == torch.float32
    assert kinds["weight"] == torch.bfloat16
    assert model(torch.randn(1, 3, 32, 32)).last_hidden_state.isfinite().all()


def test_gradient_checkpointing_changes_no_gradient():
    model = DefocusForImageClassification(build_config(num_labels=3))
    pixels, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    model(pixels, labels=labels).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.train()(pixels, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])
