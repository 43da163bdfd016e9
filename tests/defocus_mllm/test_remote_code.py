"""A saved checkpoint carries its own code: it loads, answers and saves again where this package is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPProcessor
from transformers.dynamic_module_utils import get_relative_import_files

from defocus_mllm import (
    DefocusBackbone,
    DefocusCLIPConfig,
    DefocusCLIPModel,
    DefocusForImageClassification,
    DefocusImageProcessor,
    DefocusVisionModel,
)
from training.checkpointing import save_checkpoint

MULTIMODAL_MAP = {
    "AutoConfig": "configuration_defocus.DefocusConfig",
    "AutoModel": "modeling_defocus.DefocusModel",
    "AutoModelForImageTextToText": "modeling_defocus.DefocusForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_defocus.DefocusForConditionalGeneration",
}
VISION_MAP = {
    "AutoConfig": "configuration_defocus.DefocusVisionConfig",
    "AutoBackbone": "modeling_defocus_backbone.DefocusBackbone",
    "AutoModel": "modeling_defocus_vision.DefocusVisionModel",
    "AutoModelForImageClassification": "modeling_defocus_vision.DefocusForImageClassification",
}
CLIP_MAP = {
    "AutoConfig": "configuration_defocus_clip.DefocusCLIPConfig",
    "AutoModel": "modeling_defocus_clip.DefocusCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_defocus_clip.DefocusCLIPModel",
}
IMAGE_PROCESSOR = {"AutoImageProcessor": "image_processing_defocus.DefocusImageProcessor"}

PREAMBLE = """
import sys
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText,
    AutoModelForMultimodalLM, AutoModelForZeroShotImageClassification, AutoProcessor,
)

sys.modules["defocus_mllm"] = None  # importing the package fails
folder, copy, output = sys.argv[1:]
image = Image.new("RGB", (20, 30), "red")

def load(auto_class, name):
    loaded = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__name__ == name, type(loaded)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    return loaded
"""

ANSWER = (
    PREAMBLE
    + """
