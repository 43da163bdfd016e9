"""The command line: `defocus-mllm COMMAND`.

    defocus-mllm chat outputs/quickstart/stage2 --image photo.png
    defocus-mllm chat outputs/quickstart/stage2 --image photo.png --prompt "what color is the shape?"
    defocus-mllm convert --checkpoint defocus_mamba_base_cls.pth --output models/defocus_mamba_base
    defocus-mllm new --vision models/defocus_mamba_base --language models/qwen3 --output models/mine
    defocus-mllm merge outputs/llava15/stage2_lora --output models/merged
    defocus-mllm card models/mine --license mit
    defocus-mllm report outputs/quickstart/stage2
    defocus-mllm presets

A command is a pair of functions, one that declares its arguments and one that runs it, and one line in `build_parser`.
Answers go to stdout, everything else to stderr, so that a pipe receives the answers only.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextStreamer
from transformers.utils import logging as transformers_logging

from .assemble_cli import add_new_arguments, run_new
from .card_cli import add_card_arguments, run_card
from .configuration_defocus import DefocusConfig
from .console import run_script
from .convert_cli import add_convert_arguments, run_convert, run_presets
from .images import load_image
from .loading import load_strictly, require_model
from .merge_cli import add_merge_arguments, run_merge

CHAT_COMMANDS = "/image FILE (look at another picture, start over), /reset (start over), /exit"


class ChatSession:
    """One conversation about one image.

    Args:
        model: a `DefocusForConditionalGeneration` in evaluation mode.
        processor: its `DefocusProcessor`.
        max_new_tokens: upper limit of an answer's length, in tokens.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.image: Image.Image | None = None
        self.messages: list[dict[str, Any]] = []

    def show(self, path: str | Path) -> None:
        """Look at the image at `path` and start over. Raises what `load_image` raises, and then changes nothing."""
        self.image = load_image(path)
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep the image."""
        self.messages = []

    @torch.inference_mode()
    def ask(self, question: str) -> str:
        """Print the answer to stdout as it is generated, and return it.

        The question joins the conversation only together with its answer: after an error or an interruption the
        conversation is what it was before.

        Raises:
            ValueError: the conversation has outgrown the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": self._content(question)}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        prompt_length = inputs["input_ids"].shape[1]
        self._check_length(prompt_length)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        tokenizer = self.processor.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, streamer=streamer)
        generated = output[0, prompt_length:]
        answer = tokenizer.decode(generated, skip_special_tokens=True).strip()
        ends = self.model.generation_config.eos_token_id  # several, where turns end otherwise than texts
        if generated[-1] not in (ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id]):
            _note(f"(cut after {self.max_new_tokens} tokens; --max_new_tokens sets the limit)")
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        return answer

    def _content(self, question: str) -> list[dict[str, Any]]:
        """The parts of a user message; the image stands in the first one of a conversation."""
        text = {"type": "text", "text": question}
        if self.messages or self.image is None:
            return [text]
        return [{"type": "image", "image": self.image}, text]

    def _check_length(self, prompt_length: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and prompt_length + self.max_new_tokens > limit:
            raise ValueError(
                f"the conversation has {prompt_length} tokens and its answer may take {self.max_new_tokens}, more than "
                f"the model's context of {limit}; /reset starts over"
            )


def load_model(directory: str | Path) -> tuple[Any, Any]:
    """Load a multimodal model and its processor from a directory that `save_pretrained` wrote, without any network.

    Returns:
        `(model, processor)`, the model in evaluation mode, on the GPU where there is one.

    Raises:
        FileNotFoundError: the directory or its config.json is missing.
        OSError: the processor's files are missing.
        ValueError: the directory holds another kind of model, or damaged or missing weights.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; `make quickstart` trains outputs/quickstart/stage2")
    require_model(directory)
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if not isinstance(config, DefocusConfig):
        raise ValueError(
            f"{directory / 'config.json'}: model_type is {config.model_type!r}; a multimodal model "
            f"({DefocusConfig.model_type!r}) is needed, such as stage 2 writes"
        )
    transformers_logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    model = load_strictly(AutoModelForImageTextToText, directory, dtype="auto")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `defocus-mllm chat`."""
    parser.add_argument("model", metavar="DIR", help="directory of a trained model (stage 1 or 2)")
    parser.add_argument("--image", metavar="FILE", required=True, help="the picture to talk about")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this one question, print the answer and leave")
    parser.add_argument(
        "--max_new_tokens", type=_positive_integer, default=64, metavar="N", help="longest answer (default: 64)"
    )


def run_chat(arguments: argparse.Namespace) -> None:
    """Talk about an image: one question (`--prompt`), a terminal conversation, or one question a line from a pipe."""
    image = load_image(arguments.image)  # before the model: a typo should not cost the loading time
    model, processor = load_model(arguments.model)
    session = ChatSession(model, processor, arguments.max_new_tokens)
    session.image = image
    if arguments.prompt is not None:
        session.ask(arguments.prompt)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        _note(f"{arguments.model}: {parameters / 1e6:.2f} M parameters on {model.device}. {CHAT_COMMANDS}")
    for line in _read_lines(interactive):
        if line == "/exit":
            return
        if line:
            _take_turn(session, line, interactive)


def _take_turn(session: ChatSession, line: str, interactive: bool) -> None:
    """Answer one line. On a terminal an error is shown and the conversation goes on; in a pipe it ends the program."""
    try:
        if line.startswith("/"):
            _run_chat_command(session, line)
        else:
            session.ask(line)
    except (ValueError, FileNotFoundError) as error:
        if not interactive:
            raise
        _note(f"error: {error}")
    except KeyboardInterrupt:
        if not interactive:
            raise
        _note("\n(answer interrupted; the question is forgotten)")


def _run_chat_command(session: ChatSession, line: str) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/image" and argument:
        session.show(Path(argument).expanduser())
        _note(f"(looking at {argument}; the conversation starts over)")
    elif command == "/reset" and not argument:
        session.reset()
        _note("(the conversation starts over)")
    else:
        raise ValueError(f"{line!r} is not a command; there are {CHAT_COMMANDS}")


def _read_lines(interactive: bool) -> Iterator[str]:
    """The user's lines until the end of the input, stripped; with a prompt and line editing on a terminal."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() its line editing; absent on some systems)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            _note("")
            return


def _positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_report(arguments: argparse.Namespace) -> None:
    """Run `python -m training.report`, which this package must not import."""
    words = [arguments.folder, *(["--output", arguments.output] if arguments.output else [])]
    sys.exit(subprocess.run([sys.executable, "-m", "training.report", *words]).returncode)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each sets `run`, the function that takes the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="defocus-mllm", description="Vision and language as one causal sequence.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chat = commands.add_parser("chat", help="talk to a trained model about an image", allow_abbrev=False)
    add_chat_arguments(chat)
    chat.set_defaults(run=run_chat)
    convert = commands.add_parser("convert", help="read a released De-focus Mamba checkpoint", allow_abbrev=False)
    add_convert_arguments(convert)
    convert.set_defaults(run=run_convert)
    new = commands.add_parser("new", help="put an encoder and a language model together", allow_abbrev=False)
    add_new_arguments(new)
    new.set_defaults(run=run_new)
    merge = commands.add_parser("merge", help="make a model of a LoRA adapter and its base", allow_abbrev=False)
    add_merge_arguments(merge)
    merge.set_defaults(run=run_merge)
    card = commands.add_parser("card", help="write the model card of a checkpoint", allow_abbrev=False)
    add_card_arguments(card)
    card.set_defaults(run=run_card)
    report = commands.add_parser("report", help="make one page of a training run", allow_abbrev=False)
    report.add_argument("folder", metavar="RUN", help="folder of a run")
    report.add_argument("--output", metavar="FILE", help="the page; default RUN/report.html")
    report.set_defaults(run=run_report)
    presets = commands.add_parser("presets", help="list the published sizes", allow_abbrev=False)
    presets.set_defaults(run=run_presets)
    return parser


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command; leaves the process with 0, 2 for a mistake of the user's, 130 when interrupted."""
    arguments = build_parser().parse_args(argv)
    run_script(lambda: arguments.run(arguments))


if __name__ == "__main__":
    main()
