"""LoRA through the real scripts: what learns, every checkpoint whole, resumed to the bit, merged, loaded elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parent))
import toy_task

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig
from defocus_mllm.adapters import NOT_QUANTISED
from defocus_mllm.cli import build_parser
from defocus_mllm.loading import CheckpointError
from training import stage0, stage1, stage2
from training.argument_parsing import ArgumentsError, parse_arguments
from training.arguments import Stage2Arguments
from training.freezing import apply_freezing
from training.lora import add_lora, load_adapter_weights, nf4_config, quantization_options, trained_components
from training.tuning import components_of
from training.tuning_arguments import TuningArguments

LORA = ["--lora_rank", "4", "--lora_dropout", "0.1", "--projector_learning_rate", "1e-3", "--save_steps", "2"]
WEIGHTS = "adapter_model.safetensors"


def run(data: Path, runs: Path, *extra: str) -> Path:
    """Stage 2 with LoRA on the toy data; returns its output_dir."""
    words = [*toy_task.stage_words("stage2", data, runs), *LORA, *extra]
    stage2.main(words)
    return Path(words[len(words) - words[::-1].index("--output_dir")])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, runs): everything up to stage 1, and `runs / straight`, a whole run with LoRA."""
    folder = tmp_path_factory.mktemp("lora")
    data, runs = toy_task.write_data(folder / "data"), folder / "runs"
    for name, main in (("stage0_language", stage0.main), ("stage0_vision", stage0.main), ("stage1", stage1.main)):
        main(toy_task.stage_words(name, data, runs))
    run(data, runs, "--output_dir", str(runs / "straight"))
    return data, runs


def merge(adapter: Path, output: Path) -> None:
    arguments = build_parser().parse_args(["merge", str(adapter), "--output", str(output)])
    arguments.run(arguments)


def test_projector_and_adapters_learn_at_their_own_rates(toy: tuple[Path, Path]) -> None:
    record = json.loads((toy[1] / "straight" / "run.json").read_text())
    rows = {row["component"]: row for row in record["freeze"] if not row["group"]}
    assert {name: row["learning_rate"] for name, row in rows.items() if row["trainable"]} == {
        "projector": 1e-3,
        "language_model_lora": 1e-2,
        "new_tokens": 1e-2,
    }
    assert {"vision_tower", "projector_before", "language_model"} == {
        n for n, row in rows.items() if not row["trainable"]
    }


def test_every_checkpoint_is_whole(toy: tuple[Path, Path]) -> None:
    """Not only the last one: LLaVA's lacked non_lora_trainables.bin."""
    final = toy[1] / "straight"
    first = final / "checkpoints" / "step-000002"
    for folder in (first, final):
        names = set(load_file(folder / WEIGHTS))
        for part in ("lora_A", "lora_B", "multi_modal_projector.linear_1.weight", "trainable_tokens_delta"):
            assert any(part in name for name in names), f"{folder} lacks {part}"
        assert not any("vision_tower" in name for name in names)
        for file in ("adapter_config.json", "base_model.json", "tokenizer.json", "generation_config.json"):
            assert (folder / file).is_file(), file
        assert not (folder / "config.json").exists()
    base = AutoModelForImageTextToText.from_pretrained(toy[1] / "stage1").state_dict()
    loaded = AutoModelForImageTextToText.from_pretrained(first).state_dict()
    trained = load_file(first / WEIGHTS)["base_model.model.model.multi_modal_projector.linear_1.weight"]
    name = "model.multi_modal_projector.modules_to_save.default.linear_1.weight"
    assert torch.equal(loaded[name], trained)
    assert not torch.equal(trained, base["model.multi_modal_projector.linear_1.weight"])


def test_a_resumed_run_is_bit_equal(toy: tuple[Path, Path], tmp_path: Path) -> None:
    data, runs = toy
    folder = shutil.copytree(runs / "straight", tmp_path / "resumed")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    for name in ("adapter_config.json", WEIGHTS):
        (folder / name).unlink()
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    run(data, runs, "--output_dir", str(folder))
    assert json.loads((folder / "run.json").read_text())["resumed_from_step"] == 2
    assert (folder / WEIGHTS).read_bytes() == (runs / "straight" / WEIGHTS).read_bytes()


