"""Where and with what a result was made."""

from __future__ import annotations

import functools
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import defocus_mllm
from defocus_mllm.provenance import commit
from eval.files import sha256_of_files, sha256_of_json


def describe_environment() -> dict[str, Any]:
    """The `env` block of results.json."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code_sha": code_digest(),
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "git": commit(Path(__file__).parent),
        "argv": sys.argv,
    }


@functools.cache
def code_digest() -> str:
    """Digest of the code that turns a prompt into an answer: `defocus_mllm`, and what generator.py needs of eval."""
    package = Path(defocus_mllm.__file__).parent
    own = [Path(__file__).with_name(name) for name in ("generator.py", "image_features.py", "likelihood.py")]
    return sha256_of_json([sources_digest(package), sha256_of_files(own)])


def sources_digest(folder: Path) -> str:
    """Digest of the *.py files below `folder`: the same wherever the same files are installed."""
    files = sorted(folder.rglob("*.py"))
    return sha256_of_json({file.relative_to(folder).as_posix(): sha256_of_files([file]) for file in files})


def peak_memory_gb() -> float:
    """Largest memory use of this process so far in GB (1e9 bytes): on the GPU if one was used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e9
