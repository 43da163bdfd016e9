"""A tiny model that has learned some answers of easy-VQA by heart, so that its score is neither 0 nor 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from defocus_mllm import DefocusForConditionalGeneration, DefocusProcessor
from eval.samples import BenchmarkData, Sample

STEPS = 40


def learn(
    model: DefocusForConditionalGeneration, processor: DefocusProcessor, data: BenchmarkData, samples: Sequence[Sample]
) -> None:
    """Fit the model to the answers of `samples`."""
    batch = encode(processor, data.root, samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def encode(processor: DefocusProcessor, root: Path, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The conversations about `samples`; only what the assistant says is learned."""

    def tokens(count_answers: bool) -> dict[str, torch.Tensor]:
        conversations = [conversation(root, sample)[: 2 if count_answers else 1] for sample in samples]
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=not count_answers,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    batch, prompts = tokens(True), tokens(False)
    labels = torch.full_like(batch["input_ids"], -100)
    lengths = batch["attention_mask"].sum(dim=1) - prompts["attention_mask"].sum(dim=1)
    for row, length in enumerate(lengths.tolist()):
        labels[row, -length:] = batch["input_ids"][row, -length:]
    return {**batch, "labels": labels}


def conversation(root: Path, sample: Sample) -> list[dict]:
    """A question with its image, and the answer."""
    image = Image.open(root / sample.images[0]).convert("RGB")
    question = [{"type": "image", "image": image}, {"type": "text", "text": sample.question}]
    answer = [{"type": "text", "text": sample.target}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
