"""The loop: resumed equals straight bit for bit, accumulation and processes change nothing, failures are named."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from training.arguments import CommonArguments
from training.checkpointing import find_newest_valid
from training.encoding import IGNORED
from training.engine import NonFiniteLossError
from training.freezing import apply_freezing
from training.loop import TrainingLoop
from training.run_record import MetricsFile
from training.sampling import BatchPlan, MicroBatchSampler, SampleKey
from training.schedule import cosine_scale
from training.stage import Batch, Stage, count_supervised

TIMINGS = {"tokens_per_second", "images_per_second", "seconds"}
SAMPLES = 13


def tokens_of(key: SampleKey) -> torch.Tensor:
    """A sample whose length and content depend on (epoch, index), like shuffled turns do."""
    generator = torch.Generator().manual_seed(100 * key.epoch + key.sample)
    return torch.randint(0, 11, (2 + key.sample % 5,), generator=generator)


def load_batch(keys: Sequence[SampleKey]) -> Batch:
    rows = [tokens_of(key) for key in keys]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": (labels != IGNORED).long()}


def compute_loss(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
    return forward(**batch, num_items_in_batch=items).loss


def make_stage(**changes: Any) -> Stage:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    # dropout draws from the global generator, so it shows whether the random state is restored
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, attention_dropout=changes.pop("dropout", 0.2), **sizes))
    fields: dict[str, Any] = {
        "name": "toy",
        "model": model,
        "companions": [],
        "components": {"language_model": [model]},
        "num_samples": SAMPLES,
        "load_batch": load_batch,
        "count_items": count_supervised,
        "compute_loss": compute_loss,
        "unit": "tokens",
    }
    return Stage(**{**fields, **changes})


def make_loop(folder: Path, stage: Stage | None = None, after_step: Any = None, **changes: Any) -> TrainingLoop:
    values = {"max_steps": 9, "global_batch_size": 4, "logging_steps": 2, "learning_rate": 1e-2, "cpu": True}
    arguments = CommonArguments(output_dir=str(folder), **{**values, **changes})
    stage = stage or make_stage()
    freeze = apply_freezing(stage.model, stage.components, ["language_model"], arguments.learning_rate, 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingLoop(stage, arguments, Accelerator(cpu=True), freeze, after_step)


def weights(loop: TrainingLoop) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.stage.model.state_dict().items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in MetricsFile(folder).read()]


class Stop(Exception):
    """Stands for a kill."""


def stop_at(step: int) -> Any:
    def after_step(done: int) -> None:
        if done == step:
            raise Stop

    return after_step


@pytest.mark.parametrize(
    ("stopped_at", "changes"),
    [
        (5, {}),  # the checkpoint (step 3) lies between two logged steps
        (6, {"ema_decay": 0.9}),
        (7, {"global_batch_size": 6, "per_device_batch_size": 2}),
        (4, {"dataloader_num_workers": 1}),
    ],
)
def test_resumed_run_equals_straight_run(tmp_path: Path, stopped_at: int, changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    straight = make_loop(tmp_path / "straight", save_steps=3, **changes)
    straight.run()
    torch.manual_seed(1)
    interrupted = make_loop(tmp_path / "resumed", after_step=stop_at(stopped_at), save_steps=3, **changes)
    with pytest.raises(Stop):
        interrupted.run()
    resumed = make_loop(tmp_path / "resumed", save_steps=3, **changes)
    checkpoint, _ = find_newest_valid(tmp_path / "resumed" / "checkpoints")
    assert checkpoint is not None
    assert resumed.resume(checkpoint) == []
    assert resumed.step == stopped_at // 3 * 3
    resumed.run()
    assert resumed.use_average() == straight.use_average() == ("ema_decay" in changes)
    expected = weights(straight)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    assert [line["step"] for line in metrics(tmp_path / "straight")] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize("warmup", [True, False])
def test_average_by_hand(tmp_path: Path, warmup: bool) -> None:
    """Without warm-up it is the release's (timm's ModelEma): it begins with the initial weights."""
    history: list[list[torch.Tensor]] = []
    loop = make_loop(tmp_path, ema_decay=0.9, ema_warmup=warmup, after_step=lambda step: remember())

    def remember() -> None:
        history.append([parameter.detach().clone() for parameter in loop.engine.parameters])

    remember()
    loop.run()
    expected = history[0]
    for step, weights_then in enumerate(history[1:]):
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights_then, strict=True)]
    for average, value in zip(loop.average, expected, strict=True):
        torch.testing.assert_close(average, value, atol=1e-6, rtol=1e-5)
    assert loop.use_average()
    assert all(torch.equal(*pair) for pair in zip(loop.engine.parameters, loop.average, strict=True))


def test_average_and_last_weights_are_both_validated(tmp_path: Path) -> None:
    stage = make_stage()
    stage.validate = lambda accelerator: {"validation_loss": first_weight(stage), "validation_samples": 1}
    loop = make_loop(tmp_path, stage, ema_decay=0.9)
    loop.run()
    (line,) = [line for line in metrics(tmp_path) if "validation_loss" in line]
    assert line["validation_loss_of_last_weights"] == first_weight(stage)
    loop.use_average()
    assert line["validation_loss"] == first_weight(stage) != line["validation_loss_of_last_weights"]
    assert set(line) == {"step", "epoch", "validation_loss", "validation_loss_of_last_weights", "validation_samples"}


def first_weight(stage: Stage) -> float:
    return next(stage.model.parameters()).detach().flatten()[0].item()


def test_without_the_random_state_it_would_differ(tmp_path: Path) -> None:
    """The comparison above can fail."""
    torch.manual_seed(1)
    first = make_loop(tmp_path / "a")
    first.run()
    torch.manual_seed(2)
    second = make_loop(tmp_path / "b", stage=make_stage())
    torch.manual_seed(2)
    second.run()
    assert any(not torch.equal(tensor, weights(first)[name]) for name, tensor in weights(second).items())


@pytest.mark.parametrize("per_device", [1, 2, 4])
def test_accumulation_changes_neither_loss_nor_gradient(tmp_path: Path, per_device: int) -> None:
    one_step = {"global_batch_size": 8, "max_steps": 1}
    whole = make_loop(tmp_path / "whole", make_stage(dropout=0.0), **one_step)
    parts = make_loop(tmp_path / "parts", make_stage(dropout=0.0), **one_step, per_device_batch_size=per_device)
    assert parts.plan.accumulation_steps == 8 // per_device
    whole.run()
    parts.run()
    losses = [MetricsFile(loop.output_dir).read()[0]["loss"] for loop in (whole, parts)]
    assert math.isclose(*losses, rel_tol=1e-5)
    torch.testing.assert_close(parts.grad_norm, whole.grad_norm, rtol=1e-4, atol=1e-6)


def test_loss_falls_and_the_schedule_is_logged(tmp_path: Path) -> None:
    # the same tokens in every epoch, so that there is something to remember
    stage = make_stage(load_batch=lambda keys: load_batch([SampleKey(0, key.sample) for key in keys]))
    loop = make_loop(tmp_path, stage, max_steps=60, warmup_ratio=0.1, logging_steps=1, learning_rate=2e-2)
    loop.run()
    lines = MetricsFile(tmp_path).read()
    assert lines[-1]["loss"] < lines[0]["loss"]
    rates = [line["learning_rate"] for line in lines]
    assert rates[:6] == pytest.approx([2e-2 * (step + 1) / 6 for step in range(6)])
    assert rates[-1] == pytest.approx(2e-2 * cosine_scale(59, 60, 6, 0.0))
    read = {"samples_per_step", "supervised_tokens_per_step", "padding"}
    assert set(lines[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", *read, *TIMINGS}


def test_metrics_tell_what_the_steps_held(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, max_steps=4, logging_steps=2)
    loop.run()
    for number, line in enumerate(metrics(tmp_path)):
        batches = [load_batch(loop.plan.keys(step, 0, 0)) for step in (2 * number, 2 * number + 1)]
        used = sum(int(batch["attention_mask"].sum()) for batch in batches)
        tokens = sum(batch["labels"].numel() for batch in batches)
        assert line["samples_per_step"] == 4
        assert line["supervised_tokens_per_step"] == sum(map(count_supervised, batches)) / 2
        assert line["padding"] == pytest.approx(1 - used / tokens, abs=1e-6)


def test_non_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    stage = make_stage()
    calls = 0

    def poisoned(forward: nn.Module, batch: Batch, items: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return compute_loss(forward, batch, items) * (float("nan") if calls == 4 else 1.0)

    stage.compute_loss = poisoned
    loop = make_loop(tmp_path, stage, save_steps=1, save_total_limit=0)
    with pytest.raises(NonFiniteLossError, match=r"toy: loss nan .* at step 4; lower learning_rate"):
        loop.run()
    assert all(torch.isfinite(tensor).all() for tensor in weights(loop).values())
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())][-1] == "step-000003"


def test_batch_without_anything_to_learn_is_an_error(tmp_path: Path) -> None:
    stage = make_stage(count_items=lambda batch: 0)
    with pytest.raises(ValueError, match="nothing to learn"):
        make_loop(tmp_path, stage).run()


def test_epochs_are_announced_also_after_resuming(tmp_path: Path) -> None:
    epochs: list[tuple[int, int]] = []
    stage = make_stage(begin_epoch=lambda epoch, count: epochs.append((epoch, count)))
    make_loop(tmp_path, stage, max_steps=-1, num_train_epochs=2.5, save_steps=4).run()
    assert epochs == [(0, 3), (1, 3), (2, 3)]
    epochs.clear()
    resumed = make_loop(tmp_path, stage, max_steps=-1, num_train_epochs=2.5)
    checkpoint, _ = find_newest_valid(tmp_path / "checkpoints")
    assert checkpoint is not None
    resumed.resume(checkpoint)
    resumed.run()
    assert epochs == [(2, 3)]


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_last_batch_that_reaches_beyond_the_data_begins_no_epoch(tmp_path: Path, epochs: int) -> None:
    announced: list[tuple[int, int]] = []
    stage = make_stage(begin_epoch=lambda epoch, count: announced.append((epoch, count)))
    loop = make_loop(tmp_path, stage, max_steps=-1, num_train_epochs=epochs)
    assert loop.plan.num_samples * epochs % loop.plan.global_batch_size  # else this shows nothing
    loop.run()
    assert announced == [(epoch, epochs) for epoch in range(epochs)]


def test_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    make_loop(tmp_path, save_steps=9).run()
    other = make_loop(tmp_path)
    other.freeze.optimizer_groups.pop()
    with pytest.raises(ValueError, match="trained other parameters"):
        other.resume(tmp_path / "checkpoints" / "step-000009")


def test_torn_and_later_metrics_lines_are_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        file.append({"step": step})
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    file.keep_until(2)
    assert file.read() == [{"step": 1}, {"step": 2}]
    file.append({"step": 3})
    assert json.loads(file.path.read_text().splitlines()[-1]) == {"step": 3}


# --- which sample is seen when ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 40),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    first_step=st.integers(0, 5),
)
def test_every_sample_once_an_epoch(
    num_samples: int, micro: int, accumulation: int, world_size: int, seed: int, first_step: int
) -> None:
    global_batch = micro * accumulation * world_size
    plan = BatchPlan(num_samples, global_batch, micro, world_size, seed)
    steps = max(first_step + 1, math.ceil(2 * num_samples / global_batch))
    per_rank = [list(MicroBatchSampler(plan, 0, steps, rank)) for rank in range(world_size)]
    stream = [key for batches in zip(*per_rank, strict=True) for batch in batches for key in batch]
    assert len(stream) == steps * global_batch
    for epoch in (0, 1):
        seen = [key.sample for key in stream if key.epoch == epoch]
        assert sorted(seen)[:num_samples] == list(range(num_samples))[: len(seen)] or len(seen) < num_samples
        assert len(set(seen)) == len(seen)
    assert {key for key in stream if key.epoch == 0} == {SampleKey(0, index) for index in range(num_samples)}
    # resuming is reading on; and the samples of a step do not depend on how many processes share it
    assert list(MicroBatchSampler(plan, first_step, steps, 0)) == per_rank[0][first_step * accumulation :]
    alone = BatchPlan(num_samples, global_batch, global_batch, 1, seed)
    assert stream == [key for batch in MicroBatchSampler(alone, 0, steps, 0) for key in batch]


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [
        tuple(key.sample for key in BatchPlan(50, 50, 50, 1, seed).keys(step, 0, 0))
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert len(set(orders)) == 4


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1.0, -1, 4), (2.0, -1, 7), (0.1, -1, 1), (5.0, 3, 3), (4.0, -1, 13)]
)
def test_number_of_steps(epochs: float, max_steps: int, expected: int) -> None:
    assert BatchPlan(13, 4, 4, 1, 0).total_steps(epochs, max_steps) == expected


@pytest.mark.parametrize(("global_batch", "micro", "world"), [(8, 3, 1), (8, 4, 3), (2, 0, 4)])
def test_batch_sizes_must_divide(global_batch: int, micro: int, world: int) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        BatchPlan(10, global_batch, micro, world, 0)


@given(total=st.integers(1, 200), warmup=st.integers(0, 50), floor=st.floats(0, 1))
def test_schedule_rises_then_falls(total: int, warmup: int, floor: float) -> None:
    scales = [cosine_scale(step, total, warmup, floor) for step in range(total)]
    assert all(0 < scale <= 1 or (floor == 0 and scale >= 0) for scale in scales)
    top = min(warmup, total)
    assert scales[:top] == sorted(scales[:top])
    assert all(a >= b - 1e-12 for a, b in zip(scales[top:], scales[top + 1 :], strict=False))
