"""Log-likelihoods of options against a plain calculation, one prompt and one token at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval.generator import Request, TransformersGenerator
from eval.likelihood import agreement, first_token_likelihoods, most_likely, sequence_likelihoods, single_tokens
from eval.registry import Benchmark, get_benchmark
from eval.run import evaluate
from eval.samples import Sample
from tests.eval.fake_generator import FakeGenerator

OPTIONS = ("red", "circle", "a blue rectangle")


def by_hand(generator: TransformersGenerator, request: Request, option: str) -> float:
    """Without batches, padding or cache: every token of every form in a pass of its own."""
    tokenizer = generator.processor.tokenizer
    forms = [[token] for token in single_tokens(tokenizer, option)]
    totals = []
    for form in forms or [tokenizer(option, add_special_tokens=False).input_ids]:
        inputs = dict(generator._encode([request]))
        total = 0.0
        for token in form:
            with torch.inference_mode():
                logits = generator.model(**inputs).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        totals.append(total)
    return math.log(sum(map(math.exp, totals)))


def test_likelihoods_in_a_batch_are_those_by_hand(model_dir: Path, benchmark: Benchmark, data_root: Path) -> None:
    generator = TransformersGenerator(model_dir, "cpu")
    data = benchmark.load(data_root)
    plain = [Request(sample.id, sample.question, (data.root / sample.images[0],)) for sample in data.samples[:7]]
    requests = [replace(request, options=OPTIONS) for request in plain]
    tokenizer = generator.processor.tokenizer
    assert single_tokens(tokenizer, "red")
    assert not single_tokens(tokenizer, "a blue rectangle")
    predictions = generator.generate(requests, 4)
    for request, prediction in zip(requests, predictions, strict=True):
        assert prediction.ll is not None
        assert list(prediction.ll) == list(OPTIONS)
        for option in OPTIONS:
            assert prediction.ll[option] == pytest.approx(by_hand(generator, request, option), abs=2e-4)
    without = generator.generate(plain, 4)
    assert [(p.text, p.ll) for p in without] == [(p.text, None) for p in predictions]


def test_what_else_stands_beside_the_tokens_is_as_long_as_they() -> None:
    """Some models are told for each token whether it is an image's (`token_type_ids`, `mm_token_type_ids`)."""
    given = {}

    def model(**inputs: torch.Tensor) -> SimpleNamespace:
        given.update(inputs)
        return SimpleNamespace(logits=torch.zeros(*inputs["input_ids"].shape, 10))

    def tokenizer(text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[7, 8, 9])

    ids = torch.tensor([[3, 3, 5], [3, 3, 6]])
    kinds = (ids == 3).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds}
    inputs["pixel_values"] = torch.zeros(2, 3, 4, 4)
    likelihoods = sequence_likelihoods(model, tokenizer, inputs, "a blue rectangle")
    assert likelihoods == pytest.approx([-3 * math.log(10)] * 2)
    assert given["input_ids"].tolist() == [[3, 3, 5, 7, 8], [3, 3, 6, 7, 8]]
    assert given["token_type_ids"].tolist() == [[1, 1, 0, 0, 0]] * 2
    assert given["attention_mask"].tolist() == [[1] * 5] * 2
    assert given["pixel_values"].shape == (2, 3, 4, 4)


def test_forms_of_an_option_are_added_up() -> None:
    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool):
            known = {"yes": [3], "Yes": [4], " yes": [3], " Yes": [5, 6]}
            return type("Encoded", (), {"input_ids": known.get(text, [7, 8])})

    logits = torch.log(torch.tensor([[0.1, 0.1, 0.1, 0.2, 0.3, 0.2]]))
    for option in ("Yes", "yes"):
        (scores,) = first_token_likelihoods(Tokenizer(), [(option, "No")], logits)
        assert scores == {option: pytest.approx(math.log(0.5))}


def test_agreement_forgives_case_and_period() -> None:
    rows = [{"text": "Yes.", "ll": {"yes": -1.0, "no": -2.0}}, {"text": "no", "ll": {"yes": -1.0, "no": -2.0}}]
    assert agreement(rows) == 0.5
    assert most_likely({"a": -2.0, "b": -1.0}) == "b"


class Knowing(FakeGenerator):
    """Says "fish" to everything; by likelihood it knows that the answer is "red"."""

    def answer(self, request: Request):
        prediction = replace(super().answer(request), text="fish")
        return (
            replace(prediction, ll={o: -float(o != "red") for o in request.options}) if request.options else prediction
        )


def test_likelihood_stands_beside_generation(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    evaluate(benchmark, Knowing(), tmp_path, data_root)
    printed = evaluate(benchmark, Knowing(), tmp_path, data_root, likelihood=True)
    results = json.loads((tmp_path / "easy_vqa" / "results.json").read_text())
    assert results["health"]["resumed"] == 0, "answers without likelihoods are no answers to this"
    assert results["metrics"]["accuracy"]["value"] == 0
    assert results["likelihood"]["metrics"]["accuracy"]["value"] == pytest.approx(0.2)
    assert results["likelihood"]["agreement"] == 0
    assert "by likelihood of the options: accuracy 20.00 %" in printed
    row = json.loads((tmp_path / "easy_vqa" / "samples.jsonl").read_text().splitlines()[0])
    assert set(row["ll"]) >= {"yes", "no", "red", "circle"}


def test_a_free_answer_has_no_likelihood(benchmark: Benchmark, data_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="easy_vqa: the answer to test-00000 is free text"):
        evaluate(replace(benchmark, options=None), Knowing(), tmp_path, data_root, likelihood=True)


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_yes_no_benchmarks_have_their_two_options(name: str) -> None:
    sample = Sample("1", ("a.jpg",), "Is there a dog?", "yes", "a.jpg")
    assert get_benchmark(name).options_of(sample) == ("Yes", "No")


def test_options_of_multiple_choice_are_its_letters() -> None:
    sample = Sample("1", ("a.jpg",), "Which?", "B", "a.jpg", choices=("a dog", "a cat", "a cow"))
    assert get_benchmark("scienceqa").options_of(sample) == ("A", "B", "C")
