"""What a run checks about its chat template before it begins, and the change from one template to another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from defocus_mllm import DefocusProcessor
from defocus_mllm.assemble import change_template
from defocus_mllm.chat_templates import NAMES, choose_template, name_of
from training.chat import check_chat

sys.path.insert(0, str(Path(__file__).parent))
from chat_tokenizers import PAIRS, build_processor, build_tokenizer


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_every_template_passes_with_every_tokenizer(kind: str, template: str) -> None:
    processor = build_processor(kind, template)
    check = check_chat(processor, template, "stage2")
    assert check.lines[0] == f"chat template: {template}"
    assert check.facts["name"] == template
    last = processor.encode_chat(
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A"}]
    ).ids[-1]
    end = processor.tokenizer.convert_ids_to_tokens(last)
    if template == "plain":
        assert check.facts["ends"] == [None]
        assert "plain leaves out the text of all questions" in check.lines
        assert any("does not learn to stop" in line for line in check.lines)
        assert any("a longer dialogue with a system message is refused: the template plain" in x for x in check.lines)
    elif "<|im_end|>" not in processor.chat_template:
        assert check.facts["ends"] == [end]
        assert f"an answer ends with {end}" in check.lines


def test_the_template_that_nobody_named_is_told(processor: DefocusProcessor) -> None:
    for stage, hint in (("stage1", True), ("stage2", False)):
        line = check_chat(processor, "", stage).lines[0]
        assert line.startswith("chat template: defocus (none was named")
        assert ("--chat_template plain" in line) == hint


def test_the_second_stage_does_not_inherit_plain() -> None:
    processor = build_processor("llama_2", "plain")
    check_chat(processor, "", "stage1")
    check_chat(processor, "plain", "stage2")
    with pytest.raises(ValueError, match=r"chat_template: the model was trained with plain.*for example vicuna_v1"):
        check_chat(processor, "", "stage2")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{%- if add_generation_prompt -%}", "{%- if false -%}", "does not write the answer 'A bus, 3 m high.'"),
        (
            "{{- eos_token -}}{%- endgen",
            "{{- eos_token if loop.last else ';' -}}{%- endgen",
            "otherwise than its prompt",
        ),
        ("{{- bos_token or '' -}}", "{{- bos_token ~ bos_token -}}", "'<s>' stands twice"),
        ("'<image>'", "'a picture'", "writes 0 images for 1"),
        ("'<image>'", "'<image><image>'", "writes 2 images for 1"),
        (
            "{%- generation -%}{{- parts(message['content']) -}}",
            "{{- parts(message['content']) -}}{%- generation -%}",
            "that '</s>' is learnt, but generation goes on behind",
        ),
        ("{%- for message in messages -%}", "{%- for message in message -%}", "chat_template: defective.jinja"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(processor: Any, old: str, new: str, message: str) -> None:
    assert old in processor.chat_template
    processor.chat_template = processor.chat_template.replace(old, new)
    with pytest.raises(ValueError, match=message) as error:
        check_chat(processor, "defective.jinja", "stage1")
    assert str(error.value).startswith("chat_template: ")


def test_a_model_changes_its_template(model: Any, processor: DefocusProcessor) -> None:
    rows, end = model.get_input_embeddings().weight.shape[0], processor.tokenizer.eos_token_id
    notes = change_template(model, processor, "chatml")
    tokens = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokens == [rows, rows + 1]
    assert "added to the tokenizer of model: <|im_start|>, <|im_end|>" in notes[0]
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == rows + 2
    assert model.lm_head.weight.shape[0] == rows + 2
    assert model.generation_config.eos_token_id == [tokens[1], end]
    assert name_of(processor.chat_template) == "chatml"
    check_chat(processor, "chatml", "stage2")
    assert change_template(model, processor, "vicuna_v1") == []
    assert model.generation_config.eos_token_id == end
    with pytest.raises(ValueError, match="chat_template: 'tokenizer' is for a language model"):
        change_template(model, processor, "tokenizer")


def test_a_template_from_a_file(tmp_path: Path, processor: DefocusProcessor) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(processor.chat_template.replace("roles are", "possible are"))
    tokenizer = processor.tokenizer
    processor.chat_template = choose_template(str(file), tokenizer).text
    check = check_chat(processor, str(file), "stage2")
    assert check.facts["name"] == str(file)
    assert name_of(processor.chat_template) == "of its own"
    for name, kind, message in (
        (str(tmp_path / "none.jinja"), FileNotFoundError, "chat_template: there is no file"),
        ("vicuna", ValueError, "chat_template: 'vicuna' is none of " + ", ".join(NAMES)),
        ("tokenizer", ValueError, "no chat template of its own"),
    ):
        with pytest.raises(kind, match=message):
            choose_template(name, build_tokenizer("gpt_2"))
    file.write_text("hello")
    with pytest.raises(ValueError, match=r"mine\.jinja is no chat template"):
        choose_template(str(file), tokenizer)
