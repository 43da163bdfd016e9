"""Two processes that share a contrastive batch learn exactly what one process with all of it does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from defocus_mllm import DefocusCLIPConfig, DefocusCLIPModel, DefocusVisionConfig

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PAIRS = 6

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from defocus_mllm import DefocusCLIPModel

folder = sys.argv[1]
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
model = DefocusCLIPModel.from_pretrained(folder, dtype=torch.float64).train()
batch = torch.load(folder + "/batch.pt", weights_only=True)
part = {name: tensor.chunk(world_size)[rank] for name, tensor in batch.items()}
wrapped = torch.nn.parallel.DistributedDataParallel(model)
loss = wrapped(**part, return_loss=True).loss
loss.backward()
mean = loss.detach() / world_size
dist.all_reduce(mean)
gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
uneven = {name: tensor[: 1 + rank] for name, tensor in part.items()}
try:
    model(**uneven, return_loss=True)
    message = "nothing"
except ValueError as error:
    message = str(error)
result = {"loss": mean, "gradients": gradients, "world_size": world_size, "uneven": message}
torch.save(result, f"{folder}/result-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(loss and gradients of one process, results of the two)."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    config = DefocusCLIPConfig(
        vision_config=DefocusVisionConfig(image_size=16, patch_size=8, **SIZES),
        text_config={"model_type": "clip_text_model", "vocab_size": 30, "eos_token_id": 2, "bos_token_id": 1, **SIZES},
        projection_dim=8,
    )
    model = DefocusCLIPModel(config)
    model.save_pretrained(folder)
    batch = {
        "pixel_values": torch.randn(PAIRS, 3, 16, 16, dtype=torch.float64),
        "input_ids": torch.randint(4, 30, (PAIRS, 7)),
        "attention_mask": (torch.arange(7) < torch.randint(2, 8, (PAIRS, 1))).long(),
    }
    torch.save(batch, folder / "batch.pt")
    model = DefocusCLIPModel.from_pretrained(folder, dtype=torch.float64).train()
    loss = model(**batch, return_loss=True).loss
    loss.backward()
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "script.py")]
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *words, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_loss_and_gradients_are_those_of_the_whole_batch(results):
    loss, gradients, shared = results
    for result in shared:
        assert result["world_size"] == 2  # a launcher that silently starts one process would pass all the rest
        assert abs(result["loss"] - loss) < 1e-12
        assert result["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            exact = 1e-9 if gradient.dtype == torch.float64 else 1e-6  # the filter stays in float32
            assert (result["gradients"][name] - gradient).abs().max() < 1e-12 + exact * gradient.abs().max(), name


def test_processes_with_different_numbers_of_pairs_are_told_so(results):
    assert [result["uneven"] for result in results[2]] == [
        "the processes have [1, 2] pairs; all processes need the same number of pairs"
    ] * 2
