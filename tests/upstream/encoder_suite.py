"""The common model tests of Transformers on the encoder and the classifier, with each mixer."""

from __future__ import annotations

import unittest
from typing import Any

from stand_ins import Suite, random_pixels  # before what it makes importable
from upstream_tests.test_configuration_common import ConfigTester
from upstream_tests.test_modeling_common import ModelTesterMixin

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig, DefocusVisionModel


class EncoderTester:
    """Configuration and inputs of a tiny encoder."""

    batch_size = 3
    image_size = 16
    patch_size = 4
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    num_labels = 3
    is_training = True

    def __init__(self, mixer: str) -> None:
        self.mixer = mixer
        self.seq_length = self.encoder_seq_length = self.key_length = self.get_config().num_image_tokens

    def get_config(self) -> DefocusVisionConfig:
        return DefocusVisionConfig(
            mixer=self.mixer,
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            state_size=4,
            time_step_rank=4,
            num_registers=1,
            num_labels=self.num_labels,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[DefocusVisionConfig, dict[str, Any]]:
        return self.get_config(), {"pixel_values": random_pixels(self.batch_size, self.image_size)}


class EncoderSuite(Suite, ModelTesterMixin):
    """What the encoders have in common."""

    mixer: str
    all_model_classes = (DefocusVisionModel, DefocusForImageClassification)
    test_resize_embeddings = False  # no words

    def setUp(self) -> None:
        self.model_tester = EncoderTester(self.mixer)
        self.config_tester = ConfigTester(self, config_class=DefocusVisionConfig, has_text_modality=False)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self) -> None:
        model = DefocusVisionModel(self.model_tester.get_config())
        assert model.get_input_embeddings() is model.embeddings.patch_embed
        assert DefocusForImageClassification(self.model_tester.get_config()).get_output_embeddings() is None


class AttentionEncoderTest(EncoderSuite, unittest.TestCase):
    mixer = "attention"


class RetentionEncoderTest(EncoderSuite, unittest.TestCase):
    mixer = "retention"
    has_attentions = False


class MambaEncoderTest(EncoderSuite, unittest.TestCase):
    mixer = "mamba"
    has_attentions = False
