"""The generation loop with a generator that needs no model: batching, the journal, images."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import defocus_mllm
from eval import environment
from eval.batches import BatchPolicy, BatchQueue
from eval.environment import code_digest, sources_digest
from eval.generator import Request
from eval.images import ImageCache
from eval.journal import PredictionJournal
from eval.registry import Benchmark
from eval.runner import Answers, generate_answers
from eval.samples import Prediction
from tests.eval.fake_generator import FakeGenerator


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "predictions.jsonl"


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def run(benchmark: Benchmark, data_root: Path, journal: Path, generator: FakeGenerator, batch_size: int = 7) -> Answers:
    data = benchmark.load(data_root)
    return generate_answers(benchmark, data.root, data.samples, generator, journal, BatchPolicy(batch_size))


@given(
    prompts=st.lists(st.text("ab ", min_size=1, max_size=12), max_size=40),
    samples=st.integers(1, 9),
    tokens=st.integers(1, 60),
)
def test_batches_hold_every_request_once_longest_first_within_the_budget(
    prompts: list[str], samples: int, tokens: int
) -> None:
    requests = [Request(str(index), prompt, ()) for index, prompt in enumerate(prompts)]
    queue = BatchQueue(requests, lambda request: len(request.prompt), BatchPolicy(samples, tokens), max_new_tokens=3)
    batches = list(iter(queue.take, []))
    flat = [request for batch in batches for request in batch]
    assert sorted(request.id for request in flat) == sorted(request.id for request in requests)
    assert [len(request.prompt) for request in flat] == sorted((len(prompt) for prompt in prompts), reverse=True)
    for batch, following in itertools.zip_longest(batches, batches[1:]):
        longest = len(batch[0].prompt) + 3
        assert len(batch) == 1 or (len(batch) <= samples and len(batch) * longest <= tokens)
        if following:
            assert len(batch) == samples or (len(batch) + 1) * longest > tokens, "room for one more"


def test_requests_of_one_length_keep_their_order() -> None:
    requests = [Request(str(index), "abc", ()) for index in range(10)]
    queue = BatchQueue(requests, lambda _: 3, BatchPolicy(4, 1000), 0)
    assert [request.id for batch in iter(queue.take, []) for request in batch] == [str(index) for index in range(10)]


def test_predictions_come_back_in_sample_order(benchmark: Benchmark, data_root: Path, journal_path: Path) -> None:
    answers = run(benchmark, data_root, journal_path, FakeGenerator())
    assert [prediction.id for prediction in answers.predictions] == [f"test-{index:05d}" for index in range(60)]
    assert (answers.resumed, answers.generated) == (0, 60)


@pytest.mark.parametrize("torn_bytes", [0, 1, 30])
def test_killed_run_redoes_only_what_is_missing(
    benchmark: Benchmark, data_root: Path, journal_path: Path, torn_bytes: int
) -> None:
    straight = run(benchmark, data_root, journal_path.with_name("straight.jsonl"), FakeGenerator())
    with pytest.raises(RuntimeError, match="killed"):
        run(benchmark, data_root, journal_path, FakeGenerator(dies_at=3))
    content = journal_path.read_bytes()
    journal_path.write_bytes(content[: len(content) - torn_bytes])

    second = FakeGenerator()
    resumed = run(benchmark, data_root, journal_path, second, batch_size=4)
    assert resumed.resumed == 21 - (torn_bytes > 0)
    assert sum(map(len, second.batches)) == 60 - resumed.resumed
    assert resumed.predictions == straight.predictions
    assert run(benchmark, data_root, journal_path, FakeGenerator()).resumed == 60


def test_a_second_model_redoes_everything_and_loses_nothing(
    benchmark: Benchmark, data_root: Path, journal_path: Path
) -> None:
    of_a = run(benchmark, data_root, journal_path, FakeGenerator("model-a"))
    before = lines_of(journal_path)
    of_b = run(benchmark, data_root, journal_path, FakeGenerator("model-b"))
    assert (of_b.resumed, of_b.other_keys) == (0, 60)
    run(benchmark, data_root, journal_path, FakeGenerator("model-c"))
    assert lines_of(journal_path)[:60] == before
    assert len(lines_of(journal_path)) == 180
    assert of_a.predictions != of_b.predictions
    for model, first in (("model-a", of_a), ("model-b", of_b)):
        again = run(benchmark, data_root, journal_path, FakeGenerator(model))
        assert (again.resumed, again.other_keys) == (60, 120)
        assert again.predictions == first.predictions
    assert [path.name for path in journal_path.parent.iterdir()] == ["predictions.jsonl"]


def test_another_environment_redoes_everything(benchmark: Benchmark, data_root: Path, journal_path: Path) -> None:
    run(benchmark, data_root, journal_path, FakeGenerator(device="cpu"))
    answers = run(benchmark, data_root, journal_path, FakeGenerator(device="cuda"))
    assert (answers.resumed, answers.other_keys) == (0, 60)


def test_source_digest_follows_the_code_and_not_its_place(tmp_path: Path) -> None:
    package = Path(defocus_mllm.__file__).parent
    for name in ("a", "b"):
        shutil.copytree(package, tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not code")
    assert sources_digest(tmp_path / "a") == sources_digest(tmp_path / "b") == sources_digest(package)
    with (tmp_path / "b" / "modeling_defocus.py").open("a") as file:
        file.write("# changed\n")
    assert sources_digest(tmp_path / "b") != sources_digest(package)


def test_code_digest_covers_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digest()
    for name in ("generator.py", "image_features.py", "likelihood.py"):
        shutil.copy(Path(environment.__file__).with_name(name), tmp_path)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert code_digest.__wrapped__() == before
    with (tmp_path / "generator.py").open("a") as file:
        file.write("# changed\n")
    assert code_digest.__wrapped__() != before


def test_a_changed_image_is_asked_again(benchmark: Benchmark, data_root: Path, journal_path: Path) -> None:
    run(benchmark, data_root, journal_path, FakeGenerator())
    Image.new("RGB", (64, 64)).save(data_root / "easy_vqa" / "test" / "images" / "3.png")
    answers = run(benchmark, data_root, journal_path, FakeGenerator())
    assert (answers.resumed, answers.other_keys) == (55, 5)


def test_missing_images_are_all_found_before_the_first_batch(
    benchmark: Benchmark, data_root: Path, journal_path: Path
) -> None:
    for number in (4, 7):
        (data_root / "easy_vqa" / "test" / "images" / f"{number}.png").unlink()
    generator = FakeGenerator()
    with pytest.raises(FileNotFoundError, match=r"2 images are missing: .*images/4\.png, .*images/7\.png"):
        run(benchmark, data_root, journal_path, generator)
    assert generator.batches == []


def test_a_batch_is_on_disk_before_the_next_begins(journal_path: Path) -> None:
    with PredictionJournal(journal_path, {"a": "k"}) as journal:
        journal.append([Prediction("a", "yes")])
        assert json.loads(journal_path.read_text())["text"] == "yes"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").symlink_to("/dev/full")
    full = rf"No space left on device: '{tmp_path}/predictions\.jsonl'"
    with pytest.raises(OSError, match=full), PredictionJournal(tmp_path / "predictions.jsonl", {"1": "k"}) as journal:
        journal.append([Prediction("1", "red")])


def test_malformed_journal_line_is_named(journal_path: Path) -> None:
    journal_path.parent.mkdir()
    journal_path.write_text('{"id": "a", "text": "yes", "key": "k"}\n{"id": \n{"id": "b", "text": "no", "key": "k"}\n')
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2: malformed JSON"):
        PredictionJournal(journal_path, {"a": "k", "b": "k"})


@given(text=st.text())
def test_any_text_survives_the_journal(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("journal") / "predictions.jsonl"
    with PredictionJournal(path, {"a": "k"}) as journal:
        journal.append([Prediction("a", text)])
    with PredictionJournal(path, {"a": "k"}) as journal:
        assert journal.finished == {"a": Prediction("a", text)}
    assert json.loads(path.read_text(encoding="utf-8"))["key"] == "k"


def test_corrupt_image_is_named(data_root: Path) -> None:
    path = data_root / "easy_vqa" / "test" / "images" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"images/0\.png is truncated or corrupt"):
        ImageCache().load(path)


def test_images_are_decoded_once_within_the_budget(data_root: Path) -> None:
    folder = data_root / "easy_vqa" / "test" / "images"
    cache = ImageCache(byte_budget=2 * 64 * 64 * 3)
    first = cache.load(folder / "0.png")
    assert cache.load(folder / "0.png") is first
    cache.load(folder / "1.png")
    assert cache.load(folder / "0.png") is first
    cache.load(folder / "2.png")  # 1 leaves: 0 was used later
    assert cache.load(folder / "0.png") is first
    cache.load(folder / "1.png")
    cache.load(folder / "2.png")
    assert cache.load(folder / "0.png") is not first
