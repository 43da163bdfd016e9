"""What the progress bar calls the peak is what the process has taken, and it never falls."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

PROCESS = """
import torch
from training.peak_memory import peak_memory
print(peak_memory(torch.device("cpu")))
resident = torch.ones(2**28)  # 1 GiB, more than the process had
print(peak_memory(torch.device("cpu")))
del resident
print(peak_memory(torch.device("cpu")))
"""


def test_the_peak_grows_and_stays() -> None:
    done = toy_task.launch(["-c", PROCESS])
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {unit for _, unit in lines} == {"GiB"}
    before, during, after = (float(number) for number, _ in lines)
    assert 0 < before < 1 < during < before + 1.3
    assert after == during
