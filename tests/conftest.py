"""A tiny multimodal LLM with its processor, and the parts it is made of, for every test that needs one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from defocus_mllm import (
    DefocusConfig,
    DefocusForConditionalGeneration,
    DefocusImageProcessor,
    DefocusProcessor,
    DefocusVisionConfig,
)
from training.tokenizer import train_tokenizer

SENTENCES = ["what color is the shape?", "is there a red circle in the image?", "does the image contain it?"] * 20
ANSWERS = ["red", "blue", "yes", "no", "circle", "a blue rectangle"] * 20
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _indexes_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps indexes of conversations, also those that child processes make, out of the user's cache."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` writes when it opens a file out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(SENTENCES + ANSWERS, 320, folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def vision_config() -> DefocusVisionConfig:
    return DefocusVisionConfig(image_size=32, patch_size=8, num_registers=1, **SIZES)


@pytest.fixture
def processor(tokenizer, vision_config) -> DefocusProcessor:
    image_processor = DefocusImageProcessor(size={"height": 32, "width": 32})
    return DefocusProcessor(image_processor, tokenizer, num_image_tokens=vision_config.num_image_tokens)


@pytest.fixture
def model(tokenizer, vision_config) -> DefocusForConditionalGeneration:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # A wide initialisation makes random answers differ from question to question.
    text_config = {"model_type": "llama", "vocab_size": len(tokenizer), "initializer_range": 0.4, **SIZES, **ids}
    config = DefocusConfig(
        vision_config=vision_config, text_config=text_config, image_token_id=tokenizer.image_token_id
    )
    return DefocusForConditionalGeneration(config).eval()


@pytest.fixture
def image() -> Image.Image:
    picture = Image.new("RGB", (64, 48), "white")
    picture.paste((200, 30, 30), (10, 10, 30, 30))
    return picture
