"""`transformers serve` on a saved model: OpenAI's protocol with images inside, from the checkpoint's own code."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs the serve extra: pip install -e '.[serve]'")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def server(model, processor, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and model name of a server that has never heard of this package."""
    checkpoint = tmp_path / "checkpoint"
    # Bytes that are no character yet are held back in a stream; this model would say little else.
    vocabulary = processor.tokenizer.get_vocab()
    model.generation_config.suppress_tokens = [index for token, index in vocabulary.items() if token.startswith("<0x")]
    for part in (model, processor):
        part.save_pretrained(checkpoint)
    port = free_port()
    command = [Path(sys.executable).with_name("transformers"), "serve", checkpoint, "--trust-remote-code"]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": ""}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = ""
        while "Uvicorn running" not in said:
            line = process.stdout.readline()
            assert line, f"the server has ended:\n{said[-2000:]}"
            said += line
        yield f"http://127.0.0.1:{port}/v1", str(checkpoint)
    finally:
        process.kill()
        process.communicate()


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def post(address: str, **body: Any) -> str:
    request = urllib.request.Request(
        address, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def streamed_text(events: str) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_requests_with_images_are_answered_as_by_generate(server, model, processor, image) -> None:
    address, name = server
    images = [image, Image.new("RGB", (20, 30), "blue")]
    text = {"type": "text", "text": "what color is the shape?"}
    for shown in (images[:1], images, []):
        urls = [{"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in shown]
        messages = [{"role": "user", "content": [*urls, text]}]
        body = {"model": name, "messages": messages, "max_tokens": 6, "temperature": 0}
        reply = json.loads(post(f"{address}/chat/completions", **body))

        content = [*({"type": "image", "image": picture} for picture in shown), text]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prompt = inputs["input_ids"].shape[1]
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, prompt:]
        expected = processor.decode(answer, skip_special_tokens=True)
        assert expected
        assert reply["choices"][0]["message"]["content"] == expected
        assert reply["usage"]["prompt_tokens"] == prompt
        assert streamed_text(post(f"{address}/chat/completions", **body, stream=True)) == expected
