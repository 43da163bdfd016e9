"""Retention in chunks against retention at once, in float64, values and gradients; growth, range, dispatch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm import retention_core_defocus
from defocus_mllm.fold_defocus import scale_tokens
from defocus_mllm.kernels_defocus import kernel_report
from defocus_mllm.retention_core_defocus import retention, rotated_retention

RATES = st.floats(math.log(1e-4), math.log(5)).map(math.exp)


def arguments(tokens, rates, memory=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(rates), tokens, 6)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    state = torch.randn(2, len(rates), 6, 6, generator=generator, dtype=torch.float64)
    return [*tensors, -torch.tensor(rates, dtype=torch.float64), state if memory else None]


def by_definition(query, key, value, decay, memory):
    """One token after the other."""
    outputs = []
    memory = torch.zeros(2, query.shape[1], 6, 6, dtype=torch.float64) if memory is None else memory
    for t in range(query.shape[2]):
        update = key[:, :, t, :, None] * value[:, :, t, None, :]
        memory = torch.exp(decay)[:, None, None] * memory + update
        outputs.append((query[:, :, t, None, :] @ memory).squeeze(2))
    return torch.stack(outputs, dim=2), memory


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 300),
    rates=st.lists(RATES, min_size=1, max_size=3),
    memory=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_retention_is_its_recurrence(tokens, rates, memory, dtype):
    given_ = arguments(tokens, rates, memory)
    rounded = [
        x if x is None else x.to(dtype if i < 3 else torch.promote_types(dtype, torch.float32))
        for i, x in enumerate(given_)
    ]
    results = []
    for run, kind in ((by_definition, torch.float64), (retention, None)):
        leaves = [x if x is None else x.detach().to(kind or x.dtype, copy=True).requires_grad_() for x in rounded]
        output, last = run(*leaves)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        ((output.double() * weights).sum() + last.double().sum()).backward()
        results.append([output, last, *(x.grad for x in leaves if x is not None)])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 2e-2
    for exact, ours in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1)


def test_a_long_sequence_in_chunks_is_its_recurrence():
    given_ = arguments(4096, [1e-4, 5.0], memory=False)
    expected = by_definition(*given_)[0]
    single = [x if x is None else x.float() for x in given_]
    assert (retention(*single)[0] - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_short_piece_is_done_at_once_and_a_long_one_in_chunks(monkeypatch):
    def runs(name):
        return kernel_report().get("retention", {}).get(name, 0)

    for tokens, name in ((64, "reference"), (65, "chunked")):
        before = runs(name)
        retention(*arguments(tokens, [0.1]))
        assert runs(name) == before + 1
    monkeypatch.setenv("DEFOCUS_KERNEL", "reference")
    before = runs("reference")
    retention(*arguments(200, [0.1]))
    assert runs("reference") == before + 1


def test_a_tracer_needs_no_break():
    given_ = [x.requires_grad_() for x in arguments(150, [0.1])]
    compiled = torch.compile(retention, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(*given_), retention(*given_), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_decay_none_is_plain_linear_attention():
    query, key, value, _, memory = arguments(100, [0.1])
    expected = by_definition(query, key, value, torch.zeros(1, dtype=torch.float64), memory)
    for ours, theirs in zip(retention(query, key, value, None, memory), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128])
def test_chunk_borders(tokens):
    given_ = arguments(tokens, [0.3, 4.0])
    for ours, theirs in zip(retention(*given_), by_definition(*given_), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [7, 130, 200, 333])
@pytest.mark.parametrize("frequencies", [True, False])
def test_rotation_span_by_span_is_rotation_at_once(monkeypatch, tokens, frequencies):
    query, key, value, decay, memory = arguments(tokens, [0.1, 0.002])
    theta = torch.tensor([[0.3, 0.1, 0.02], [0.7, 0.2, 0.05]], dtype=torch.float64) if frequencies else None
    leaves = [x.requires_grad_() for x in (query, key, value, decay, memory)]
    results = []
    for span in (10_000, 100):
        monkeypatch.setattr(retention_core_defocus, "_SPAN", span)
        output, last = rotated_retention(query, key, value, decay, theta, 0.4, memory, past=50)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        gradients = torch.autograd.grad((output * weights).sum() + last.sum(), leaves)
        results.append([output, last, *gradients])
    for at_once, in_spans in zip(*results, strict=True):
        torch.testing.assert_close(in_spans, at_once, rtol=1e-9, atol=1e-9)
    time = 50 + torch.arange(tokens, dtype=torch.float64)
    turned = [scale_tokens(x, None, theta, time) for x in (query, key)]
    expected = by_definition(turned[0], turned[1] * 0.4, value, decay, memory)
    torch.testing.assert_close(results[1][0], expected[0], rtol=1e-9, atol=1e-9)
