"""Log-likelihoods of given answers, for yes/no and multiple-choice questions.

Beside generation, not instead of it: published POPE, MME and multiple-choice numbers are made by generation.
Likelihoods have no unparsed answers and give a calibrated rate of "yes".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from eval.metrics.exact_match import lenient_exact_match


def surface_forms(option: str) -> tuple[str, ...]:
    """The ways an option may begin an answer: as it is, in lower case, capitalised, each also after a space."""
    spellings = dict.fromkeys((option, option.lower(), option[:1].upper() + option[1:]))
    return (*spellings, *(f" {spelling}" for spelling in spellings))


def single_tokens(tokenizer: Any, option: str) -> tuple[int, ...]:
    """Ids of the surface forms of an option that are one token."""
    encoded = (tokenizer(form, add_special_tokens=False).input_ids for form in surface_forms(option))
    return tuple(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1))


def first_token_likelihoods(
    tokenizer: Any, options: Sequence[Sequence[str]], logits: torch.Tensor
) -> list[dict[str, float]]:
    """Log-likelihood of every option that has a form of one token, summed (in probability) over such forms.

    Args:
        options: those of each row.
        logits: (rows, vocabulary), where the answer's first token is predicted.
    """
    log_probabilities = logits.float().log_softmax(-1)
    forms = {option: single_tokens(tokenizer, option) for row in options for option in row}
    return [
        {option: float(log_probabilities[index, list(forms[option])].logsumexp(0)) for option in row if forms[option]}
        for index, row in enumerate(options)
    ]


def sequence_likelihoods(model: Any, tokenizer: Any, inputs: Mapping[str, Any], option: str) -> list[float]:
    """Log-likelihood of an option as it is, summed over its tokens, after each prompt.

    Args:
        inputs: what the model is given for prompts of one length, without padding.
    """
    ids = torch.tensor(tokenizer(option, add_special_tokens=False).input_ids, device=inputs["input_ids"].device)
    rows, length = inputs["input_ids"].shape
    given = ids[:-1].expand(rows, -1)
    # What some models are told about every token beside its id (`token_type_ids`, ...) is 0 for text.
    beside = {name: value for name, value in inputs.items() if value.shape == (rows, length)}
    whole = dict(inputs) | {
        name: torch.cat([value, torch.zeros_like(given, dtype=value.dtype)], dim=1) for name, value in beside.items()
    }
    whole["input_ids"] = torch.cat([inputs["input_ids"], given], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    logits = model(**whole).logits[:, length - 1 :].float()
    steps = logits.log_softmax(-1).gather(-1, ids.expand(rows, -1)[..., None])
    return steps.sum(dim=(1, 2)).tolist()


def most_likely(likelihoods: Mapping[str, float]) -> str:
    """The option of the highest likelihood; the first of equals."""
    return max(likelihoods, key=lambda option: likelihoods[option])


def agreement(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of rows whose generated answer is the most likely option (case and a closing period aside)."""
    return sum(lenient_exact_match(row["text"], most_likely(row["ll"])) for row in rows) / len(rows)
