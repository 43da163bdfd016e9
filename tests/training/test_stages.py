"""All stages at toy size through their real scripts, what they leave behind, and what they say to bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import defocus_mllm  # noqa: F401 - registers the Auto classes
from defocus_mllm.console import USER_ERRORS
from training import stage0, stage1, stage2
from training.run_record import MetricsFile

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

MAINS = {"stage0_language": stage0.main, "stage0_vision": stage0.main, "stage1": stage1.main, "stage2": stage2.main}


def run(stage: str, data: Path, runs: Path, *extra: str) -> None:
    MAINS[stage]([*toy_task.stage_words(stage, data, runs), *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(data, runs, what stage 2 printed): the last stage as a script by its path, as a user launches it."""
    folder = tmp_path_factory.mktemp("toy")
    data, runs = toy_task.write_data(folder / "data"), folder / "runs"
    for stage in ("stage0_language", "stage0_vision", "stage1"):
        run(stage, data, runs)
    done = toy_task.launch([toy_task.script("stage2"), *toy_task.stage_words("stage2", data, runs)])
    assert done.returncode == 0, done.stderr
    return data, runs, done.stdout


@pytest.mark.parametrize("stage", MAINS)
def test_each_stage_leaves_model_record_and_metrics(finished: tuple[Path, Path, str], stage: str) -> None:
    folder = finished[1] / stage
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["stage"] == stage
    assert record["world_size"] == 1
    assert record["step"] == record["total_steps"] == 4
    assert record["train_seconds"] > 0
    assert record["parameters"] >= record["trainable_parameters"] > 0
    card = (folder / "README.md").read_text()
    assert f"| Stage | {stage} |" in card
    assert "| Steps | 4 of 4 |" in card
    assert all(digest in card for digest in record["inputs"].values())
    assert str(folder) not in card
    assert record["arguments"]["learning_rate"] == 1e-2
    assert all(len(value) == 64 for value in record["inputs"].values())
    assert [line["step"] for line in MetricsFile(folder).read()] == [1, 2, 3, 4]
    assert not list(folder.glob(".partial*"))


