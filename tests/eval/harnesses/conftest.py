"""A stand-in for VLMEvalKit: its public interface, as little of it as the launcher meets, written to a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = {
    "vlmeval/__init__.py": "import ssl\nssl._create_default_https_context = ssl._create_unverified_context\n",
    "vlmeval/vlm/__init__.py": "",
    "vlmeval/vlm/base.py": """
class BaseModel:
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, function):
        self.dump_image_func = function

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        if isinstance(message, str):
            message = [{"type": "text", "value": message}]
        for part in message:
            assert part["type"] in self.allowed_types, f"Invalid input type: {part['type']}"
        return self.generate_inner(message, dataset)
""",
    "vlmeval/config.py": "supported_VLM = {'taken': None}\n",
    "vlmeval/smp.py": """
import json, os

def load(path):
    return json.load(open(path))

def LMUDataRoot():
    return os.environ["LMUData"]
""",
    "run.py": """
import argparse, json, os, pathlib
from vlmeval.config import supported_VLM

parser = argparse.ArgumentParser()
parser.add_argument("--data", nargs="+")
parser.add_argument("--model")
parser.add_argument("--mode", default="all")
parser.add_argument("--work-dir", default="outputs")
arguments = parser.parse_args()
folder = pathlib.Path(arguments.work_dir) / arguments.model / "T1"
folder.mkdir(parents=True, exist_ok=True)

class Dataset:
    def __init__(self, rows):
        self.rows = rows
    def dump_image(self, line):
        return line["images"]
    def build_prompt(self, line):
        return line["message"]

class ImageMCQDataset(Dataset):
    def build_prompt(self, line):
        raise AssertionError("the model has a prompt of its own")

class CustomMCQDataset(ImageMCQDataset):
    pass

KINDS = {"mcq": CustomMCQDataset}
plan = json.loads(pathlib.Path(os.environ["LMUData"], "plan.json").read_text())
status = {}
for name in arguments.data:
    model = supported_VLM[arguments.model](use_vllm=False)
    dataset = KINDS.get(name, Dataset)(plan[name]["rows"])
    model.set_dump_image(dataset.dump_image)
    entry = status[name] = dict(plan[name]["entry"], prediction_file=f"{name}.json")
    try:
        answers = []
        for row in dataset.rows:
            own = model.use_custom_prompt(name)
            message = model.build_prompt(row, dataset=name) if own else dataset.build_prompt(row)
            speak = model.chat if row.get("several_turns") else model.generate
            answers.append({"index": row["index"], "prediction": speak(message, dataset=name)})
        (folder / f"{name}.json").write_text(json.dumps(answers))
    except Exception as error:
        entry.pop("metrics", None)
        entry["error_message"] = str(error)
if not os.environ.get("NO_STATUS"):
    (folder / "status.json").write_text(json.dumps({"datasets": status}))
""",
}


class StandIn:
    """The folder of the stand-in, and what it will ask."""

    def __init__(self, folder: Path) -> None:
        self.kit = folder / "kit"
        self.data = folder / "LMUData"
        self.work_dir = folder / "results"
        self.data.mkdir()
        self._plan: dict[str, dict] = {}
        for name, text in FILES.items():
            (self.kit / name).parent.mkdir(parents=True, exist_ok=True)
            (self.kit / name).write_text(text)

    def ask(self, name: str, *rows: dict, **entry: object) -> None:
        """Let there be a data set of these rows, whose entry in the status file is `entry` if all goes well."""
        entry = entry or {"metrics": {"Overall": 0.5}, "primary_metric": "Overall"}
        rows_with_index = [{"index": number, **row} for number, row in enumerate(rows)]
        self._plan[name] = {"rows": rows_with_index, "entry": {"status": "done", **entry}}
        (self.data / "plan.json").write_text(json.dumps(self._plan))

    def answers(self, model: str, name: str) -> list[str]:
        """What the kit wrote of a data set."""
        rows = json.loads((self.work_dir / model / "T1" / f"{name}.json").read_text())
        return [row["prediction"] for row in rows]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The kit's stand-in, which leaves nothing imported behind."""
    kit = StandIn(tmp_path)
    monkeypatch.setenv("LMUData", str(kit.data))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield kit
    for name in [name for name in sys.modules if name.partition(".")[0] == "vlmeval"]:
        del sys.modules[name]
