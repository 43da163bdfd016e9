"""The selective scan in C for the CPU, compiled on first use where there is a compiler.

A scan in plain torch writes (tokens, batch, channels, states) tensors to memory several times over. This core keeps the
states of a few tokens at a time, forward and backward. It is optional: without a compiler the plain core is used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.utils import logging

from .scan_source_defocus import SCAN_SOURCE

logger = logging.get_logger(__name__)

# Sums in any order, as vector units need. Not -ffast-math: a library linked with it makes the whole process round
# subnormal numbers to zero.
_REORDERING = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
_FLAGS = ("-O3", "-march=native", *_REORDERING, "-std=gnu11", "-shared", "-fPIC")


class CompilerError(RuntimeError):
    """The compiled core cannot be had here; the message says why."""


def load_library() -> ctypes.CDLL:
    """The compiled core, from the cache (`$XDG_CACHE_HOME/defocus_mllm`) or built now, once a process.

    Raises `CompilerError` when there is no compiler or it fails; it is not tried again then.
    """
    library = _library_or_reason()
    if isinstance(library, str):
        raise CompilerError(library)
    return library


@functools.lru_cache(maxsize=1)
def _library_or_reason() -> ctypes.CDLL | str:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return "no C compiler was found (cc, gcc or $CC)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = "\0".join((SCAN_SOURCE, compiler, version, *_FLAGS, _processor())).encode()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defocus_mllm"
    library = root / f"scan-{hashlib.sha256(key).hexdigest()[:16]}.so"
    try:
        if not library.is_file():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            _build(compiler, library)
            logger.info(f"compiled the selective scan with {compiler}: {library}")
        return ctypes.CDLL(str(library))
    except CompilerError as error:
        return str(error)
    except OSError as error:
        return f"the compiled core cannot be stored or loaded: {error}"


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(compiler: str, library: Path) -> None:
    """Compile in a folder of its own and move the result into place in one step."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, built = Path(folder) / "scan.c", Path(folder) / "scan.so"
        source.write_text(SCAN_SOURCE, encoding="utf-8")
        for threads in (["-fopenmp"], []):  # some compilers come without OpenMP; the core then runs on one thread
            command = [compiler, *_FLAGS, *threads, str(source), "-o", str(built), "-lm"]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode == 0:
                os.replace(built, library)
                return
    raise CompilerError(f"{compiler} could not compile the core: {finished.stderr.strip()[:500]}")


class CompiledScan(torch.autograd.Function):
    """`selective_scan` of float32 tensors on the CPU; the arguments are those of the reference, all given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta: torch.Tensor,
        decay_delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        initial: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [tensor.contiguous() for tensor in (x, delta, decay_delta, A, B, C, initial)]
        output, last = torch.empty_like(tensors[0]), torch.empty_like(tensors[6])
        _call("defocus_scan_forward", tensors[0], A, [*tensors, output, last])
        ctx.save_for_backward(*tensors)
        return output, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, gradient_of_last: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = ctx.saved_tensors
        x, _, _, A, B, _, initial = tensors
        gradients = [torch.empty_like(x) for _ in range(3)]
        # One sum for each image: the images are worked on in parallel, and a fixed order of summation repeats exactly.
        of_A = torch.empty_like(initial)
        gradients += [of_A, torch.empty_like(B), torch.empty_like(B), torch.empty_like(initial)]
        given = [gradient.contiguous(), gradient_of_last.contiguous()]
        _call("defocus_scan_backward", x, A, [*tensors, *given, *gradients])
        gradients[3] = of_A.sum(dim=0)
        return tuple(gradients)


def _call(name: str, x: torch.Tensor, A: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    sizes = [*x.shape, A.shape[1], torch.get_num_threads()]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    if getattr(load_library(), name)(*(ctypes.c_int64(size) for size in sizes), *pointers) != 0:
        raise MemoryError(f"{name}: no memory for the states of a few tokens")
