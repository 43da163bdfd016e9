"""`defocus-mllm chat`: answers are the model's, a conversation is remembered, mistakes are one clear line."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from defocus_mllm import (
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusImageProcessor,
    DefocusProcessor,
    DefocusVisionConfig,
    DefocusVisionModel,
    cli,
)
from defocus_mllm.cli import ChatSession, load_model

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = ["what", "which", "color", "shape", "is", "it", "the", "a", "red", "blue", "circle", "square", "yes", "no"]
QUESTION = "what color is the shape"
ANSWER_LENGTH = "6"


def main(words: list[str]) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL_TOKENS + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=SPECIAL_TOKENS[5:],
        extra_special_tokens={"image_token": "<image>"},
    )


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model that, its special tokens silenced, always says `ANSWER_LENGTH` words."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = DefocusVisionConfig(**sizes, image_size=16, patch_size=8)
    vocabulary = len(SPECIAL_TOKENS) + len(WORDS)
    text = {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 96, **sizes}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "initializer_range": 0.5}
    config = DefocusConfig(vision_config=vision.to_dict(), text_config=text, image_token_id=4)
    model = DefocusForConditionalGeneration(config)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL_TOKENS)))
    model.save_pretrained(directory)
    image_processor = DefocusImageProcessor(size={"height": 16, "width": 16})
    DefocusProcessor(image_processor, make_tokenizer(), vision.num_image_tokens).save_pretrained(directory)
    return directory


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (20, 20), (200, 20, 20)).save(path)
    return str(path)


@pytest.fixture
def session(model_directory: Path, picture: str) -> ChatSession:
    session = ChatSession(*load_model(model_directory), max_new_tokens=int(ANSWER_LENGTH))
    session.show(picture)
    return session


def chat(model_directory: Path, picture: str, *options: str) -> int:
    return main(["chat", str(model_directory), "--image", picture, "--max_new_tokens", ANSWER_LENGTH, *options])


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str, terminal: bool = False) -> None:
    """Put `lines` on stdin; `terminal` makes it look like a keyboard."""
    stdin = io.StringIO("".join(line + "\n" for line in lines))
    monkeypatch.setattr(stdin, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stdin)


def expected_answer(model_directory: Path, messages: list[dict[str, Any]]) -> str:
    """What the model generates, computed without the command line."""
    model, processor = load_model(model_directory)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=int(ANSWER_LENGTH), do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def user(question: str, picture: str | None = None) -> dict[str, Any]:
    image = [] if picture is None else [{"type": "image", "image": Image.open(picture)}]
    return {"role": "user", "content": [*image, {"type": "text", "text": question}]}


def assistant(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed command printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_prompt_prints_the_answer_of_the_model(
    model_directory: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(model_directory, picture, "--prompt", QUESTION) == 0
    answer = capsys.readouterr().out.strip()
    assert len(answer.split()) == int(ANSWER_LENGTH)
    assert answer == expected_answer(model_directory, [user(QUESTION, picture)])


def test_a_pipe_gets_one_line_an_answer_and_the_second_turn_knows_the_first(
    model_directory: Path, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, QUESTION, "", "is it a circle")
    assert chat(model_directory, picture) == 0
    first, second = capsys.readouterr().out.splitlines()
    history = [user(QUESTION, picture), assistant(first.strip()), user("is it a circle")]
    assert second.strip() == expected_answer(model_directory, history)
    assert second.strip() != expected_answer(model_directory, history[2:]), "the test cannot tell a forgotten turn"


def test_the_answer_appears_word_by_word(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *values, **options: written.append(str(values[0])))
    answer = session.ask(QUESTION)
    assert len([piece for piece in written if piece.strip() and piece.strip() in answer]) >= int(ANSWER_LENGTH) - 1


def test_an_answer_that_was_cut_is_said_to_be(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.ask(QUESTION)
    assert f"cut after {ANSWER_LENGTH} tokens" in capsys.readouterr().err


def test_a_finished_answer_is_not_said_to_be_cut(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    end = session.processor.tokenizer.eos_token_id
    session.model.generation_config.suppress_tokens = [
        token for token in range(session.model.config.text_config.vocab_size) if token != end
    ]
    assert session.ask(QUESTION) == ""
    assert "cut after" not in capsys.readouterr().err


def test_image_stands_in_the_first_message_only(session: ChatSession) -> None:
    session.ask(QUESTION)
    session.ask("is it red")
    assert [message["role"] for message in session.messages] == ["user", "assistant", "user", "assistant"]
    images = [part for message in session.messages for part in message["content"] if part["type"] == "image"]
    assert len(images) == 1
    assert session.messages[0]["content"][0] is images[0]


def test_reset_and_image_start_over(
    model_directory: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other = tmp_path / "other picture.png"
    Image.effect_noise((20, 20), 90).save(other)
    pipe(monkeypatch, QUESTION, "is it red", "/reset", QUESTION, f"/image {other}", QUESTION, "/exit", "is it red")
    assert chat(model_directory, picture) == 0
    answers = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 4
    assert answers[2] == answers[0]
    assert answers[3] == expected_answer(model_directory, [user(QUESTION, str(other))])
    assert answers[3] != answers[0], "the test cannot tell one picture from the other"


def test_a_mistake_ends_a_pipe(
    model_directory: Path, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, "/image nowhere.png", QUESTION)
    assert chat(model_directory, picture) == 2
    assert "nowhere.png does not exist" in error_line(capsys)


@pytest.mark.parametrize("command", ["/image", "/image nowhere.png", "/quit", "/reset now"])
def test_a_mistake_on_a_terminal_leaves_the_conversation_alone(
    model_directory: Path, picture: str, command: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pipe(monkeypatch, QUESTION, command, "is it red", terminal=True)
    assert chat(model_directory, picture) == 0
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1
    first, second = (line.strip() for line in captured.out.replace("> ", "").splitlines())
    history = [user(QUESTION, picture), assistant(first), user("is it red")]
    assert second == expected_answer(model_directory, history)


def test_a_conversation_beyond_the_context_is_refused_and_kept(session: ChatSession) -> None:
    session.ask(QUESTION)
    before = list(session.messages)
    with pytest.raises(ValueError, match=r"more than the model's context of 96; /reset starts over"):
        session.ask("is it red " * 40)
    assert session.messages == before


def test_an_interrupted_answer_leaves_the_conversation_alone(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.ask(QUESTION)
    before = list(session.messages)

    def interrupt(**inputs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.model, "generate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask("is it red")
    assert session.messages == before


@pytest.mark.parametrize("name", ["llava-lora-7b", "qlora_base", "clip"])
def test_the_name_of_a_folder_decides_nothing(model_directory: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(model_directory, tmp_path / name)
    ours, theirs = load_model(copy), load_model(model_directory)
    assert type(ours[0]) is type(theirs[0])
    weights = theirs[0].state_dict()
    assert all(torch.equal(weights[key], value) for key, value in ours[0].state_dict().items())
    assert ours[1].chat_template == theirs[1].chat_template


def test_no_such_directory(picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path / "nowhere"), "--image", picture]) == 2
    assert "nowhere: no such directory" in error_line(capsys)


def test_directory_without_a_model(picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tmp_path), "--image", picture]) == 2
    assert "no config.json" in error_line(capsys)


def test_an_encoder_cannot_chat(picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DefocusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    DefocusVisionModel(config).save_pretrained(tmp_path / "encoder")
    assert main(["chat", str(tmp_path / "encoder"), "--image", picture]) == 2
    assert "model_type is 'defocus_vision'; a multimodal model ('defocus') is needed" in error_line(capsys)


def test_damaged_weights(
    model_directory: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in model_directory.iterdir():
        if file.is_file():
            content = file.read_bytes()
            (damaged / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    assert main(["chat", str(damaged), "--image", picture]) == 2
    assert f"the weights in {damaged} are damaged" in error_line(capsys)


def test_missing_weights_are_not_made_up(
    model_directory: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(model_directory, lacking)
    weights = load_file(lacking / "model.safetensors")
    del weights["model.multi_modal_projector.linear_1.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    assert main(["chat", str(lacking), "--image", picture]) == 2
    expected = f"{lacking} lacks 1 weights, first model.multi_modal_projector.linear_1.weight"
    assert expected in error_line(capsys)


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_max_new_tokens_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "DIR", "--image", "F", "--max_new_tokens", value]) == 2
    assert "--max_new_tokens" in capsys.readouterr().err


def test_debug_keeps_the_traceback(picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFOCUS_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["chat", str(tmp_path / "nowhere"), "--image", picture])
