"""The Triton scan under Triton's interpreter: `test_triton_scan.py` runs this file in a process of its own, since
TRITON_INTERPRET=1 must be set before Triton is imported and would change what other tests see.
"""

import importlib.util

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from defocus_mllm import DefocusVisionConfig, triton_scan_defocus
from defocus_mllm.kernels_defocus import kernel_report
from defocus_mllm.mixers_defocus import DefocusMamba
from defocus_mllm.scan_core_defocus import scan_kernel, selective_scan
from defocus_mllm.scan_formula_defocus import plain_scan
from defocus_mllm.triton_scan_defocus import triton_scan

# Memory is filled with NaN when it is allocated, which shows what a kernel leaves out.
torch.use_deterministic_algorithms(True)
NAMES = ("x", "delta", "decay_delta", "A", "B", "C", "initial")


def scan_arguments(batch, tokens, channels, states, decay="own", seed=0):
    """Float64 arguments of a scan; the decay's steps: of each entry, those of delta, or a row's, or a token's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    delta = 0.3 * normal(batch, tokens, channels).abs()
    shape = {"own": (batch, tokens, channels), "channel": (channels,), "token": (1, tokens, 1), "delta": (0,)}[decay]
    return [
        normal(batch, tokens, channels),
        delta,
        delta if decay == "delta" else 0.3 * normal(*shape).abs(),
        -torch.exp(normal(channels, states)),
        *(normal(batch, tokens, states) for _ in range(2)),
        normal(batch, channels, states),
    ]


def results_and_gradients(scan, arguments, dtype=None):
    """Output, last state and the gradients of all arguments; `delta` given twice is one leaf."""
    leaves = {id(tensor): tensor.detach().to(dtype or tensor.dtype, copy=True) for tensor in arguments}
    tensors = [leaves[id(tensor)].requires_grad_() for tensor in arguments]
    given = list(tensors)
    if tensors[2] is not tensors[1]:
        given[2] = tensors[2].expand(tensors[0].shape)
    output, last = scan(*given)
    (output.sin().sum() + last.cos().sum()).backward()
    return {"output": output.detach(), "last": last.detach()} | {
        name: tensor.grad for name, tensor in zip(NAMES, tensors, strict=True)
    }


def assert_equal(results, reference, tolerance):
    for name, expected in reference.items():
        assert results[name].isfinite().all(), name
        error = (results[name] - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < tolerance, name


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 9),
    channels=st.integers(1, 11),
    states=st.sampled_from([1, 2, 3, 5, 8, 16, 32]),
    decay=st.sampled_from(["own", "delta", "channel", "token"]),
    seed=st.integers(0, 9),
)
@example(batch=1, tokens=65, channels=3, states=4, decay="own", seed=0)  # a segment and a token
def test_the_triton_scan_is_the_plain_one(batch, tokens, channels, states, decay, seed):
    arguments = scan_arguments(batch, tokens, channels, states, decay, seed)
    results = results_and_gradients(triton_scan, arguments, torch.float32)
    assert_equal(results, results_and_gradients(plain_scan, arguments), 1e-5)


@pytest.mark.parametrize("tokens", [16, 19])
def test_sequences_of_several_segments(monkeypatch, tokens):
    monkeypatch.setattr(triton_scan_defocus, "_SEGMENT", 8)
    arguments = scan_arguments(2, tokens, 3, 4, "delta")
    results = results_and_gradients(triton_scan, arguments, torch.float32)
    assert_equal(results, results_and_gradients(plain_scan, arguments), 1e-5)


def test_wide_programs_compute_the_same(monkeypatch):
    arguments = scan_arguments(1, 6, 37, 5)
    monkeypatch.setattr(triton_scan_defocus, "_WIDE_FROM", 1)
    results = results_and_gradients(triton_scan, arguments, torch.float32)
    assert_equal(results, results_and_gradients(plain_scan, arguments), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_read_and_computed_in_float32(dtype):
    arguments = scan_arguments(2, 9, 5, 4)
    arguments = [
        tensor.to(dtype if name in "xBC" else torch.float32) for name, tensor in zip(NAMES, arguments, strict=True)
    ]
    results = results_and_gradients(triton_scan, arguments)
    reference = results_and_gradients(plain_scan, arguments, torch.float64)
    assert {name: results[name].dtype for name in NAMES} == {
        name: tensor.dtype for name, tensor in zip(NAMES, arguments, strict=True)
    }
    rounded = {"x", "B", "C"}
    assert_equal(results, {name: value for name, value in reference.items() if name not in rounded}, 1e-5)
    assert_equal(results, {name: reference[name] for name in rounded}, torch.finfo(dtype).eps)


@pytest.mark.parametrize("step", [0.0, 1e-30, 30.0, 1e4, 1e30])
def test_no_decay_is_too_weak_or_too_strong(step):
    arguments = scan_arguments(1, 7, 3, 16)
    arguments[2] = torch.full_like(arguments[1], step)
    arguments[3] = -torch.arange(1, 17, dtype=torch.float64).expand(3, 16)
    results = results_and_gradients(triton_scan, arguments, torch.float32)
    assert_equal(results, results_and_gradients(plain_scan, arguments), 1e-5)


def test_what_is_left_out_is_zero_and_layouts_do_not_matter():
    x, delta, decay_delta, A, B, C, h = (tensor.float() for tensor in scan_arguments(2, 5, 3, 4))
    torch.testing.assert_close(
        triton_scan(x, delta, delta, None, B, C),
        plain_scan(x, delta, delta, torch.zeros_like(A), B, C, torch.zeros_like(h)),
    )
    turned = [tensor.mT.contiguous().mT for tensor in (x, delta, decay_delta, A, B, C, h)]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(triton_scan(*turned), plain_scan(x, delta, decay_delta, A, B, C, h))


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "initial"])
def test_a_wrong_shape_is_refused_before_it_reaches_a_kernel(name):
    arguments = dict(zip(NAMES, (tensor.float() for tensor in scan_arguments(2, 5, 3, 4)), strict=True))
    arguments[name] = arguments[name][..., :2, :]  # the kernel would read what lies behind it
    arguments["hidden_states"] = arguments.pop("x")
    with pytest.raises(RuntimeError, match="size"):
        triton_scan(**arguments)


def saved_sizes(scan, *arguments):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda x: x):
        scan(*arguments)
    return sizes


def test_only_states_between_segments_are_kept():
    batch, tokens, channels, states = 1, 70, 16, 16
    x, delta, decay_delta, *others = (
        tensor.float().requires_grad_() for tensor in scan_arguments(batch, tokens, channels, states)
    )
    sizes = saved_sizes(triton_scan, x, delta, decay_delta, *others)
    assert max(sizes) < batch * tokens * channels * states / 8
    assert sum(sizes) == sum(saved_sizes(triton_scan, x, delta, delta, *others)) + delta.numel(), "delta is kept twice"


@pytest.mark.parametrize(("gradients", "segments"), [(True, 2), (False, 0)])
def test_nothing_is_kept_without_gradients(monkeypatch, gradients, segments):
    scan, kept = triton_scan_defocus._scan, []

    def observed(*arguments):
        results = scan(*arguments)
        kept.append(results[2])
        return results

    monkeypatch.setattr(triton_scan_defocus, "_scan", observed)
    arguments = [tensor.float().requires_grad_() for tensor in scan_arguments(1, 70, 2, 2)]
    with torch.set_grad_enabled(gradients):
        triton_scan(*arguments)
    assert kept[0].shape == (1, segments, 2, 2)


def test_programs_have_scratch_memory_of_their_own(monkeypatch):
    kernel, scratch = triton_scan_defocus._backward_kernel, []

    class Observed:
        def __getitem__(self, grid):
            return lambda *arguments, **options: scratch.append(arguments[16]) or kernel[grid](*arguments, **options)

    monkeypatch.setattr(triton_scan_defocus, "_backward_kernel", Observed())
    monkeypatch.setattr(triton_scan_defocus, "_SEGMENT", 8)
    results_and_gradients(triton_scan, scan_arguments(2, 8, 9, 1), torch.float32)
    assert scratch[0].shape[:2] == (2, 2)
    assert scratch[0].isfinite().all()


@pytest.mark.parametrize("decay", ["own", "delta"])
def test_the_operators_pass_the_checks_of_torch(decay):
    arguments = [tensor.float().requires_grad_() for tensor in scan_arguments(1, 3, 2, 2)]
    arguments[4] = arguments[4].detach().bfloat16().requires_grad_()
    if decay == "delta":
        arguments[2] = None
    torch.library.opcheck(triton_scan_defocus._scan, (*arguments, True))
    given = [None if tensor is None else tensor.detach() for tensor in arguments]
    results = triton_scan_defocus._scan(*given, True)
    torch.library.opcheck(triton_scan_defocus._scan_backward, (*given, results[2], *results[:2]))


@pytest.mark.parametrize("decay", ["own", "delta"])
def test_a_compiled_graph_has_no_break(monkeypatch, decay):
    monkeypatch.setenv("DEFOCUS_KERNEL", "triton")
    arguments = scan_arguments(1, 5, 3, 4, decay)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    results = results_and_gradients(compiled, arguments, torch.float32)
    assert_equal(results, results_and_gradients(plain_scan, arguments), 1e-5)


def test_the_mixer_runs_with_it_and_continues_a_sequence(monkeypatch):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "state_size": 4, "group_norm_size": 8}
    mixer = DefocusMamba(DefocusVisionConfig(mixer="mamba", **sizes))
    inputs = torch.randn(1, 6, 8)
    expected, _ = mixer(inputs)
    monkeypatch.setenv("DEFOCUS_KERNEL", "triton")
    before = kernel_report().get("scan", {}).get("triton", 0)
    first, state = mixer(inputs[:, :4])
    second, _ = mixer(inputs[:, 4:], state)
    assert kernel_report()["scan"]["triton"] == before + 2
    torch.testing.assert_close(torch.cat((first, second), dim=1), expected)


def test_it_is_used_when_forced_and_refuses_what_it_cannot_compute(monkeypatch):
    monkeypatch.setenv("DEFOCUS_KERNEL", "triton")
    assert scan_kernel(torch.zeros(1)) == "triton"
    with pytest.raises(RuntimeError, match=r"DEFOCUS_KERNEL=triton: .* not in torch.float64"):
        scan_kernel(torch.zeros(1, dtype=torch.float64))


def test_too_long_a_sequence_is_refused():
    x = torch.zeros(1, 1, 1).expand(1, 2**25, 2**6)
    with pytest.raises(ValueError, match="33554432 tokens of 64 channels are too many"):
        triton_scan(x, x, x, None, x, x)


def test_a_checkpoints_copy_of_the_file_has_operators_of_its_own():
    spec = importlib.util.spec_from_file_location("transformers_modules.a-b.0c.scan", triton_scan_defocus.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    arguments = [tensor.float() for tensor in scan_arguments(1, 3, 2, 2)]
    assert copy._scan._qualname != triton_scan_defocus._scan._qualname
    assert torch.equal(copy.triton_scan(*arguments)[0], triton_scan(*arguments)[0])
