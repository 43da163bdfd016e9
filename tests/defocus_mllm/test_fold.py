"""Factors of tokens: from their definition, far down a sequence, differentiable, traced."""

import cmath

import pytest
import torch

from defocus_mllm.fold_defocus import folds_any, folds_safely, scale_tokens


def test_each_pair_of_channels_is_multiplied_by_its_factor():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    rate, theta = torch.tensor([-0.1, 0.2, -2.0]).double(), torch.rand(3, 2, dtype=torch.float64)
    scaled = scale_tokens(x, rate, theta, torch.arange(-2.0, 3.0, dtype=torch.float64))
    for h in range(3):
        for t in range(5):
            for p in range(2):
                number = complex(*x[1, h, t, 2 * p : 2 * p + 2])
                expected = number * cmath.exp((rate[h] + 1j * theta[h, p]).item() * (t - 2))
                assert complex(*scaled[1, h, t, 2 * p : 2 * p + 2]) == pytest.approx(expected, rel=1e-12)


def test_a_phase_far_down_the_sequence_is_not_rounded():
    time = 100_000 + torch.arange(50, dtype=torch.float64)
    x, theta = torch.ones(1, 1, 50, 2), torch.tensor([[1.0]])
    exact = scale_tokens(x.double(), None, theta.double(), time)
    assert (scale_tokens(x, None, theta, time) - exact).abs().max() < 1e-6


@pytest.mark.parametrize("with_rate", [True, False])
@pytest.mark.parametrize("with_theta", [True, False])
@pytest.mark.parametrize("blocks", [(), (2,)])
def test_gradients_match_finite_differences_and_a_tracer_gets_the_same(with_rate, with_theta, blocks):
    x = torch.randn(2, 2, *blocks, 3, 4, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([-0.3, 0.2], dtype=torch.float64, requires_grad=True) if with_rate else None
    theta = torch.rand(2, 2, dtype=torch.float64, requires_grad=True) if with_theta else None
    time = torch.arange(-1.0, 2.0, dtype=torch.float64)
    given = [tensor for tensor in (x, rate, theta) if tensor is not None]

    def run(*tensors):
        left = iter(tensors)
        return scale_tokens(*(None if tensor is None else next(left) for tensor in (x, rate, theta)), time)

    assert torch.autograd.gradcheck(run, given)
    compiled = torch.compile(scale_tokens, backend="aot_eager", fullgraph=True)
    results = []
    for scale in (scale_tokens, compiled):
        output = scale(x, rate, theta, time)
        results.append([output, *(torch.autograd.grad(output.sin().sum(), given) if output.requires_grad else ())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_numbers_that_cannot_be_viewed_as_complex_where_they_lie():
    base = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    theta, time = torch.rand(2, 2, dtype=torch.float64), torch.arange(3, dtype=torch.float64)
    torch.testing.assert_close(
        scale_tokens(base[..., 1:], None, theta, time), scale_tokens(base[..., 1:].contiguous(), None, theta, time)
    )


@pytest.mark.parametrize("norms", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_what_is_not_finite_is_not_safe(norms):
    assert not folds_safely(-0.01, 10, 10, norms, 4, torch.float32)
    assert not folds_any(float("nan"), 10, torch.float32)


def test_large_numbers_and_far_keys_leave_less_room():
    room = {"rate": -0.5, "queries": 200, "channels": 4, "dtype": torch.float32}
    assert folds_safely(keys=200, norms=(1.0, 1.0), **room)
    assert not folds_safely(keys=200, norms=(1.0, 1e20), **room)
    assert not folds_safely(keys=400, norms=(1e8, 1e8), **room)
    assert not folds_safely(keys=200, norms=(1.0, 1.0), future_is_computed=True, **room)
