"""The report: self-contained, complete, escaped."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the report needs the extra [quickstart]")

from eval.registry import Benchmark
from eval.report import main
from eval.run import evaluate
from tests.eval.fake_generator import FakeGenerator


@pytest.fixture
def evaluation(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> Path:
    evaluate(benchmark, FakeGenerator(), tmp_path / "eval", data_root)
    return tmp_path / "eval" / "easy_vqa"


@pytest.fixture
def training_run(tmp_path: Path) -> Path:
    folder = tmp_path / "stage2"
    folder.mkdir()
    rows = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-3} for step in range(10, 60, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"status": "complete", "seed": 7, "commit": "abcdef0123456789", "train_seconds": 125.0}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def write_report(evaluation: Path, *runs: Path) -> str:
    output = evaluation.parent / "report.html"
    main(["--evaluation", str(evaluation), "--runs", *map(str, runs), "--output", str(output)])
    return output.read_text(encoding="utf-8")


def test_report_shows_number_runs_and_gallery(evaluation: Path, training_run: Path) -> None:
    page = write_report(evaluation, training_run)
    accuracy = json.loads((evaluation / "results.json").read_text())["metrics"]["accuracy"]
    assert f"<p class='number'>{100 * accuracy['value']:.2f} %</p>" in page
    assert "2 min 5 s" in page
    assert "abcdef0123" in page
    wrong = page.count("data-outcome='wrong'")
    samples = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
    assert wrong == sum(sample["score"] == 0 for sample in samples) > 0
    assert page.count("data-outcome='right'") == len(samples) - wrong
    assert page.index("data-outcome='wrong'") < page.index("data-outcome='right'")
    assert page.count("class='figure'") == 2


def test_report_is_self_contained(evaluation: Path, training_run: Path) -> None:
    page = write_report(evaluation, training_run)
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]+)", page)
    assert sources
    assert all(source.startswith("data:") for source in sources)


def test_report_is_the_same_every_time(evaluation: Path, training_run: Path) -> None:
    assert write_report(evaluation, training_run) == write_report(evaluation, training_run)


def test_answers_are_escaped(evaluation: Path) -> None:
    samples = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
    samples[0] |= {"text": "<script>alert(1)</script>", "score": 0.0}
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = write_report(evaluation)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_gallery_offers_each_label_of_a_question(evaluation: Path) -> None:
    samples = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
    samples[0] |= {"categories": {"answer_type": ["form", "table/list"], "evidence": []}}
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = write_report(evaluation)
    assert "<option>form</option><option>shape</option><option>table/list</option>" in page
    assert """data-kinds='[&quot;form&quot;, &quot;table/list&quot;]'""" in page


def test_only_what_there_is_gets_a_section(evaluation: Path) -> None:
    page = write_report(evaluation)
    assert "<td>accuracy_lenient</td>" in page, "every metric is shown"
    assert "published results" in page
    assert "By kind of question" in page
    results = json.loads((evaluation / "results.json").read_text())
    metric = results["metrics"]["accuracy"]
    metric |= {"ci95": None, "style": {"scale": 1.0, "digits": 4, "unit": " points"}}
    likelihood = {"agreement": 0.25, "metrics": {"accuracy": results["metrics"]["accuracy_lenient"]}}
    changed = {"breakdown": {}, "likelihood": likelihood}
    (evaluation / "results.json").write_text(json.dumps(results | changed))
    page = write_report(evaluation)
    assert f"<p class='number'>{metric['value']:.4f} points</p>" in page
    assert "no interval: one image only" in page
    assert "By kind of question" not in page
    assert "accuracy, by likelihood of the options" in page
    assert "25.0 %" in page


def test_each_breakdown_is_named_and_long_ones_are_folded(evaluation: Path) -> None:
    results = json.loads((evaluation / "results.json").read_text())
    (groups,) = results["breakdown"].values()
    group = next(iter(groups.values()))
    breakdown = {"question_type": {"1": group}, "number_of_words": {str(number): group for number in range(30)}}
    (evaluation / "results.json").write_text(json.dumps(results | {"breakdown": breakdown}))
    page = write_report(evaluation)
    assert "<th>question type</th>" in page
    assert page.count("<details>") == 1
    assert "<summary>number of words: 30 groups</summary>" in page


def test_a_card_has_all_that_a_score_depends_on(evaluation: Path) -> None:
    samples = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
    asked = {"question": "first line\nWhich?", "choices": ["a cat", "a <dog>"], "target": "B", "images": []}
    samples[0] |= asked | {"text": "B.", "parsed": None, "score": 0.0}
    samples[1] |= {"text": "Red", "parsed": "red", "answers": ["red"] * 7 + ["pink", "dark red", "pink"], "score": 0.3}
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = write_report(evaluation)
    assert "<p class='choices'>A. a cat\nB. a &lt;dog&gt;</p>" in page
    assert "<p class='answer'>✗ B.</p><p class='truth'>not readable</p><p class='truth'>truth: B</p>" in page
    assert "<p class='answer'>◑ Red</p><p class='truth'>read as: red</p>" in page
    assert "truth: red (7), pink (2), dark red</p>" in page


def test_large_images_are_reduced_and_stay_upright(evaluation: Path, data_root: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the first row is the right side
    photograph = data_root / "easy_vqa" / "test" / "images" / "0.png"
    Image.effect_noise((2000, 1000), 90).save(photograph, "JPEG", exif=turned)
    page = write_report(evaluation)
    (uri,) = set(re.findall(r"<img alt='images/0.png' src='data:image/jpeg;base64,([^']+)'>", page))
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (512, 1024)
    assert "<img class='pixels' alt='images/1.png' src='data:image/png" in page, "small ones are as they were"
    assert "class='gallery large'" in page


def test_partial_run_shows_no_number(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    evaluate(benchmark, FakeGenerator(), tmp_path / "eval", data_root, limit=20)
    page = write_report(tmp_path / "eval" / "easy_vqa")
    assert "partial 20/60" in page
    assert "class='figure'" not in page


def test_missing_run_files_are_named(evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.jsonl: no such file"):
        write_report(evaluation, tmp_path / "nowhere")
    assert not (evaluation.parent / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../../secret.png", "lies outside the images of the benchmark"),
        ("{absolute}", "lies outside the images of the benchmark"),
        ("images/link.png", "lies outside the images of the benchmark"),
        ("questions.json", "questions.json: not an image"),
        ("images/text.png", "text.png: not an image"),
    ],
)
def test_only_images_of_the_benchmark_enter_the_page(
    evaluation: Path, data_root: Path, name: str, message: str
) -> None:
    secret = data_root.parent / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    images = data_root / "easy_vqa" / "test" / "images"
    (images / "link.png").symlink_to(secret)
    (images / "text.png").write_text("password")
    samples = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()]
    samples[0]["images"] = [name.format(absolute=secret)]
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert (images / "../../../../secret.png").is_file()
    with pytest.raises(ValueError, match=message):
        write_report(evaluation)
    assert not (evaluation.parent / "report.html").exists()


@pytest.mark.parametrize("content", ["{}", "[]", '{"schema_version": 2}'])
def test_results_of_another_schema_are_refused(evaluation: Path, content: str) -> None:
    (evaluation / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"easy_vqa/results\.json: schema_version must be 1, found (None|2)"):
        write_report(evaluation)