model = load(AutoModelForImageTextToText, "DefocusForConditionalGeneration").eval()
load(AutoModelForMultimodalLM, "DefocusForConditionalGeneration")
load(AutoImageProcessor, "DefocusImageProcessor")
processor = load(AutoProcessor, "DefocusProcessor")
content = [{"type": "image", "image": image}, {"type": "text", "text": "is it red?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
)
base = load(AutoModel, "DefocusModel")
try:
    base.generate(**inputs)
except AttributeError as error:
    assert "AutoModelForImageTextToText" in str(error), error
else:
    raise AssertionError("a model without an output layer generates")
stream = model.open_stream(processor)
stream.push(inputs["pixel_values"])
stream.ask("is it red?", max_new_tokens=1)
with torch.no_grad():
    logits, answer = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
model.save_pretrained(copy)
processor.save_pretrained(copy)
torch.save([logits, answer], output)
"""
)

CLASSIFY = (
    PREAMBLE
    + """
model = load(AutoModelForImageClassification, "DefocusForImageClassification").eval()
load(AutoModel, "DefocusVisionModel")
processor = load(AutoImageProcessor, "DefocusImageProcessor")
with torch.no_grad():
    logits = model(**processor(image, return_tensors="pt")).logits
model.save_pretrained(copy)
processor.save_pretrained(copy)
torch.save([logits], output)
"""
)

COMPARE = (
    PREAMBLE
    + """
model = load(AutoModelForZeroShotImageClassification, "DefocusCLIPModel").eval()
load(AutoModel, "DefocusCLIPModel")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(copy)
processor.save_pretrained(copy)
torch.save([model(**processor(text=["is it red?"], images=[image], return_tensors="pt")).logits_per_image], output)
"""
)


def run_without_package(script: str, checkpoint: Path, copy: Path) -> list[torch.Tensor]:
    """What `script` outputs, given `checkpoint`, in a Python that knows neither the package nor the current folder."""
    folder = copy.with_name(f"{copy.name}-process")
    folder.mkdir()
    environment = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    finished = subprocess.run(
        [sys.executable, "-I", "-c", script, str(checkpoint), str(copy), str(folder / "output.pt")],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return torch.load(folder / "output.pt", weights_only=True)


def assert_carries_its_code(folder: Path, auto_map: dict[str, str], name: str = "config.json") -> None:
    """The file `name` names the classes of `auto_map`, and all code that these need lies beside it."""
    saved = json.loads((folder / name).read_text())["auto_map"]
    assert saved == auto_map
    for reference in saved.values():
        module, class_name = reference.split(".")
        path = folder / f"{module}.py"
        assert f"class {class_name}(" in path.read_text()
        for needed in get_relative_import_files(str(path)):
            assert Path(needed).is_file(), f"{needed} did not travel"


def save(folder: Path, *savables) -> Path:
    for savable in savables:
        savable.save_pretrained(folder)
    return folder


def lora_merged(model):
    return get_peft_model(model, LoraConfig(target_modules="all-linear")).merge_and_unload()


def image_processor() -> DefocusImageProcessor:
    return DefocusImageProcessor(size={"height": 32, "width": 32})


@pytest.mark.parametrize("change", [lambda model: model, lora_merged, lambda model: model.model])
def test_a_multimodal_checkpoint_carries_its_code(change, model, processor, tmp_path):
    folder = save(tmp_path / "checkpoint", change(model), processor)
    assert_carries_its_code(folder, MULTIMODAL_MAP)
    processor_map = {"AutoProcessor": "processing_defocus.DefocusProcessor"}
    assert_carries_its_code(folder, processor_map, "processor_config.json")
    nested = json.loads((folder / "processor_config.json").read_text())["image_processor"]["auto_map"]
    assert nested.items() >= IMAGE_PROCESSOR.items()
    assert (folder / "image_processing_defocus.py").is_file()


@pytest.mark.parametrize("model_class", [DefocusVisionModel, DefocusForImageClassification, DefocusBackbone])
def test_a_checkpoint_of_the_encoder_carries_its_code(model_class, vision_config, tmp_path):
    folder = save(tmp_path / "checkpoint", model_class(vision_config), image_processor())
    assert_carries_its_code(folder, VISION_MAP)
    assert_carries_its_code(folder, IMAGE_PROCESSOR, "preprocessor_config.json")


def test_a_checkpoint_of_a_training_carries_its_code(model, processor, tmp_path):
    folder = save_checkpoint(tmp_path / "checkpoints" / "step-000001", [model, processor], {"step": 1})
    assert_carries_its_code(folder, MULTIMODAL_MAP)
    assert_carries_its_code(folder, {"AutoProcessor": "processing_defocus.DefocusProcessor"}, "processor_config.json")


def test_a_checkpoint_and_its_copy_answer_without_the_package(model, processor, tmp_path):
    checkpoint, copy, copy_of_copy = (tmp_path / name for name in ("checkpoint", "copy", "copy-of-copy"))
    save(checkpoint, model, processor)
    content = [{"type": "image", "image": Image.new("RGB", (20, 30), "red")}, {"type": "text", "text": "is it red?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits, answer = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for source, target in ((checkpoint, copy), (copy, copy_of_copy)):
        remote_logits, remote_answer = run_without_package(ANSWER, source, target)
        assert torch.equal(remote_logits, logits)
        assert torch.equal(remote_answer, answer)
    assert_carries_its_code(copy_of_copy, MULTIMODAL_MAP)


def test_a_classifier_and_its_copy_load_without_the_package(vision_config, tmp_path):
    classifier, checkpoint, copy = (
        DefocusForImageClassification(vision_config).eval(),
        tmp_path / "checkpoint",
        tmp_path / "copy",
    )
    save(checkpoint, classifier, image_processor())
    (logits,) = run_without_package(CLASSIFY, checkpoint, copy)
    pixels = image_processor()(Image.new("RGB", (20, 30), "red"), return_tensors="pt")
    assert torch.equal(logits, classifier(**pixels).logits)
    assert_carries_its_code(copy, VISION_MAP)
    assert_carries_its_code(copy, IMAGE_PROCESSOR, "preprocessor_config.json")


def test_a_contrastive_checkpoint_loads_without_the_package(model, processor, tmp_path):
    text_config = {"model_type": "clip_text_model", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 320}
    config = DefocusCLIPConfig(
        vision_config=model.config.vision_config, text_config={**text_config, "bos_token_id": 1, "eos_token_id": 2}
    )
    clip, checkpoint, copy = DefocusCLIPModel(config).eval(), tmp_path / "checkpoint", tmp_path / "copy"
    clip_processor = CLIPProcessor(processor.image_processor, processor.tokenizer)
    save(checkpoint, clip, clip_processor)
    assert_carries_its_code(checkpoint, CLIP_MAP)
    (logits,) = run_without_package(COMPARE, checkpoint, copy)
    inputs = clip_processor(text=["is it red?"], images=[Image.new("RGB", (20, 30), "red")], return_tensors="pt")
    assert torch.allclose(logits, clip(**inputs).logits_per_image, rtol=1e-5)
    assert_carries_its_code(copy, CLIP_MAP)
