"""From requests to answers: the interface the runner needs, and its implementation for Transformers checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import defocus_mllm  # noqa: F401 (registers the model with the Auto classes)
from defocus_mllm.loading import load_strictly
from eval.environment import code_digest
from eval.files import sha256_of_files
from eval.images import ImageCache
from eval.samples import Prediction

_MODEL_FILE_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
_FILES_ABOUT_THE_RUN = {"run.json"}


@dataclass(frozen=True)
class Request:
    """One prompt for the model: the user's words and the images (absolute paths) that come before them."""

    id: str
    prompt: str
    images: tuple[Path, ...]


class Generator(Protocol):
    """What the runner asks of a model."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything in the checkpoint that shapes an answer."""

    @property
    def environment(self) -> dict[str, Any]:
        """Versions of code and libraries, and the kind of device: another one may give another answer."""

    def describe(self) -> dict[str, Any]:
        """The `model` block of results.json."""

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        """The generation settings; with checkpoint, environment, prompt and images they determine the answer."""

    def prompt_length(self, prompt: str) -> int:
        """Number of text tokens of a prompt, the key batches are sorted by."""

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        """Answer a batch, in its order."""


class TransformersGenerator:
    """Greedy generation with any image-text-to-text checkpoint on disk.

    Args:
        model_dir: folder written by `save_pretrained` of model and processor.
        device: "cpu", "cuda", ...; None takes the GPU if there is one.

    Raises:
        FileNotFoundError: `model_dir` is no checkpoint.
        ValueError: there is no such device, or it cannot be used here; weights are missing or damaged.
    """

    def __init__(self, model_dir: Path, device: str | None = None) -> None:
        self.model_dir = model_dir
        self.device = usable_device(device)
        self.model = load_strictly(AutoModelForImageTextToText, model_dir, "--model", dtype="auto").eval()
        self.model.to(device=self.device)
        self.processor = AutoProcessor.from_pretrained(model_dir)
        ends = self.model.generation_config.eos_token_id
        self._ends = {self.processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._images = ImageCache()
        files = sorted(path for path in model_dir.iterdir() if path.suffix in _MODEL_FILE_SUFFIXES)
        self.fingerprint = sha256_of_files(path for path in files if path.name not in _FILES_ABOUT_THE_RUN)
        self._weights_sha = sha256_of_files(path for path in files if path.suffix == ".safetensors")

    @property
    def environment(self) -> dict[str, Any]:
        """Not part of `settings`, and so of the run id, which says what was measured and not where."""
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": self.device.type,
            "code_sha": code_digest(),
        }

    def describe(self) -> dict[str, Any]:
        """The `model` block of results.json; `params` counts shared weights once."""
        return {
            "name": self.model_dir.name,
            "path": str(self.model_dir),
            "fingerprint": self.fingerprint,
            "weights_sha": self._weights_sha,
            "params": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attn": self.model.config._attn_implementation,
            "image_tokens": getattr(self.processor, "num_image_tokens", None),
        }

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        """Greedy search, plus the number format, which decides near ties."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "dtype": dtype}

    def prompt_length(self, prompt: str) -> int:
        """Number of text tokens; the image tokens and the template add the same to every prompt."""
        return len(self.processor.tokenizer(prompt, add_special_tokens=False).input_ids)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        """Answer a batch greedily, in its order. Prompts are padded on the left, so every answer starts at once."""
        started = time.perf_counter()
        inputs = self._encode(requests)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self._ends),
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        sequences = self.model.generate(**inputs, generation_config=config)
        answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        seconds = (time.perf_counter() - started) / len(requests)
        return [
            self._prediction(request, answer, n_in, seconds)
            for request, answer, n_in in zip(requests, answers, lengths, strict=True)
        ]

    def _encode(self, requests: Sequence[Request]) -> Any:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": self._images.load(path)} for path in request.images),
                        {"type": "text", "text": request.prompt},
                    ],
                }
            ]
            for request in requests
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        if not bool(inputs["attention_mask"][:, -1].all()):
            raise ValueError(f"{self.model_dir}: its processor pads on the right; generation needs left padding")
        return inputs.to(self.device, dtype=self.model.dtype)

    def _prediction(self, request: Request, answer: list[int], n_in: int, seconds: float) -> Prediction:
        tokens = list(itertools.takewhile(lambda token: token not in self._ends, answer))
        finished = len(tokens) < len(answer)
        return Prediction(
            id=request.id,
            # Some chat templates put spaces around an answer.
            text=self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            finish="stop" if finished else "length",
            n_in=n_in,
            n_out=len(tokens) + finished,
            secs=round(seconds, 6),
        )


def usable_device(name: str | None) -> torch.device:
    """The device of that name, tried out; None takes the GPU if there is one. ValueError names --device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # each kind of device has its own way to be absent
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}; try cpu, or leave --device out") from error
    return device
