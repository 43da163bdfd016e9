"""The launcher on a stand-in of VLMEvalKit: the same answers as eval.run's generator, and no silent failure."""

from __future__ import annotations

import math
import ssl
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from defocus_mllm.console import run_script
from eval.benchmarks.official import LETTER_SUFFIX, SHORT_SUFFIX
from eval.generator import Request, TransformersGenerator
from eval.harnesses.chat_requests import ChatRequest
from eval.harnesses.vlmevalkit import main
from eval.harnesses.vlmevalkit_model import llava_prompt, prompt_form
from tests.eval.harnesses.conftest import StandIn

TOKENS = 6
MCQ_ROW = {"question": "what color is the shape?", "A": "red", "B": "blue", "C": math.nan, "hint": math.nan}


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Paths of three images."""
    paths = [tmp_path / f"{color}.png" for color in ("red", "blue", "green")]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    return [str(path) for path in paths]


def launch(stand_in: StandIn, model_dir: Path, *arguments: str) -> None:
    ours = ["--kit", str(stand_in.kit), "--model", str(model_dir), "--max-new-tokens", str(TOKENS), "--device", "cpu"]
    main([*ours, "--work-dir", str(stand_in.work_dir), *arguments])


def part(value: str) -> dict[str, str]:
    return {"type": "image" if value.endswith(".png") else "text", "value": value}


def test_answers_are_those_of_eval_run(
    stand_in: StandIn, model_dir: Path, pictures: list[str], capsys: pytest.CaptureFixture
) -> None:
    stand_in.ask("mcq", *({**MCQ_ROW, "images": [picture]} for picture in pictures))
    questions = [{"message": [part(pictures[0]), part("is it red?")]}, {"message": [part("is it blue?")]}]
    stand_in.ask("own", *questions, metrics={"a": 1, "split=none|Overall": 0.25}, primary_metric="Overall Acc")
    launch(stand_in, model_dir, "--data", "mcq", "own")
    generator = TransformersGenerator(model_dir, "cpu")
    prompt = "what color is the shape?\nA. red\nB. blue" + LETTER_SUFFIX
    asked = [Request(picture, prompt, (Path(picture),)) for picture in pictures]
    assert stand_in.answers("model", "mcq") == [answer.text for answer in generator.generate(asked, TOKENS)]
    asked = [Request("1", "is it red?", (Path(pictures[0]),)), Request("2", "is it blue?", ())]
    expected = [generator.generate([request], TOKENS)[0] for request in asked]
    assert stand_in.answers("model", "own") == [answer.text for answer in expected]
    printed = capsys.readouterr().out
    assert "mcq: 3 answers, Overall 0.5" in printed
    assert "own: 2 answers, a 1" in printed
    assert f"answers were cut at --max-new-tokens {TOKENS}" in printed


def test_images_stay_where_they_stand_between_words(stand_in: StandIn, model_dir: Path, pictures: list[str]) -> None:
    words_last = [part(pictures[0]), part(pictures[1]), part("what color is the shape?"), part("is it red?")]
    between = [part("what color is the shape?"), part(pictures[0]), part("is it red?"), part(pictures[1])]
    stand_in.ask("own", {"message": words_last}, {"message": between})
    launch(stand_in, model_dir, "--data", "own")
    generator = TransformersGenerator(model_dir, "cpu")
    red, blue = ({"type": "image", "url": picture} for picture in pictures[:2])
    color, is_red = ({"type": "text", "text": words} for words in ("what color is the shape?", "is it red?"))
    asked = [[red, blue, color, is_red], [color, red, is_red, blue]]
    requests = [
        ChatRequest.of("1", lambda content=content: [{"role": "user", "content": content}])  # type: ignore[misc]
        for content in asked
    ]
    expected = [generator.generate([request], TOKENS)[0].text for request in requests]
    assert stand_in.answers("model", "own") == expected
    assert expected[0] != expected[1]


def test_errors_that_the_kit_swallows_end_the_command(
    stand_in: StandIn, model_dir: Path, pictures: list[str], tmp_path: Path
) -> None:
    good = {"message": [part(pictures[0]), part("is it red?")]}
    (tmp_path / "torn.png").write_bytes(Path(pictures[0]).read_bytes()[:60])
    stand_in.ask("good", good)
    stand_in.ask("torn", {"message": [part(str(tmp_path / "torn.png")), part("is it red?")]})
    stand_in.ask("video", {"message": [{"type": "video", "value": "a.mp4"}]})
    stand_in.ask("system", {"message": [{"type": "text", "value": "be brief", "role": "system"}]})
    stand_in.ask("turns", {"message": [part("is it red?")], "several_turns": True})
    stand_in.ask("unscored", good, metrics={})
    stand_in.ask("silent", good, error_message="")
    stand_in.ask("unknown", good, skip_reason="invalid_dataset")
    stand_in.ask("half", good, status="infer", metrics={"Overall": 1})
    names = ["good", "torn", "video", "system", "turns", "unscored", "silent", "unknown", "half"]
    with pytest.raises(ValueError, match="1 of 9 data sets are done") as caught:
        launch(stand_in, model_dir, "--data", *names)
    message = str(caught.value)
    assert "torn.png" in message
    assert "video: Invalid input type: video" in message
    assert "system: system: its messages have a part of role 'system'" in message
    assert "turns: turns: questions in several turns are not supported" in message
    assert "unscored: the kit computed no metric" in message
    assert "silent: the kit failed without a message" in message
    assert "unknown: skipped by the kit: invalid_dataset" in message
    assert "half: not finished (status 'infer')" in message
    assert "good:" not in message


def test_one_of_several_processes_ends_with_its_error(
    stand_in: StandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it; the kit, which goes on after an `Exception`, must not see one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    stand_in.ask("system", {"message": [{"type": "text", "value": "be brief", "role": "system"}]})
    with pytest.raises(SystemExit, match="error: system: its messages have a part of role 'system'"):
        launch(stand_in, model_dir, "--data", "system")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for which the kit's NCCL is right")
def test_several_processes_without_a_gpu_speak_gloo(
    stand_in: StandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict] = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda **options: asked.append(options))
    run = stand_in.kit / "run.py"
    begin = "import torch.distributed\ntorch.distributed.init_process_group(backend='nccl', timeout=7)\n"
    run.write_text(begin + run.read_text())
    stand_in.ask("own", {"message": [part("is it red?")]})
    launch(stand_in, model_dir, "--data", "own")
    assert asked == [{"backend": "gloo", "timeout": 7}]


def test_failed_samples_are_no_wrong_answers(
    stand_in: StandIn, model_dir: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.ask("own", {"message": [part(pictures[0]), part("is it red?")]})
    monkeypatch.setattr(
        "eval.generator.TransformersGenerator._prediction",
        lambda *_: type("Failed", (), {"text": "Failed to obtain answer: <RuntimeError>", "finish": "stop"}),
    )
    monkeypatch.setattr("eval.generator.replace", lambda prediction, **_: prediction)
    with pytest.raises(ValueError, match="1 of 1 samples failed, and count as wrong answers"):
        launch(stand_in, model_dir, "--data", "own")


def test_a_run_without_a_status_file_is_an_error(
    stand_in: StandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_STATUS", "1")
    stand_in.ask("own", {"message": [part("is it red?")]})
    with pytest.raises(FileNotFoundError, match=r"the kit wrote no status\.json"):
        launch(stand_in, model_dir, "--data", "own")


def test_rows_that_the_kit_leaves_out_are_counted(
    stand_in: StandIn, model_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    stand_in.ask("own", {"message": [part("is it red?")]}, skip_reason="mode_infer")
    (stand_in.data / "own.tsv").write_text("index\tquestion\n0\tis it red?\n1\twhy?\n")
    launch(stand_in, model_dir, "--data", "own", "--mode", "infer")
    printed = capsys.readouterr().out
    assert "own: 1 answers (1 of 2 rows of" in printed
    assert "not scored: --mode infer" in printed


def test_importing_the_kit_leaves_certificates_checked(stand_in: StandIn, model_dir: Path) -> None:
    before = ssl._create_default_https_context
    stand_in.ask("own", {"message": [part("is it red?")]})
    launch(stand_in, model_dir, "--data", "own")
    assert ssl._create_default_https_context is before
    assert sys.argv[0] != str(stand_in.kit / "run.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "taken"], "the kit has a model of that name"),
        (["--name", "a/b"], "must not contain '/'"),
        (["--temperature=1"], "--temperature: the kit ignores it"),
        (["--api-mode"], "--api-mode: the kit ignores it"),
    ],
)
def test_arguments_without_effect_are_refused(
    stand_in: StandIn, model_dir: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        launch(stand_in, model_dir, "--data", "own", *arguments)


def test_what_is_missing_is_named(stand_in: StandIn, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--data: name the kit's data sets"):
        launch(stand_in, model_dir)
    with pytest.raises(FileNotFoundError, match=r"--model: .* holds no saved model"):
        launch(stand_in, model_dir.parent, "--data", "own")
    monkeypatch.setenv("LMUData", "/nowhere")
    with pytest.raises(FileNotFoundError, match="LMUData=/nowhere: no such folder"):
        launch(stand_in, model_dir, "--data", "own")
    (stand_in.kit / "run.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"--kit .*: no run.py"):
        launch(stand_in, model_dir, "--data", "own")


def test_a_package_that_the_kit_lacks_is_named(stand_in: StandIn, model_dir: Path) -> None:
    (stand_in.kit / "vlmeval" / "config.py").write_text("import torchvisionary\n")
    with pytest.raises(ValueError, match="install what it requires: No module named 'torchvisionary'"):
        launch(stand_in, model_dir, "--data", "own")


@pytest.mark.parametrize(
    ("line", "form", "prompt"),
    [
        ({**MCQ_ROW, "hint": "look"}, "letter", "look\nwhat color is the shape?\nA. red\nB. blue" + LETTER_SUFFIX),
        ({"question": "why?", "A": "x", "B": math.nan, "C": 3}, "letter", "why?\nA. x\nC. 3" + LETTER_SUFFIX),
        ({"question": "why?", "A": math.nan}, "letter", "why?" + SHORT_SUFFIX),
        ({"question": "is it red? Please answer yes or no.", "A": "x"}, "short", "is it red?" + SHORT_SUFFIX),
    ],
)
def test_prompts_are_those_of_llava(line: dict, form: str, prompt: str) -> None:
    assert llava_prompt(line, form) == prompt


def test_the_chinese_mmbench_asks_in_chinese() -> None:
    assert llava_prompt(MCQ_ROW, "letter", chinese=True).endswith("\nB. blue\n请直接回答选项字母。")


def test_data_sets_with_a_prompt_of_their_own_keep_it() -> None:
    standard = type("ImageMCQDataset", (), {})
    exec("def build_prompt(self, line): ...", namespace := {})
    standard.build_prompt = namespace["build_prompt"]
    standard.build_prompt.__qualname__ = "ImageMCQDataset.build_prompt"
    assert prompt_form(type("CustomMCQDataset", (standard,), {})()) == "letter"
    assert prompt_form(type("MMMUDataset", (standard,), {"build_prompt": lambda self, line: []})()) is None
    assert prompt_form(type("CustomVQADataset", (), {"build_prompt": lambda self, line: []})()) == "short"
    assert prompt_form(None) is None


def test_the_command_exits_with_an_error(stand_in: StandIn, model_dir: Path, capsys: pytest.CaptureFixture) -> None:
    stand_in.ask("turns", {"message": [part("is it red?")], "several_turns": True})
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: launch(stand_in, model_dir, "--data", "turns"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: turns: turns: questions in several turns")
