"""Whether samples in one row of a decoder are independent: tried on the decoder itself, not looked up by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from defocus_mllm import DefocusForConditionalGeneration

_ROWS = ((5, 4, 6), (7, 3))
"""Tokens of the probe's samples; the second row is padded, and more than one row is what flash attention leaks in."""
_ADVICE = "take --packing none; --group_by length saves padding with every decoder"

_Rows = list[list[torch.Tensor]]


def check_packing(model: DefocusForConditionalGeneration) -> None:
    """Raise `ValueError` unless every sample of a packed row comes out of the decoder as if it were alone.

    Recurrent and hybrid decoders fail, whose state runs from one sample into the next, and decoders that do not take
    positions. Draws nothing from the global random generator.
    """
    decoder = model.model.language_model
    kind, implementation = decoder.config.model_type, str(decoder.config._attn_implementation)
    if "flash" in implementation:
        raise ValueError(
            f"packing: {implementation} tells samples apart in a batch of one row only; load {kind} with "
            "attn_implementation sdpa, eager or flex_attention"
        )
    with _evaluated(decoder), torch.no_grad():
        samples = _samples(decoder)
        packed = _run_packed(decoder, samples)
        if not _independent(decoder, samples, packed):
            what = "sees those before it in its row (its state runs on)"
        elif not _as_if_alone(decoder, samples, packed):
            what = "comes out differently in a packed row (its positions do not begin anew)"
        else:
            return
    raise ValueError(f"packing: in a {kind} decoder a sample {what}; {_ADVICE}")


def _independent(decoder: nn.Module, samples: _Rows, packed: _Rows) -> bool:
    """Whether nothing of a sample changes when its neighbours are replaced."""
    changed = [[-3 * one.flip(0) if number % 2 == 0 else one for number, one in enumerate(row)] for row in samples]
    limit = max(1e-5, torch.finfo(packed[0][0].dtype).eps)
    return all(
        _distance(after[number], before[number]) <= limit
        for before, after in zip(packed, _run_packed(decoder, changed), strict=True)
        for number in range(1, len(before), 2)
    )


def _as_if_alone(decoder: nn.Module, samples: _Rows, packed: _Rows) -> bool:
    """Whether every sample comes out as from a row of its own, but for rounding."""
    limit = 1e-3 if packed[0][0].dtype in (torch.float32, torch.float64) else 5e-2
    return all(
        _distance(inside, _run(decoder, sample[None], torch.arange(len(sample))[None])[0]) <= limit
        for row, of_row in zip(samples, packed, strict=True)
        for sample, inside in zip(row, of_row, strict=True)
    )


def _samples(decoder: nn.Module) -> _Rows:
    """Embeddings of samples of random tokens, row by row, each (tokens, hidden)."""
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    size, device = embedding.weight.shape[0], embedding.weight.device
    return [
        [embedding(torch.randint(size, (length,), generator=generator).to(device)) for length in row] for row in _ROWS
    ]


def _run_packed(decoder: nn.Module, samples: _Rows) -> _Rows:
    """What comes out for each sample, with all of them in packed rows."""
    rows = nn.utils.rnn.pad_sequence([torch.cat(row) for row in samples], batch_first=True)
    positions = [torch.cat([torch.arange(len(sample)) for sample in row]) for row in samples]
    hidden = _run(decoder, rows, nn.utils.rnn.pad_sequence(positions, batch_first=True))
    return [
        list(of_row[: sum(map(len, row))].split([len(sample) for sample in row]))
        for of_row, row in zip(hidden, samples, strict=True)
    ]


def _run(decoder: nn.Module, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    positions = positions.to(embeddings.device)
    return decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


@contextlib.contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Without dropout inside the block; every submodule's mode is as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
