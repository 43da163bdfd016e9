"""Attention's backends against eq. 8 in float64: values, gradients, rates from 1e-4 to 5, dispatch, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm.attention_core_defocus import _folded, _plan, _reference, defocus_attention
from defocus_mllm.fold_defocus import folds_safely
from defocus_mllm.kernels_defocus import kernel_report
from defocus_mllm.window_defocus import BLOCK_EXPONENT, far_field_error, far_logit, windowed_attention

RATES = st.floats(math.log(1e-4), math.log(5)).map(math.exp)


def equation_8(query, key, value, decay, theta, scaling, causal=True):
    """Float64, with the complex factor of every pair of tokens: no code shared with the core."""
    query, key, value = query.double(), key.double(), value.double()
    queries, keys = query.shape[2], key.shape[2]
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).double()
    pairs = (torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) for x in (query, key))
    q, k = pairs
    logits = torch.zeros(query.shape[0], query.shape[1], queries, keys, dtype=torch.float64)
    for pair in range(q.shape[-1]):
        turn = torch.zeros(query.shape[1], 1, 1) if theta is None else theta[:, pair, None, None].double()
        rotation = torch.polar(torch.ones(len(turn), queries, keys).double(), -turn * distance)
        logits = logits + (q[..., pair].conj()[..., None] * rotation * k[..., pair][:, :, None]).real
    if decay is not None:
        logits = logits * torch.exp(decay.double()[:, None, None] * distance.abs())
    logits = logits * scaling
    if causal:
        logits = logits.masked_fill(distance < 0, -math.inf)
    return logits.softmax(dim=-1) @ value


def inputs(tokens, rates, channels=8, batch=1, keys=None, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = len(rates)
    shapes = [(tokens, size), (keys or tokens, size), (keys or tokens, 1.0)]
    tensors = [
        factor * torch.randn(batch, heads, length, channels, generator=generator, dtype=torch.float64)
        for length, factor in shapes
    ]
    theta = (0.01 ** torch.linspace(0, 1, channels // 2, dtype=torch.float64)).expand(heads, -1).contiguous()
    return [*tensors, -torch.tensor(rates, dtype=torch.float64), theta]


def check(arguments, dtype, scaling=0.35, causal=True, run=defocus_attention):
    """Values and gradients of `run` in `dtype` against float64, within what the rounding of the logits explains."""
    rounded = [
        x.to(dtype if index < 3 else torch.promote_types(dtype, torch.float32)) for index, x in enumerate(arguments)
    ]
    exact = [x.double().requires_grad_() for x in rounded]
    fast = [x.detach().clone().requires_grad_() for x in rounded]
    expected = equation_8(*exact, scaling, causal)
    output = run(*fast, scaling, causal)
    with torch.no_grad():
        assert_near(run(*rounded, scaling, causal), output, 4 * torch.finfo(dtype).eps, "without gradients")
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * weight).sum().backward()
    (output.double() * weight).sum().backward()
    largest = (exact[0].norm(dim=-1).max() * exact[1].norm(dim=-1).max() * scaling).item()
    tolerance = 8 * torch.finfo(dtype).eps * (1 + largest)
    assert_near(output, expected, tolerance, "output")
    for name, ours, theirs in zip(["query", "key", "value", "decay", "theta"], fast, exact, strict=True):
        # Where the softmax saturates a gradient is a difference of numbers of order one; and those of the filter are
        # differences of sums that are weighted by the place in the sequence.
        places = 1 + arguments[1].shape[2] / 8 if name in ("decay", "theta") else 1
        assert_near(ours.grad, theirs.grad, 8 * tolerance * places, f"gradient of {name}", scale=1.0)


def assert_near(ours, theirs, tolerance, what, scale=1e-3):
    assert ours.isfinite().all(), what
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=scale)
    assert error <= tolerance, f"{what}: off by {error:.2e}, allowed {tolerance:.2e}"


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 200),
    rates=st.lists(RATES, min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    size=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 9),
)
def test_attention_is_equation_8_for_any_rate(tokens, rates, dtype, size, seed):
    check(inputs(tokens, rates, size=size, seed=seed), dtype)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    past=st.integers(1, 200),
    rates=st.lists(RATES, min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_last_tokens_of_a_sequence_are_those_of_the_whole(tokens, past, rates, dtype):
    check(inputs(tokens, rates, keys=tokens + past), dtype)


def test_long_sequences_of_every_kind_of_head():
    arguments = [x.float() for x in inputs(1024, [1e-4, 0.02, 0.4, 5.0], channels=4)]
    backends = {group.backend for group in _plan(*arguments[:2], arguments[3], 0.5, True)}
    assert backends == {"folded", "windowed"}
    check(arguments, torch.float32, scaling=0.5)


@pytest.mark.parametrize("rate", [1e-4, 0.02, 5.0])
def test_4096_tokens(rate):
    """Against the backend `reference` in float64, which the other tests hold to the equation."""
    arguments = inputs(4096, [rate], channels=4)
    with torch.no_grad():
        assert_near(
            defocus_attention(*(x.float() for x in arguments), 0.5), _reference(*arguments, 0.5, True), 1e-5, ""
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("without", [(), ("decay",), ("theta",), ("decay", "theta")])
def test_without_decay_or_rotation_or_causality(causal, without):
    query, key, value, decay, theta = inputs(30, [0.1, 2.0])
    filters = {"decay": decay, "theta": theta} | dict.fromkeys(without)
    expected = equation_8(query, key, value, *filters.values(), 0.3, causal)
    torch.testing.assert_close(defocus_attention(query, key, value, *filters.values(), 0.3, causal), expected)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(2, 300), rate=RATES, window=st.integers(1, 64), size=st.sampled_from([0.3, 1.0]))
def test_the_far_field_errs_by_no_more_than_its_bound(tokens, rate, window, size):
    window = min(window, int(BLOCK_EXPONENT / rate))
    query, key, value, decay, theta = inputs(tokens, [rate], size=size)
    output = windowed_attention(query, key, value, decay, theta, 0.35, window)
    norms = query.norm(dim=-1).max().item(), key.norm(dim=-1).max().item()
    bound = far_field_error(far_logit(-rate, window, norms, 0.35)) * value.abs().max().item()
    error = (output - equation_8(query, key, value, decay, theta, 0.35)).abs().max().item()
    assert error <= bound + 1e-12
    if window >= tokens:
        assert error < 1e-12


def test_a_window_too_small_is_seen():
    query, key, value, decay, theta = inputs(100, [0.05])
    output = windowed_attention(query, key, value, decay, theta, 0.35, 4)
    assert (output - equation_8(query, key, value, decay, theta, 0.35)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_condition_of_folding_is_the_range_of_the_dtype(dtype):
    """Just inside it the result is exact, and not far outside it is not: neither loose nor wasteful."""
    channels, tokens = 4, 101
    arguments = inputs(tokens, [1.0], channels=channels, size=0.5)
    norms = (4.0, 4.0)
    safe = [rate / 100 for rate in range(1, 3000) if folds_safely(-rate / 100, tokens, tokens, norms, channels, dtype)]
    limit = max(safe)
    room = math.log(torch.finfo(dtype).max)
    assert 0.5 * room < limit * 50 < room
    for rate, exact in ((limit, True), (2.2 * room / 100, False)):
        arguments[3] = torch.tensor([-rate], dtype=torch.float64)
        q, k, v, decay, theta = (x.to(dtype if i < 3 else torch.float64) for i, x in enumerate(arguments))
        output = _folded(q, k, v, decay, theta, 0.5, True)
        expected = equation_8(q, k, v, decay, theta, 0.5)
        near = bool(((output.double() - expected).abs() < 40 * torch.finfo(dtype).eps * expected.abs().max()).all())
        assert near is exact


def test_inputs_that_are_not_finite_give_what_the_reference_gives():
    query, key, value, decay, theta = (x.float() for x in inputs(300, [2.0]))
    query[0, 0, 7, 0] = math.nan
    output = defocus_attention(query, key, value, decay, theta, 0.3)
    assert output[0, 0, 7].isnan().all()
    assert output[0, 0, 8:].isfinite().all()


def test_forced_backends_run_or_refuse(monkeypatch):
    weak, strong = ([x.float() for x in inputs(200, [rate])] for rate in (0.001, 3.0))
    for name, arguments in (("reference", weak), ("folded", weak), ("windowed", strong), ("flex", strong)):
        monkeypatch.setenv("DEFOCUS_KERNEL", name)
        before = kernel_report().get("attention", {}).get(name, 0)
        with torch.no_grad():
            output = defocus_attention(*arguments, 0.3)
        assert kernel_report()["attention"][name] == before + 1
        assert_near(output, equation_8(*arguments, 0.3), 1e-5, name)
    monkeypatch.setenv("DEFOCUS_KERNEL", "flex")
    with pytest.raises(RuntimeError, match="no backward pass on the CPU"):
        defocus_attention(*weak, 0.3)
    for name, arguments in (("folded", strong), ("windowed", weak)):
        monkeypatch.setenv("DEFOCUS_KERNEL", name)
        with pytest.raises(RuntimeError, match=f"DEFOCUS_KERNEL={name}: not safe for head 0"):
            defocus_attention(*arguments, 0.3)
    with pytest.raises(RuntimeError, match="does not factorise"):
        defocus_attention(*weak, 0.3, False)
    with pytest.raises(RuntimeError, match="no window"):
        defocus_attention(*weak[:3], None, None, 0.3)


@pytest.mark.parametrize("name", ["reference", "folded"])
def test_each_backend_alone_has_the_values_and_gradients_of_equation_8(monkeypatch, name):
    monkeypatch.setenv("DEFOCUS_KERNEL", name)
    check(inputs(70, [0.01, 0.3]), torch.float32)
    check(inputs(9, [0.01, 0.3], keys=70), torch.float64)


def test_heads_in_any_order_come_back_in_theirs():
    rates = [2.0, 0.01, 0.7, 0.02, 4.0]
    arguments = inputs(1100, rates, channels=4)
    groups = _plan(*arguments[:2], arguments[3], 0.5, True)
    assert len(groups) > 1
    assert [head for group in groups for head in group.heads] != list(range(5))
    assert_near(defocus_attention(*arguments, 0.5), equation_8(*arguments, 0.5), 1e-9, "order")


@pytest.mark.parametrize("past", [0, 5])
def test_a_tracer_sees_one_operator(past):
    arguments = [x.float().requires_grad_() for x in inputs(20, [0.1, 3.0], keys=20 + past)]
    compiled = torch.compile(defocus_attention, backend="aot_eager", fullgraph=True)
    results = []
    for run in (defocus_attention, compiled):
        output = run(*arguments, 0.3)
        results.append([output, *torch.autograd.grad(output.sin().sum(), arguments)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
