"""One training loop for all stages, on Accelerate: accumulation, schedule, clipping, EMA, metrics, save and resume.

The loss of a step is the sum over its supervised items (tokens, labels) divided by their number over all micro-batches
and processes, so neither accumulation nor the number of processes changes it. On one CPU a run resumed from a
checkpoint is bit-equal to one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from training.acceleration import checkpoint_activations, compile_in_place, explained_compilation
from training.arguments import CommonArguments
from training.batches import Batch, load_batches
from training.checkpointing import (
    CheckpointError,
    Savable,
    get_random_state,
    load_training_state,
    save_checkpoint,
    set_random_state,
    step_directory,
)
from training.engine import make_engine
from training.freezing import FreezePlan
from training.interruption import Interrupted, Interruption, elected
from training.nonfinite import NonFiniteGuard, keep_for_replay
from training.peak_memory import peak_memory
from training.run_record import MetricsFile, read_run
from training.sampling import BatchPlan, mix_seed
from training.schedule import cosine_scale
from training.stage import Stage
from training.token_counts import TokenCounts


class TrainingLoop:
    """Trains `stage.model` in place. Build it on every process; `run` returns when the last step is done.

    Args:
        stage: the model, the data and the loss.
        arguments: the run's arguments.
        accelerator: devices and processes.
        freeze: which parameters, at which learning rates.
        after_step: called with the number of finished steps, for tests and progress of callers.
    """

    def __init__(
        self,
        stage: Stage,
        arguments: CommonArguments,
        accelerator: Accelerator,
        freeze: FreezePlan,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        self.stage, self.arguments, self.accelerator, self.freeze = stage, arguments, accelerator, freeze
        self.after_step = after_step
        self.plan = BatchPlan(
            num_samples=stage.num_samples,
            global_batch_size=arguments.global_batch_size,
            per_device_batch_size=arguments.per_device_batch_size,
            world_size=accelerator.num_processes,
            seed=arguments.seed,
            repeats=stage.repeats,
        )
        self.total_steps = self.plan.total_steps(arguments.num_train_epochs, arguments.max_steps)
        self.num_epochs = int(self.plan.epoch_at(self.total_steps - 1)) + 1
        self.warmup_steps = arguments.warmup_steps or math.ceil(arguments.warmup_ratio * self.total_steps)
        self.output_dir = Path(arguments.output_dir)
        self.metrics = MetricsFile(self.output_dir)
        self.interruption = Interruption()
        self.step = 0
        self.train_seconds = 0.0
        self._saved_step = 0
        self.guard = NonFiniteGuard(accelerator, arguments.max_nonfinite_steps)
        self._prepare()

    def _prepare(self) -> None:
        arguments, device = self.arguments, self.accelerator.device
        self.recomputed = ""
        if arguments.gradient_checkpointing:
            self.recomputed = checkpoint_activations(self.stage.model, self.freeze.frozen_modules)
        if arguments.torch_compile:
            compile_in_place(self.stage.model, device)
        groups = [
            {**{key: value for key, value in group.items() if key != "names"}, "peak_lr": group["lr"]}
            for group in self.freeze.optimizer_groups
        ]
        self.engine = make_engine(self.accelerator, self.stage.model, groups, arguments)
        self.average = self.engine.copy_parameters() if arguments.ema_decay > 0 else []
        self.window_loss = torch.zeros((), device=device)
        self.window_steps, self.window_units, self._window_began = 0, 0, time.perf_counter()
        self.window_tokens = TokenCounts()
        self.grad_norm = torch.zeros((), device=device)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the current step to the last.

        Raises `NonFiniteLossError` naming the step, or `Interrupted` on every process, after a checkpoint, if
        `interruption` was asked for on any of them.
        """
        began, seconds_before = time.perf_counter(), self.train_seconds
        self._window_began = began
        batches = self._batches()
        epoch = -1
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=self.stage.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=0.5,
            dynamic_ncols=True,
        )
        with bar, explained_compilation():
            while self.step < self.total_steps:
                epoch = self._begin_epoch_if_new(epoch)
                self._take_step(batches)
                self.step += 1
                self.train_seconds = seconds_before + time.perf_counter() - began
                bar.update()
                if self.step % self.arguments.logging_steps == 0 or self.step == self.total_steps:
                    self._log(bar)
                if self._validation_is_due():
                    self._validate()
                if self.arguments.save_steps and self.step % self.arguments.save_steps == 0:
                    self.save()
                if self.after_step:
                    self.after_step(self.step)

    def _batches(self) -> Iterator[Batch]:
        self.sampler = self.stage.sampler(self.plan, self.step, self.total_steps, self.accelerator.process_index)
        pin_memory = self.accelerator.device.type == "cuda"
        seed = mix_seed(self.arguments.seed, self.step)
        workers = self.arguments.dataloader_num_workers
        return load_batches(self.stage.load_batch, self.sampler, workers, pin_memory, seed)

    def _begin_epoch_if_new(self, epoch: int) -> int:
        current = int(self.plan.epoch_at(self.step))
        if current != epoch:
            if self.stage.begin_epoch:
                self.stage.begin_epoch(current, self.num_epochs)
            self.freeze.set_training_mode(self.stage.model)
        return current

    def _take_step(self, batches: Iterator[Batch]) -> None:
        micro_batches, items = self._next_batch(batches, self.sampler.micro_batches(self.step))
        loss = self._forward_and_backward(micro_batches, items)
        norm = self.engine.clip(self.arguments.max_grad_norm)
        self._set_learning_rates()
        if not self.guard.allows(loss, norm):
            self._skip_step(micro_batches, items)
            return
        self.window_tokens.add(micro_batches)
        self.grad_norm = self.engine.step(norm)
        self._update_average()
        self.window_loss += loss
        self.window_steps += 1
        self.window_units += items if self.stage.unit == "tokens" else self.arguments.global_batch_size

    def rehearse(self, attempts: int) -> tuple[float, list[float] | None]:
        """Loss of a first micro-batch and gradient norm of every optimizer group, if known; changes no weight.

        Micro-batches are added up, `attempts` at most, until every group has had a gradient: one without pictures gives
        none to what reads pictures, and one of bad samples alone gives none at all.
        """
        self._begin_epoch_if_new(-1)
        batches = self._batches()
        losses: list[torch.Tensor] = []
        norms: list[float] | None = None
        with explained_compilation():
            for left in reversed(range(min(attempts, self._micro_batches_of_first_steps(attempts)))):
                batch, items = self._next_batch(batches, 1, may_be_empty=bool(losses or left))
                if not items:
                    continue
                losses.append(self._forward_and_backward(batch, items))
                norms = self.engine.gradient_norms()
                if norms is None or all(norms):  # those that are not finite count as well
                    break
        return self.accelerator.reduce(losses[0], reduction="sum").item(), norms

    def _micro_batches_of_first_steps(self, count: int) -> int:
        return sum(self.sampler.micro_batches(step) for step in range(min(count, self.total_steps)))

    def _next_batch(self, batches: Iterator[Batch], count: int, may_be_empty: bool = False) -> tuple[list[Batch], int]:
        """This process's next `count` micro-batches, and the supervised items of all processes in them.

        In the same message the processes tell each other whether one of them has heard of bad samples, which they then
        share, and whether one of them was asked to stop: then all raise `Interrupted`, after a checkpoint.
        """
        votes = self.interruption.votes()
        micro_batches = [] if any(votes) else [next(batches) for _ in range(count)]
        items = sum(self.stage.count_items(batch) for batch in micro_batches)
        bad_samples = self.stage.bad_samples
        told = torch.tensor([items, bad_samples.num_heard, *votes])
        if self.accelerator.num_processes > 1:
            told = self.accelerator.reduce(told.to(self.accelerator.device), reduction="sum")
        items, num_bad, *votes = told.tolist()
        if num_bad:
            bad_samples.share()
        if signal_name := elected(votes):
            if self.step > self._saved_step:
                self.save()
            raise Interrupted(signal_name, self.step)
        if items == 0 and not may_be_empty:
            raise ValueError(
                f"step {self.step}: the batch of {self.arguments.global_batch_size} samples has nothing to learn from "
                "(no supervised token or label); check the data"
            )
        return micro_batches, items

    def _forward_and_backward(self, micro_batches: Sequence[Batch], items: int) -> torch.Tensor:
        """Gradients of these micro-batches; returns this process's part of the loss."""
        device = self.accelerator.device
        loss_of_step = torch.zeros((), device=device)
        for number, batch in enumerate(micro_batches, start=1):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with self.engine.micro_step(last=number == len(micro_batches)):
                loss = self.stage.compute_loss(self.engine.model, batch, items)
                self.engine.backward(loss)
            loss_of_step += loss.detach()
        return loss_of_step

    def _set_learning_rates(self) -> None:
        floor = self.arguments.min_learning_rate / self.arguments.learning_rate
        scale = cosine_scale(self.step, self.total_steps, self.warmup_steps, floor)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale

    def _update_average(self) -> None:
        if self.average:
            decay = self.arguments.ema_decay
            if self.arguments.ema_warmup:  # the average of few steps must not be ruled by the random initialisation
                decay = min(decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                get_ema_multi_avg_fn(decay)(self.average, self.engine.parameters, 0)

    def _skip_step(self, micro_batches: Sequence[Batch], items: int) -> None:
        """Leave the weights as they are; after too many such steps in a row, keep this one and raise."""
        self.engine.drop_gradients()
        if not self.guard.exhausted:
            return
        folder = step_directory(self.output_dir / "nonfinite", self.step + 1)
        loss, norm = self.guard.worst
        record = {"stage": self.stage.name, "step": self.step + 1, "items": items, "loss": str(loss)}
        record |= {"gradient_norm": str(norm), "mixed_precision": self.arguments.mixed_precision}
        counts = [self.stage.count_items(batch) for batch in micro_batches]
        keep_for_replay(folder, self.accelerator, self.savables(), micro_batches, counts, record)
        hint = f"; its batch can be looked at: python -m training.replay {folder}"
        raise self.guard.error(self.stage.name, self.step, hint)

    def _raise_if_not_finite(self) -> None:
        """For steps that were taken without looking: on a GPU, before logging and saving."""
        if distance := self.guard.find():
            hint = "; with --max_nonfinite_steps such steps are skipped"
            raise self.guard.error(self.stage.name, self.step - distance, hint)

    # --- what it tells ------------------------------------------------------------------------------------------------

    def _log(self, bar: Any) -> None:
        self._raise_if_not_finite()
        taken = max(self.window_steps, 1)  # all may have been skipped
        loss = self.accelerator.reduce(self.window_loss, reduction="sum").item() / taken
        seconds = time.perf_counter() - self._window_began
        rate = self.window_units / seconds
        values = {
            "step": self.step,
            "epoch": round(self.plan.epoch_at(self.step), 4),
            **({"loss": loss} if self.window_steps else {}),
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "grad_norm": self.grad_norm.item(),
            f"{self.stage.unit}_per_second": round(rate, 2),
            "seconds": round(self.train_seconds, 3),
            **self.window_tokens.describe(self.accelerator, taken, self.arguments.global_batch_size, seconds),
        }
        if self.guard.limit:
            values["nonfinite_steps"] = self.guard.skipped
        if self.accelerator.is_main_process:
            self.metrics.append(values)
            self.accelerator.log(values, self.step)
            shown = {"loss": f"{values.get('loss', math.nan):.4f}", "lr": f"{values['learning_rate']:.2e}"}
            rates = [unit for unit in ("tokens", "images") if f"{unit}_per_second" in values]
            shown |= {f"{unit}/s": f"{values[f'{unit}_per_second']:.0f}" for unit in rates}
            shown["peak"] = peak_memory(self.accelerator.device)
            bar.set_postfix(shown, refresh=False)
        self.window_loss = torch.zeros_like(self.window_loss)
        self.window_steps, self.window_units, self._window_began = 0, 0, time.perf_counter()
        self.window_tokens.reset()

    def _validation_is_due(self) -> bool:
        every = self.stage.validation_steps
        return self.stage.validate is not None and (
            self.step == self.total_steps or (every > 0 and self.step % every == 0)
        )

    def _validate(self) -> None:
        """Write a line of metrics.jsonl: how good the weights are that the run would end with.

        If that is their average the last weights are validated too, as the release does.
        """
        assert self.stage.validate is not None
        self._raise_if_not_finite()
        began = time.perf_counter()
        with self.engine.assigned(self.average):
            values = self.stage.validate(self.accelerator)
            if self.stage.write_answers:
                self.stage.write_answers(self.step)
        if self.average:
            last = self.stage.validate(self.accelerator)
            kept = [name for name in last if "_loss" in name or "_accuracy" in name]
            values |= {f"{name}_of_last_weights": last[name] for name in kept}
        if self.accelerator.is_main_process:
            epoch = round(self.plan.epoch_at(self.step), 4)
            self.metrics.append({"step": self.step, "epoch": epoch, **values})
            self.accelerator.log(values, self.step)
        self._window_began += time.perf_counter() - began  # the rate is that of training

    # --- save and resume ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `checkpoints/step-<step>`; every process must call it, the main one writes."""
        self._raise_if_not_finite()
        window_loss = self.accelerator.reduce(self.window_loss, reduction="sum")
        random_states = gather_object([get_random_state()])
        state = {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "parameter_names": self.freeze.trainable_names,
            "optimizer": self.engine.optimizer_state(),
            "average": self.engine.gathered(self.average),
            "random_states": random_states,
            "window": [window_loss.item(), self.window_steps, self.window_units],
            "nonfinite": self.guard.state(),
            "window_tokens": self.window_tokens.over_processes(self.accelerator),
        }
        savables = self.savables()
        if self.accelerator.is_main_process:
            self.metrics.synchronise()
            directory = step_directory(self.output_dir / "checkpoints", self.step)
            run = read_run(self.output_dir)
            if run is not None:
                run |= {"step": self.step, "train_seconds": round(self.train_seconds, 3)}
            save_checkpoint(directory, savables, state, self.arguments.save_total_limit, run)
        self.accelerator.wait_for_everyone()
        self._saved_step = self.step

    def savables(self) -> list[Savable]:
        """The model and what belongs to it, to be saved by the main process. Every process must call this."""
        return [self.engine.savable(self.stage.writer), *self.stage.companions]

    def resume(self, directory: Path) -> list[str]:
        """Continue from a verified checkpoint; returns warnings (what could not be restored).

        Raises `CheckpointError` when the checkpoint trained other parameters.
        """
        state = load_training_state(directory)
        if state["parameter_names"] != self.freeze.trainable_names:
            raise CheckpointError(
                f"checkpoint {directory} trained other parameters than this run; start a new output_dir"
            )
        self.engine.load(directory, state["optimizer"])
        self.engine.load_average(self.average, state["average"])
        self.step, self.train_seconds = state["step"], state["train_seconds"]
        self._saved_step = self.step
        self.guard.restore(state.get("nonfinite", (0, 0)))
        loss, self.window_steps, self.window_units = state["window"]
        # the sum over processes, kept by the main one only, so that reducing it again gives the same
        self.window_loss.fill_(loss if self.accelerator.is_main_process else 0.0)
        if self.accelerator.is_main_process:
            self.window_tokens.reset(state.get("window_tokens", (0, 0, 0, 0)))
            self.metrics.keep_until(self.step)
        return self._restore_random_state(state["random_states"])

    def _restore_random_state(self, random_states: Sequence[Mapping[str, Any]]) -> list[str]:
        if len(random_states) != self.accelerator.num_processes:
            return [
                f"warning: the checkpoint was written by {len(random_states)} process(es), now there are "
                f"{self.accelerator.num_processes}: dropout differs from the uninterrupted run"
            ]
        set_random_state(random_states[self.accelerator.process_index])
        return []

    def use_average(self) -> bool:
        """Put the averaged weights (EMA) into the model; False when none are kept."""
        self.engine.assign(self.average)
        return bool(self.average)
