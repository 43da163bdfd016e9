"""LLaVA-Bench and MM-Vet: files for their judges, and every command's message that nothing is scored here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from eval.answer_files import read_answers
from eval.compare import compare_folders
from eval.listing import list_benchmarks
from eval.registry import Benchmark, get_benchmark
from eval.report import main as report
from eval.results import write_submission
from eval.run import evaluate
from eval.samples import Prediction
from eval.score import score_file
from eval.table import read_table
from tests.eval.fake_generator import FakeGenerator

QUESTIONS = [
    {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "is this famous?"},
    {"question_id": 1, "image": "001.jpg", "category": "detail", "text": "Describe this photo."},
]
MM_VET = {
    "v1_0": {"imagename": "v1_0.png", "question": "is it x?", "answer": "1 <OR> -1", "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "v1_0.png", "question": "is it d?", "answer": "2", "capability": ["rec"]},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Both benchmarks in their official layouts, with a picture each."""
    for name, image in (("llava_bench", "001.jpg"), ("mm_vet", "v1_0.png")):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "images" / image)
    questions = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "llava_bench" / "questions.jsonl").write_text(questions)
    (tmp_path / "mm_vet" / "mm-vet.json").write_text(json.dumps(MM_VET))
    return tmp_path


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    small = dataclasses.replace(get_benchmark("llava_bench"), n_expected=2, fingerprint=None)
    for module in ("score", "compare", "report_data"):
        monkeypatch.setattr(f"eval.{module}.get_benchmark", lambda name: small)
    return small


def test_llava_bench_answers_as_its_script_reads_them(root: Path, tmp_path: Path) -> None:
    benchmark = get_benchmark("llava_bench")
    data = benchmark.load(root)
    assert data.samples[0].images == ("images/001.jpg",)
    assert benchmark.prompt(data.samples[1]) == "Describe this photo."
    given = {"1": Prediction("1", "A\nphoto"), "0": Prediction("0", "Yes.")}
    path = write_submission(tmp_path, benchmark, data, given)
    assert path is not None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1]  # the script pairs line with line
    assert rows[1]["text"] == "A\nphoto"
    assert benchmark.submission is not None
    alike = benchmark.submission.write(data, {name: Prediction(name, "Yes.") for name in given})
    rows = [json.loads(line) for line in alike.splitlines()]
    assert len({row["answer_id"] for row in rows}) == 2  # the script fails without
    assert benchmark.import_predictions is not None
    assert benchmark.import_predictions(read_answers(path), data).predictions == given


def test_mm_vet_answers_as_its_script_reads_them(root: Path, tmp_path: Path) -> None:
    benchmark = get_benchmark("mm_vet")
    data = benchmark.load(root)
    assert [sample.categories["capability"] for sample in data.samples] == [("ocr", "math"), "rec"]
    given = {name: Prediction(name, f"it is {name}") for name in MM_VET}
    path = write_submission(tmp_path, benchmark, data, given)
    assert path is not None
    assert json.loads(path.read_text()) == {"v1_0": "it is v1_0", "v1_1": "it is v1_1"}
    assert benchmark.import_predictions is not None
    assert benchmark.import_predictions(read_answers(path), data).predictions == given
    llava = tmp_path / "llava.jsonl"
    llava.write_text("".join(json.dumps({"question_id": n, "text": f"it is v1_{n}"}) + "\n" for n in (0, 1)))
    assert benchmark.import_predictions(read_answers(llava), data).predictions == given
    llava.write_text(json.dumps({"question_id": 7, "text": "x"}))
    with pytest.raises(ValueError, match="'v1_7' is no sample of this benchmark"):
        benchmark.import_predictions(read_answers(llava), data)


def test_every_command_says_that_a_judge_is_required(benchmark: Benchmark, root: Path, tmp_path: Path) -> None:
    said = "not scored here: judge required (GPT-4)"
    assert said in " ".join(list_benchmarks(root).split())
    printed = evaluate(benchmark, FakeGenerator(), tmp_path / "a", root)
    assert printed.startswith(f"llava_bench in_the_wild: 2 answers, {said}, see https://github.com/haotian-liu/LLaVA")
    folder = tmp_path / "a" / "llava_bench"
    assert (folder / "llava_bench_answers.jsonl").is_file()
    scored = score_file("llava_bench", folder / "llava_bench_answers.jsonl", tmp_path / "b", root)
    headline, health, *_ = scored.replace("truncated unknown", "truncated 0").splitlines()
    assert [headline, health] == printed.splitlines()[:2]
    for text, place in ((printed, folder), (scored, tmp_path / "b")):
        assert f"\n  written for its scorer: {place / 'llava_bench_answers.jsonl'}" in text
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert (results["metrics"], results["partial"], results["benchmark"]["not_scored_here"]) == ({}, False, said)
    table = read_table([tmp_path / "a", tmp_path / "b"], ["a", "b"])
    assert table.header[1] == "llava_bench in_the_wild, not scored here"
    assert [row[1] for row in table.rows] == ["-", "-"]
    with pytest.raises(ValueError, match=r"^llava_bench: not scored here: judge required .*nothing to compare$"):
        compare_folders(folder, tmp_path / "b")
    with pytest.raises(ValueError, match=r"llava_bench: not scored here: judge required .*nothing to report$"):
        report(["--evaluation", str(folder), "--output", str(tmp_path / "report.html")])


def test_a_part_of_the_answers_is_no_file_for_the_judge(benchmark: Benchmark, root: Path, tmp_path: Path) -> None:
    printed = evaluate(benchmark, FakeGenerator(), tmp_path, root, limit=1)
    assert printed.split("\n")[0] == "llava_bench in_the_wild: partial 1/2: no headline number"
    assert not (tmp_path / "llava_bench" / "llava_bench_answers.jsonl").exists()
    with pytest.raises(ValueError, match=r"is free text, without options .*: leave --likelihood out"):
        evaluate(benchmark, FakeGenerator(), tmp_path, root, likelihood=True)


@pytest.mark.parametrize("name", ["llava_bench", "mm_vet"])
def test_missing_and_malformed_files_are_named(name: str, root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"DIR/{name}/"):
        get_benchmark(name).load(tmp_path / "nothing")
    (root / "llava_bench" / "questions.jsonl").write_text('{"question_id": 0, "image": "1.jpg"}\n')
    (root / "mm_vet" / "mm-vet.json").write_text('{"v1_0": {"imagename": "a.png", "answer": "1", "capability": []}}')
    with pytest.raises(ValueError, match=r"(record 1|question v1_0): expected the field '(text|question)'"):
        get_benchmark(name).load(root)
