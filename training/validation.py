"""How good a classifier is on pictures it does not learn from: accuracy and loss, over all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from defocus_mllm import DefocusForImageClassification
from training.batches import load_batches
from training.labelled_images import LabelledImageDataset

TOP = 5


class Validation:
    """Called with the accelerator, on every process alike: the metrics of `model` as it is now.

    Args:
        model: evaluated in evaluation mode, so without drop path, and left in the mode it was in.
        dataset: pictures with the labels the model was made for.
        samples: which of them.
        per_device_batch_size: pictures a process takes at once.
        num_workers: processes that prepare batches.
    """

    def __init__(
        self,
        model: DefocusForImageClassification,
        dataset: LabelledImageDataset,
        samples: Sequence[int],
        per_device_batch_size: int,
        num_workers: int = 0,
    ) -> None:
        self.model, self.dataset, self.samples = model, dataset, samples
        self.per_device_batch_size, self.num_workers = per_device_batch_size, num_workers

    def __call__(self, accelerator: Accelerator) -> dict[str, float]:
        """`validation_accuracy` from 0 to 1, `validation_loss`, the number of `validation_samples`.

        Accuracy is the share of pictures whose class has the highest logit or, of pictures with attributes, the share
        of known attributes that are told right. With more than 5 classes `validation_top5_accuracy` comes on top.
        """
        mine = self.samples[accelerator.process_index :: accelerator.num_processes]
        size = self.per_device_batch_size
        chunks = [mine[start : start + size] for start in range(0, len(mine), size)]
        counted = len(chunks)
        # processes that share the model call it equally often; the first one has the most to do
        chunks += [self.samples[:1]] * (-(-len(self.samples[:: accelerator.num_processes]) // size) - counted)
        batches = load_batches(self.dataset.batch, chunks, self.num_workers, accelerator.device.type == "cuda")
        sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        bar = tqdm(batches, "validation", len(chunks), leave=False, delay=2, disable=not accelerator.is_main_process)
        with evaluating(self.model), torch.no_grad():
            for number, batch in enumerate(bar):
                batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                with accelerator.autocast():
                    outputs = self.model(**batch)
                if number < counted:
                    sums += _sums(outputs.logits.float(), outputs.main_loss, batch["labels"])
        known, loss, right, among_top = accelerator.reduce(sums, reduction="sum").tolist()
        values = {"validation_accuracy": right / known, "validation_loss": loss / known}
        if self.dataset.labels.ndim == 1 and len(self.dataset.label_names) > TOP:
            values[f"validation_top{TOP}_accuracy"] = among_top / known
        return {**values, "validation_samples": len(self.samples)}


def _sums(logits: torch.Tensor, mean_loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(4,) float64: number of known labels, and over them the sum of losses, right ones, and ones among the top 5."""
    known = labels >= 0
    if labels.ndim == 1:
        order = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices == labels[:, None]
        right, among_top = order[:, 0], order.any(dim=-1)
    else:
        right = among_top = (logits > 0) == (labels == 1)
    count = known.sum()
    return torch.stack([count, mean_loss * count, (right & known).sum(), (among_top & known).sum()]).double()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module is put back into its own mode (frozen parts stay as they were) afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
