"""A saved checkpoint carries its own code: it loads and answers where this package is not installed."""

import subprocess
import sys

import torch
from transformers import CLIPProcessor

from defocus_mllm import DefocusCLIPConfig, DefocusCLIPModel

SCRIPT = """
import sys
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

sys.modules["defocus_mllm"] = None  # importing the package fails
folder, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": Image.new("RGB", (20, 30), "red")}, {"type": "text", "text": "is it red?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(base).__name__ == "DefocusModel", type(base)
stream = model.open_stream(processor)
stream.push(inputs["pixel_values"])
stream.ask("is it red?", max_new_tokens=1)
torch.save(model(**inputs).logits, output)
"""

CLIP_SCRIPT = """
import sys
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

sys.modules["defocus_mllm"] = None  # importing the package fails
folder, output = sys.argv[1:]
model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "DefocusCLIPModel"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.new("RGB", (20, 30), "red")
torch.save(model(**processor(text=["is it red?"], images=[image], return_tensors="pt")).logits_per_image, output)
"""


def run_without_package(script, checkpoint, tmp_path):
    """What `script` saves, given `checkpoint`, in a Python that knows neither the package nor the current folder."""
    output = tmp_path / "output.pt"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    finished = subprocess.run(
        [sys.executable, "-I", "-c", script, str(checkpoint), str(output)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return torch.load(output, weights_only=True)


def test_a_checkpoint_loads_without_the_package(model, processor, tmp_path):
    from PIL import Image

    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    logits = run_without_package(SCRIPT, checkpoint, tmp_path)
    content = [{"type": "image", "image": Image.new("RGB", (20, 30), "red")}, {"type": "text", "text": "is it red?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(logits, model(**inputs).logits)


def test_a_contrastive_checkpoint_loads_without_the_package(model, processor, tmp_path):
    from PIL import Image

    text_config = {"model_type": "clip_text_model", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 320}
    config = DefocusCLIPConfig(
        vision_config=model.config.vision_config, text_config={**text_config, "bos_token_id": 1, "eos_token_id": 2}
    )
    clip, checkpoint = DefocusCLIPModel(config).eval(), tmp_path / "checkpoint"
    clip_processor = CLIPProcessor(processor.image_processor, processor.tokenizer)
    clip.save_pretrained(checkpoint)
    clip_processor.save_pretrained(checkpoint)
    logits = run_without_package(CLIP_SCRIPT, checkpoint, tmp_path)
    inputs = clip_processor(text=["is it red?"], images=[Image.new("RGB", (20, 30), "red")], return_tensors="pt")
    assert torch.allclose(logits, clip(**inputs).logits_per_image, rtol=1e-5)
