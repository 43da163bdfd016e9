"""The cores in C for the CPU, compiled on first use where there is a compiler.

A scan in plain torch writes (tokens, batch, channels, states) tensors to memory several times over; in C the states of
a few tokens stay in registers and in the cache. It is optional: without a compiler there is the scan in plain torch.
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

import torch
from transformers.utils import logging

from .convolution_source_defocus import CONVOLUTION_SOURCE
from .scan_source_defocus import SCAN_SOURCE
from .vector_source_defocus import VECTOR_SOURCE

logger = logging.get_logger(__name__)

_SOURCE = VECTOR_SOURCE + CONVOLUTION_SOURCE + SCAN_SOURCE
# Not -ffast-math: a library linked with it makes the whole process round subnormal numbers to zero, and the source
# rounds by adding and subtracting a large number.
_FLAGS = ("-O3", "-march=native", "-fno-trapping-math", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")


class CompilerError(RuntimeError):
    """The compiled core cannot be had here; the message says why."""


@torch.compiler.assume_constant_result
def why_unavailable(device: str, dtype: str) -> str | None:
    """Why the compiled cores cannot be used for tensors of this device type and dtype; None if they can."""
    if device != "cpu" or dtype == "torch.float64":
        return f"the compiled core is for float32 on the CPU, not for {dtype.removeprefix('torch.')} on {device}"
    library = _library_or_reason()
    if not isinstance(library, str):
        return None
    logger.warning_once(f"De-focus Mamba runs with the slower scan in plain torch: {library}")
    return library


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
    key = "\0".join((_SOURCE, compiler, version, *_FLAGS, _processor())).encode()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "defocus_mllm"
    library = root / f"cores-{hashlib.sha256(key).hexdigest()[:16]}.so"
    try:
        if not library.is_file():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            _build(compiler, library)
            logger.info(f"compiled the cores of De-focus Mamba with {compiler}: {library}")
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
        source, built = Path(folder) / "cores.c", Path(folder) / "cores.so"
        source.write_text(_SOURCE, encoding="utf-8")
        for threads in (["-fopenmp"], []):  # some compilers come without OpenMP; the core then runs on one thread
            command = [compiler, *_FLAGS, *threads, str(source), "-o", str(built), "-lm"]
            finished = subprocess.run(command, capture_output=True, text=True)
            if finished.returncode == 0:
                os.replace(built, library)
                return
    raise CompilerError(f"{compiler} could not compile the core: {finished.stderr.strip()[:500]}")
