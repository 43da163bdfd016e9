"""What can go wrong with a batch: too little memory, or a sample that fails while the others are answered."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from defocus_mllm.images import ImageError
from eval.answering import answer
from eval.generator import Request, TransformersGenerator
from eval.registry import Benchmark
from eval.run import SamplesFailedError, evaluate
from eval.samples import Prediction
from tests.eval.fake_generator import FakeGenerator

REQUESTS = [Request(str(index), "what?", (Path(f"{index}.png"),)) for index in range(11)]


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """A collection of garbage, as after every lack of memory, looks through what the test made alone."""
    gc.freeze()
    yield
    gc.unfreeze()


class SmallMemory(FakeGenerator):
    """Fits `room` samples at once; fails as PyTorch does, on the GPU or on the CPU."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self._room, self._error = room, error

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        if len(requests) > self._room:
            raise self._error
        return super().generate(requests, max_new_tokens)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"),  # not from PyTorch's own allocator
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_too_large_for_memory_is_halved(error: Exception) -> None:
    small = SmallMemory(3, error)
    outcome = answer(small, REQUESTS, 8)
    assert outcome.predictions == FakeGenerator().generate(REQUESTS, 8)
    assert (outcome.backoffs, outcome.fitted) == (3, 3)
    assert all(len(batch) <= 3 for batch in small.batches)


@pytest.mark.parametrize(("error", "times"), [(ERRORS[0], 3), (ImageError("torn"), 0)])
def test_memory_is_released_where_it_lacked(error: Exception, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []
    monkeypatch.setattr(gc, "collect", lambda: released.append(True))
    assert len(answer(SmallMemory(3, error), REQUESTS, 8).predictions) == len(REQUESTS)
    assert len(released) == times


def test_a_sample_too_large_for_memory_is_named() -> None:
    with pytest.raises(ValueError, match="sample '0' does not fit into memory, even alone"):
        answer(SmallMemory(0, ERRORS[0]), REQUESTS, 8)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        answer(SmallMemory(3, RuntimeError("shapes do not match")), REQUESTS, 8)


def test_later_batches_are_as_small_as_memory_asked(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    small = SmallMemory(5, ERRORS[0])
    evaluate(benchmark, small, tmp_path, data_root, batch_size=20)
    sizes = [len(batch) for batch in small.batches]
    assert sizes[:4] == [5, 5, 5, 5]
    assert set(sizes) == {5}
    results = json.loads((tmp_path / "easy_vqa" / "results.json").read_text())
    assert results["throughput"]["oom_backoffs"] == 3, "twenty, then two tens; never again"


def test_a_broken_image_costs_its_samples_and_the_headline(
    benchmark: Benchmark, data_root: Path, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = data_root / "easy_vqa" / "test" / "images" / "1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    generator = TransformersGenerator(model_dir, "cpu")
    with pytest.raises(
        SamplesFailedError, match=r"easy_vqa: 5 samples could not be answered: test-000.*1\.png is trunc"
    ):
        evaluate(benchmark, generator, tmp_path, data_root)
    assert capsys.readouterr().out.split("\n")[0] == "easy_vqa test: partial 55/60: no headline number"
    results = json.loads((tmp_path / "easy_vqa" / "results.json").read_text())
    assert results["partial"] is True
    assert results["health"]["errors"] == 5
    assert sorted(results["errors"]) == [f"test-{index:05d}" for index in range(5, 10)]
    image.write_bytes(whole)
    assert "no headline" not in evaluate(benchmark, generator, tmp_path, data_root)
    results = json.loads((tmp_path / "easy_vqa" / "results.json").read_text())
    assert (results["health"]["errors"], results["health"]["resumed"]) == (0, 55)
