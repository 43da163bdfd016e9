"""What is trained and what is frozen: one specification decides, and one table shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from training.acceleration import checkpointed_layers

Components = Mapping[str, Sequence[nn.Module]]
"""Component name -> the modules that make it up; together they must hold every parameter of the model."""


@dataclass
class FreezePlan:
    """Result of `apply_freezing`: optimizer groups, the table's rows, and the modules to keep in evaluation mode."""

    optimizer_groups: list[dict[str, Any]]
    """`params`, `lr`, `weight_decay`, `names`: what `torch.optim.AdamW` takes, plus the parameters' names."""
    rows: list[dict[str, Any]]
    """One row a component and decay group: `component`, `parameters`, `trainable`, `learning_rate`, `weight_decay`."""
    frozen_modules: list[nn.Module] = field(default_factory=list)
    trained_modules: list[nn.Module] = field(default_factory=list)

    def set_training_mode(self, model: nn.Module) -> None:
        """`model.train()`, except frozen components: no dropout or drop path where nothing can learn from it."""
        model.train()
        for module in self.frozen_modules:
            module.eval()
            for layer in checkpointed_layers(module):
                layer.training = True  # else Transformers does not recompute it; the dropout inside it stays off
        for module in self.trained_modules:
            module.train()  # an adapter lies within what is frozen

    @property
    def trainable_names(self) -> list[str]:
        """Names of the trained parameters in the optimizer's order."""
        return [name for group in self.optimizer_groups for name in group["names"]]

    @property
    def total_parameters(self) -> int:
        """Number of scalars in the model, tied ones counted once."""
        return sum(row["parameters"] for row in self.rows)

    @property
    def trainable_parameters(self) -> int:
        """Number of scalars that are trained."""
        return sum(row["trainable"] for row in self.rows)

    def table(self) -> str:
        """The plan as text, one line a row and a total."""
        header = f"{'component':<24}{'parameters':>14}{'trainable':>14}{'learning rate':>15}{'weight decay':>14}"
        lines = [header, "-" * len(header)]
        for row in self.rows:
            name = row["component"] + (f" ({row['group']})" if row["group"] else "")
            rate = f"{row['learning_rate']:.3g}" if row["trainable"] else "frozen"
            decay = f"{row['weight_decay']:.3g}" if row["trainable"] else "-"
            lines.append(f"{name:<24}{row['parameters']:>14,}{row['trainable']:>14,}{rate:>15}{decay:>14}")
        lines.append(f"{'total':<24}{self.total_parameters:>14,}{self.trainable_parameters:>14,}")
        return "\n".join(lines)


def has_weight_decay(name: str, parameter: torch.Tensor, decay_class_token: bool = True) -> bool:
    """Whether weight decay applies: not to vectors and scalars, biases, nor the band-pass filter's own parameters.

    Pulling lambda, theta, `A_log` or `D` towards 0 would not make the model simpler but change what it filters.

    Args:
        name: the parameter's name in its model; only what follows the last dot counts.
        parameter: the parameter, for its dimensions.
        decay_class_token: whether the class token and the position embeddings decay. They do in the release, by
            accident: its `no_weight_decay` names both, but is looked up on the distributed wrapper and never found
            (classification/utils/optimizer.py).
    """
    leaf = name.rsplit(".", 1)[-1]
    if parameter.ndim < 2 or leaf == "bias" or leaf.endswith("_bias"):
        return False
    if leaf in ("cls_token", "pos_embed"):
        return decay_class_token
    return not (leaf in ("A_log", "D") or any(part in leaf for part in ("decay", "lambda", "theta")))


def apply_freezing(
    model: nn.Module,
    components: Components,
    train: Sequence[str],
    learning_rate: float,
    weight_decay: float,
    learning_rates: Mapping[str, float] | None = None,
    decay_class_token: bool = True,
) -> FreezePlan:
    """Set `requires_grad` of every parameter of `model` and build the optimizer's groups.

    Args:
        components: component name -> its modules; a parameter shared by two (tied) belongs to the first.
        train: names of the components to train; the others are frozen.
        learning_rate: peak learning rate of every trained component without one of its own in `learning_rates`.
        weight_decay: for the parameters `has_weight_decay` admits; the others get 0.
        learning_rates: component -> its own peak learning rate.
        decay_class_token: see `has_weight_decay`.

    Raises `ValueError` naming an unknown component, a component without parameters, or a parameter that belongs to no
    component: a parameter forgotten here would silently stay as it was initialised.
    """
    unknown = sorted((set(train) | set(learning_rates or {})) - set(components))
    if unknown:
        raise ValueError(f"train: unknown component {unknown[0]!r}; this model has {', '.join(components)}")
    if not train:
        raise ValueError(f"train: nothing to train; name at least one of {', '.join(components)}")
    owners = _owners(components)
    names: dict[str, list[tuple[str, nn.Parameter]]] = {component: [] for component in components}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owners:
            raise ValueError(f"parameter {name} belongs to no component of {', '.join(components)}")
        names[owners[id(parameter)]].append((name, parameter))
    plan = FreezePlan([], [])
    for component, members in names.items():
        trained = component in train
        if trained and not members:
            raise ValueError(f"train: component {component!r} has no parameters of its own")
        for _, parameter in members:
            parameter.requires_grad_(trained)
        if trained:
            plan.trained_modules.extend(components[component])
            rate = (learning_rates or {}).get(component, learning_rate)
            _add_groups(plan, component, members, rate, weight_decay, decay_class_token)
        else:
            count = sum(parameter.numel() for _, parameter in members)
            plan.rows.append(_row(component, "", count, 0, 0.0, 0.0))
            plan.frozen_modules.extend(components[component])
    return plan


def _owners(components: Components) -> dict[int, str]:
    owners: dict[int, str] = {}
    for component, modules in components.items():
        for module in modules:
            for parameter in module.parameters():
                owners.setdefault(id(parameter), component)
    return owners


def _add_groups(
    plan: FreezePlan,
    component: str,
    members: list[tuple[str, nn.Parameter]],
    rate: float,
    weight_decay: float,
    decay_class_token: bool,
) -> None:
    for decayed in (True, False):
        chosen = [member for member in members if has_weight_decay(*member, decay_class_token) is decayed]
        if not chosen:
            continue
        decay = weight_decay if decayed else 0.0
        plan.optimizer_groups.append(
            {
                "params": [parameter for _, parameter in chosen],
                "names": [name for name, _ in chosen],
                "lr": rate,
                "weight_decay": decay,
            }
        )
        count = sum(parameter.numel() for _, parameter in chosen)
        plan.rows.append(_row(component, "" if decayed else "no decay", count, count, rate, decay))


def _row(component: str, group: str, parameters: int, trainable: int, rate: float, decay: float) -> dict[str, Any]:
    return {
        "component": component,
        "group": group,
        "parameters": parameters,
        "trainable": trainable,
        "learning_rate": rate,
        "weight_decay": decay,
    }
