"""Two processes that share a model, split by tensor parallelism or FSDP2, compute what one process computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from defocus_mllm import DefocusConfig, DefocusForConditionalGeneration, DefocusVisionConfig

ROOT = Path(__file__).parents[2]
MIXERS = ("attention", "retention", "mamba")
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
MAMBA = {"state_size": 4, "time_step_rank": 3, "group_norm_size": 16}
TEXT = {"model_type": "llama", "vocab_size": 40, "initializer_range": 0.2, **SIZES, "num_attention_heads": 4}
RATE = 0.1

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from defocus_mllm import DefocusForConditionalGeneration

rate, *folders = sys.argv[1:]
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()

def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def load(folder, **options):
    config = DistributedConfig(**options)
    model = DefocusForConditionalGeneration.from_pretrained(folder, distributed_config=config)
    split = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)
             and any(placement.is_shard() for placement in parameter.placements)]
    return model.train(), {"split": split, "world_size": world_size}

def tensor_parallel(folder, batch):
    model, result = load(folder, tp_size=2, tp_plan="auto")
    loss = model(**batch).loss
    loss.backward()
    result["gradients"] = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        result["logits"] = model.eval()(**batch).logits
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        result["answer"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder + "/saved")
    return {**result, "loss": loss.detach()}

def fully_sharded(folder, batch):
    model, result = load(folder, fsdp_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rate))
    loss = model(**{name: tensor.chunk(world_size)[rank] for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    mean = loss.detach() / world_size
    dist.all_reduce(mean)
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return {**result, "loss": mean, "weights": weights}

for folder in folders:
    batch = torch.load(folder + "/batch.pt", weights_only=True)
    results = [tensor_parallel(folder, batch), fully_sharded(folder, batch)]
    torch.save(results, f"{folder}/result-{rank}.pt")
dist.destroy_process_group()
"""


def write_model(folder, mixer, **fields):
    """A model with a batch of two sequences, each of one image and four words, two of them supervised."""
    torch.manual_seed(0)
    vision = {"mixer": mixer, "image_size": 16, "patch_size": 8, "initializer_range": 0.2, **SIZES, **MAMBA}
    config = DefocusConfig(vision_config=DefocusVisionConfig(**vision), text_config=TEXT, **fields)
    model = DefocusForConditionalGeneration(config)
    model.save_pretrained(folder)
    ids = torch.randint(5, 40, (2, config.num_image_tokens + 4))
    ids[:, 1 : config.num_image_tokens + 1] = config.image_token_id
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 2, ids, -100)
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "labels": labels}
    torch.save(batch, folder / "batch.pt")
    return model, batch


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(root):
    """Name -> (model, batch), each in a folder of `root`."""
    made = {mixer: write_model(root / mixer, mixer) for mixer in MIXERS}
    return {**made, "linear": write_model(root / "linear", "attention", projector_type="linear")}


@pytest.fixture(scope="module")
def results(root, models):
    """Name -> what each of two processes computed, by tensor parallelism and by FSDP2."""
    (root / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(root / "script.py"), str(RATE), *(str(root / name) for name in models)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [torch.load(root / name / f"result-{rank}.pt", weights_only=True) for rank in (0, 1)] for name in models
    }


@pytest.mark.parametrize("name", [*MIXERS, "linear"])
def test_tensor_parallel_processes_compute_what_one_computes(models, results, name):
    model, batch = models[name]
    model.zero_grad()
    outputs = model.train()(**batch)
    outputs.loss.backward()
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    answer = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    for result, _ in results[name]:
        assert result["world_size"] == 2
        close(result["loss"], outputs.loss.detach())
        close(result["logits"], outputs.logits.detach())
        assert torch.equal(result["answer"], answer)
        for parameter, value in model.named_parameters():
            close(result["gradients"][parameter], value.grad)


def test_the_plan_splits_the_linear_layers_of_encoder_and_projector(results):
    before = {"attention": {"qkv"}, "retention": {"qkv", "gate"}, "mamba": {"in_proj"}}
    for mixer in MIXERS:
        split = set(results[mixer][0][0]["split"])
        mixing = {f"mixer.{name}.weight" for name in before[mixer] | {"out_proj"}}
        mlp = set() if mixer == "mamba" else {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"}
        assert {f"model.vision_tower.layers.1.{name}" for name in mixing | mlp} <= split
        assert {f"model.multi_modal_projector.linear_{number}.weight" for number in (1, 2)} <= split
        assert "model.language_model.layers.1.mlp.down_proj.weight" in split
        assert not [name for name in split if "norm" in name or "band_pass" in name or "embeddings" in name]


@pytest.mark.parametrize("name", MIXERS)
def test_a_model_split_over_processes_is_saved_whole(root, models, results, name):
    saved = DefocusForConditionalGeneration.from_pretrained(root / name / "saved").state_dict()
    assert (root / name / "saved" / "README.md").is_file()
    original = DefocusForConditionalGeneration.from_pretrained(root / name).state_dict()
    assert all(torch.equal(saved[parameter], value) for parameter, value in original.items())


@pytest.mark.parametrize("name", MIXERS)
def test_one_step_of_fully_sharded_processes_is_a_step_of_one(models, root, results, name):
    batch = models[name][1]
    model = DefocusForConditionalGeneration.from_pretrained(root / name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    for _, result in results[name]:
        assert result["world_size"] == 2
        assert {parameter for parameter, _ in model.named_parameters()} == set(result["split"])
        close(result["loss"], loss.detach())
        for parameter, value in model.named_parameters():
            close(result["weights"][parameter], value.detach())
