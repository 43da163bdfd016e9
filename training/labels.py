"""Labels of pictures as numbers, and what is said about records that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

UNKNOWN = -1.0
NAMED_IN_MESSAGE = 20


def number_classes(labels: Sequence[Any], records: Sequence[str], where: str) -> tuple[torch.Tensor, list[str]]:
    """(samples,) long and the names of the classes, from numbers or names, one for each of `records`.

    Numbers are kept as they are (classes 0 to the largest); names are numbered in alphabetical order. Raises
    `ValueError` naming `where` and the first record whose label is of the other kind.
    """
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        other = next(
            record for label, record in zip(labels, records, strict=True) if type(label) is not type(labels[0])
        )
        raise ValueError(f'{where}: "label" is a name in some records and a number in others, first {other}; use one')
    if kinds == {int}:
        return torch.tensor(labels), [str(number) for number in range(max(labels) + 1)]
    names = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[label] for label in labels]), names


def number_attributes(labels: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, list[str]]:
    """(samples, num_labels) float, 1 holds, 0 does not, -1 unknown; and the names of the attributes."""
    names = list(labels[0])
    rows = [[UNKNOWN if label[name] is None else float(label[name]) for name in names] for label in labels]
    return torch.tensor(rows), names


def count_labels(labels: torch.Tensor, names: list[str]) -> dict[str, int]:
    """How many pictures have each label."""
    held = torch.bincount(labels, minlength=len(names)) if labels.ndim == 1 else (labels == 1).sum(0)
    return dict(zip(names, held.tolist(), strict=True))


def raise_first(where: str, problems: Sequence[str], missing: Sequence[str] = ()) -> None:
    """Raise for the first bad record (ValueError), or for all missing files together (FileNotFoundError), if any."""
    remedy = 'or leave such records out with on_bad_sample: "skip"'
    if problems:
        others = f"; {len(problems) - 1} more bad record(s)" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {problems[0]}{others}; mend the data {remedy}")
    if missing:
        shown = "; ".join(missing[:NAMED_IN_MESSAGE])
        others = f"; and {len(missing) - NAMED_IN_MESSAGE} more" if len(missing) > NAMED_IN_MESSAGE else ""
        raise FileNotFoundError(
            f"{where}: {len(missing)} image(s) do not exist: {shown}{others}; restore them {remedy}"
        )


def check_same_labels(names: Sequence[str], where: str, other_names: Sequence[str], other: str) -> None:
    """Raise `ValueError` naming both data sets unless their labels are the same, in the same order."""
    if list(names) == list(other_names):
        return
    if len(names) != len(other_names):
        difference = f"{len(names)} and {len(other_names)} labels"
    else:
        pairs = zip(names, other_names, strict=True)
        number, (one, two) = next((number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1])
        difference = f"label {number} is {one!r} and {two!r}"
    raise ValueError(f"{where} and {other} have other labels than each other ({difference}); give both the same")