def test_a_checkpoint_of_another_adapter_is_refused(toy: tuple[Path, Path], tmp_path: Path, model, processor) -> None:
    add_lora(model, processor, TuningArguments(lora_rank=4), ["projector", "language_model"])
    shutil.copytree(toy[1] / "straight", tmp_path / "other", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="not"):
        load_adapter_weights(model, tmp_path / "other")
    weights = load_file(tmp_path / "other" / WEIGHTS)
    lost = weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, tmp_path / "other" / WEIGHTS)
    assert lost is not None
    with pytest.raises(CheckpointError, match=r"lacks base_model\.model\.model\.multi_modal_projector"):
        load_adapter_weights(model, tmp_path / "other")


FRESH = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
import defocus_mllm
processor = AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor.apply_chat_template(
    [{"role": "user", "content": "is it red?"}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
for folder in sys.argv[1:3]:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.save(logits, sys.argv[3] + folder.rsplit("/", 1)[1])
"""


def test_merged_model_loads_in_a_fresh_process_and_says_the_same(toy: tuple[Path, Path], tmp_path: Path) -> None:
    merge(toy[1] / "straight", tmp_path / "merged")
    folders = [str(tmp_path / "merged"), str(toy[1] / "straight")]
    subprocess.run(
        [sys.executable, "-c", FRESH, *folders, str(tmp_path / "logits-")],
        check=True,
        env=toy_task.environment(),
        capture_output=True,
    )
    merged, adapted = (torch.load(tmp_path / f"logits-{name}", weights_only=True) for name in ("merged", "straight"))
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)


def test_an_adapter_alone_is_no_model_to_go_on_from(toy: tuple[Path, Path], tmp_path: Path) -> None:
    data, runs = toy
    with pytest.raises(FileNotFoundError, match="defocus-mllm merge"):
        run(data, runs, "--output_dir", str(tmp_path / "out"), "--model", str(runs / "straight"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_alpha", "8"], "lora_alpha: set, but lora_rank is 0"),
        (["--lora_rank", "4", "--train", "projector"], "`train` does not name language_model"),
        (["--lora_rank", "4", "--lora_vision"], "`train` does not name vision_tower"),
        (["--lora_rank", "4", "--lora_dropout", "1"], "lora_dropout: must lie in"),
        (["--quantization", "nf4"], "set lora_rank as well"),
        (["--projector_learning_rate", "1e-4", "--train", "language_model"], "does not name projector"),
    ],
)
def test_fields_that_do_not_go_together(words: list[str], message: str) -> None:
    with pytest.raises(ArgumentsError, match=message):
        parse_arguments(Stage2Arguments, "stage2", ["--output_dir", "o", "--model", "m", "--data", "d", *words])


def test_an_adapter_needs_a_saved_model() -> None:
    words = ["--output_dir", "o", "--vision_model", "v", "--language_model", "l", "--data", "d", "--lora_rank", "4"]
    with pytest.raises(ArgumentsError, match="defocus-mllm new"):
        parse_arguments(Stage2Arguments, "stage2", words)


def test_quantisation_without_a_gpu_is_an_error_before_anything_is_loaded(
    toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("training.multimodal.load_strictly", loaded)
    with pytest.raises(ValueError, match="nf4 needs a CUDA GPU"):
        run(*toy, "--output_dir", str(tmp_path / "out"), "--quantization", "nf4")
    assert not (tmp_path / "out").exists()


def test_quantisation_names_the_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        quantization_options("nf4")
    assert quantization_options("none") == {}


def test_only_the_decoder_is_quantised() -> None:
    config = nf4_config()
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.llm_int8_skip_modules == NOT_QUANTISED


def test_numbers_of_parameters_are_the_published_ones(processor) -> None:
    """LLaVA-1.5 7B: a projector from 1024 to 4096, LoRA of rank 128 on the 7 linear layers of 32 Llama layers."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 16}
    text = {"model_type": "llama", "vocab_size": 32000, **sizes}
    config = DefocusConfig(
        vision_config=DefocusVisionConfig(image_size=32, patch_size=8, **vision), text_config=text, image_token_id=4
    )
    with torch.device("meta"):
        model = DefocusForConditionalGeneration(config)
        plain = apply_freezing(model, components_of(model), ["projector", "language_model"], 2e-5, 0.0)
        add_lora(model, processor, TuningArguments(lora_rank=128), ["projector", "language_model"])
    components = components_of(model)
    plan = apply_freezing(model, components, trained_components(components, ["projector", "language_model"]), 2e-4, 0.0)
    learned: dict[str, int] = {}
    for row in [*plan.rows, *plain.rows]:
        learned[row["component"]] = learned.get(row["component"], 0) + row["trainable"]
    assert sum(row["trainable"] for row in plain.rows if row["component"] == "projector") == 20_979_712
    assert learned["language_model"] == 6_738_415_616
    assert learned["language_model_lora"] == 319_815_680
