"""How well stages 1 and 2 do on conversations they do not learn from: loss on answers, and a few answers to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from tqdm import tqdm

from training.arguments import MultimodalArguments
from training.bad_samples import BadSamples
from training.batches import Batch, load_batches
from training.conversations import ConversationDataset, SourceOptions, format_report, open_conversations
from training.encoding import IGNORED
from training.rehearsal import first_question
from training.run_record import MetricsFile
from training.stage import count_supervised
from training.stages import usable_samples
from training.supervision import ConversationCollator
from training.validation import evaluating

ANSWERS_FILE = "answers.jsonl"
NEW_TOKENS = 64
"""An answer is cut off after so many."""


class HeldOut:
    """Held-out conversations: called on every process alike, the loss of `model` on their answers as it is now.

    Args:
        model: evaluated in evaluation mode, and left in the mode it was in.
        compute_loss: (model, micro-batch, divisor) -> sum of the losses of its supervised tokens / divisor.
        dataset: the conversations; all of them are used.
        collate: makes batches of them, without a random order.
        arguments: of the run.
    """

    def __init__(
        self,
        model: Any,
        compute_loss: Callable[[nn.Module, Batch, int], torch.Tensor],
        dataset: ConversationDataset,
        collate: ConversationCollator,
        arguments: MultimodalArguments,
    ) -> None:
        self.model, self.compute_loss = model, compute_loss
        self.dataset, self.collate, self.arguments = dataset, collate, arguments
        count = min(arguments.validation_answers, len(dataset))
        self.answered = [number * len(dataset) // count for number in range(count)]

    def __call__(self, accelerator: Accelerator) -> dict[str, float]:
        """`validation_loss`, the mean over `validation_tokens` supervised tokens of `validation_samples`."""
        chunks = self._chunks(accelerator.process_index, accelerator.num_processes)
        workers, pin_memory = self.arguments.dataloader_num_workers, accelerator.device.type == "cuda"
        batches = load_batches(self._batch, chunks, workers, pin_memory)
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        bar = tqdm(batches, "validation", len(chunks), leave=False, delay=2, disable=not accelerator.is_main_process)
        with evaluating(self.model), torch.no_grad():
            for chunk, batch in zip(chunks, bar, strict=True):
                tokens = count_supervised(batch)
                batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                with accelerator.autocast():
                    loss = self.compute_loss(self.model, batch, 1)
                if chunk:  # others only keep step with the processes that share the weights
                    sums += torch.stack([loss.double(), torch.tensor(tokens, device=loss.device).double()])
        loss_sum, tokens = accelerator.reduce(sums, reduction="sum").tolist()
        return {
            "validation_loss": loss_sum / tokens,
            "validation_tokens": int(tokens),
            "validation_samples": len(self.dataset),
        }

    def _chunks(self, rank: int, processes: int) -> list[list[int]]:
        """Positions of each of this process's micro-batches; all processes have as many, the last may be empty."""
        most = max(1, self.arguments.global_batch_size // processes)
        size = min(self.arguments.per_device_batch_size or most, most)
        mine = list(range(len(self.dataset)))[rank::processes]
        longest = -(-len(self.dataset) // processes)
        return [mine[start : start + size] for start in range(0, longest, size)]

    def _batch(self, chunk: Sequence[int]) -> Batch:
        return self.collate([self.dataset[index] for index in chunk or [0]])

    def write_answers(self, step: int) -> None:
        """Answer a few first questions greedily and append a line each to answers.jsonl; on every process."""
        processor = self.collate.processor
        lines = []
        with evaluating(self.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for index in self.answered:
                example = self.collate.example(self.dataset[index])
                ids, pixels = first_question(processor, example, self.model)
                said = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    **pixels,
                )[0, ids.shape[1] :]
                rest = example["labels"][ids.shape[1] :]
                other = (rest == IGNORED).nonzero()
                expected = rest[: int(other[0])] if len(other) else rest
                words = {
                    "question": processor.tokenizer.decode(example["input_ids"][: ids.shape[1]]).replace(
                        processor.image_token * processor.num_image_tokens, processor.image_token
                    ),
                    "answer": processor.tokenizer.decode(said, skip_special_tokens=True),
                    "expected": processor.tokenizer.decode(expected, skip_special_tokens=True),
                }
                lines.append({"step": step, "record": self.dataset[index].record, **words})
        if PartialState().is_main_process:
            file = MetricsFile(self.arguments.output_dir, ANSWERS_FILE)
            file.keep_until(step - 1)  # a resumed run writes them again
            for line in lines:
                file.append(line)

    def describe(self) -> str:
        """Lines for the log."""
        cut = self.collate.counts["over_max_length"]
        return f"held out: {format_report(self.dataset.report)}\nheld out: {cut} pairs are over max_length"


def open_held_out(
    model: Any,
    processor: Any,
    compute_loss: Callable[[nn.Module, Batch, int], torch.Tensor],
    arguments: MultimodalArguments,
) -> HeldOut | None:
    """What `validation_data` names, looked at as the training data is; None if it names nothing.

    Raises `ValueError` or `FileNotFoundError` naming the first conversation that cannot be used, whatever
    `on_bad_sample` says: a loss over fewer of them could not be compared.
    """
    if not arguments.validation_data:
        return None
    options = SourceOptions(
        arguments.validation_data,
        arguments.validation_image_root or arguments.image_root,
        repair=arguments.repair,
        follow_links=arguments.follow_links,
        any_extension=arguments.any_image_extension,
        cache=arguments.index_cache,
    )
    dataset = open_conversations([options], BadSamples())
    collate = ConversationCollator(processor, max_length=arguments.max_length)

    def load_one(index: int) -> None:
        try:
            collate.example(dataset[index])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"validation_data: {dataset[index].source}: {error}") from error

    usable_samples(len(dataset), arguments.check_images, load_one, "raise")
    return HeldOut(model, compute_loss, dataset, collate, arguments)
