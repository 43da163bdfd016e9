"""What a run says it reads is what its batches hold."""

import torch
from accelerate import Accelerator

from training.token_counts import TokenCounts


def test_tokens_padding_answers_and_images_are_counted() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    counts, accelerator = TokenCounts(), Accelerator(cpu=True)
    counts.add([{"attention_mask": mask, "labels": labels, "pixel_values": torch.zeros(3, 3, 2, 2)}])
    counts.add([{"attention_mask": mask, "labels": labels}])
    counts.add([{"pixel_values": torch.zeros(9, 3, 2, 2), "labels": torch.tensor([1])}])  # no text
    assert counts.over_processes(accelerator) == [16, 4, 6, 3]
    assert counts.describe(accelerator, steps=2, global_batch_size=4, seconds=1.5) == {
        "samples_per_step": 4,
        "supervised_tokens_per_step": 3.0,
        "padding": 0.25,
        "tokens_per_second": 8.0,
        "images_per_second": 2.0,
    }
