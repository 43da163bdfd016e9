"""The scan with steps, norm, skip and gate, and the convolution before it: each backend against float64 formulas."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm.kernels_defocus import kernel_report
from defocus_mllm.scan_core_defocus import causal_convolution, selective_scan
from defocus_mllm.scan_formula_defocus import ScanOptions

BACKENDS = ["chunked", "compiled"] if shutil.which("cc") else ["chunked"]
RATES = st.floats(math.log(1e-4), math.log(5)).map(math.exp)
NAMES = ("x", "delta", "decay", "A", "B", "C", "initial", "D", "gate")


def arguments(batch, tokens, channels, states, rate, decay, surrounded, seed=0):
    """Float64 arguments of `selective_scan` in its order; `decay`: "shared", "constant" or "own" steps of the decay."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    delta = normal(batch, tokens, channels)
    steps = {"shared": None, "constant": normal(channels).exp(), "own": normal(batch, tokens, channels).abs()}[decay]
    return [
        normal(batch, tokens, channels),
        delta if surrounded else 0.3 * delta.abs(),
        steps,
        -rate * torch.rand(channels, states, generator=generator, dtype=torch.float64),
        normal(batch, tokens, states),
        normal(batch, tokens, states),
        normal(batch, channels, states),
        normal(channels) if surrounded else None,
        normal(batch, tokens, channels) if surrounded else None,
    ]


def by_definition(x, delta, decay, A, B, C, initial, D, gate, options):
    """One token after the other."""
    if options.softplus:
        delta = torch.log1p(torch.exp(delta)) * options.scale
    decay = delta if decay is None else decay.expand(delta.shape)
    state, outputs = initial, []
    for t in range(x.shape[1]):
        update = (delta[:, t] * x[:, t])[..., None] * B[:, t, None]
        state = torch.exp(decay[:, t, :, None] * A) * state + update
        outputs.append((state * C[:, t, None]).sum(-1))
    output = torch.stack(outputs, dim=1)
    if options.group_size:
        groups = output.unflatten(-1, (-1, options.group_size))
        output = (groups / (groups.square().mean(-1, keepdim=True) + options.eps).sqrt()).flatten(-2)
    if D is not None:
        output = output + D * x
    return (output if gate is None else output * gate * torch.sigmoid(gate)), state


def results(run, tensors, dtype, options):
    leaves = [None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    output, last = run(*leaves, options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ((output.double() * weights).sum() + last.double().sin().sum()).backward()
    gradients = {name: x.grad for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    return {"output": output.detach(), "last": last.detach()} | gradients


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 70),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([0, 4, 8, 12, 64]),
    states=st.sampled_from([1, 2, 4, 6, 16, 20]),
    rate=RATES,
    decay=st.sampled_from(["shared", "constant", "own"]),
    surrounded=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_backend_computes_the_formula(
    backend, batch, tokens, groups, group_size, states, rate, decay, surrounded, seed
):
    channels = groups * (group_size or 7)
    tensors = arguments(batch, tokens, channels, states, rate, decay, surrounded, seed)
    # A norm amplifies what is small: with this epsilon it is as exact as what it divides.
    options = ScanOptions(True, 0.5, group_size, 0.1) if surrounded else ScanOptions()
    exact = results(by_definition, tensors, torch.float64, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEFOCUS_KERNEL", backend)
        before = kernel_report().get("scan", {}).get(backend, 0)
        fast = results(selective_scan, tensors, torch.float32, options)
        assert kernel_report()["scan"][backend] > before
        with torch.no_grad():
            single = [None if x is None else x.float() for x in tensors]
            torch.testing.assert_close(selective_scan(*single, options)[0], fast["output"], rtol=1e-5, atol=1e-5)
    for name, expected in exact.items():
        assert fast[name].isfinite().all(), name
        error = (fast[name] - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [1e-4, 5.0])
def test_4096_tokens(backend, rate, monkeypatch):
    monkeypatch.setenv("DEFOCUS_KERNEL", backend)
    tensors = arguments(1, 4096, 3, 4, rate, "shared", True)
    options = ScanOptions(True, 1.0, 3, 0.1)
    expected, last = by_definition(*tensors, options)
    output, ours = selective_scan(*(None if x is None else x.float() for x in tensors), options)
    assert (output - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (ours - last).abs().max() < 1e-4 * last.abs().max().clamp(min=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_keep_no_states_of_every_token(backend, monkeypatch):
    monkeypatch.setenv("DEFOCUS_KERNEL", backend)
    batch, tokens, channels, states = 2, 640, 48, 16
    tensors = arguments(batch, tokens, channels, states, 1.0, "shared", True)
    leaves = [None if x is None else x.float().requires_grad_() for x in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(*leaves, ScanOptions(True, 1.0, 16, 1e-6))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) < 4 * batch * tokens * channels * states


@settings(max_examples=40, deadline=None)
@given(
    backend=st.sampled_from([*BACKENDS, "reference"]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 20),
    channels=st.integers(1, 40),
    kernel=st.integers(1, 5),
    window=st.booleans(),
    biased=st.booleans(),
)
def test_the_convolution_is_that_of_torch(backend, batch, tokens, channels, kernel, window, biased):
    def run(inputs, before, weight, bias):
        before = inputs.new_zeros(batch, channels, kernel - 1) if before is None else before
        padded = torch.cat((before, inputs.transpose(1, 2)), dim=-1)
        return F.silu(F.conv1d(padded, weight, bias, groups=channels)).transpose(1, 2)

    wide = torch.randn(batch, tokens, 2 * channels, dtype=torch.float64)
    tensors = [
        wide[..., :channels],
        torch.randn(batch, channels, kernel - 1, dtype=torch.float64) if window else None,
        torch.randn(channels, 1, kernel, dtype=torch.float64),
        torch.randn(channels, dtype=torch.float64) if biased else None,
    ]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEFOCUS_KERNEL", backend)
        for function, dtype in ((run, torch.float64), (causal_convolution, torch.float32)):
            leaves = [None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
            # Part of a wider tensor, as the mixer gives it.
            whole = torch.cat((leaves[0], leaves[0]), dim=-1)
            output = function(whole[..., :channels], *leaves[1:])
            output.double().sin().sum().backward()
            found.append([output, *(x.grad for x in leaves if x is not None)])
    for exact, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_can_be_computed_again(backend, monkeypatch):
    monkeypatch.setenv("DEFOCUS_KERNEL", backend)
    tensors = arguments(1, 9, 8, 4, 1.0, "shared", True)
    weight = torch.randn(8, 1, 3, requires_grad=True)

    def run(x, *rest):
        return selective_scan(causal_convolution(x, None, weight, None), *rest)

    def checkpointed(*given):
        return torch.utils.checkpoint.checkpoint(run, *given, use_reentrant=False)

    options = ScanOptions(True, 1.0, 4, 0.1)
    plain, again = (results(function, tensors, torch.float32, options) for function in (run, checkpointed))
    for name, expected in plain.items():
        assert torch.equal(again[name], expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tracer_needs_no_break(backend, monkeypatch):
    """The compiled core as it is; without a compiler the formula, because the lean backward pass cannot be traced."""
    monkeypatch.setenv("DEFOCUS_KERNEL", "compiled" if backend == "compiled" else "reference")
    tensors = arguments(2, 12, 8, 4, 1.0, "shared", True)
    options = ScanOptions(True, 1.0, 4, 0.1)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    eager, traced = (results(run, tensors, torch.float32, options) for run in (selective_scan, compiled))
    for name, expected in eager.items():
        torch.testing.assert_close(traced[name], expected, rtol=1e-4, atol=1e-5)
