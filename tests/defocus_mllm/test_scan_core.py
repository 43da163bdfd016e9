"""The scan from its definition, and the compiled core against the plain one: values, gradients, dispatch, failures."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defocus_mllm import compiled_defocus
from defocus_mllm.kernels_defocus import group_rms_norm
from defocus_mllm.scan_core_defocus import scan_kernel, selective_scan
from defocus_mllm.scan_formula_defocus import plain_scan

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


def scan_arguments(batch, tokens, channels, states, seed=0):
    """Float64 arguments of `selective_scan` with rates and steps as they occur."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = [0.3 * normal(batch, tokens, channels).abs() for _ in range(2)]
    rates = -torch.exp(normal(channels, states))
    return [
        normal(batch, tokens, channels),
        *steps,
        rates,
        *(normal(batch, tokens, states) for _ in range(2)),
        normal(batch, channels, states),
    ]


def results_and_gradients(scan, arguments, dtype):
    tensors = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in arguments]
    output, last = scan(*tensors)
    (output.sin().sum() + last.cos().sum()).backward()
    return [output.detach(), last.detach(), *(tensor.grad for tensor in tensors)]


def test_the_scan_is_its_definition():
    x, delta, decay_delta, A, B, C, h = scan_arguments(2, 5, 3, 2)
    output, last = selective_scan(x, delta, decay_delta, A, B, C, h)
    for b in range(2):
        for e in range(3):
            state = h[b, e].tolist()
            for t in range(5):
                for n in range(2):
                    decay = math.exp(decay_delta[b, t, e] * A[e, n])
                    state[n] = decay * state[n] + (delta[b, t, e] * B[b, t, n] * x[b, t, e]).item()
                expected = sum(C[b, t, n].item() * state[n] for n in range(2))
                assert output[b, t, e].item() == pytest.approx(expected, rel=1e-12)
            assert last[b, e].tolist() == pytest.approx(state, rel=1e-12)


def test_gradients_of_the_scan_match_finite_differences():
    arguments = [tensor.requires_grad_() for tensor in scan_arguments(1, 4, 2, 3)]
    assert torch.autograd.gradcheck(selective_scan, arguments)


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    channels=st.integers(1, 9),
    states=st.sampled_from([1, 2, 4, 6, 8, 16, 32]),
    seed=st.integers(0, 9),
)
def test_the_compiled_scan_is_the_plain_one(batch, tokens, channels, states, seed):
    arguments = scan_arguments(batch, tokens, channels, states, seed)
    assert scan_kernel(arguments[0].float()) == "compiled"
    expected = results_and_gradients(plain_scan, arguments, torch.float64)
    compiled = results_and_gradients(selective_scan, arguments, torch.float32)
    for ours, reference in zip(compiled, expected, strict=True):
        error = (ours - reference).abs().max() / reference.abs().max().clamp(min=1)
        assert error < 1e-5


@needs_compiler
def test_a_strong_decay_forgets_without_overflow():
    x, delta, _, A, B, C, h = (tensor.float() for tensor in scan_arguments(1, 3, 2, 16))
    output, last = selective_scan(x, delta, torch.full_like(delta, 1e4), A, B, C, h)
    torch.testing.assert_close(output, ((delta * x)[..., None] * B[:, :, None] * C[:, :, None]).sum(-1))
    assert last.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("name", ["B", "initial"])
def test_a_wrong_shape_is_refused_before_it_reaches_the_compiled_core(name):
    names = ("hidden_states", "delta", "decay_delta", "A", "B", "C", "initial")
    arguments = dict(zip(names, (tensor.float() for tensor in scan_arguments(2, 5, 3, 4)), strict=True))
    arguments[name] = arguments[name][:, :2]  # the core would read what lies behind it
    with pytest.raises(RuntimeError, match="size"):
        selective_scan(**arguments)


@needs_compiler
def test_another_dtype_is_converted_before_it_reaches_the_compiled_core():
    arguments = [tensor.float() for tensor in scan_arguments(2, 5, 3, 4)]
    mixed = [arguments[0], *(tensor.double() for tensor in arguments[1:])]
    torch.testing.assert_close(selective_scan(*mixed)[0], selective_scan(*arguments)[0])


@needs_compiler
def test_a_tracer_is_given_the_plain_core():
    arguments = [tensor.float() for tensor in scan_arguments(1, 4, 3, 4)]
    compiled = torch.compile(selective_scan, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments)[0], selective_scan(*arguments)[0])


@needs_compiler
def test_the_compiled_core_leaves_subnormal_numbers_alone():
    compiled_defocus.load_library()
    assert float("5e-324") * 1.0 > 0
    assert (torch.tensor([1e-40]) * 1.0).item() > 0


def test_a_forced_core_is_used_or_refused(monkeypatch):
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    monkeypatch.setenv("DEFOCUS_KERNEL", "reference")
    assert scan_kernel(single) == "reference"
    monkeypatch.setenv("DEFOCUS_KERNEL", "compiled")
    with pytest.raises(RuntimeError, match="float64"):
        scan_kernel(double)
    monkeypatch.setenv("DEFOCUS_KERNEL", "fastest")
    with pytest.raises(ValueError, match="'fastest'"):
        scan_kernel(single)


def test_without_a_compiler_plain_torch_remains(monkeypatch):
    monkeypatch.setattr(compiled_defocus.shutil, "which", lambda name: None)
    compiled_defocus._library_or_reason.cache_clear()
    try:
        assert scan_kernel(torch.zeros(1)) == "chunked"
        monkeypatch.setenv("DEFOCUS_KERNEL", "compiled")
        with pytest.raises(RuntimeError, match="no C compiler"):
            scan_kernel(torch.zeros(1))
    finally:
        compiled_defocus._library_or_reason.cache_clear()


@needs_compiler
def test_a_source_that_does_not_compile_is_said_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled_defocus, "_SOURCE", "int broken(")
    compiled_defocus._library_or_reason.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(compiled_defocus.CompilerError, match="could not compile"):
                compiled_defocus.load_library()
        assert compiled_defocus._library_or_reason.cache_info().misses == 1, "a compiler that fails is not asked again"
        assert list((tmp_path / "defocus_mllm").iterdir()) == [], "nothing half built is left behind"
    finally:
        compiled_defocus._library_or_reason.cache_clear()


def test_the_group_norm_has_unit_mean_square_in_every_group():
    normalised = group_rms_norm(torch.randn(2, 3, 12, dtype=torch.float64) * 100, 4, 0.0)
    mean_squares = normalised.unflatten(-1, (3, 4)).square().mean(-1)
    torch.testing.assert_close(mean_squares, torch.ones_like(mean_squares))
