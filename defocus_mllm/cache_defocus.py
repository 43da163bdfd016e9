"""What an encoder carries from one piece of an image, or from one frame of a sequence, to the next.

Tensors in a cache are replaced, never changed in place. Forks therefore share them, and cost nothing until they grow.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .kernels_defocus import at_least_float32

# Transformers 5.24 renamed the cache of models and of their outputs; ours follow the installed version.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def given_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache of a call, under either of its names; the old one is deprecated where Transformers deprecates it."""
    if past_key_values is not None and CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated; use `cache` instead", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


@dataclass
class DefocusLayerState:
    """What one block carries; the block replaces the values when it has seen its tokens.

    Attributes:
        mixer: the state of the token mixer, a dataclass whose tensors have the batch first; None before the first
            token, if the mixer needs none to start with.
        token_sum: context broadcasting: sum of the tokens so far, (batch, 1, hidden), in at least float32.
        num_tokens: tokens so far.
    """

    mixer: Any = None
    token_sum: torch.Tensor | None = None
    num_tokens: int = 0


@dataclass
class DefocusImageProgress:
    """How much of an image has arrived, in the order of the sequence.

    Attributes:
        rows: of the whole image, in patches; None until the piece that ends it.
        columns: of the whole image, in patches.
        section: height and width of a section, in patches (1: the patches themselves).
        num_patches: patches so far.
        positions: interpolated position embeddings of the whole image, (1, tokens, hidden), once they are needed.
        num_tokens: without a class token: tokens of the image so far, and
        token_sum: the sum of the encoder's output for them, (batch, hidden), in at least float32.
    """

    rows: int | None
    columns: int
    section: int = 1
    num_patches: int = 0
    positions: torch.Tensor | None = None
    num_tokens: int = 0
    token_sum: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether all patches have arrived."""
        return self.rows is not None and self.num_patches == self.rows * self.columns

    @property
    def missing_rows(self) -> int | None:
        """Rows of patches still to come, those of a begun row of sections included; None if nobody knows the height."""
        return None if self.rows is None else self.rows - self.whole_rows

    @property
    def whole_rows(self) -> int:
        """Rows of patches that have arrived from end to end."""
        return self.num_patches // (self.columns * self.section) * self.section

    def place(self, rows: int, columns: int) -> tuple[int, int]:
        """Return where the next piece begins, as (row, column) in patches.

        Args:
            rows, columns: of the piece, in patches; multiples of `section`.

        Raises:
            ValueError: the piece is neither whole rows nor the next sections of one row, or it does not fit.
        """
        section, per_row = self.section, self.columns // self.section
        row, column = (place * section for place in divmod(self.num_patches // section**2, per_row))
        if (column or columns != self.columns) and (rows != section or column + columns > self.columns):
            begun = f"{self.columns - column} columns of the current row are missing" if column else "a row begins"
            raise ValueError(
                f"pixel_values: {rows} x {columns} patches are not the next piece of an image of {self.columns} "
                f"columns: give whole rows, or sections of {section} x {section} from left to right ({begun})"
            )
        if self.rows is not None and row + rows > self.rows:
            raise ValueError(
                f"pixel_values: {rows} rows of patches, but the image lacks only {self.rows - row} of its {self.rows}"
            )
        return row, column


class DefocusVisionCache:
    """The state of an encoder in the middle of an image, or of a sequence of images (frames).

    `DefocusVisionModel(rows, past_key_values=cache)` takes the next piece, updates the cache and returns it. After an
    error the cache is what it was before. After the last piece of an image the next one continues the same sequence:
    filter positions and states go on, as for the frames of a video.

    Args:
        attention_window: attention only: bound the state, keeping this many last tokens exactly and a summary of those
            before them; None keeps all tokens, and the result is that of the batch computation. The states of
            retention and mamba are bounded whatever it is.

    Attributes:
        layers: one state a block.
        image: progress of the current image; None before the first piece.
        num_images: complete images so far.
        batch_size: sequences that are encoded side by side; None before the first piece.
    """

    def __init__(self, attention_window: int | None = None) -> None:
        if attention_window is not None and attention_window < 1:
            raise ValueError(f"attention_window must be positive, in tokens, not {attention_window}")
        self.attention_window = attention_window
        self.layers: list[DefocusLayerState] = []
        self.image: DefocusImageProgress | None = None
        self.num_images = 0
        self.batch_size: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those of earlier images and of their ends included."""
        return self.layers[0].num_tokens if self.layers else 0

    @property
    def num_rows(self) -> int:
        """Whole rows of patches of the current image that have arrived."""
        return 0 if self.image is None else self.image.whole_rows

    @property
    def in_image(self) -> bool:
        """Whether an image has begun that is not complete."""
        return self.image is not None and not self.image.complete

    @property
    def num_bytes(self) -> int:
        """Memory that this cache keeps alive, in bytes; what forks share counts in each of them."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors([self.layers, self.image])
        }
        return sum(storages.values())

    @property
    def error_bounds(self) -> torch.Tensor | None:
        """With `attention_window`: the largest possible error so far, (layers, batch, heads); None without.

        |output - exact output| of a head's attention, divided by its largest |value|, for the tokens that its layer was
        given. Heads that decay weakly over the window have bounds far above their errors.
        """
        bounds = [layer.mixer.error_bound for layer in self.layers if hasattr(layer.mixer, "error_bound")]
        return torch.stack(bounds) if bounds else None

    def start(self, mixers: Sequence[Any], batch_size: int) -> None:
        """Prepare for the next piece of `batch_size` sequences through blocks with these mixers.

        Raises:
            ValueError: the cache was filled by another encoder, or with another batch size.
        """
        if not self.layers:
            self.layers = [DefocusLayerState(mixer.start_state(self.attention_window)) for mixer in mixers]
        if len(self.layers) != len(mixers):
            raise ValueError(f"the cache is of an encoder of {len(self.layers)} blocks, this one has {len(mixers)}")
        if self.batch_size not in (None, batch_size):
            raise ValueError(f"pixel_values has a batch of {batch_size}, but the cache one of {self.batch_size}")
        self.batch_size = batch_size

    def fork(self) -> DefocusVisionCache:
        """Return an independent cache in the same state; the two share tensors, not what becomes of them."""
        fork = copy.copy(self)
        fork.layers = [replace(layer) for layer in self.layers]
        fork.image = None if self.image is None else replace(self.image)
        return fork

    def become(self, other: DefocusVisionCache) -> None:
        """Take over the state of `other`, which must not be used any more."""
        self.__dict__.update(other.__dict__)

    def pool_piece(self, hidden_states: torch.Tensor, class_token: bool) -> torch.Tensor | None:
        """Count the image, if a piece has completed it, and return what sums it up, (batch, hidden); None before.

        Args:
            hidden_states: the encoder's output for the piece, (batch, tokens, hidden).
            class_token: whether a class token, the last of the tokens, sums an image up; otherwise their mean does.
        """
        image = self.image
        assert image is not None
        if not class_token:
            image.num_tokens += hidden_states.shape[1]
            token_sum = at_least_float32(hidden_states).sum(dim=1)
            image.token_sum = token_sum if image.token_sum is None else image.token_sum + token_sum
        if not image.complete:
            return None
        self.num_images += 1
        image.positions = None
        if image.token_sum is None:
            return hidden_states[:, -1]
        pooled = (image.token_sum / image.num_tokens).to(hidden_states.dtype)
        return pooled

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put sequence `beam_idx[i]` of the batch in place i; they may be repeated or left out."""
        self.layers = _map_tensors(self.layers, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        if self.image is not None and self.image.token_sum is not None:
            token_sum = self.image.token_sum
            self.image.token_sum = token_sum.index_select(0, beam_idx.to(token_sum.device))
        self.batch_size = len(beam_idx)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested lists, tuples and dataclasses with `function` of every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        items = {field.name: _map_tensors(getattr(value, field.name), function) for field in fields(value)}
        return replace(value, **items)
    return value


__all__ = ["DefocusVisionCache"]
