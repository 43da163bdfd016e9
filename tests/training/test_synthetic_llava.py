"""The stand-ins for LLaVA's files have their shape, and its recipes give the published numbers of steps."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from defocus_mllm.cli import build_parser
from training import stage1, stage2, synthetic_llava
from training.argument_parsing import parse_arguments
from training.arguments import SECTIONS
from training.sampling import BatchPlan
from training.synthetic_llava import MIX_FILE, MIX_RECORDS, PRETRAIN_FILE, PRETRAIN_IMAGES, PRETRAIN_RECORDS

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
SHARE = 1e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "data"
    synthetic_llava.main(["--output", str(folder), "--share", str(SHARE)])
    return folder


def test_the_numbers_are_the_official_ones() -> None:
    assert PRETRAIN_RECORDS == 558_128
    assert sum(MIX_RECORDS.values()) == 665_298
    assert MIX_RECORDS[""] == 40_688


def test_records_have_the_shape_of_the_official_files(data: Path) -> None:
    captions = json.loads((data / PRETRAIN_FILE).read_text())
    assert len(captions) == 56
    assert {len(record["conversations"]) for record in captions} == {2}
    placed = Counter(record["conversations"][0]["value"].startswith("<image>\n") for record in captions)
    assert placed[True] == placed[False] == 28
    mix = json.loads((data / MIX_FILE).read_text())
    folders = Counter(record["image"].rpartition("/")[0] if "image" in record else "" for record in mix)
    assert folders == {"coco/train2017": 37, "vg/VG_100K": 9, "ocr_vqa/images": 8, "gqa/images": 8, "": 5} | {
        "textvqa/train_images": 3
    }
    for record in mix:
        values = [turn["value"] for turn in record["conversations"]]
        assert "".join(values).count("<image>") == ("image" in record)
        assert ("model" in record) is ("image" not in record)
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(values) // 2)
    assert max(len(record["conversations"]) for record in mix) > 8
    assert {type(record["id"]) for record in mix} == {int, str}
    assert all((data / record["image"]).is_file() for record in mix if "image" in record)
    assert all((data / PRETRAIN_IMAGES / record["image"]).is_file() for record in captions)


def test_a_share_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--share"):
        synthetic_llava.main(["--output", str(tmp_path / "data"), "--share", "0"])


PUBLISHED = {
    "llava15_stage1": ("stage1", PRETRAIN_RECORDS, 256, 2181, 66),
    "llava15_stage2": ("stage2", 665_298, 128, 5198, 156),
    "llava15_stage2_lora": ("stage2", 665_298, 128, 5198, 156),
}
"""Recipe -> section, samples, global batch, steps, warm-up steps (HF: the ceiling of 0.03 x steps)."""


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("world_size", [1, 8, 16])
def test_steps_are_the_published_ones_on_any_number_of_gpus(name: str, world_size: int) -> None:
    section, samples, batch, steps, _ = PUBLISHED[name]
    arguments = parse_arguments(SECTIONS[section], section, ["--config", str(RECIPES / f"{name}.yaml")])
    assert arguments.global_batch_size == batch
    per_device = min(arguments.per_device_batch_size, batch // world_size)
    plan = BatchPlan(samples, batch, per_device, world_size, arguments.seed)
    assert plan.total_steps(arguments.num_train_epochs, arguments.max_steps) == steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name: str) -> None:
    """llava_recipe: scripts/v1_5/{pretrain,finetune,finetune_lora}.sh and the defaults of TrainingArguments."""
    section = PUBLISHED[name][0]
    given = parse_arguments(SECTIONS[section], section, ["--config", str(RECIPES / f"{name}.yaml")])
    common = {
        "num_train_epochs": 1.0,
        "warmup_ratio": 0.03,
        "min_learning_rate": 0.0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "max_length": 2048,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "projector_type": "mlp2x_gelu",
        "shuffle_turns": False,
    }
    own = {
        "llava15_stage1": {
            "learning_rate": 1e-3,
            "train": ["projector"],
            "chat_template": "plain",
            "image_fit": "crop",
        },
        "llava15_stage2": {
            "learning_rate": 2e-5,
            "train": ["projector", "language_model"],
            "projector_learning_rate": 0,
        },
        "llava15_stage2_lora": {
            "learning_rate": 2e-4,
            "projector_learning_rate": 2e-5,
            "lora_rank": 128,
            "lora_alpha": 256,
            "lora_dropout": 0.05,
        },
    }[name]
    if section == "stage2":
        own |= {"chat_template": "vicuna_v1", "image_fit": "pad"}
    assert {field: getattr(given, field) for field in common | own} == common | own


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_names_its_source(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    paths = ("output_dir", "repair")
    for line in lines:
        if match := re.match(r"  (\w+): ", line):
            comment = line.partition(" # ")[2]
            assert comment or match[1] in paths, line
            known = ("script", "default", "lora_rank", "official", "mended", "yours")
            assert match[1] in paths or any(word in comment for word in known), line


@pytest.fixture
def other_precision() -> Iterator[None]:
    """Accelerate keeps one precision a process, and that of other tests is not bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
def test_the_recipes_dry_run_on_stand_ins_as_they_are(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of docs/llava15.md, from a folder laid out as the recipes expect."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "playground" / "data")
    parts = ["--vision_model", "playground/data/encoder", "--language_model", "playground/data/language"]
    small = ["--cpu", "--dry_run", "--dataloader_num_workers", "0"]
    stage1.main(["--config", str(RECIPES / "llava15_stage1.yaml"), *parts, *small])
    shown = capsys.readouterr().out
    assert "56 samples, 1 epoch(s), 1 steps (1 warm-up)" in shown
    assert "global batch 256 = 32 a device x 8 accumulated x 1 process(es)" in shown
    assert "<image> x 65[[" in shown
    words = ["new", "--vision", parts[1], "--language", parts[3], "--output", "outputs/llava15/stage1"]
    arguments = build_parser().parse_args(words)
    arguments.run(arguments)
    for name in ("llava15_stage2", "llava15_stage2_lora"):
        stage2.main(["--config", str(RECIPES / f"{name}.yaml"), *small])
        shown = capsys.readouterr().out
        assert "70 samples, 1 epoch(s), 1 steps (1 warm-up)" in shown
        assert "70 records, 70 used (5 with 0 image(s), 65 with 1 image(s))" in shown
        assert "USER: <image> x 65" in shown
    rows = {line.split()[0]: line.split()[-2] for line in shown.splitlines() if re.match(r"\w+ +[\d,]+ +[\d,]+ ", line)}
    assert rows["language_model"] == rows["vision_tower"] == "frozen"
    assert (rows["language_model_lora"], rows["projector"]) == ("0.0002", "2e-05")
    assert not (tmp_path / "outputs" / "llava15" / "stage2_lora").exists()
