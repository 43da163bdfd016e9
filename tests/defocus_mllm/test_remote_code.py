"""A saved checkpoint carries its own code: it loads and answers where this package is not installed."""

import subprocess
import sys

import torch

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
torch.save(model(**inputs).logits, output)
"""


def test_a_checkpoint_loads_without_the_package(model, processor, tmp_path):
    from PIL import Image

    checkpoint, output = tmp_path / "checkpoint", tmp_path / "logits.pt"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    finished = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(checkpoint), str(output)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    content = [{"type": "image", "image": Image.new("RGB", (20, 30), "red")}, {"type": "text", "text": "is it red?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(torch.load(output, weights_only=True), model(**inputs).logits)
