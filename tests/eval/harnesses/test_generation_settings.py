"""What a task asks of generation: honoured, or refused with the way out."""

from __future__ import annotations

import re

import pytest

from eval.harnesses.generation_settings import DEFAULT_NEW_TOKENS, GenerationSettings

USUAL = {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


def test_the_usual_settings_of_tasks_are_honoured() -> None:
    assert GenerationSettings.of(USUAL, "task") == GenerationSettings(16, ("\n\n",))
    assert GenerationSettings.of({}, "task") == GenerationSettings(DEFAULT_NEW_TOKENS, ())
    assert GenerationSettings.of({"until": "Q:", "max_new_tokens": None}, "task").until == ("Q:",)


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True},
        {"temperature": 0.2},
        {"num_beams": 5},
        {"repetition_penalty": 1.2},
        {"num_return_sequences": 2},
        {"n": 2},
        {"best_of": 3},
    ],
)
def test_more_than_greedy_search_is_refused_with_the_way_out(setting: dict) -> None:
    ((name, value),) = setting.items()
    greedy = {"do_sample": "False", "temperature": "0"}.get(name, "1")
    with pytest.raises(ValueError, match=rf"^task: generation setting {name}={value}.*--gen_kwargs {name}={greedy}$"):
        GenerationSettings.of(USUAL | setting, "task")


def test_an_unknown_setting_is_refused_unless_the_user_names_it() -> None:
    values = USUAL | {"image_aspect_ratio": "pad"}
    with pytest.raises(ValueError, match=r"image_aspect_ratio='pad' is unknown here.*ignore=image_aspect_ratio to"):
        GenerationSettings.of(values, "task")
    assert GenerationSettings.of(values, "task", ["image_aspect_ratio"]) == GenerationSettings.of(USUAL, "task")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, found 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be a positive integer, found True"),
        ({"max_new_tokens": "16"}, "max_new_tokens must be a positive integer, found '16'"),
        ({"until": [""]}, "until must be a text or a list of texts, none of them empty, found ['']"),
        ({"until": [5]}, "until must be a text or a list of texts, none of them empty, found [5]"),
    ],
)
def test_senseless_values_are_named(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^task: {re.escape(message)}$"):
        GenerationSettings.of(setting, "task")


def test_an_answer_ends_before_the_first_stop() -> None:
    settings = GenerationSettings(16, ("\n\n", "Q:"))
    assert settings.cut("red Q: what?\n\nblue") == "red"
    assert settings.cut("red\n\nQ: what?") == "red"
    assert settings.cut("red\nblue") == "red\nblue"
    assert GenerationSettings(16, ()).cut("red\n\nblue") == "red\n\nblue"
