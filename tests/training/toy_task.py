"""A toy data set and command lines for the real stage scripts: 8 pictures of two colours and tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
TEXT_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
VISION_CONFIG = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_data(folder: Path) -> Path:
    """Pictures, metadata.jsonl, captions.json, conversations.json and dialogues.json in `folder`."""
    (folder / "images").mkdir(parents=True)
    metadata, captions, conversations = [], [], []
    for number in range(8):
        colour = ("red", "blue")[number % 2]
        Image.new("RGB", (16, 16), COLOURS[colour]).save(folder / "images" / f"{number}.png")
        metadata.append({"file_name": f"{number}.png", "labels": {"red": int(colour == "red"), "blue": None}})
        captions.append(record(number, [("<image>\nDescribe the image.", colour)]))
        questions = [("<image>\nwhat color is it?", colour), ("is it red?", "yes" if colour == "red" else "no")]
        conversations.append(record(number, questions))
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metadata))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "conversations.json").write_text(json.dumps(conversations))
    dialogues = [
        {
            "conversations": [
                {"from": "human", "value": f"{colour}\nwhat color is it? is it red?"},
                {"from": "gpt", "value": f"{colour} yes no"},
                {"from": "human", "value": "Describe the image."},
                {"from": "gpt", "value": colour},
            ]
        }
        for colour in ("red", "blue")
    ]
    (folder / "dialogues.json").write_text(json.dumps(dialogues))
    return folder


def record(number: int, turns: list[tuple[str, str]]) -> dict[str, object]:
    """One conversation in LLaVA's format about picture `number`."""
    values = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": number, "image": f"{number}.png", "conversations": values}


def stage_words(stage: str, data: Path, runs: Path) -> list[str]:
    """Command line of one stage, output in `runs / stage`."""
    common = ["--output_dir", str(runs / stage), "--max_steps", "4", "--global_batch_size", "4", "--logging_steps", "1"]
    common += ["--cpu", "--learning_rate", "1e-2", "--warmup_ratio", "0"]
    own = {
        "stage0_language": ["--task", "language", "--text", str(data / "dialogues.json"), "--vocab_size", "290"],
        "stage0_vision": ["--task", "classification", "--data", str(data / "images" / "metadata.jsonl")],
        "stage1": ["--data", str(data / "captions.json"), "--image_root", str(data / "images")],
        "stage2": ["--data", str(data / "conversations.json"), "--image_root", str(data / "images")],
    }[stage]
    own += {
        "stage0_language": ["--text_config", json.dumps(TEXT_CONFIG)],
        "stage0_vision": ["--vision_config", json.dumps(VISION_CONFIG), "--max_shift", "2"],
        "stage1": ["--vision_model", str(runs / "stage0_vision"), "--language_model", str(runs / "stage0_language")],
        "stage2": ["--model", str(runs / "stage1"), "--shuffle_turns"],
    }[stage]
    return [*common, *own]


def script(stage: str) -> str:
    """Path of a stage's script."""
    return str(ROOT / "training" / f"{stage.partition('_')[0]}.py")


def environment() -> dict[str, str]:
    """For child processes: one thread each, and the repository importable where it is not installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def launch(words: list[str], timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """Run `python <words>` to its end."""
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )
