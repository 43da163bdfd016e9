"""The launcher on VLMEvalKit itself. Its stand-in (test_vlmevalkit.py) is always there; the kit takes a checkout.

VLMEVALKIT=/path/VLMEvalKit python -m pytest tests/eval/harnesses/test_vlmevalkit_itself.py
"""

from __future__ import annotations

import base64
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.benchmarks.official import LETTER_SUFFIX, SHORT_SUFFIX, read_table
from eval.generator import Request, TransformersGenerator

REPOSITORY = Path(__file__).parents[3]
KIT = os.environ.get("VLMEVALKIT")
TOKENS = 8
CONFIG = {"tiny_yes_no": {"class": "ImageYORNDataset", "dataset": "tiny_yes_no"}}

pytestmark = pytest.mark.skipif(not KIT, reason="VLMEVALKIT does not name a checkout of open-compass/VLMEvalKit")


def write_table(path: Path, rows: list[dict[str, str]], pictures: list[Path]) -> None:
    """A table as the kit reads it, with the images in it."""
    encoded = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["index", "image", *rows[0]], delimiter="\t")
        writer.writeheader()
        writer.writerows(
            {"index": i, "image": image, **row} for i, (image, row) in enumerate(zip(encoded, rows, strict=True))
        )


@pytest.fixture
def pictures(data_root: Path) -> list[Path]:
    """Six different images."""
    return sorted((data_root / "easy_vqa" / "test" / "images").glob("*.png"))[:6]


@pytest.fixture
def tables(pictures: list[Path], tmp_path: Path) -> Path:
    """A folder with two tables: multiple choice, and yes/no."""
    folder = tmp_path / "LMUData"
    folder.mkdir()
    choices = {"question": "what color?", "A": "red", "B": "blue", "answer": "A"}
    write_table(folder / "tiny_choice.tsv", [choices | {"hint": "look" if i == 1 else ""} for i in range(6)], pictures)
    question = "is it red? Please answer yes or no."
    write_table(folder / "tiny_yes_no.tsv", [{"question": question, "answer": "Yes", "category": "x"}] * 6, pictures)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_are_those_of_eval_run(
    processes: int, tables: Path, pictures: list[Path], model_dir: Path, tmp_path: Path
) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    options = [
        "--max-new-tokens",
        TOKENS,
        "--device",
        "cpu",
        "--judge",
        "exact_matching",
        "--work-dir",
        tmp_path / "out",
    ]
    options += ["--data", "tiny_choice", "tiny_yes_no", "--data-config", json.dumps(CONFIG)]
    command = [
        sys.executable,
        *torchrun,
        "-m",
        "eval.harnesses.vlmevalkit",
        "--kit",
        KIT,
        "--model",
        model_dir,
        *options,
    ]
    environment = os.environ | {"LMUData": str(tables), "PRED_FORMAT": "tsv", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*map(str, command)], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "tiny_choice: 6 answers, " in run.stdout
    assert "tiny_yes_no: 6 answers, Overall " in run.stdout
    (folder,) = (tmp_path / "out" / "model").glob("T*")
    generator = TransformersGenerator(model_dir, "cpu")
    hints = ["", "look\n", "", "", "", ""]
    prompts = {
        "tiny_choice": [f"{hint}what color?\nA. red\nB. blue{LETTER_SUFFIX}" for hint in hints],
        "tiny_yes_no": ["is it red?" + SHORT_SUFFIX] * 6,
    }
    for name, words in prompts.items():
        asked = [Request(word, word, (picture,)) for word, picture in zip(words, pictures, strict=True)]
        expected = [answer.text for answer in generator.generate(asked, TOKENS)]
        written = read_table(folder / f"model_{name}.tsv")
        assert [row["prediction"] for row in written] == expected
        assert len(set(expected)) > 1
