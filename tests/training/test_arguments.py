"""Recipes and command lines: who wins, what is refused, and that each refusal is one line with the nearest name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from training.argument_parsing import ArgumentsError, _field_docstrings, parse_arguments, read_recipe, recipe_values
from training.arguments import (
    SECTIONS,
    JsonDict,
    Stage0LanguageArguments,
    Stage0VisionArguments,
    Stage1Arguments,
    Stage2Arguments,
)

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))
GIVEN = ["--output_dir", "out", "--model", "model", "--data", "data.json"]


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_command_line_wins_over_section_over_shared(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "seed: 3\nlearning_rate: 1e-3\nweight_decay: 0.1\nstage1: {learning_rate: 2e-3}\nstage2: {}\n"
    )
    arguments = parse_arguments(Stage1Arguments, "stage1", ["--config", recipe, *GIVEN, "--weight_decay", "0.2"])
    assert (arguments.seed, arguments.learning_rate, arguments.weight_decay) == (3, 2e-3, 0.2)
    assert parse_arguments(Stage2Arguments, "stage2", ["--config", recipe, *GIVEN]).learning_rate == 1e-3


def test_shared_field_of_another_stage_is_left_out(tmp_path: Path) -> None:
    recipe = write(tmp_path, "vocab_size: 300\nstage1: {}\n")
    assert "vocab_size" not in recipe_values(recipe, "stage1")


def test_flat_recipe_is_one_stage(tmp_path: Path) -> None:
    recipe = write(tmp_path, "output_dir: out\nmodel: m\ndata: d\nlearning_rate: 1e-4\n")
    assert parse_arguments(Stage2Arguments, "stage2", ["--config", recipe]).learning_rate == 1e-4


def test_values_keep_their_kind(tmp_path: Path) -> None:
    text = "mixed_precision: no\nresume: false\ntrain: [projector, vision_tower]\nmax_steps: 7\nmax_turns: null\n"
    arguments = parse_arguments(Stage2Arguments, "stage2", ["--config", write(tmp_path, text), *GIVEN])
    assert arguments.mixed_precision == "no"  # YAML reads a bare `no` as false
    assert arguments.resume is False
    assert arguments.train == ["projector", "vision_tower"]
    assert arguments.max_steps == 7
    assert arguments.max_turns == 0


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False), ("no", False), ("1", True)])
def test_booleans_mean_what_they_say(text: str, expected: bool) -> None:
    assert parse_arguments(Stage2Arguments, "stage2", [*GIVEN, "--resume", text]).resume is expected


def test_dictionaries_from_yaml_and_json(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "output_dir: o\ntext: t\nvocab_size: 300\ntext_config: {model_type: llama, hidden_size: 32}\n"
    )
    arguments = parse_arguments(Stage0LanguageArguments, "stage0_language", ["--config", recipe])
    assert arguments.text_config == {"model_type": "llama", "hidden_size": 32}
    words = ["--config", recipe, "--text_config", '{"model_type": "gpt2"}']
    assert parse_arguments(Stage0LanguageArguments, "stage0_language", words).text_config == {"model_type": "gpt2"}
    assert dataclasses.asdict(arguments)["text_config"] == arguments.text_config


def test_json_dict_refuses_a_list() -> None:
    with pytest.raises(ValueError, match="JSON object"):
        JsonDict("[1]")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stage1: {lerning_rate: 1}", ["recipe.yaml", "section stage1", "'lerning_rate'", "'learning_rate'"]),
        ("stage2: {}\nstag1: {}\n", ["recipe.yaml", "top level", "'stag1'", "'stage1'"]),
        ("stage1: {}\nstage2: {trian: [projector]}", ["section stage2", "'trian'", "'train'"]),
        ("lerning_rate: 1", ["recipe.yaml", "'lerning_rate'", "'learning_rate'"]),
        ("vocab_size: 1", ["recipe.yaml", "'vocab_size'"]),
        ("stage1: 5", ["section stage1", "5"]),
        ("stage2: {}", ["no section 'stage1'", "stage2"]),
        ("stage1: {learning_rate: fast}", ["section stage1", "learning_rate", "fast"]),
        ("stage1: {train: []}", ["section stage1", "train", "empty list"]),
        ("stage1: {learning_rate: [", ["recipe.yaml", "line 1", "not valid YAML"]),
        ("- 1", ["recipe.yaml", "list"]),
        ("stage1: {global_batch_size: 0}", ["section stage1", "global_batch_size", "positive"]),
        ("stage1: {train: [projektor]}", ["train", "'projektor'", "projector"]),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ArgumentsError) as caught:
        parse_arguments(Stage1Arguments, "stage1", ["--config", write(tmp_path, text), *GIVEN])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--lerning_rate", "1"], "did you mean 'learning_rate'"),
        (["--learning", "1"], "unknown field"),
        (["--config"], "--config needs a file"),
        (["--warmup_ratio", "1.5"], "warmup_ratio: must lie in [0, 1)"),
        (["--min_learning_rate", "1"], "min_learning_rate"),
        (["--vision_model", "v"], "give either model"),
        (["--vision_learning_rate", "1e-4"], "vision_tower"),
        (["--mixed_precision", "fp8"], "mixed_precision"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], part: str) -> None:
    with pytest.raises(ArgumentsError) as caught:
        parse_arguments(Stage1Arguments, "stage1", [*GIVEN, *words])
    assert part in str(caught.value)


def test_missing_recipe_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        parse_arguments(Stage1Arguments, "stage1", ["--config", "nowhere.yaml"])


def test_drop_path_rates_must_rise() -> None:
    words = ["--output_dir", "o", "--data", "d", "--min_drop_path_rate", "0.5", "--drop_path_rate", "0.1"]
    with pytest.raises(ArgumentsError, match="drop_path_rate"):
        parse_arguments(Stage0VisionArguments, "stage0_vision", words)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_documented(section: str) -> None:
    documented: set[str] = set()
    for kind in SECTIONS[section].__mro__:
        if dataclasses.is_dataclass(kind):
            documented |= set(_field_docstrings(kind))
    assert {field.name for field in dataclasses.fields(SECTIONS[section])} == documented


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(Stage2Arguments, "stage2", ["--help"])
    assert caught.value.code == 0
    assert "Peak learning rate of AdamW." in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_are_valid(recipe: Path) -> None:
    inputs = {
        "stage0_contrastive": ["--data", "d", "--tokenizer", "t"],
        "stage0_language": ["--text", "t"],
        "stage0_vision": ["--data", "d"],
        "stage1": ["--data", "d", "--vision_model", "v", "--language_model", "l"],
        "stage2": ["--data", "d", "--model", "m"],
        "evidence": ["--train", "d", "--test", "t"],
    }
    sections = [section for section in read_recipe(recipe) if section in inputs]
    assert sections
    for section in sections:
        words = inputs[section]
        parse_arguments(SECTIONS[section], section, ["--config", str(recipe), "--output_dir", "o", *words])


def test_there_are_recipes() -> None:
    assert {"easy_vqa", "easy_vqa_full", "easy_vqa_miniature"} <= {recipe.stem for recipe in RECIPES}
