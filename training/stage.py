"""What a stage of training is to the loop: a model, its data, its loss, and what is told about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from training.bad_samples import BadSamples
from training.batches import Batch
from training.checkpointing import Savable
from training.encoding import IGNORED
from training.freezing import Components
from training.sampling import BatchPlan, MicroBatchSampler, StepSampler


@dataclass
class Stage:
    """What a stage gives to the loop; everything else is the same for all."""

    name: str
    """Its section of a recipe, such as `stage0_vision`."""
    model: nn.Module
    companions: list[Savable]
    """Saved beside the model: its processor, image processor or tokenizer."""
    components: Components
    """Component name -> modules, for the freeze table."""
    num_samples: int
    """Size of the training set."""
    load_batch: Callable[[Any], Batch]
    """What `sampler` gives, made a micro-batch on the CPU; depends on nothing else, since it may run in a worker."""
    count_items: Callable[[Batch], int]
    """Number of supervised items in a micro-batch."""
    compute_loss: Callable[[nn.Module, Batch, int], torch.Tensor]
    """(model, micro-batch, supervised items of the whole step) -> sum of the items' losses / items of the step."""
    train: Sequence[str] = ()
    """Components that learn; empty: all."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Component -> peak learning rate of its own."""
    writer: Savable | None = None
    """Saves the model, where it does not do so itself: the adapter in it, without the rest."""
    bad_samples: BadSamples = field(default_factory=BadSamples)
    """Hears of samples that cannot be used when `count_items` is called; the loop lets the processes share that."""
    unit: str = "images"
    """What the rate counts: "images" (samples) or "tokens"; where text is read, `TokenCounts` tells both instead."""
    sampler: Callable[[BatchPlan, int, int, int], StepSampler[Any]] = MicroBatchSampler
    """(plan, first step, number of steps, rank) -> what each micro-batch is made of: keys, or samples of a stream."""
    repeats: int = 1
    """Visits to a sample in a row, see `BatchPlan.repeats`."""
    begin_epoch: Callable[[int, int], None] | None = None
    """Called with (epoch, number of epochs) before the first step of each epoch."""
    validate: Callable[[Accelerator], dict[str, float]] | None = None
    """Metrics of the model as it is, for metrics.jsonl; called on every process, and leaves no trace."""
    write_answers: Callable[[int], None] | None = None
    """Called with the number of finished steps after each validation, on every process: answers to be read."""
    validation_steps: int = 0
    """Steps between calls of `validate`, which also follows the last step; 0: only then."""
    try_out: Callable[[nn.Module], tuple[torch.Tensor, str]] | None = None
    """Logits of one sample and a few generated tokens, of the model given: what a loaded checkpoint is held against."""
    estimate_activations: Callable[[int], int] | None = None
    """Samples in a micro-batch -> bytes of what its forward pass keeps for the backward pass, estimated."""
    sample_text: str = ""
    """One sample with its supervised span, printed before step 0."""
    describe_plan: Callable[[BatchPlan, int], str] | None = None
    """(plan, number of steps) -> what else is said about them before step 0, such as how much of them is padding."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else `run.json` should hold, such as the data set's report."""
    begin: Callable[[], None] | None = None
    """Called on every process when training begins, which a rehearsal does not."""
    conclude: Callable[[], dict[str, Any]] | None = None
    """Called on every process after the last step: what else `run.json` should hold, such as what was skipped."""


def count_supervised(batch: Batch) -> int:
    """Tokens the model is asked to predict: labels other than -100, without the first position."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
