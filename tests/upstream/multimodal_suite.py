"""The common model tests of Transformers on the multimodal models, with each mixer."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from encoder_suite import EncoderTester
from stand_ins import GenerationTesterMixin, Suite, random_pixels  # before what it makes importable
from upstream_tests import test_modeling_common
from upstream_tests.test_configuration_common import ConfigTester
from upstream_tests.test_modeling_common import ModelTesterMixin

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusModel

IMAGE_TOKEN = 3
_any_ids = test_modeling_common.ids_tensor


def words(shape: Any, vocab_size: int, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What `ids_tensor` gives, but with another word for the placeholder (see `overrides.ADAPTED`)."""
    ids = _any_ids(shape, vocab_size, *args, **kwargs)
    return ids.masked_fill(ids == IMAGE_TOKEN, IMAGE_TOKEN - 1)


test_modeling_common.ids_tensor = words


class MultimodalTester:
    """Configuration and inputs of a tiny multimodal model with a Llama."""

    batch_size = 7  # as many as a common test wants: it would fill up with random words
    num_words = 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    image_token_id = IMAGE_TOKEN
    pad_token_id = 0
    is_training = True

    def __init__(self, mixer: str) -> None:
        self.encoder = EncoderTester(mixer)
        self.image_size = self.encoder.image_size
        self.vision_config = self.encoder.get_config().to_dict()
        self.text_config = {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": self.pad_token_id,
        }
        self.seq_length = self.encoder_seq_length = self.key_length = self.encoder.seq_length + self.num_words

    def get_config(self) -> DefocusConfig:
        return DefocusConfig(
            vision_config=self.vision_config, text_config=self.text_config, image_token_id=self.image_token_id
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[DefocusConfig, dict[str, Any]]:
        words = torch.randint(self.image_token_id + 1, self.vocab_size, (self.batch_size, self.num_words))
        placeholders = torch.full((self.batch_size, self.encoder.seq_length), self.image_token_id)
        input_ids = torch.cat([words[:, :1], placeholders, words[:, 1:]], dim=1)
        inputs = {
            "pixel_values": random_pixels(self.batch_size, self.image_size),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        return self.get_config(), inputs


class MultimodalSuite(Suite, ModelTesterMixin, GenerationTesterMixin):
    """What the multimodal models have in common."""

    mixer: str
    all_model_classes = (DefocusModel, DefocusForConditionalGeneration)
    additional_model_inputs = ("pixel_values",)
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = MultimodalTester(self.mixer)
        self.config_tester = ConfigTester(
            self, config_class=DefocusConfig, has_text_modality=False, common_properties=["image_token_id"]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _image_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return self.model_tester.num_hidden_layers if self.mixer == "attention" else 0

    def _image_features_get_expected_num_hidden_states(self, model_tester: Any = None) -> int:
        return self.model_tester.num_hidden_layers + 1


class AttentionMultimodalTest(MultimodalSuite, unittest.TestCase):
    mixer = "attention"


class RetentionMultimodalTest(MultimodalSuite, unittest.TestCase):
    mixer = "retention"


class MambaMultimodalTest(MultimodalSuite, unittest.TestCase):
    mixer = "mamba"
