"""The common tests of Transformers on the image processor and the processor."""

from __future__ import annotations

import tempfile
import unittest
from typing import Any

from stand_ins import Suite  # before what it makes importable
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from upstream_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from upstream_tests.test_processing_common import ProcessorTesterMixin

from defocus_mllm import DEFAULT_CHAT_TEMPLATE, DefocusImageProcessor, DefocusProcessor
from training.tokenizer import train_tokenizer

SENTENCES = ["lower newer", "what color is the shape in the image?", "what is shown in this image?"] * 20


class DefocusImageProcessingTester(ImageProcessingTester):
    """Sizes of the pictures and of what becomes of them."""

    def __init__(self, parent: unittest.TestCase, **kwargs: Any) -> None:
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": DefocusImageProcessor}


class ImageProcessorTest(Suite, ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = DefocusImageProcessingTester

    def test_new_models_require_torchvision_backend(self) -> None:
        assert list(self.image_processing_classes) == ["pil"]


class ProcessorTest(Suite, ProcessorTesterMixin, unittest.TestCase):
    processor_class = DefocusProcessor

    @classmethod
    def _setup_tokenizer(cls) -> PreTrainedTokenizerBase:
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(SENTENCES, 320, f"{folder}/tokenizer")
            return AutoTokenizer.from_pretrained(f"{folder}/tokenizer")

    @classmethod
    def _setup_image_processor(cls) -> DefocusImageProcessor:
        return DefocusImageProcessor(size={"height": 16, "width": 16})

    @classmethod
    def _get_component_class_from_processor(cls, attribute: str, use_fast: bool = True) -> type:
        return {"image_processor": DefocusImageProcessor, "tokenizer": AutoTokenizer}[attribute]

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"num_image_tokens": 5, "chat_template": DEFAULT_CHAT_TEMPLATE}