def test_result_loads_with_the_auto_classes_and_answers(finished: tuple[Path, Path, str]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = finished[1] / "stage2"
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.new("RGB", (16, 16))}, {"type": "text", "text": "is it red?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_only_what_should_learn_has_changed(finished: tuple[Path, Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from defocus_mllm import DefocusVisionModel

    runs = finished[1]
    vision = DefocusVisionModel.from_pretrained(runs / "stage0_vision").state_dict()
    language = AutoModelForCausalLM.from_pretrained(runs / "stage0_language").state_dict()
    aligned = AutoModelForImageTextToText.from_pretrained(runs / "stage1")
    tuned = AutoModelForImageTextToText.from_pretrained(runs / "stage2")
    for model, language_trained in ((aligned, False), (tuned, True)):
        for name, tensor in model.model.vision_tower.state_dict().items():
            assert torch.equal(tensor, vision[name]), name
        same = [torch.equal(t, language[f"model.{n}"]) for n, t in model.model.language_model.state_dict().items()]
        assert all(same) is not language_trained
    bridge = aligned.model.multi_modal_projector.state_dict()
    assert any(not torch.equal(t, bridge[n]) for n, t in tuned.model.multi_modal_projector.state_dict().items())


def test_the_output_shows_freezing_and_one_supervised_sample(finished: tuple[Path, Path, str]) -> None:
    output = finished[2]
    table = [line.split() for line in output.splitlines() if line.startswith(("vision_tower", "projector "))]
    assert table[0][-2:] == ["frozen", "-"]
    assert table[1][-2] == "0.01"
    assert "<image> x 5" in output
    assert "[[red</s>]]" in output or "[[yes</s>]]" in output


def test_finished_run_is_left_alone(finished: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    data, runs, _ = finished
    before = (runs / "stage2" / "model.safetensors").stat().st_mtime_ns
    run("stage2", data, runs)
    assert "already complete" in capsys.readouterr().out
    assert (runs / "stage2" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seed", "5"], "differs in seed: 0 -> 5"),
        (["--resume", "false"], "is not empty and resume is false"),
    ],
)
def test_finished_run_is_not_overwritten(finished: tuple[Path, Path, str], extra: list[str], message: str) -> None:
    data, runs, _ = finished
    with pytest.raises(ValueError, match=message):
        run("stage2", data, runs, *extra)


def test_run_from_before_a_field_existed_is_recognised(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    data, runs, _ = finished
    folder = shutil.copytree(runs / "stage2", tmp_path / "old")
    record = json.loads((folder / "run.json").read_text())
    del record["arguments"]["warmup_steps"]
    (folder / "run.json").write_text(json.dumps(record))
    run("stage2", data, runs, "--output_dir", str(folder))  # complete, nothing to do
    with pytest.raises(ValueError, match="differs in warmup_steps: 0 -> 2"):
        run("stage2", data, runs, "--output_dir", str(folder), "--warmup_steps", "2")


def test_foreign_folder_is_not_written_to(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"no run\.json"):
        run("stage2", finished[0], finished[1], "--output_dir", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_dry_run_leaves_nothing(
    finished: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("stage2", finished[0], finished[1], "--output_dir", str(tmp_path / "dry"), "--dry_run")
    assert "dry run: loss" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


def test_vision_tower_can_be_trained_at_its_own_rate(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--train", "projector", "vision_tower", "--vision_learning_rate", "1e-4"]
    run("stage2", finished[0], finished[1], *words, "--ema_decay", "0.9", "--max_steps", "2")
    record = json.loads((tmp_path / "run.json").read_text())
    rates = {row["component"]: row["learning_rate"] for row in record["freeze"] if row["trainable"]}
    assert rates == {"vision_tower": 1e-4, "projector": 1e-2}
    assert record["saved_weights"] == "average"


def foreign_language_model(folder: Path, kind: str) -> Path:
    """A causal language model that knows nothing of images: no `<image>`, no turn markers, no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<|endoftext|>", "what", "color", "is", "it", "red", "blue", "yes", "no", "Describe", "the"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    if kind == "gpt2":
        special["bos_token"] = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    if kind != "gpt2":  # a template of its own, which cannot show images
        tokenizer.chat_template = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(words)}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 32, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, **ids)
    if kind == "granite":
        config.logits_scaling = 5.0
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_foreign_language_model_gets_what_it_lacks(
    finished: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    language = foreign_language_model(tmp_path / kind, kind)
    words = ["--language_model", str(language), "--output_dir", str(tmp_path / "out"), "--train", "projector"]
    run("stage1", finished[0], finished[1], *words, "language_model")
    shown = capsys.readouterr().out
    assert "<image>, <|user|>, <|assistant|>, <|system|>, <pad> (17 tokens now)" in shown
    assert ("the chat template of language_model is replaced" in shown) == (kind != "gpt2")
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    tokenizer = processor.tokenizer
    assert model.config.text_config.vocab_size == len(tokenizer) == 17
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    begin = tokenizer.bos_token or ""
    assert processor.apply_chat_template([{"role": "user", "content": "red"}]) == f"{begin}<|user|>red<|endoftext|>"


@pytest.mark.parametrize("kind", ["gemma2", "granite", "phi"])
def test_an_output_layer_that_is_more_than_linear_comes_along(
    finished: tuple[Path, Path, str], tmp_path: Path, kind: str
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    language = foreign_language_model(tmp_path / kind, kind)
    weights = load_file(language / "model.safetensors")
    if "lm_head.bias" in weights:  # zero at first, so that only a trained one shows
        weights["lm_head.bias"] += torch.randn(12)
        save_file(weights, language / "model.safetensors", {"format": "pt"})
    words = ["--language_model", str(language), "--output_dir", str(tmp_path / "out"), "--train", "projector"]
    run("stage1", finished[0], finished[1], *words)
    original = AutoModelForCausalLM.from_pretrained(language).eval()
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    input_ids = torch.arange(12)[None]
    torch.testing.assert_close(trained(input_ids=input_ids).logits[..., :12], original(input_ids).logits)


def test_batches_without_an_image_train_too(finished: tuple[Path, Path, str], tmp_path: Path) -> None:
    data = toy_task.write_data(tmp_path / "data")
    texts = json.loads((data / "dialogues.json").read_text()) * 4
    captions = json.loads((data / "captions.json").read_text())
    (data / "captions.json").write_text(json.dumps([*texts, captions[0]]))
    words = ["--output_dir", str(tmp_path / "out"), "--per_device_batch_size", "1"]
    run("stage1", data, finished[1], *words, "--train", "projector", "vision_tower")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "complete"


# --- bad input: one line that names file and record, and no output---------------------------------------------


def break_data(data: Path, kind: str) -> None:
    path = data / "conversations.json"
    records: list[dict[str, Any]] = json.loads(path.read_text())
    if kind == "corrupt picture":
        picture = data / "images" / "5.png"
        picture.write_bytes(picture.read_bytes()[:40])
    elif kind == "missing picture":
        (data / "images" / "5.png").unlink()
    elif kind == "malformed JSON":
        path.write_text(path.read_text()[:-5])
    elif kind == "placeholder count":
        records[5]["conversations"][0]["value"] = "<image>\n<image>\nwhat color is it?"
        path.write_text(json.dumps(records))


BAD_DATA = {
    "corrupt picture": ["conversations.json[5]", "5.png"],
    "missing picture": ["conversations.json[5]", "5.png"],
    "malformed JSON": ["conversations.json", "line 1"],
    "placeholder count": ["conversations.json[5]", "<image>"],
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_named_before_anything_is_written(
    finished: tuple[Path, Path, str], tmp_path: Path, kind: str
) -> None:
    data = toy_task.write_data(tmp_path / "data")
    break_data(data, kind)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run("stage2", data, finished[1], "--output_dir", str(tmp_path / "out"))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in BAD_DATA[kind]), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["corrupt picture", "missing picture", "placeholder count"])
def test_bad_records_can_be_left_out(
    finished: tuple[Path, Path, str], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = toy_task.write_data(tmp_path / "data")
    break_data(data, kind)
    run(
        "stage2",
        data,
        finished[1],
        "--output_dir",
        str(tmp_path / "out"),
        "--on_bad_sample",
        "skip",
        "--max_steps",
        "1",
    )
    assert "7 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["num_samples"] == 7


def test_corrupt_picture_in_stage_0(tmp_path: Path) -> None:
    data = toy_task.write_data(tmp_path / "data")
    break_data(data, "corrupt picture")
    with pytest.raises(ValueError, match=r"metadata\.jsonl: metadata\.jsonl\[5\].*5\.png"):
        run("stage0_vision", data, tmp_path / "runs")
    assert not (tmp_path / "runs" / "stage0_vision").exists()


@pytest.mark.parametrize(
    ("stage", "extra", "message"),
    [
        ("stage2", ["--model", "nowhere"], "model: nowhere"),
        ("stage0_language", ["--vocab_size", "20"], "vocab_size 20"),
        ("stage0_language", ["--text_config", '{"model_type": "llama", "hiden_size": 3}'], "'hidden_size'"),
        ("stage0_language", ["--text_config", '{"model_type": "lama"}'], "model_type 'lama'"),
        ("stage0_language", ["--max_length", "3"], "max_length 3"),
        ("stage0_vision", ["--vision_config", '{"hiden_size": 3}'], "hiden_size"),
        ("stage0_vision", ["--vision_config", '{"hidden_size": 33, "num_attention_heads": 2}'], "hidden_size 33"),
        ("stage0_vision", ["--vision_config", '{"decay": "learned"}'], "decay"),
        ("stage0_vision", ["--vision_config", '{"drop_path_rate": 0.3}'], "drop_path_rate is a field of the stage"),
        ("stage0_vision", ["--vision_config", '{"preset": "giant"}'], "giant"),
        ("stage0_vision", ["--global_batch_size", "4", "--per_device_batch_size", "3"], "not a multiple"),
    ],
)
def test_bad_arguments_are_named(
    finished: tuple[Path, Path, str], tmp_path: Path, stage: str, extra: list[str], message: str
) -> None:
    with pytest.raises(USER_ERRORS) as caught:
        run(stage, finished[0], finished[1], "--output_dir", str(tmp_path / "out"), *extra)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_script_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage2:\n  lerning_rate: 1e-3\n")
    done = toy_task.launch([toy_task.script("stage2"), "--config", str(recipe)])
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error:")
    assert "lerning_rate" in lines[0]
    assert "learning_rate" in lines[0]


def test_a_chat_template_by_name_goes_from_training_to_inference(
    finished: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    data, runs, printed = finished
    assert "chat template: defocus (none was named)" in printed
    run("stage1", data, runs, "--chat_template", "plain", "--output_dir", str(tmp_path / "plain"))
    shown = capsys.readouterr().out
    assert "chat template: plain" in shown
    assert "plain leaves out the text of all questions" in shown
    inherited = ["--model", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="chat_template: the model was trained with plain"):
        run("stage2", data, runs, *inherited)
    run("stage2", data, runs, *inherited, "--chat_template", "chatml")
    folder = tmp_path / "out"
    assert json.loads((folder / "run.json").read_text())["facts"]["chat_template"] == {
        "name": "chatml",
        "begin": True,
        "ends": ["<|im_end|>"],
    }
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    question = [{"role": "user", "content": [{"type": "text", "text": "is <|im_end|> red?"}]}]
    assert processor.apply_chat_template(question, add_generation_prompt=True) == (
        "<s><|im_start|>user\nis <|im_end|> red?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor.apply_chat_template(question, tokenize=True, return_dict=True, add_generation_prompt=True)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert inputs["input_ids"][0].count(end) == 1
    assert model.generation_config.eos_token_id == [end, processor.tokenizer.eos_token_id]
    assert model.get_input_embeddings().weight.shape[0] >= len(processor.tokenizer)
