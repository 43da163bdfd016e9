"""The Triton scan without a GPU: run by Triton's interpreter, compiled for a GPU's machine code, chosen and refused."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from defocus_mllm import triton_scan_defocus
from defocus_mllm.scan_core_defocus import scan_kernel
from defocus_mllm.triton_scan_defocus import why_unavailable

CASES = Path(__file__).with_name("triton_scan_cases.py")
HOPPER = ("cuda", 90, 32)
ON_A_GPU = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
needs_triton = pytest.mark.skipif(
    triton_scan_defocus.triton is None, reason="triton is not installed (its wheels are for Linux)"
)


@needs_triton
def test_the_interpreter_computes_the_plain_scan():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    finished = subprocess.run(command, cwd=CASES.parents[2], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
    assert "skipped" not in finished.stdout


class CompiledOnly:
    """Stands for a kernel: a launch compiles it for a Hopper GPU as it would be launched, and goes no further."""

    def __init__(self, kernel):
        self.kernel, self.assembly = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.assembly.append(self.kernel.run(*arguments, grid=grid, warmup=True, **options).asm)

        return launch


@pytest.fixture
def compiled_only(monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    device = 10**6  # none that a machine has: kernels compiled for it are never launched
    current = {"device": lambda: device, "stream": lambda device: 0, "target": lambda: GPUTarget(*HOPPER)}
    stub = SimpleNamespace(**{f"get_current_{name}": function for name, function in current.items()})
    monkeypatch.setattr(driver, "_active", stub)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = [CompiledOnly(getattr(triton_scan_defocus, name)) for name in ("_forward_kernel", "_backward_kernel")]
    monkeypatch.setattr(triton_scan_defocus, "_forward_kernel", kernels[0])
    monkeypatch.setattr(triton_scan_defocus, "_backward_kernel", kernels[1])
    return kernels


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "channels", "states", "dtype", "decay"),
    [
        (577, 1536, 16, torch.float32, "delta"),
        (5, triton_scan_defocus._WIDE_FROM, 16, torch.bfloat16, "channel"),
        (1, 1, 1, torch.float16, "channel"),  # Triton compiles an argument that is 1 as a constant
    ],
)
def test_the_kernels_compile_for_a_gpu(compiled_only, tokens, channels, states, dtype, decay):
    x, delta = torch.zeros(1, tokens, channels, dtype=dtype), torch.zeros(1, tokens, channels)
    per_channel = torch.zeros(channels, requires_grad=True).expand(x.shape)
    A, weights = torch.zeros(channels, states), torch.zeros(1, tokens, states, dtype=dtype)
    decay_delta = delta if decay == "delta" else per_channel
    leaves = [tensor.requires_grad_() for tensor in (x, delta, A)]
    output, last = triton_scan_defocus.triton_scan(*leaves[:2], decay_delta, A, weights, weights)
    (output.sum() + last.sum()).backward()
    for kernel in compiled_only:
        (assembly,) = kernel.assembly
        assert assembly["cubin"][:4] == b"\x7fELF"
        assert not re.search(r"\b(?:atom|red)\.", assembly["ptx"]), "sums in an order of chance"


@needs_triton
def test_tensors_on_a_gpu_are_scanned_by_triton(monkeypatch):
    monkeypatch.delenv("DEFOCUS_KERNEL", raising=False)
    assert why_unavailable(ON_A_GPU) is None
    assert scan_kernel(ON_A_GPU) == "triton"


@needs_triton
def test_tensors_on_the_cpu_are_not_scanned_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("DEFOCUS_KERNEL", "triton")
    monkeypatch.setattr(triton_scan_defocus, "_INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"DEFOCUS_KERNEL=triton: .* not for cpu .*TRITON_INTERPRET=1"):
        scan_kernel(torch.zeros(1))


def loaded_with(monkeypatch, library, name):
    """The module as it is where `import triton` gives this library, or fails for None."""
    for module in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, module, library)
    spec = importlib.util.spec_from_file_location(name, triton_scan_defocus.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_triton_plain_torch_remains_and_the_reason_is_said(monkeypatch):
    without = loaded_with(monkeypatch, None, "triton_scan_without_triton")
    reason = without.why_unavailable(ON_A_GPU)
    assert reason is not None
    assert "triton cannot be imported" in reason
    monkeypatch.setattr(triton_scan_defocus, "_PROBLEM", reason)
    assert scan_kernel(ON_A_GPU) == "chunked"
    monkeypatch.setenv("DEFOCUS_KERNEL", "triton")
    with pytest.raises(RuntimeError, match="DEFOCUS_KERNEL=triton: triton cannot be imported"):
        scan_kernel(ON_A_GPU)


def test_an_old_triton_is_left_alone(monkeypatch):
    old = ModuleType("triton")
    old.__version__, old.language = "3.2.0+git1a2b", ModuleType("triton.language")
    module = loaded_with(monkeypatch, old, "triton_scan_with_an_old_triton")
    assert module.why_unavailable(ON_A_GPU) == "triton 3.2.0+git1a2b is older than 3.5"


@pytest.mark.parametrize(("version", "usable"), [("3.4.1", False), ("3.5.0", True), ("3.10.1", True)])
def test_versions_are_compared_as_numbers(monkeypatch, version, usable):
    monkeypatch.setattr(triton_scan_defocus, "triton", SimpleNamespace(__version__=version))
    assert (triton_scan_defocus._problem_with_triton() is None) == usable
