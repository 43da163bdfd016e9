"""Equation 8 from its definition; one mixer in three forms; gradients; causality; limits; the band-pass response."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm import DefocusVisionConfig
from defocus_mllm.bandpass_defocus import DefocusBandPass
from defocus_mllm.kernels_defocus import defocus_attention
from defocus_mllm.mixers_defocus import MIXERS


def build_mixer(**fields):
    config = DefocusVisionConfig(**{"hidden_size": 16, "num_attention_heads": 2, **fields})
    torch.manual_seed(0)
    return MIXERS[config.mixer](config).double()


def equation_8(mixer, hidden_states):
    """The formula, one number at a time: no shared code with the mixer but its projections and parameters."""
    batch, num_tokens, hidden = hidden_states.shape
    band_pass, heads, width = mixer.band_pass, mixer.num_heads, mixer.head_dim
    query, key, value = mixer.qkv(hidden_states).view(batch, num_tokens, 3, heads, width).unbind(2)
    output = torch.zeros(batch, num_tokens, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            decay = 0.0 if band_pass.lambda_hat is None else -math.exp(band_pass.lambda_hat[h].item())
            for t in range(num_tokens):
                visible = range(t + 1) if mixer.causal else range(num_tokens)
                logits = []
                for s in visible:
                    q, k = (torch.view_as_complex(x[b, i, h].view(-1, 2)) for x, i in ((query, t), (key, s)))
                    theta = torch.zeros(width // 2) if band_pass.theta is None else band_pass.theta[h]
                    rotation = torch.exp(-1j * theta * (t - s))  # Re(conj(q) e^{-i theta (t-s)} k) = <R(t) q, R(s) k>
                    product = (q.conj() * rotation * k).sum().real
                    logits.append(product / math.sqrt(width) * math.exp(decay * abs(t - s)))
                weights = torch.softmax(torch.stack(logits), dim=0)
                output[b, t, h] = sum(w * value[b, s, h] for w, s in zip(weights, visible, strict=True))
    return mixer.out_proj(output.view(batch, num_tokens, hidden))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", ["learnable", "none"])
@pytest.mark.parametrize("rotary", ["learnable", "none"])
def test_the_mixer_is_equation_8(causal, decay, rotary):
    mixer = build_mixer(causal=causal, decay=decay, rotary=rotary)
    hidden_states = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(hidden_states)[0], equation_8(mixer, hidden_states), rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 24), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_parallel_chunked_and_recurrent_forms_agree(data, num_tokens, dtype):
    mixer = build_mixer().to(dtype)
    hidden_states = torch.randn(2, num_tokens, 16, dtype=dtype)
    parallel, last_state = mixer(hidden_states)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, num_tokens - 1)), max_size=4)) | {num_tokens})
    for pieces in (cuts, range(1, num_tokens + 1)):
        state, outputs, start = None, [], 0
        for end in pieces:
            output, state = mixer(hidden_states[:, start:end], state)
            outputs.append(output)
            start = end
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(torch.cat(outputs, dim=1), parallel, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state.key, last_state.key, rtol=tolerance, atol=tolerance)


def test_a_later_token_changes_no_earlier_output():
    mixer = build_mixer()
    hidden_states = torch.randn(1, 9, 16, dtype=torch.float64)
    changed = hidden_states.clone()
    changed[:, 5] += 1
    before, after = mixer(hidden_states)[0], mixer(changed)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


def test_non_causal_attention_sees_everything_and_refuses_a_state():
    mixer = build_mixer(causal=False)
    hidden_states = torch.randn(1, 9, 16, dtype=torch.float64)
    changed = hidden_states.clone()
    changed[:, 5] += 1
    output, state = mixer(hidden_states)
    assert (output != mixer(changed)[0]).any(dim=-1).all()
    with pytest.raises(ValueError, match="no state"):
        mixer(hidden_states, state)


def test_gradients_of_lambda_and_theta_match_finite_differences():
    mixer = build_mixer()
    hidden_states = torch.randn(2, 6, 16, dtype=torch.float64)
    parameters = (mixer.band_pass.lambda_hat, mixer.band_pass.theta)

    def output(lambda_hat, theta):
        values = {"band_pass.lambda_hat": lambda_hat, "band_pass.theta": theta}
        return torch.func.functional_call(mixer, values, (hidden_states,))[0]

    assert torch.autograd.gradcheck(output, parameters)


def test_the_decay_multiplies_the_logit_so_far_tokens_tend_to_uniform_attention():
    query = torch.full((1, 1, 1, 4), 3.0, dtype=torch.float64)
    key = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    value = torch.eye(5, dtype=torch.float64)[None, None]
    vanished = torch.full((1, 1, 5), 1e-12, dtype=torch.float64)
    weights = defocus_attention(query, key, value, vanished, None, 0.5)
    torch.testing.assert_close(weights.flatten(), torch.full((5,), 0.2, dtype=torch.float64))


def test_limits_give_the_plain_operator():
    filtered = build_mixer()
    plain = build_mixer(decay="none", rotary="none")
    plain.load_state_dict(filtered.state_dict(), strict=False)
    with torch.no_grad():
        filtered.band_pass.lambda_hat.fill_(-50)
        filtered.band_pass.theta.zero_()
    hidden_states = torch.randn(2, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(filtered(hidden_states)[0], plain(hidden_states)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "trained"), [("learnable", True), ("fixed", False)])
def test_fixed_parameters_get_no_gradient(mode, trained):
    mixer = build_mixer(decay=mode, rotary=mode)
    mixer(torch.randn(1, 4, 16, dtype=torch.float64))[0].square().sum().backward()
    for parameter in (mixer.band_pass.lambda_hat, mixer.band_pass.theta):
        assert (parameter.grad is not None) == trained
        assert not trained or parameter.grad.abs().min() > 0


def test_phases_stay_in_float32_under_autocast():
    band_pass = DefocusBandPass(1, 1, "fixed", "fixed")
    positions = torch.tensor([1000])
    ones = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        band_pass.theta.fill_(1.001)
        rotated = band_pass.rotate(ones, positions)
    phase = torch.tensor(1001.0)
    expected = torch.stack((phase.cos() - phase.sin(), phase.sin() + phase.cos()))
    torch.testing.assert_close(rotated.flatten().float(), expected, atol=1e-2, rtol=1e-2)


def test_the_frequency_response_is_the_spectrum_of_the_impulse_response():
    band_pass = DefocusBandPass(2, 3, "learnable", "learnable").double()
    step = 0.01
    time = torch.arange(0, 4000, step, dtype=torch.float64)
    omega = torch.tensor([0.0, 0.3, 0.9, 2.0], dtype=torch.float64)
    gain = band_pass.frequency_response(omega)
    for head in range(2):
        envelope = torch.exp(band_pass.decay[head] * time)
        for pair in range(3):
            impulse = envelope * torch.exp(1j * band_pass.theta[head, pair] * time)
            for index, frequency in enumerate(omega):
                measured = (impulse * torch.exp(-1j * frequency * time)).sum().abs() * step
                assert measured.item() == pytest.approx(gain[head, pair, index].item(), rel=2e-2)


def test_a_filter_without_decay_has_no_response():
    with pytest.raises(ValueError, match=r"eq\. 7"):
        DefocusBandPass(2, 3, "none", "learnable").frequency_response(torch.zeros(1))
