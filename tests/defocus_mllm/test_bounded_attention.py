"""Attention with a bounded state: exact within the window, within its stated error beyond, constant in size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm.attention_core_defocus import _reference
from defocus_mllm.bounded_attention_defocus import DefocusBoundedAttentionState, bounded_attention

RATES = st.floats(math.log(1e-4), math.log(5)).map(math.exp)


def inputs(tokens, rates, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(rates), tokens, 6)
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    theta = (0.01 ** torch.linspace(0, 1, 3, dtype=torch.float64)).expand(len(rates), -1).contiguous()
    return [size * query, size * key, value], -torch.tensor(rates, dtype=torch.float64), theta


def in_pieces(tensors, decay, theta, window, cuts):
    state, outputs, start = DefocusBoundedAttentionState(window), [], 0
    for end in [*cuts, tensors[0].shape[2]]:
        piece = [x[:, :, start:end] for x in tensors]
        output, state = bounded_attention(*piece, decay, theta, 0.4, state)
        outputs.append(output)
        start = end
    return torch.cat(outputs, dim=2), state


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(2, 120),
    rates=st.lists(RATES, min_size=1, max_size=3),
    window=st.integers(1, 40),
    size=st.sampled_from([0.2, 1.0]),
)
def test_the_error_is_within_the_bound_that_the_state_states(data, tokens, rates, window, size):
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=5)))
    tensors, decay, theta = inputs(tokens, rates, size)
    output, state = in_pieces(tensors, decay, theta, window, cuts)
    exact = _reference(*tensors, decay, theta, 0.4, True)
    assert output.isfinite().all()
    error = (output - exact).abs().amax(dim=(2, 3))
    largest = tensors[2].abs().amax(dim=(2, 3))
    assert (error <= state.error_bound * largest + 1e-12).all()
    if window >= tokens:
        assert (error < 1e-12).all()
        assert (state.error_bound == 0).all()


def test_the_first_order_is_better_than_the_zeroth_by_its_order():
    tensors, decay, theta = inputs(200, [0.15], size=0.5)
    exact = _reference(*tensors, decay, theta, 0.4, True)
    output, state = in_pieces(tensors, decay, theta, 20, range(10, 200, 10))
    assert state.error_bound.max() < 0.02
    wrong, _ = in_pieces(tensors, decay, None, 20, [])
    assert (output - exact).abs().max() < 1e-4 < (wrong - exact).abs().max()


def test_the_state_stays_of_one_size_and_the_exact_window_does_not_depend_on_the_pieces():
    tensors, decay, theta = inputs(300, [0.3, 2.0])
    sizes = []
    for cuts in ([], [100], range(7, 300, 7)):
        output, state = in_pieces(tensors, decay, theta, 60, cuts)
        sizes.append(sum(x.numel() for x in vars(state).values() if isinstance(x, torch.Tensor)))
        torch.testing.assert_close(output, _reference(*tensors, decay, theta, 0.4, True), atol=1e-6, rtol=0)
        assert state.num_far == 240
    assert len(set(sizes)) == 1
    short, longer = (in_pieces([x[:, :, :n] for x in tensors], decay, theta, 60, []) for n in (100, 300))
    assert [x.shape for x in vars(short[1]).values() if isinstance(x, torch.Tensor)] == [
        x.shape for x in vars(longer[1]).values() if isinstance(x, torch.Tensor)
    ]


def test_gradients_match_finite_differences_through_the_far_field():
    tensors, decay, theta = inputs(7, [0.9])
    leaves = [x[:1].requires_grad_() for x in tensors] + [decay.requires_grad_(), theta.requires_grad_()]

    def run(query, key, value, decay, theta):
        return in_pieces([query, key, value], decay, theta, 2, [3])[0]

    # The window's own largest norms steer only which order is used, not the result.
    assert torch.autograd.gradcheck(run, leaves)


def test_a_state_in_half_precision_is_kept_in_float32():
    tensors, decay, theta = inputs(30, [0.3])
    half = [x.bfloat16() for x in tensors]
    output, state = in_pieces(half, decay.float(), theta.float(), 8, [10, 20])
    assert output.dtype == torch.bfloat16
    assert state.memory.dtype == state.far_value.dtype == torch.float32
    exact = _reference(*(x.double() for x in half), decay, theta, 0.4, True)
    assert (output.double() - exact).abs().max() < 0.02


def test_a_window_below_one_token_is_refused():
    with pytest.raises(ValueError, match="at least one token, not 0"):
        DefocusBoundedAttentionState(0)
