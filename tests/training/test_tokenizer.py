"""The tokenizer: sentencepiece's ids, lossless, concatenative at special tokens, the same after a reload."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from training import tokenizer as tokenizer_module
from training.tokenizer import main, read_texts, train_tokenizer

TEXTS = ["what color is the shape?", "is there a red circle?", "red", "blue", " leading", "two  spaces", "42 é\n漢"] * 9
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<image>", "<|user|>", "<|assistant|>", "<|system|>"]
# U+2581 is sentencepiece's own sign for the space; lone surrogates are no text.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TEXTS, 320, folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return AutoTokenizer.from_pretrained(folder)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_size_special_tokens_and_padding_survive_the_reload(trained):
    assert len(trained) == 320
    ids = trained.convert_tokens_to_ids(SPECIAL)
    assert sorted(ids) == sorted(set(ids))
    assert max(ids) < 320
    assert [trained.bos_token, trained.eos_token, trained.unk_token, trained.pad_token] == SPECIAL[:4]
    assert (trained.image_token, trained.image_token_id) == ("<image>", ids[4])
    assert trained.user_token == "<|user|>"
    assert trained.padding_side == "left"
    assert trained("red")["input_ids"] == plain_ids(trained, "red")  # nothing is added unless asked for


@settings(deadline=None)
@given(PLAIN)
def test_every_text_comes_back(trained, text):
    assert trained.decode(plain_ids(trained, text)) == text


@settings(deadline=None)
@given(st.sampled_from(SPECIAL))
def test_the_text_of_a_special_token_is_only_text(trained, token):
    ids = plain_ids(trained, f"a {token} b")
    assert not set(ids) & set(trained.convert_tokens_to_ids(SPECIAL))
    assert trained.decode(ids) == f"a {token} b"


@settings(deadline=None)
@given(st.lists(PLAIN.filter(lambda text: not any(token in text for token in SPECIAL)), min_size=1, max_size=4))
def test_tokens_are_those_of_the_parts_beside_a_special_token(trained, parts):
    joined = trained("<|user|>".join(parts), add_special_tokens=False)["input_ids"]
    expected: list[int] = []
    for index, part in enumerate(parts):
        expected += ([trained.convert_tokens_to_ids("<|user|>")] if index else []) + plain_ids(trained, part)
    assert joined == expected


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "qwen3"])
def test_beside_a_language_model_it_stays_what_it_is(trained, folder, tmp_path, model_type):
    trained.save_pretrained(tmp_path)
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>is there a red  circle?</s>red é"
    assert again(text)["input_ids"] == trained(text)["input_ids"]
    assert again.padding_side == "left"


def test_the_same_text_gives_the_same_files_in_another_process(folder, tmp_path):
    script = (
        f"from training.tokenizer import train_tokenizer; train_tokenizer({TEXTS!r}, 320, {str(tmp_path / 'again')!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_sizes_that_cannot_be_are_answered_with_those_that_can(tmp_path):
    for size, bound in ((100, ">= "), (5000, "<= ")):
        with pytest.raises(ValueError, match=bound) as raised:
            train_tokenizer(TEXTS, size, tmp_path / "tokenizer")
        feasible = int(str(raised.value).rpartition(bound)[2])
        assert len(train_tokenizer(TEXTS, feasible, tmp_path / "tokenizer")) == feasible


def test_long_lines_are_not_dropped(tmp_path):
    trained = train_tokenizer(["zyx" * 3000, *TEXTS], 320, tmp_path / "tokenizer")
    assert len(plain_ids(trained, "zyx" * 4)) < 12


def test_a_conversion_that_changes_ids_is_refused(tmp_path, monkeypatch):
    convert = tokenizer_module._convert

    def broken(model, folder):
        tokenizer = convert(model, folder)
        tokenizer.backend_tokenizer.pre_tokenizer.prepend_scheme = "always"
        return tokenizer

    monkeypatch.setattr(tokenizer_module, "_convert", broken)
    with pytest.raises(ValueError, match="disagrees with sentencepiece"):
        train_tokenizer(TEXTS, 320, tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []


def test_command_line_and_bad_text_files(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    main(["--text", str(text), "--output", str(tmp_path / "tokenizer"), "--vocab_size", "310"])
    assert "310 tokens" in capsys.readouterr().out
    text.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"text.txt is not UTF-8 text \(byte 3\)"):
        read_texts(text)
    text.write_text("\n \n")
    with pytest.raises(ValueError, match=r"text.txt holds no text"):
        read_texts(text)
    with pytest.raises(ValueError, match="empty"):
        train_tokenizer([""], 310, tmp_path / "none")
