"""`eval.run` on a tiny random model: left padding, resumption after a kill, partial runs, errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from eval.benchmarks.easy_vqa import BENCHMARK
from eval.environment import code_digest
from eval.generator import Request, TransformersGenerator, usable_device
from eval.image_features import ImageFeatures
from eval.registry import Benchmark
from eval.run import evaluate, evaluate_all, main
from eval.samples import BenchmarkData
from eval.workers import WorkerLostError
from tests.eval.fake_generator import FakeGenerator

REPOSITORY = Path(__file__).parents[2]


def read_samples(output: Path) -> list[dict]:
    lines = (output / "easy_vqa" / "samples.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "secs"} for line in lines]


@pytest.fixture
def requests(benchmark: Benchmark, data_root: Path) -> list[Request]:
    data = BENCHMARK.load(data_root)
    return [Request(sample.id, sample.question, (data.root / sample.images[0],)) for sample in data.samples]


def test_batched_answers_equal_single_answers(model_dir: Path, requests: list[Request]) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    batched = generator.generate(requests, max_new_tokens=8)
    assert len({request.prompt for request in requests}) > 1
    assert len({prediction.n_in for prediction in batched}) > 1, "prompts of one length prove nothing about padding"
    for request, in_batch in zip(requests, batched, strict=True):
        (alone,) = generator.generate([request], max_new_tokens=8)
        assert (alone.text, alone.finish, alone.n_in, alone.n_out) == (
            in_batch.text,
            in_batch.finish,
            in_batch.n_in,
            in_batch.n_out,
        )


def test_settings_of_the_checkpoint_leave_the_search_greedy(model_dir: Path, requests: list[Request]) -> None:
    greedy = [answer.text for answer in TransformersGenerator(model_dir, "cpu").generate(requests[:4], 8)]
    path = model_dir / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_time": 1e-9}))
    assert [answer.text for answer in TransformersGenerator(model_dir, "cpu").generate(requests[:4], 8)] == greedy


def test_a_second_token_may_end_an_answer(model_dir: Path, requests: list[Request]) -> None:
    (whole,) = TransformersGenerator(model_dir, "cpu").generate(requests[:1], 8)
    assert (whole.finish, whole.n_out) == ("length", 8)
    generator = TransformersGenerator(model_dir, "cpu")
    inputs = generator._encode(requests[:1])
    first = generator.model(**inputs).logits[0, -1].argmax().item()
    path = model_dir / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [settings["eos_token_id"], first]}))
    (cut,) = TransformersGenerator(model_dir, "cpu").generate(requests[:1], 8)
    assert (cut.text, cut.finish, cut.n_out) == ("", "stop", 1)


def test_an_image_is_encoded_once_and_answers_stay(
    model_dir: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    encoded: list[int] = []
    tower = generator.model.model.vision_tower
    tower.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    first = [generator.generate(requests[start : start + 6], 8) for start in range(0, 60, 6)]
    assert sum(encoded) == len({request.images for request in requests}) == 12
    with monkeypatch.context() as patch:
        patch.setattr(generator._images, "load", lambda path: pytest.fail(f"{path} was read again"))
        generator.generate(requests[:6], 8)
    monkeypatch.setattr(generator, "_image_features", None)
    plain = generator.generate(requests, 8)
    assert sum(encoded) == 12 + 60
    assert [p.text for batch in first for p in batch] == [p.text for p in plain]


def test_a_defocus_model_is_given_the_tokens_that_its_processor_makes(model_dir: Path, requests: list[Request]) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    asked = [*requests[:9], Request("text", "what? <image> </s>", ()), Request("two", "both?", requests[0].images * 2)]
    by_processor, shared = generator._encode(asked), generator._encode_once(asked)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(by_processor[name], shared[name])
    features = generator.model.get_image_features(by_processor["pixel_values"], return_dict=True).pooler_output
    assert len(features) == len(shared["mm_encoder_outputs"]["image"].pooler_output) == 11
    for mine, theirs in zip(shared["mm_encoder_outputs"]["image"].pooler_output, features, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_features_of_images_stay_within_their_budget(model_dir: Path, requests: list[Request]) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    generator._image_features = ImageFeatures(generator.model, byte_budget=1)
    answers = generator.generate(requests[:12], 4)
    assert not generator._image_features._features
    assert [p.text for p in generator.generate(requests[:12], 4)] == [p.text for p in answers]


def test_length_of_a_request_counts_its_images(model_dir: Path, requests: list[Request]) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    image_tokens = generator.processor.num_image_tokens
    text_only = Request("t", requests[0].prompt, ())
    assert generator.request_length(requests[0]) == generator.request_length(text_only) + image_tokens
    predictions = generator.generate(requests[:5], max_new_tokens=2)
    pairs = zip(predictions, requests[:5], strict=True)
    (template,) = {prediction.n_in - generator.request_length(request) for prediction, request in pairs}
    generator._image_tokens = None  # as with a processor that does not say how many tokens an image has
    assert generator.request_length(requests[0]) == generator.request_length(text_only) + image_tokens + template


def test_a_broken_image_does_not_keep_lengths_from_being_known(
    model_dir: Path, requests: list[Request], tmp_path: Path
) -> None:
    """A processor that does not say how long images are is tried on one; that it is damaged is found when asked."""
    (tmp_path / "torn.png").write_bytes(b"no image")
    torn = Request("torn", requests[0].prompt, (tmp_path / "torn.png",))
    generator = TransformersGenerator(model_dir, "cpu")
    known = generator.request_length(requests[0])
    generator._image_tokens = None
    assert generator.request_length(torn) < known
    assert generator.request_length(requests[0]) >= known


def test_answers_depend_on_image_and_question(model_dir: Path, requests: list[Request]) -> None:
    texts = {prediction.text for prediction in TransformersGenerator(model_dir, "cpu").generate(requests, 8)}
    assert len(texts) > len({request.prompt for request in requests}), "a model that ignores its input tests nothing"


def test_right_padding_is_refused(model_dir: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    render = generator.processor.apply_chat_template

    def pad_right(conversations: list, **kwargs: object) -> object:
        return render(conversations, **kwargs | {"processor_kwargs": {"padding": True, "padding_side": "right"}})

    monkeypatch.setattr(generator, "_image_features", None)  # the way of all other models
    monkeypatch.setattr(generator.processor, "apply_chat_template", pad_right)
    with pytest.raises(ValueError, match="left padding"):
        generator.generate(requests, 8)


def test_killed_run_resumes_to_the_uninterrupted_result(
    model_dir: Path, benchmark: Benchmark, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    evaluate(benchmark, generator, tmp_path / "straight", data_root, limit=40, batch_size=8)

    batches: list[list[Request]] = []
    generate = generator.generate

    def dies_in_third_batch(batch: list[Request], max_new_tokens: int) -> list:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(batch)
        return generate(batch, max_new_tokens)

    monkeypatch.setattr(generator, "generate", dies_in_third_batch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(benchmark, generator, tmp_path / "killed", data_root, limit=40, batch_size=8)
    monkeypatch.setattr(generator, "generate", generate)
    journal = tmp_path / "killed" / "easy_vqa" / "predictions.jsonl"
    torn = journal.read_bytes()[:-20]
    journal.write_bytes(torn)

    assert not (tmp_path / "killed" / "easy_vqa" / "results.json").exists()
    evaluate(benchmark, generator, tmp_path / "killed", data_root, limit=40, batch_size=8)
    results = json.loads((tmp_path / "killed" / "easy_vqa" / "results.json").read_text())
    assert results["health"]["resumed"] == 15, "two batches of eight, less the torn line"
    assert read_samples(tmp_path / "killed") == read_samples(tmp_path / "straight")


def test_a_killed_run_leaves_no_result_of_an_earlier_model(
    benchmark: Benchmark, data_root: Path, tmp_path: Path
) -> None:
    evaluate(benchmark, FakeGenerator("model-a"), tmp_path, data_root)
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(benchmark, FakeGenerator("model-b", dies_at=1), tmp_path, data_root, batch_size=8)
    assert not (tmp_path / "easy_vqa" / "results.json").exists()


def test_a_run_that_answers_nothing_leaves_the_earlier_result(
    benchmark: Benchmark, data_root: Path, tmp_path: Path
) -> None:
    evaluate(benchmark, FakeGenerator("model-a"), tmp_path, data_root)
    journal, result = (tmp_path / "easy_vqa" / name for name in ("predictions.jsonl", "results.json"))
    before, predictions = result.read_bytes(), journal.read_bytes()
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(benchmark, FakeGenerator("model-b", dies_at=0), tmp_path, data_root)
    assert result.read_bytes() == before
    journal.write_bytes(b"{\n" + predictions)
    with pytest.raises(ValueError, match="line 1: malformed JSON"):
        evaluate(benchmark, FakeGenerator("model-b"), tmp_path, data_root)
    assert result.read_bytes() == before
    journal.write_bytes(predictions)
    (data_root / "easy_vqa" / "test" / "images" / "5.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 images are missing"):
        evaluate(benchmark, FakeGenerator("model-b"), tmp_path, data_root)
    assert result.read_bytes() == before


def test_result_stands_while_answers_are_only_read_back(
    benchmark: Benchmark, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(benchmark, FakeGenerator(), tmp_path, data_root)
    before = (tmp_path / "easy_vqa" / "results.json").read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("eval.run.write_results", fails)
    with pytest.raises(OSError, match="no space"):
        evaluate(benchmark, FakeGenerator(), tmp_path, data_root)
    assert (tmp_path / "easy_vqa" / "results.json").read_bytes() == before


def test_partial_run_never_replaces_a_complete_result(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    evaluate(benchmark, FakeGenerator(), tmp_path, data_root, limit=60)
    before = (tmp_path / "easy_vqa" / "results.json").read_bytes()
    other = FakeGenerator("model-b")
    with pytest.raises(ValueError, match=r"/easy_vqa: holds a complete result, .*another --output"):
        evaluate(benchmark, other, tmp_path, data_root, limit=10)
    assert other.batches == []
    assert (tmp_path / "easy_vqa" / "results.json").read_bytes() == before
    evaluate(benchmark, other, tmp_path, data_root, limit=60)  # all questions: not a partial run


def test_predictions_not_used_are_reported(
    benchmark: Benchmark, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(benchmark, FakeGenerator(device="cpu"), tmp_path, data_root)
    assert capsys.readouterr().out == ""
    evaluate(benchmark, FakeGenerator(device="cuda"), tmp_path, data_root)
    message = "60 predictions made with another model, image, setting or version: kept, not used\n"
    assert capsys.readouterr().out.endswith(f"easy_vqa/predictions.jsonl: {message}")


def test_partial_run_has_no_headline_number(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    printed = evaluate(benchmark, FakeGenerator(), tmp_path, data_root, limit=10)
    headline, health = printed.split("\n")
    assert headline == "easy_vqa test: partial 10/60: no headline number"
    assert re.fullmatch(r"  unparsed \d+, unparsed_lenient \d+, truncated 0, empty \d+, errors 0, resumed 0", health)
    results = json.loads((tmp_path / "easy_vqa" / "results.json").read_text())
    assert results["partial"] is True
    assert results["metrics"] == {}
    assert "accuracy" in results["partial_metrics"]


def reading(benchmark: Benchmark, read: Callable[[Path], BenchmarkData]) -> Benchmark:
    """The benchmark, whose official files are read by another function."""
    (layout,) = benchmark.layouts
    return dataclasses.replace(benchmark, layouts=(dataclasses.replace(layout, read=read),))


def test_questions_without_text_are_not_asked(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    data = BENCHMARK.load(data_root)
    stripped = dataclasses.replace(data.samples[7], question=" ")
    data = dataclasses.replace(
        data, samples=(*data.samples[:7], stripped, *data.samples[8:]), compared=("id", "target")
    )
    lacking = dataclasses.replace(reading(benchmark, lambda _: data), fingerprint=data.fingerprint())
    with pytest.raises(ValueError, match="1 of 60 questions of easy_vqa have no text, the first is test-00007: enough"):
        evaluate(lacking, FakeGenerator(), tmp_path, data_root, limit=2)
    one_prompt_for_all = dataclasses.replace(lacking, prompt=lambda _: "Describe it.")
    assert "partial 2/60" in evaluate(one_prompt_for_all, FakeGenerator(), tmp_path, data_root, limit=2)


def test_trouble_with_one_benchmark_costs_no_other(
    benchmark: Benchmark, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    malformed = reading(benchmark, Mock(side_effect=ValueError("questions.json: malformed")))
    broken = dataclasses.replace(malformed, name="broken", shares_folder=benchmark.folder)
    with pytest.raises(ValueError, match=r"^questions.json: malformed$"):
        evaluate_all([broken, benchmark], FakeGenerator(), tmp_path, data_root=data_root)
    first, second, *_ = capsys.readouterr().out.split("\n")
    assert first == "broken failed, going on with the others: questions.json: malformed"
    assert second.startswith("easy_vqa test: accuracy ")
    with pytest.raises(ValueError, match=r"^questions.json: malformed; questions.json: malformed$"):
        evaluate_all([broken, broken], FakeGenerator(), tmp_path, data_root=data_root)
    lost = reading(benchmark, Mock(side_effect=WorkerLostError("lost")))
    with pytest.raises(WorkerLostError):
        evaluate_all([lost, benchmark], FakeGenerator(), tmp_path, data_root=data_root)
    assert "going on" not in capsys.readouterr().out


def test_full_run_after_a_partial_one_has(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    evaluate(benchmark, FakeGenerator(), tmp_path, data_root, limit=10)
    printed = evaluate(benchmark, FakeGenerator(), tmp_path, data_root)
    results = json.loads((tmp_path / "easy_vqa" / "results.json").read_text())
    assert results["health"]["resumed"] == 10
    assert results["partial"] is False
    value = sum(sample["score"] for sample in read_samples(tmp_path)) / 60
    assert results["metrics"]["accuracy"]["value"] == pytest.approx(value)
    assert printed.startswith(f"easy_vqa test: accuracy {100 * value:.2f} % (95 % interval ")
    assert set(results["breakdown"]["answer_type"]) == {"yes/no", "colour", "shape"}


def test_command_line_by_path(model_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "eval/run.py", "--model", model_dir, "--benchmarks", "easy_vqa", "--output", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    run = [*map(str, command), "--limit", "6", "--device", "cpu"]
    finished = subprocess.run(run, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[0] == "easy_vqa test: partial 6/9673: no headline number"
    assert json.loads((tmp_path / "easy_vqa" / "results.json").read_text())["model"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "nowhere", "--benchmarks", "easy_vqa", "--output", "out"],
            r"--model: nowhere holds no saved model",
        ),
        (["--model", "nowhere", "--benchmarks", "easy_qva", "--output", "out"], "unknown benchmark 'easy_qva'"),
    ],
)
def test_errors_name_what_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(arguments)


@pytest.mark.parametrize("device", ["banana", "", "cuda:99", "meta"])
def test_unusable_device_is_one_line(model_dir: Path, tmp_path: Path, device: str) -> None:
    command = ["--model", str(model_dir), "--benchmarks", "easy_vqa", "--output", str(tmp_path), "--device", device]
    with pytest.raises(ValueError, match=f"^--device '{device}' cannot be used: ") as error_information:
        main(command)
    assert len(str(error_information.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^--device 'cuda' cannot be used: [^\n]+; try cpu, or leave --device out$"):
        usable_device("cuda")


def test_environment_holds_versions_device_and_code(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    before = generator.environment
    assert (before["torch"], before["device"]) == (torch.__version__, "cpu")
    assert before["transformers"] == transformers.__version__
    assert before["code_sha"] == code_digest()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert generator.environment != before


@pytest.mark.parametrize("arguments", [[], ["--model", "m"], ["--limit", "0"]])
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_information:
        main(arguments)
    assert exit_information.value.code == 2
    assert "--" in capsys.readouterr().err


def test_list_names_the_data_each_benchmark_needs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    printed = capsys.readouterr().out
    assert "easy_vqa: test, 9,673 samples, headline accuracy" in printed
    assert "questions.json" in printed


def test_weights_that_are_missing_are_not_made_up(model_dir: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(model_dir, lacking)
    weights = load_file(lacking / "model.safetensors")
    del weights["model.vision_tower.norm.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, first model\.vision_tower\.norm\.weight"):
        TransformersGenerator(lacking, "cpu")


def test_model_fingerprint_changes_with_the_weights(model_dir: Path, tmp_path: Path) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    with torch.no_grad():
        generator.model.lm_head.weight[0, 0] += 1
    generator.model.save_pretrained(tmp_path)
    generator.processor.save_pretrained(tmp_path)
    assert TransformersGenerator(tmp_path, "cpu").fingerprint != generator.fingerprint
