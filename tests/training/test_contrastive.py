"""Contrastive pre-training: it learns, its result is usable as it is, and what would silently be worse is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from defocus_mllm import DefocusCLIPModel
from defocus_mllm.console import USER_ERRORS
from training import stage0, stage1
from training.argument_parsing import recipe_values
from training.run_record import MetricsFile

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 180, 30), "grey": (128, 128, 128)}
TEXTS = [f"a {colour} {shape}" for colour in COLOURS for shape in ("circle", "square")]
VISION = {**toy_task.VISION_CONFIG, "initializer_range": 0.2}
MAMBA = {**VISION, "mixer": "mamba", "time_step_rank": 4, "group_norm_size": 16}
TEXT = {**toy_task.TEXT_CONFIG, "model_type": "clip_text_model", "max_position_embeddings": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of coloured shapes and what they show."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = []
    for text in TEXTS:
        _, colour, shape = text.split()
        picture = Image.new("RGB", (16, 16), "white")
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)((1, 1, 14, 14), fill=COLOURS[colour])
        picture.save(folder / f"{colour}-{shape}.png")
        lines.append(json.dumps({"file_name": f"{colour}-{shape}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def words(data: Path, output: Path, *extra: str, vision: Any = VISION, text: Any = TEXT) -> list[str]:
    common = ["--task", "contrastive", "--data", str(data), "--output_dir", str(output), "--vocab_size", "290"]
    common += ["--vision_config", json.dumps(vision), "--text_config", json.dumps(text), "--projection_dim", "16"]
    common += ["--max_length", "16", "--global_batch_size", "8", "--max_steps", "40", "--learning_rate", "3e-3"]
    return [*common, "--warmup_steps", "2", "--adam_epsilon", "1e-6", "--logging_steps", "1", "--cpu", *extra]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "contrastive"
    stage0.main(words(data, output))
    return output


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in MetricsFile(folder).read()]


def test_it_learns_which_text_belongs_to_which_image(finished: Path, data: Path) -> None:
    values = losses(finished)
    assert len(values) == 40
    assert values[0] > 1.5  # eight pairs: log(8) is 2.08
    assert values[-1] < 0.1
    rates = [line["learning_rate"] for line in MetricsFile(finished).read()]
    assert rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])  # two warm-up steps
    model = AutoModel.from_pretrained(finished).eval()
    assert isinstance(model, DefocusCLIPModel)
    processor = AutoProcessor.from_pretrained(finished)
    pictures = [Image.open(data / f"{text.split()[1]}-{text.split()[2]}.png") for text in TEXTS]
    inputs = processor(text=TEXTS, images=pictures, padding=True, truncation=True, return_tensors="pt")
    assert model(**inputs).logits_per_image.argmax(dim=-1).tolist() == list(range(len(TEXTS)))


@pytest.mark.parametrize(
    ("vision", "text"), [(MAMBA, TEXT), (VISION, {**toy_task.TEXT_CONFIG})], ids=["mamba", "llama"]
)
def test_other_encoders_learn_too(data: Path, tmp_path: Path, vision: Any, text: Any) -> None:
    stage0.main(words(data, tmp_path / "run", "--max_steps", "25", "--drop_path_rate", "0.1", vision=vision, text=text))
    values = losses(tmp_path / "run")
    assert values[-1] < 0.6 * values[0]


def test_saved_tokenizer_ends_and_cuts_texts_by_itself(finished: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(finished).tokenizer
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    short = tokenizer("a red circle")["input_ids"]
    assert (short[0], short[-1]) == (begin, end)
    assert begin not in short[1:]
    long = tokenizer("a red circle " * 20, truncation=True)["input_ids"]
    assert (len(long), long[-1]) == (16, end)
    assert tokenizer(["a", "a red circle"], padding=True)["attention_mask"][0][-1] == 0


@pytest.mark.parametrize("kind", ["bare", "complete"])
def test_given_tokenizer_is_used(data: Path, tmp_path: Path, tokenizer: Any, kind: str, capsys: Any) -> None:
    if kind == "bare":
        tokenizer.pad_token = None
    else:
        from tokenizers.processors import TemplateProcessing

        special = [("</s>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=special)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = ["--tokenizer", str(tmp_path / "tokenizer"), "--vocab_size", "0", "--max_steps", "1"]
    stage0.main(words(data, tmp_path / "run", *given))
    used = AutoProcessor.from_pretrained(tmp_path / "run").tokenizer
    ids = used("a red circle")["input_ids"]
    assert ids[-1] == used.eos_token_id
    assert (ids[0] == used.bos_token_id) is (kind == "bare")  # a tokenizer that ends texts by itself stays as it is
    assert used.get_vocab() == tokenizer.get_vocab()
    assert AutoConfig.from_pretrained(tmp_path / "run").text_config.vocab_size == len(tokenizer)
    assert f"a red circle{used.eos_token}" in capsys.readouterr().out


def test_cut_texts_are_counted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage0.main(words(data, tmp_path / "run", "--max_length", "6", "--max_steps", "1"))
    assert "8 texts checked" in (shown := capsys.readouterr().out)
    assert "8 are longer than max_length 6 and lose their end" in shown


def test_encoder_becomes_the_eyes_of_a_language_model(finished: Path, tmp_path: Path) -> None:
    toy = toy_task.write_data(tmp_path / "data")
    stage0.main(toy_task.stage_words("stage0_language", toy, tmp_path))
    extra = ["--vision_model", str(finished), "--max_steps", "1"]
    stage1.main([*toy_task.stage_words("stage1", toy, tmp_path), *extra])
    clip, aligned = load_file(finished / "model.safetensors"), load_file(tmp_path / "stage1" / "model.safetensors")
    names = [name for name in aligned if name.startswith("model.vision_tower.")]
    assert names
    for name in names:
        assert torch.equal(aligned[name], clip[name.replace("model.vision_tower", "vision_model")]), name


def test_two_processes_learn_what_one_does(data: Path, tmp_path: Path) -> None:
    extra = ["--max_steps", "4", "--learning_rate", "1e-3"]
    stage0.main(words(data, tmp_path / "one", *extra))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = toy_task.script("stage0")
    done = toy_task.launch([*launcher, script, *words(data, tmp_path / "two", *extra)])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2
    for name in ("loss", "grad_norm"):
        one, two = ([line[name] for line in MetricsFile(tmp_path / run).read()] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-3)
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    assert all(two[name].allclose(tensor, atol=1e-4) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--per_device_batch_size", "4"], "cannot be accumulated; leave per_device_batch_size at 0"),
        (["--max_length", "30"], "max_length: 30 tokens, but text_config has max_position_embeddings 20"),
        (["--vocab_size", "0"], "vocab_size: required unless"),
        (["--text_column", "alt"], "has no 'alt' among file_name, text"),
        (["--text_config", '{"hidden_size": 32}'], '"model_type" is missing'),
        (["--text_config", '{"model_type": "clip_text_model", "hiden_size": 3}'], "'hidden_size'"),
        (["--vision_config", '{"drop_path_rate": 0.3}'], "drop_path_rate is a field of the stage"),
        (["--warmup_steps", "-1"], "warmup_steps: must not be negative"),
        (["--task", "contrastiv"], "unknown --task 'contrastiv'"),
    ],
)
def test_bad_arguments_are_named(data: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(USER_ERRORS) as caught:
        stage0.main(words(data, tmp_path / "out", *extra))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tokenizer_without_an_end_is_refused(data: Path, tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = ["--tokenizer", str(tmp_path / "tokenizer"), "--vocab_size", "0"]
    with pytest.raises(ValueError, match="has no eos_token, which ends every text"):
        stage0.main(words(data, tmp_path / "out", *given))


def test_long_warm_up_is_pointed_out(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage0.main(words(data, tmp_path / "run", "--warmup_steps", "40", "--max_steps", "1", "--dry_run"))
    assert "warning: the warm-up is as long as the run" in capsys.readouterr().out


def test_recipe_holds_the_published_values() -> None:
    """De-focus Attention Networks, table 7, and OpenCLIP's values for what the paper leaves to it."""
    recipe = Path(stage0.__file__).parent / "recipes" / "clip_defocus_mamba_base32.yaml"
    values = recipe_values(recipe, "stage0_contrastive")
    expected = {"num_train_epochs": 32, "global_batch_size": 32768, "warmup_steps": 20000, "weight_decay": 0.1}
    expected |= {"adam_beta1": 0.9, "adam_beta2": 0.98, "max_length": 77, "projection_dim": 512}
    assert {name: values[name] for name in expected} == expected
    assert (float(values["learning_rate"]), float(values["adam_epsilon"])) == (5e-4, 1e-6)
