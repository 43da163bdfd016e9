"""A prompt that is read while it arrives: pixels go through encoder and language model row by row, questions fork off.

Everything is causal, so what has been read never changes: the encoder's states and the language model's cache are those
of the batch computation, and so are the answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from .cache_defocus import CACHE_NAME, DefocusVisionCache

logger = logging.get_logger(__name__)

# These replace their tensors when they grow. Other layers of a cache write into them, so that a fork has to copy.
_SHAREABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
# What `ask` itself hands to `generate`.
_OWN_ARGUMENTS = {"inputs", "input_ids", "inputs_embeds", "attention_mask", "pixel_values", "mm_encoder_outputs"}
_OWN_ARGUMENTS |= {"cache", "past_key_values", "use_cache", "cache_implementation"}


def fork_decoder_cache(cache: Cache) -> Cache:
    """Return an independent cache in the same state, sharing the tensors that are never written to."""
    fork = copy.copy(cache)
    fork.layers = [
        copy.copy(layer) if type(layer) in _SHAREABLE_LAYERS else copy.deepcopy(layer) for layer in cache.layers
    ]
    return fork


def input_device(model: Any) -> torch.device:
    """Where `model` takes its inputs; one whose weights are offloaded takes them anywhere and moves them itself."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def check_continuation(language_model: Any, cache: Cache) -> None:
    """Refuse a decoder that reads a text in pieces differently than as a whole; `cache` is empty and stays so.

    Some recurrent decoders of Transformers forget their state when several tokens follow at once (Bamba's plain torch
    path, 5.23 and 5.24). Caches of attention alone are above suspicion, and skipped.

    Raises:
        ValueError: the decoder is one of them.
    """
    if all(type(layer) in _SHAREABLE_LAYERS for layer in cache.layers):
        return
    ids = torch.arange(8, device=input_device(language_model)) % language_model.config.vocab_size
    tokens = language_model.get_input_embeddings()(ids[None])

    def read(piece: torch.Tensor, cache: Cache) -> torch.Tensor:
        output = language_model(inputs_embeds=piece, use_cache=True, **{CACHE_NAME: cache})
        return output.last_hidden_state[:, -1].float()

    whole = read(tokens, fork_decoder_cache(cache))
    continued = fork_decoder_cache(cache)
    read(tokens[:, :4], continued)
    error = (read(tokens[:, 4:], continued) - whole).norm() / whole.norm()
    if not error < (1e-3 if tokens.dtype in (torch.float32, torch.float64) else 0.1):  # 16 bits round this much
        raise ValueError(
            f"language model {language_model.config.model_type!r}: with a cache it does not read several tokens as it "
            f"reads them whole (relative error {error:.1g}); give it the whole prompt at once, without a cache"
        )


