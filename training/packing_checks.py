"""Whether samples in one row of a decoder are independent: tried on the decoder itself, not looked up by its name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from defocus_mllm import DefocusForConditionalGeneration

_ROWS = ((5, 4, 6), (7, 3))
"""Tokens of the probe's samples; the second row is padded, and more than one row is what flash attention leaks in."""
_ADVICE = "take --packing none; --group_by length saves padding with every decoder"


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
        # every second sample replaced: nothing of the others may change
        changed = [[-3 * sample.flip(0) if index % 2 == 0 else sample for index, sample in enumerate(row)] for row in samples]
        others = _run_packed(decoder, changed)
        for row, (before, after) in enumerate(zip(packed, others, strict=True)):
            for index in range(1, len(before), 2):
                if _distance(after[index], before[index]) > max(1e-5, torch.finfo(before[index].dtype).eps):
                    raise ValueError(
                        f"packing: in a {kind} decoder a sample sees those before it in its row (its state runs on); "
                        f"{_ADVICE}"
                    )
            for index, sample in enumerate(samples[row]):
                alone = _run(decoder, sample[None], torch.arange(len(sample))[None])[0]
                if _distance(before[index], alone) > (1e-3 if alone.dtype in (torch.float32, torch.float64) else 5e-2):
                    raise ValueError(
                        f"packing: in a {kind} decoder a sample comes out differently in a packed row (its positions do "
                        f"not begin anew); {_ADVICE}"
                    )


def _samples(decoder: nn.Module) -> list[list[torch.Tensor]]:
    """Embeddings of samples of random tokens, row by row, each (tokens, hidden)."""
    embedding = decoder.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    size, device = embedding.weight.shape[0], embedding.weight.device
    return [
        [embedding(torch.randint(size, (length,), generator=generator).to(device)) for length in row] for row in _ROWS
    ]


def _run_packed(decoder: nn.Module, samples: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """What comes out for each sample, with all of them in packed rows."""
    rows = nn.utils.rnn.pad_sequence([torch.cat(list(row)) for row in samples], batch_first=True)
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
