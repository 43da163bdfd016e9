"""Equations 4 and 8 from their definition; every mixer in three forms; gradients; causality; limits; the band pass."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm import DefocusVisionConfig
from defocus_mllm.attention_core_defocus import defocus_attention
from defocus_mllm.bandpass_defocus import DefocusBandPass
from defocus_mllm.fold_defocus import scale_tokens
from defocus_mllm.mixers_defocus import MIXERS
from defocus_mllm.retention_core_defocus import retention

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 12, "group_norm_size": 4}
OTHER_RESOLUTION = {"delta_scale_factor": 1.7, "rope_scale_factor": 3.1}
SMALL_MAMBA = {"state_size": 6, "time_step_rank": 3, "conv_kernel": 3}


def build_mixer(**fields):
    config = DefocusVisionConfig(**{**SMALL, **SMALL_MAMBA, **fields})
    torch.manual_seed(0)
    return MIXERS[config.mixer](config).double()


def state_tensors(state):
    return [value for value in vars(state).values() if isinstance(value, torch.Tensor)]


def equation_8(mixer, hidden_states):
    """The formula, one number at a time: no shared code with the mixer but its projections and parameters."""
    batch, num_tokens, hidden = hidden_states.shape
    band_pass, heads, width = mixer.band_pass, mixer.num_heads, mixer.head_dim
    delta_scale, rope_scale = mixer.config.delta_scale_factor, mixer.config.rope_scale_factor
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
                    rotation = torch.exp(
                        -1j * theta * (t - s) / rope_scale
                    )  # Re(conj(q) e^{-i theta (t-s)} k) = <R(t) q, R(s) k>
                    product = (q.conj() * rotation * k).sum().real
                    logits.append(product / math.sqrt(width) * math.exp(decay * abs(t - s) / delta_scale))
                weights = torch.softmax(torch.stack(logits), dim=0)
                output[b, t, h] = sum(w * value[b, s, h] for w, s in zip(weights, visible, strict=True))
    return mixer.out_proj(output.view(batch, num_tokens, hidden))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", ["learnable", "none"])
@pytest.mark.parametrize("rotary", ["learnable", "none"])
def test_the_mixer_is_equation_8(causal, decay, rotary):
    mixer = build_mixer(causal=causal, decay=decay, rotary=rotary, **OTHER_RESOLUTION)
    hidden_states = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(hidden_states)[0], equation_8(mixer, hidden_states), rtol=1e-9, atol=1e-12)


def equation_4(mixer, hidden_states):
    """Retention as a sum over the past, one number at a time, then the norm of each head, the gate, the projection."""
    batch, num_tokens, hidden = hidden_states.shape
    band_pass, heads, width = mixer.band_pass, mixer.num_heads, mixer.head_dim
    delta_scale, rope_scale = mixer.config.delta_scale_factor, mixer.config.rope_scale_factor
    query, key, value = mixer.qkv(hidden_states).view(batch, num_tokens, 3, heads, width).unbind(2)
    output = torch.zeros(batch, num_tokens, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            decay = 0.0 if band_pass.lambda_hat is None else -math.exp(band_pass.lambda_hat[h].item())
            theta = torch.zeros(width // 2) if band_pass.theta is None else band_pass.theta[h]
            for t in range(num_tokens):
                for s in range(t + 1):
                    q, k = (torch.view_as_complex(x[b, i, h].view(-1, 2)) for x, i in ((query, t), (key, s)))
                    product = (q.conj() * torch.exp(-1j * theta * (t - s) / rope_scale) * k).sum().real
                    output[b, t, h] += (
                        product / math.sqrt(width) * math.exp(decay * (t - s) / delta_scale) * value[b, s, h]
                    )
    output = output / (output.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gate = mixer.gate(hidden_states)
    return mixer.out_proj(output.view(batch, num_tokens, hidden) * gate * torch.sigmoid(gate))


@pytest.mark.parametrize("decay", ["learnable", "none"])
@pytest.mark.parametrize("rotary", ["learnable", "none"])
def test_the_retention_mixer_is_equation_4(decay, rotary):
    mixer = build_mixer(mixer="retention", decay=decay, rotary=rotary, **OTHER_RESOLUTION)
    hidden_states = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(hidden_states)[0], equation_4(mixer, hidden_states), rtol=1e-9, atol=1e-12)


EVERY_FILTER = [
    (mixer, decay, rotary)
    for mixer in MIXERS
    for decay in ("learnable", "fixed", "none", *(["data_dependent"] if mixer == "mamba" else []))
    for rotary in ("learnable", "fixed", "none")
]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    variant=st.sampled_from(EVERY_FILTER),
    num_tokens=st.integers(1, 24),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    scales=st.sampled_from([(1.0, 1.0), (2.0, 4.0)]),
)
def test_parallel_chunked_and_recurrent_forms_agree(data, variant, num_tokens, dtype, scales):
    kind, decay, rotary = variant
    delta_scale, rope_scale = scales
    fields = {"delta_scale_factor": delta_scale, "rope_scale_factor": rope_scale}
    mixer = build_mixer(mixer=kind, decay=decay, rotary=rotary, **fields).to(dtype)
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
        assert state.num_tokens == last_state.num_tokens == num_tokens
        for carried, expected in zip(state_tensors(state), state_tensors(last_state), strict=True):
            torch.testing.assert_close(carried, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", MIXERS)
def test_a_later_token_changes_no_earlier_output(kind):
    mixer = build_mixer(mixer=kind)
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


FILTER_PARAMETERS = {
    "attention": ("band_pass.lambda_hat", "band_pass.theta"),
    "retention": ("band_pass.lambda_hat", "band_pass.theta"),
    "mamba": ("A_log", "theta", "D", "dt_proj.bias"),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_gradients_of_the_filter_match_finite_differences(kind):
    mixer = build_mixer(mixer=kind)
    hidden_states = torch.randn(2, 6, 16, dtype=torch.float64)
    parameters = dict(mixer.named_parameters())

    def output(*values):
        given = dict(zip(FILTER_PARAMETERS[kind], values, strict=True))
        return torch.func.functional_call(mixer, given, (hidden_states,))[0]

    assert torch.autograd.gradcheck(output, [parameters[name] for name in FILTER_PARAMETERS[kind]])


@pytest.mark.parametrize("decay", ["learnable", "data_dependent"])
def test_gradients_of_a_piece_reach_what_came_before_it(decay):
    mixer = build_mixer(mixer="mamba", decay=decay)
    hidden_states = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)

    def in_pieces(tokens):
        first, state = mixer(tokens[:, :4])
        return torch.cat((first, mixer(tokens[:, 4:], state)[0]), dim=1)

    assert torch.autograd.gradcheck(in_pieces, hidden_states)


def test_the_decay_multiplies_the_logit_so_far_tokens_tend_to_uniform_attention():
    query = torch.full((1, 1, 1, 6), 3.0, dtype=torch.float64)
    key = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    value = torch.eye(5, 6, dtype=torch.float64)[None, None]
    decay = torch.tensor([-40.0], dtype=torch.float64)
    weights = defocus_attention(query, key, value, decay, None, 0.5).flatten()[:5]
    near = torch.exp(0.5 * (query[0, 0, 0] @ key[0, 0, 4])).item()
    expected = torch.tensor([1, 1, 1, 1, near], dtype=torch.float64) / (4 + near)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("kind", ["attention", "retention"])
def test_limits_give_the_plain_operator(kind):
    filtered = build_mixer(mixer=kind)
    plain = build_mixer(mixer=kind, decay="none", rotary="none")
    plain.load_state_dict(filtered.state_dict(), strict=False)
    with torch.no_grad():
        filtered.band_pass.lambda_hat.fill_(-50)
        filtered.band_pass.theta.zero_()
    hidden_states = torch.randn(2, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(filtered(hidden_states)[0], plain(hidden_states)[0], rtol=1e-12, atol=1e-12)


def test_limits_give_plain_mamba():
    filtered = build_mixer(mixer="mamba")
    hidden_states = torch.randn(2, 8, 16, dtype=torch.float64)
    without_rotary = build_mixer(mixer="mamba", rotary="none")
    without_rotary.load_state_dict(filtered.state_dict(), strict=False)
    with torch.no_grad():
        filtered.theta.zero_()
    expected = without_rotary(hidden_states)[0]
    torch.testing.assert_close(filtered(hidden_states)[0], expected, rtol=1e-12, atol=1e-12)
    without_decay = build_mixer(mixer="mamba", decay="none", rotary="none")
    without_decay.load_state_dict(filtered.state_dict(), strict=False)
    with torch.no_grad():
        filtered.A_log.fill_(-50)
    expected = without_decay(hidden_states)[0]
    torch.testing.assert_close(filtered(hidden_states)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("mode", ["learnable", "fixed"])
def test_fixed_values_are_out_of_reach_of_an_optimizer(kind, mode):
    mixer = build_mixer(mixer=kind, decay=mode, rotary=mode)
    mixer(torch.randn(1, 4, 16, dtype=torch.float64))[0].square().sum().backward()
    names = ("A_log", "decay_bias", "theta") if kind == "mamba" else ("band_pass.lambda_hat", "band_pass.theta")
    parameters = dict(mixer.named_parameters())
    assert set(names) <= set(mixer.state_dict()), "a fixed value is saved too"
    for name in names:
        assert (name in parameters) == (mode == "learnable")
        assert mode == "fixed" or parameters[name].grad.abs().max() > 0


@pytest.mark.parametrize("kind", MIXERS)
def test_autocast_changes_little(kind):
    mixer = build_mixer(mixer=kind).float()
    hidden_states = torch.randn(2, 12, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = mixer(hidden_states)
    torch.testing.assert_close(output.float(), mixer(hidden_states)[0], rtol=0.1, atol=0.05)
    if kind != "attention":
        carried = state.memory if kind == "retention" else state.scan
        assert carried.dtype == torch.float32, "what is carried along the sequence keeps its precision"


def test_phases_stay_in_float32_under_autocast():
    ones = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated = scale_tokens(ones, None, torch.tensor([[1.001]]), torch.tensor([1000.0], dtype=torch.float64))
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


def test_an_impulse_through_retention_has_the_response_of_equation_7():
    band_pass = DefocusBandPass(1, 1, "learnable", "learnable").double()
    with torch.no_grad():
        band_pass.lambda_hat.fill_(math.log(0.02))
        band_pass.theta.fill_(0.15)
    num_tokens = 1200
    positions = torch.arange(num_tokens)
    value = torch.zeros(1, 1, num_tokens, 1, dtype=torch.float64)
    value[0, 0, 0] = 1
    ones = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, num_tokens, 2)
    turned = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 1, num_tokens, 2)
    key, *queries = (scale_tokens(x, None, band_pass.theta, positions.double()) for x in (ones, ones, turned))
    real, imaginary = (retention(query, key, value, band_pass.decay)[0].flatten() for query in queries)
    omega = torch.tensor([0.0, 0.1, 0.15, 0.2, 0.4], dtype=torch.float64)
    spectrum = ((real - 1j * imaginary) * torch.exp(-1j * omega[:, None] * positions)).sum(dim=1).abs()
    torch.testing.assert_close(spectrum, band_pass.frequency_response(omega)[0, 0], rtol=2e-2, atol=0)


def test_a_filter_without_decay_has_no_response():
    with pytest.raises(ValueError, match=r"eq\. 7"):
        DefocusBandPass(2, 3, "none", "learnable").frequency_response(torch.zeros(1))
