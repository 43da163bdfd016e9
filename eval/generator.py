"""From requests to answers: the interface the runner needs, and its implementation for Transformers checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from defocus_mllm import DefocusForConditionalGeneration  # also registers the model with the Auto classes
from defocus_mllm.images import ImageError
from defocus_mllm.loading import load_strictly
from eval.checkpoints import find_checkpoint
from eval.environment import code_digest
from eval.files import sha256_of_files
from eval.image_features import ImageFeatures
from eval.images import ImageCache
from eval.likelihood import first_token_likelihoods, sequence_likelihoods
from eval.samples import Prediction

_MODEL_FILE_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
_FILES_ABOUT_THE_RUN = {"run.json"}

LoadImage = Callable[[Path], Image.Image | None]


@dataclass(frozen=True)
class Request:
    """One prompt for the model: the user's words and the images (absolute paths) that come before them.

    Where `options` are given, the log-likelihood of each as the answer is asked for beside the answer.
    """

    id: str
    prompt: str
    images: tuple[Path, ...]
    options: tuple[str, ...] = ()

    def conversation(self, load: LoadImage) -> list[dict[str, Any]]:
        """The messages for a chat template, with images as `load` gives them."""
        images = [{"type": "image", "image": load(path)} for path in self.images]
        return [{"role": "user", "content": [*images, {"type": "text", "text": self.prompt}]}]


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

    def request_length(self, request: Request) -> int:
        """Number of tokens of a request, images included: what batches are sorted by and measured in."""

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        """Answer a batch, in its order.

        Raises:
            ImageError: an image of the batch cannot be used.
            torch.OutOfMemoryError, RuntimeError: the batch does not fit into memory.
        """


class TransformersGenerator:
    """Greedy generation with any image-text-to-text checkpoint on disk.

    Args:
        model: folder written by `save_pretrained` of model and processor, or a repository (see checkpoints.py).
        device: "cpu", "cuda", ...; None takes the GPU if there is one.
        dtype: number format of the weights, such as "bfloat16"; "auto" keeps the saved one.

    Raises:
        FileNotFoundError: `model` is no checkpoint.
        ValueError: there is no such device, or it cannot be used here; weights are missing or damaged.
    """

    def __init__(self, model: str | Path, device: str | None = None, dtype: str = "auto") -> None:
        self._checkpoint = find_checkpoint(model)
        self.model_dir = model_dir = self._checkpoint.folder
        self.device = usable_device(device)
        self.model = load_strictly(AutoModelForImageTextToText, model_dir, "--model", dtype=dtype).eval()
        self.model.to(device=self.device)
        self.processor = AutoProcessor.from_pretrained(model_dir)
        ends = self.model.generation_config.eos_token_id
        self._ends = {self.processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # Of the checkpoint's settings `generate` would take what a call leaves open: a penalty is not greedy search.
        self.model.generation_config = GenerationConfig()
        self._images = ImageCache()
        is_ours = isinstance(self.model, DefocusForConditionalGeneration)
        self._image_features = ImageFeatures(self.model) if is_ours else None
        self._text_lengths: dict[str, int] = {}
        self._image_tokens: int | None = getattr(self.processor, "num_image_tokens", None)
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
            "name": self._checkpoint.name,
            "path": str(self.model_dir),
            "revision": self._checkpoint.revision,
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

    def request_length(self, request: Request) -> int:
        """Tokens of text and images; the template adds the same to every prompt.

        Where the processor does not say how many tokens an image has, those of the first image stand for all: an
        estimate, good enough to sort by; memory errors are met by smaller batches.
        """
        if self._image_tokens is None and request.images:
            with contextlib.suppress(ImageError):  # a broken image is named when its turn comes
                whole = int(self._encode([request])["attention_mask"].sum())
                self._image_tokens = max(1, (whole - self._text_tokens(request.prompt)) // len(request.images))
        return self._text_tokens(request.prompt) + len(request.images) * (self._image_tokens or 0)

    def _text_tokens(self, prompt: str) -> int:
        if prompt not in self._text_lengths:
            self._text_lengths[prompt] = len(self.processor.tokenizer(prompt, add_special_tokens=False).input_ids)
        return self._text_lengths[prompt]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[Prediction]:
        """Answer a batch greedily, in its order. Prompts are padded on the left, so every answer starts at once."""
        started = time.perf_counter()
        inputs = self._encode(requests) if self._image_features is None else self._encode_once(requests)
        asks_options = any(request.options for request in requests)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=sorted(self._ends),
            pad_token_id=self.processor.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=asks_options,
        )
        output = self.model.generate(**inputs, generation_config=config)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        likelihoods: list[dict[str, float] | None] = [None] * len(requests)
        if asks_options:
            likelihoods = list(self._option_likelihoods(requests, output.logits[0], lengths))
        seconds = (time.perf_counter() - started) / len(requests)
        return [
            replace(self._prediction(request, answer, n_in, seconds), ll=ll)
            for request, answer, n_in, ll in zip(requests, answers, lengths, likelihoods, strict=True)
        ]

    def _option_likelihoods(
        self, requests: Sequence[Request], first_logits: torch.Tensor, lengths: Sequence[int]
    ) -> list[dict[str, float]]:
        """Log-likelihoods of each request's options; `first_logits` (batch, vocabulary) predict the first token."""
        scores = first_token_likelihoods(
            self.processor.tokenizer, [request.options for request in requests], first_logits
        )
        # Options of several tokens need a pass of their own. Prompts of one length go together: without padding there
        # is nothing about positions that a model could get wrong.
        for length in set(lengths):
            group = [index for index, n in enumerate(lengths) if n == length]
            options = sorted({o for i in group for o in requests[i].options if o not in scores[i]})
            for option in options:
                asked = [i for i in group if option in requests[i].options]
                inputs = self._encode([requests[i] for i in asked])
                values = sequence_likelihoods(self.model, self.processor.tokenizer, inputs, option)
                for i, value in zip(asked, values, strict=True):
                    scores[i][option] = value
        return [
            {option: round(score[option], 6) for option in request.options}
            for request, score in zip(requests, scores, strict=True)
        ]

    def _encode_once(self, requests: Sequence[Request]) -> dict[str, Any]:
        """As `_encode` for a De-focus model, with the features of images in place of their pixels.

        An image is read, resized and encoded for the first question about it alone.
        """
        features = self._image_features
        assert features is not None
        pictures: dict[Path, Any] = {}
        ids = []
        for request in requests:
            conversation = request.conversation(lambda path: None if path in features else self._images.load(path))
            parts = (part for message in conversation for part in message["content"])
            pictures |= zip(request.images, (part["image"] for part in parts if part["type"] == "image"), strict=True)
            chat = self.processor.encode_chat(conversation, add_generation_prompt=True).ids
            ids.append(self.processor.expand_images(chat, chat))
        padded = self.processor.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        inputs = dict(padded.to(self.device))

        def pixels(names: Sequence[Path]) -> torch.Tensor:
            batch = self.processor.image_processor([pictures[name] for name in names], return_tensors="pt")
            return batch["pixel_values"].to(self.device, dtype=self.model.dtype)  # type: ignore[no-any-return]

        images = [name for request in requests for name in request.images]
        if images:
            inputs["mm_encoder_outputs"] = features.of(images, pixels)
        return inputs

    def forget_images(self) -> None:
        """Drop what is kept of images between batches."""
        if self._image_features is not None:
            self._image_features.forget()

    def _encode(self, requests: Sequence[Request]) -> Any:
        conversations = [request.conversation(self._images.load) for request in requests]
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