class DefocusStream:
    """One sequence of images and text that grows, and answers questions at any point without being changed by them.

    Made by `DefocusForConditionalGeneration.open_stream`. Pixels are encoded, projected and read by the language model
    as they arrive, so that `ask` has only the question left to read. The answers are those of `generate` with the whole
    prompt. After an error, or an interruption, the stream is what it was before.

    The stream works on token ids: what `push_text` and `ask` are given, with placeholders where images stand. With a
    processor it works on plain text: images and texts are the parts of one user message, which the processor's chat
    template renders as in the batch path.

    Args:
        model: a `DefocusForConditionalGeneration` in evaluation mode.
        processor: its `DefocusProcessor`, for plain text; None for token ids.
        frames: images are frames of one sequence, and the encoder goes on from each to the next, as with pixels of
            shape (1, frames, channels, height, width) in the batch path; otherwise each image is encoded by itself.
        attention_window: see `DefocusVisionCache`.

    Raises:
        ValueError: the encoder is not causal, or the language model cannot read in pieces (`check_continuation`).
    """

    @torch.inference_mode()
    def __init__(
        self, model: Any, processor: Any = None, frames: bool = False, attention_window: int | None = None
    ) -> None:
        if not model.config.vision_config.causal:
            raise ValueError("causal=False: a non-causal encoder needs whole images; use generate")
        self.model = model
        self.processor = processor
        self.frames = frames
        self.attention_window = attention_window
        self.vision_cache = DefocusVisionCache(attention_window)
        self._decoder_cache: Cache = DynamicCache(config=model.config.text_config)
        check_continuation(model.model.language_model, self._decoder_cache)
        self._ids: list[int] = []  # all that the language model has read
        self._prompt: list[int] = []  # with a processor: the same with a single placeholder for each image
        self._parts: list[dict[str, str]] = []  # with a processor: the parts of the user's message

    @property
    def input_ids(self) -> torch.Tensor:
        """What the language model has read, (1, tokens), with a placeholder for every image token."""
        return torch.tensor([self._ids], dtype=torch.long, device=input_device(self.model))

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model has read."""
        return len(self._ids)

    @property
    def missing_rows(self) -> int:
        """Rows of patches that the current image still lacks; 0 between images."""
        image = self.vision_cache.image
        return 0 if image is None or image.complete else image.missing_rows or 0

    def fork(self) -> DefocusStream:
        """Return an independent stream in the same state; encodes nothing, and shares what neither of them changes."""
        fork = copy.copy(self)
        fork.vision_cache = self.vision_cache.fork()
        fork._decoder_cache = fork_decoder_cache(self._decoder_cache)
        fork._ids, fork._prompt, fork._parts = list(self._ids), list(self._prompt), list(self._parts)
        return fork

    @torch.inference_mode()
    def push(self, pixel_values: torch.Tensor) -> None:
        """Read the next rows of an image; after an image's last row the next one begins.

        Args:
            pixel_values: (channels, height, width) or (1, channels, height, width), normalised, of the encoder's image
                width; any number of rows of patches (of sections) up to the whole image.

        Raises:
            ValueError: `pixel_values` has another shape or more rows than the image lacks; the sequence outgrows the
                language model's context; the chat template renders an image before what stands in front of it.
        """
        pixels = pixel_values[None] if pixel_values.ndim == 3 else pixel_values
        if pixels.ndim != 4 or len(pixels) != 1:
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have shape (channels, rows, width), with or without a 1, not {shape}")
        after = self.fork()
        if not self.missing_rows:
            after._begin_image()
        base = self.model.model
        encoded = base.vision_tower(pixels.to(input_device(base.vision_tower)), past_key_values=after.vision_cache)
        tokens = base.multi_modal_projector(encoded.last_hidden_state)
        # One word is asked for its device and format: the weights may lie elsewhere until the module is called.
        image_token = self.model.config.image_token_id
        word = base.get_input_embeddings()(torch.tensor([[image_token]], device=input_device(self.model)))
        after._read([image_token] * tokens.shape[1], tokens.to(word.device, word.dtype))
        self.__dict__.update(after.__dict__)

    @torch.inference_mode()
    def push_text(self, text: str | torch.Tensor | Sequence[int]) -> None:
        """Add text between images: token ids, or with a processor plain text.

        Plain text is read together with what follows it (an image, a question), which can change its last tokens.

        Raises:
            ValueError: an image is not complete, or the text is of the other kind or has an image placeholder.
        """
        if self.missing_rows:
            raise ValueError(f"the image lacks {self.missing_rows} rows; text can follow when it is complete")
        if self.processor is not None:
            self._parts.append({"type": "text", "text": self._plain_text(text)})
            return
        after = self.fork()
        after._read(self._token_ids(text))
        self.__dict__.update(after.__dict__)

    @torch.inference_mode()
    def ask(self, question: str | torch.Tensor | Sequence[int], partial: bool = False, **kwargs: Any) -> Any:
        """Answer a question about what has been pushed; the stream itself stays as it is.

        Args:
            question: token ids, all that stands between what was pushed and the answer; with a processor plain text.
            partial: answer although the current image is not complete; how much of it is missing is logged.
            kwargs: for `generate`.

        Returns:
            The generated token ids, (sequences, new tokens); with `return_dict_in_generate` the output of `generate`,
            its `sequences` being these.

        Raises:
            ValueError: the current image is not complete and `partial` is not set; the question is empty, of the other
                kind or has an image placeholder; the prompt outgrows the language model's context.
        """
        if reserved := sorted(_OWN_ARGUMENTS & set(kwargs)):
            raise ValueError(f"ask: {reserved[0]} is the stream's own; leave it out")
        if self.missing_rows and not partial:
            raise ValueError(f"the image lacks {self.missing_rows} rows; push them, or ask with partial=True")
        if self.missing_rows:
            logger.warning(f"answering although the image lacks {self.missing_rows} rows of patches")
        ids = self._ids + self._question_ids(question)
        self._check_length(len(ids))
        cache = fork_decoder_cache(self._decoder_cache)
        if (width := self._num_sequences(kwargs)) > 1:
            cache.reorder_cache(torch.zeros(width, dtype=torch.long, device=input_device(self.model)))  # type: ignore[arg-type]
        prompt = torch.tensor([ids], device=input_device(self.model))
        output = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **{CACHE_NAME: cache}, **kwargs
        )
        if isinstance(output, torch.Tensor):
            return output[:, len(ids) :]
        output.sequences = output.sequences[:, len(ids) :]
        return output

    def _begin_image(self) -> None:
        """Read what stands before the next image, and start the encoder anew unless images are frames."""
        if not self.frames:
            self.vision_cache = DefocusVisionCache(self.attention_window)
        if self.processor is not None:
            self._parts.append({"type": "image"})
            rendered = self._render(self._parts)
            images = [place for place, token in enumerate(rendered) if token == self.model.config.image_token_id]
            ids = rendered[len(self._prompt) : images[-1]]
            self._prompt += [*ids, self.model.config.image_token_id]
            self._read(ids)

    def _read(self, ids: list[int], tokens: torch.Tensor | None = None) -> None:
        """Let the language model read `ids`, or image tokens (1, tokens, text hidden) in their place."""
        if not ids:
            return
        self._check_length(len(self._ids) + len(ids))
        inputs = {"inputs_embeds": tokens}
        if tokens is None:
            inputs = {"input_ids": torch.tensor([ids], device=input_device(self.model))}
        self.model.model(**inputs, cache=self._decoder_cache, use_cache=True)
        self._ids += ids

    def _question_ids(self, question: str | torch.Tensor | Sequence[int]) -> list[int]:
        """The ids between what has been read and the answer."""
        if self.processor is None:
            ids = self._token_ids(question)
        else:
            ids = self._render([*self._parts, {"type": "text", "text": self._plain_text(question)}])
            ids = ids[len(self._prompt) :]
        if not ids:
            raise ValueError("the question is empty: give at least one token")
        return ids

    def _render(self, parts: list[dict[str, str]]) -> list[int]:
        """The prompt with these parts as ids, one placeholder an image; checked to continue what has been read."""
        rendered = self.processor.prompt_ids([{"role": "user", "content": parts}])
        num_images = sum(part["type"] == "image" for part in parts)
        if (found := rendered.count(self.model.config.image_token_id)) != num_images:
            raise ValueError(f"the rendered prompt has {found} image placeholders for {num_images} images")
        if rendered[: len(self._prompt)] != self._prompt:
            raise ValueError("the chat template changes what has been read when something follows it; push token ids")
        return rendered

    def _plain_text(self, text: Any) -> str:
        if not isinstance(text, str):
            raise ValueError(f"with a processor the stream takes plain text, not {type(text).__name__}")
        return text

    def _token_ids(self, ids: Any) -> list[int]:
        """Token ids of (tokens,) or (1, tokens) as a list."""
        if isinstance(ids, str):
            raise ValueError(
                "without a processor the stream takes token ids; for plain text open it with processor=..."
            )
        ids = torch.as_tensor(ids)
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1 or (ids.is_floating_point() and len(ids)):
            raise ValueError(f"token ids must be integers of shape (tokens,) or (1, tokens), not {tuple(ids.shape)}")
        if self.model.config.image_token_id in ids.tolist():
            raise ValueError("the text has image placeholders; push pixels instead, they bring their own")
        return ids.tolist()

    def _check_length(self, length: int) -> None:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"the sequence would have {length} tokens, more than the model's context of {limit}")

    def _num_sequences(self, kwargs: dict[str, Any]) -> int:
        """Sequences that `generate` will continue side by side: beams, or several answers."""
        config = kwargs.get("generation_config") or self.model.generation_config
        names = ("num_beams", "num_return_sequences")
        return max(kwargs.get(name) or getattr(config, name, None) or 1 for name in names)


__all__ = ["DefocusStream"]
