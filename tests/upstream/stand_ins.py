"""What the common tests import from files that the source distribution lacks, and what all suites share.

Import this module first: it makes the stand-ins importable and enters our classes in the tables of names by which the
common tests decide what a class is (whether it takes labels, for one).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from overrides import OVERRIDES
from PIL import Image
from transformers.models.auto import modeling_auto

import defocus_mllm  # noqa: F401 - registers the classes

PACKAGE = "upstream_tests"


class ExportTesterMixin:
    """Stands for tests/exporters/test_export.py, which is not published."""


class GenerationTesterMixin:
    """Stands for tests/generation/test_utils.py, which is not published; a suite must only inherit from it."""


def url_to_local_path(url: str, *_: Any, **__: Any) -> str:
    """A picture of noise in place of the one at `url`; other addresses come back as they are."""
    if not url.lower().endswith((".png", ".jpg", ".jpeg")):
        return url
    path = Path(tempfile.gettempdir()) / "defocus_upstream_picture.png"
    if not path.exists():
        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(path)


def _install(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def _install_all() -> None:
    for name in ("exporters", "generation", "utils"):
        _install(f"{PACKAGE}.{name}", __path__=[])
    _install(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    _install(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    # Fields with which ConfigTester builds a configuration, to see that it keeps them.
    common_fields = {"output_hidden_states": True, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    _install(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=common_fields)
    _install("fetch_hub_objects_for_ci", url_to_local_path=url_to_local_path)
    modeling_auto.MODEL_MAPPING_NAMES.update(defocus="DefocusModel", defocus_vision="DefocusVisionModel")
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["defocus_vision"] = "DefocusForImageClassification"
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["defocus"] = "DefocusForConditionalGeneration"


_install_all()


class Suite:
    """A class of common tests applied to ours; what it replaces must stand in `OVERRIDES`.

    Raises:
        TypeError: (when a suite is defined) a test is replaced without a reason.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        own = {name for name in vars(cls) if name.startswith("test_") and callable(getattr(cls, name))}
        for name in own & {name for base in cls.__mro__[1:] for name in vars(base)} - set(OVERRIDES):
            raise TypeError(f"{cls.__name__} replaces {name}: give the reason in overrides.py")
        super().__init_subclass__(**kwargs)


def random_pixels(batch: int, size: int) -> torch.Tensor:
    """(batch, 3, size, size), normally distributed."""
    return torch.randn(batch, 3, size, size)
