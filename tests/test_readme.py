"""The Python in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def python_block(containing: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if containing in block)
    return block


def run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_a_trained_model_answers(
    model, processor, image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "data" / "easy_vqa" / "images" / "train"
    pictures.mkdir(parents=True)
    image.save(pictures / "0.png")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "outputs" / "quickstart" / "stage2")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run(python_block("AutoModelForImageTextToText"))
    assert capsys.readouterr().out.strip()


def test_the_encoder_is_causal_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    run(python_block("DefocusVisionModel"))
    upper_half, class_token = (float(value) for value in re.findall(r"tensor\(([^)]*)\)", capsys.readouterr().out))
    assert upper_half == 0
    assert class_token > 1e-3
