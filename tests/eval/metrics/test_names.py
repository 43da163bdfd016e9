"""What the metrics are called, and how."""

from __future__ import annotations

import inspect

import pytest

from eval import metrics


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vqa_soft_accuracy", {"prediction": None, "answers": None, "mode": "official"}),
        ("anls", {"prediction": None, "answers": None, "threshold": 0.5}),
        ("relaxed_accuracy", {"prediction": None, "target": None}),
        ("gqa_accuracy", {"prediction": None, "answer": None}),
        ("pope_scores", {"rows": None, "mode": "official"}),
        ("mme_scores", {"rows": None, "mode": "official"}),
        ("circular_accuracy", {"rows": None}),
        ("nlvr_scores", {"rows": None}),
        ("cider", {"candidates": None, "references": None}),
        ("exact_match", {"prediction": None, "target": None}),
    ],
)
def test_signatures(name: str, arguments: dict[str, object]) -> None:
    signature = inspect.signature(getattr(metrics, name))
    found = {
        key: None if value.default is value.empty else value.default for key, value in signature.parameters.items()
    }
    assert found == arguments
    assert name in metrics.__all__


def test_each_is_called_as_documented() -> None:
    assert metrics.vqa_soft_accuracy("red", ("red",) * 10, mode="m4c") == 1.0
    assert metrics.anls("red", ["read"], threshold=0.75) == 0.75
    assert metrics.gqa_accuracy("Red.", "red") == metrics.relaxed_accuracy("5", target="5") == 1.0
    assert metrics.pope_scores([{"prediction": "Yes", "label": "Yes", "image": "1.jpg"}])["f1"] == 1.0
    assert metrics.circular_accuracy([{"group": "1", "correct": True}, {"group": "2", "correct": False}]) == 0.5
    rows = [{"identifier": "0-0", "label": "true", "prediction": "true"}]
    assert metrics.nlvr_scores(rows) == {"precision": 1.0, "consistency": 1.0}
    captions, truths = ["a red dog", "a blue sky"], [["a red dog"], ["the blue sky"]]
    by_image = metrics.cider(dict(enumerate(captions)), dict(enumerate(truths)))
    assert metrics.cider(captions, truths) == metrics.cider(tuple(captions), truths) == by_image
