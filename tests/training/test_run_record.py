"""Which arguments make a run another one."""

from __future__ import annotations

from training.arguments import CommonArguments
from training.run_record import arguments_as_dict, changed_arguments


def test_only_what_is_learned_counts() -> None:
    arguments = CommonArguments(output_dir="a", seed=1)
    recorded = arguments_as_dict(arguments)
    assert changed_arguments(recorded, CommonArguments(output_dir="b", seed=1, save_steps=5)) == []
    assert changed_arguments(recorded, CommonArguments(output_dir="a", seed=2)) == ["seed: 1 -> 2"]
    assert changed_arguments({**recorded, "gone": 3}, arguments) == ["gone: 3 -> null"]


def test_a_field_younger_than_the_record_had_its_default() -> None:
    recorded = arguments_as_dict(CommonArguments(output_dir="a"))
    del recorded["ema_warmup"]
    assert changed_arguments(recorded, CommonArguments(output_dir="a")) == []
    assert changed_arguments(recorded, CommonArguments(output_dir="a", ema_warmup=False)) == [
        "ema_warmup: true -> false"
    ]
