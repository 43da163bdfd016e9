"""TRL's `SFTTrainer` on chats with images: only answers are learned from, and they are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.import_utils import _is_package_available

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration
from defocus_mllm.adapters import add_lora, load_adapter

if not _is_package_available("trl")[0]:
    pytest.skip("needs the trl extra: pip install -e '.[trl]'", allow_module_level=True)

from trl import SFTConfig, SFTTrainer

IMAGES_OF_ROW = ((1, "what color is the shape?", "red"), (2, "is there a red circle in the image?", "no"))


def rows(kind: str) -> list[dict[str, Any]]:
    """Chats with one and with two images, in the format `kind`; "parts" writes the places of the images down."""
    made = []
    for count, question, answer in IMAGES_OF_ROW * 2:
        images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")[:count]]
        content: Any = question
        if kind == "parts":
            content = [*({"type": "image", "text": None} for _ in images), {"type": "text", "text": question}]
            answer = [{"type": "text", "text": answer}]
        asked, answered = [{"role": "user", "content": content}], [{"role": "assistant", "content": answer}]
        chat = {"prompt": asked, "completion": answered} if kind == "prompt" else {"messages": asked + answered}
        made.append({"images": images, **chat})
    return made


def trainer(model: Any, processor: Any, folder: Path, kind: str = "text", **options: Any) -> SFTTrainer:
    options = {"max_steps": 10, "learning_rate": 3e-3, "assistant_only_loss": True, **options}
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_length=None,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    dataset = datasets.Dataset.from_list(rows(kind))
    return SFTTrainer(model, arguments, train_dataset=dataset, processing_class=processor)


def losses(trained: SFTTrainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trained.state.log_history if "loss" in entry])


@pytest.mark.parametrize("kind", ["text", "parts", "prompt"])
def test_labels_are_the_answers_alone(kind, model, processor, tmp_path, datasets_cache) -> None:
    run = trainer(model, processor, tmp_path, kind, assistant_only_loss=kind != "prompt")
    (batch,) = run.get_train_dataloader()
    labels, ids = batch["labels"], batch["input_ids"]
    assert (ids == processor.image_token_id).sum() == 6 * processor.num_image_tokens
    assert not (labels == processor.image_token_id).any()
    eos = processor.tokenizer.eos_token
    answers = sorted(processor.decode(row[row != -100]) for row in labels)
    assert answers == sorted(f"{answer}{eos}" for _, _, answer in IMAGES_OF_ROW * 2)


def test_ten_steps_learn(model, processor, tmp_path, datasets_cache) -> None:
    run = trainer(model, processor, tmp_path)
    run.train()
    course = losses(run)
    assert len(course) == 10
    assert course.isfinite().all()
    assert course[-1] < 0.7 * course[0]


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_trained_and_comes_back(tied, model, processor, tmp_path, datasets_cache) -> None:
    model.config.text_config.tie_word_embeddings = tied
    for part in (DefocusForConditionalGeneration(DefocusConfig(**model.config.to_dict())), processor):
        part.save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    run = trainer(add_lora(base, processor, vision=True), processor, tmp_path)
    run.train()
    course = losses(run)
    assert course.isfinite().all()
    assert course[-1] < 0.9 * course[0]
    run.save_model(str(tmp_path / "adapter"))
    (batch,) = run.get_train_dataloader()
    with torch.no_grad():
        after = run.model.eval()(**batch).logits
        loaded = load_adapter(tmp_path / "adapter")(**batch).logits
    torch.testing.assert_close(loaded, after, atol=1e-4, rtol=1e-5)
    assert AutoProcessor.from_pretrained(tmp_path / "adapter").num_image_tokens == processor.num_image_tokens
