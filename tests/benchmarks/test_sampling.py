"""One measurement: what is inside the two readings of the clock, and what is not."""

from __future__ import annotations

import os

import pytest

from benchmarks.sampling import KERNEL_VARIABLE, Stopwatch, forced_kernel, observed_backends
from defocus_mllm.kernels_defocus import report_backend


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_preparation_is_not_measured() -> None:
    clock = Clock()

    def prepare() -> float:
        clock.time += 100
        return 7.0

    def run(given: float) -> None:
        clock.time += given

    sample = Stopwatch(clock=clock).timed(run, prepare)
    assert [sample().value, sample().value] == [7.0, 7.0]


def test_the_clock_of_a_gpu_waits_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: events.append(f"wait for {device}"))
    clock = Clock()
    Stopwatch("cuda", lambda: events.append("read") or clock()).timed(lambda: events.append("run"))()
    assert events == ["wait for cuda", "read", "run", "wait for cuda", "read"]


@pytest.mark.parametrize("before", [None, "auto"])
def test_a_kernel_is_forced_only_meanwhile(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(KERNEL_VARIABLE, before)
    seen: list[str | None] = []
    Stopwatch().timed(lambda: seen.append(os.environ.get(KERNEL_VARIABLE)), kernel="reference")()
    Stopwatch().timed(lambda: seen.append(os.environ.get(KERNEL_VARIABLE)))()
    assert seen == ["reference", before]
    with pytest.raises(RuntimeError), forced_kernel("compiled"):
        raise RuntimeError
    assert os.environ.get(KERNEL_VARIABLE) == before


def test_only_backends_that_ran_meanwhile_are_reported() -> None:
    report_backend("scan", "reference")
    with observed_backends() as backends:
        report_backend("scan", "compiled")
        report_backend("scan", "compiled")
    assert backends == {"scan": ["compiled"]}
    assert Stopwatch().timed(lambda: report_backend("scan", "reference"))().backends == {"scan": ["reference"]}
    assert Stopwatch().timed(lambda: None)().backends == {}
