"""What is trained: every component, every combination, and the parameters that get no weight decay."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig
from training.freezing import apply_freezing, has_weight_decay


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.LayerNorm(4))
        self.bridge = nn.Linear(4, 4)
        self.tongue = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.tongue.weight

    def components(self) -> dict[str, list[nn.Module]]:
        return {"eye": [self.eye], "bridge": [self.bridge], "tongue": [self.tongue, self.head]}


COMBINATIONS = [
    list(chosen) for size in (1, 2, 3) for chosen in itertools.combinations(("eye", "bridge", "tongue"), size)
]


@pytest.mark.parametrize("train", COMBINATIONS, ids="+".join)
def test_exactly_the_named_components_learn(train: list[str]) -> None:
    model = Toy()
    components = model.components()
    plan = apply_freezing(model, components, train, learning_rate=1e-3, weight_decay=0.1)
    expected = {id(p) for name in train for module in components[name] for p in module.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    optimized = [id(p) for group in plan.optimizer_groups for p in group["params"]]
    assert set(optimized) == expected
    assert len(optimized) == len(expected)  # a tied weight is updated once
    assert plan.total_parameters == sum(p.numel() for p in model.parameters())
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_frozen_modules_stay_in_evaluation_mode() -> None:
    model = Toy()
    plan = apply_freezing(model, model.components(), ["bridge"], 1e-3, 0.0)
    plan.set_training_mode(model)
    assert model.bridge.training
    assert not any(module.training for module in model.eye.modules())


def test_own_learning_rate_and_table() -> None:
    model = Toy()
    plan = apply_freezing(model, model.components(), ["eye", "bridge"], 1e-3, 0.1, {"eye": 5e-5})
    rates = {name: group["lr"] for group in plan.optimizer_groups for name in group["names"]}
    assert rates["eye.0.weight"] == 5e-5
    assert rates["bridge.weight"] == 1e-3
    table = plan.table().splitlines()
    assert any(line.startswith("tongue") and "frozen" in line for line in table)
    assert table[-1].split()[1:] == [f"{plan.total_parameters:,}", f"{plan.trainable_parameters:,}"]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.mlp.weight", (4, 4), True),
        ("layers.0.mlp.bias", (4,), False),
        ("layers.0.mixer.in_proj_bias", (4, 4), False),
        ("norm.weight", (4,), False),
        ("mixer.decay", (4, 4), False),
        ("mixer.filter.theta", (4, 4), False),
        ("mixer.A_log", (4, 4), False),
        ("mixer.D", (4, 4), False),
        ("mixer.Dense", (4, 4), True),
        ("mixer.lambda_hat", (4, 4), False),
        ("embeddings.cls_token", (1, 1, 4), True),
    ],
)
def test_weight_decay_spares_the_filter(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert has_weight_decay(name, torch.zeros(shape)) is expected


# What decays of each mixer; all else of an encoder and its heads must not. Source: papers.md A8.
DECAYED_IN_BLOCKS = {
    "attention": {"mixer.qkv.weight", "mixer.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"},
    "retention": {
        *("mixer.qkv.weight", "mixer.gate.weight", "mixer.out_proj.weight"),
        *("mlp.fc1.weight", "mlp.fc2.weight"),
    },
    "mamba": {
        *("mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight"),
        "mixer.out_proj.weight",
    },
}


@pytest.mark.parametrize(
    ("mixer", "decay"),
    [("attention", "learnable"), ("retention", "learnable"), ("mamba", "learnable"), ("mamba", "data_dependent")],
)
@pytest.mark.parametrize("decay_class_token", [True, False])
def test_weight_decay_of_every_parameter_of_each_mixer(mixer: str, decay: str, decay_class_token: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = DefocusVisionConfig(
        mixer=mixer, decay=decay, image_size=16, patch_size=8, num_registers=1, head_type="mlp", num_labels=3, **sizes
    )
    model = DefocusForImageClassification(config)
    components = {"encoder": [model.encoder], "heads": [model.head, model.head2]}
    plan = apply_freezing(model, components, ["encoder", "heads"], 1e-3, 0.1, decay_class_token=decay_class_token)
    decayed = {name for group in plan.optimizer_groups if group["weight_decay"] for name in group["names"]}
    expected = {f"encoder.layers.0.{name}" for name in DECAYED_IN_BLOCKS[mixer]}
    expected |= {"encoder.embeddings.patch_embed.weight", "encoder.embeddings.register_tokens"}
    expected |= {f"{head}.{layer}.weight" for head in ("head", "head2") for layer in ("fc1", "fc2")}
    if decay_class_token:
        expected |= {"encoder.embeddings.cls_token", "encoder.embeddings.pos_embed"}
    assert decayed == expected


def test_mistakes_are_named() -> None:
    model = Toy()
    with pytest.raises(ValueError, match="unknown component 'nose'"):
        apply_freezing(model, model.components(), ["nose"], 1e-3, 0.0)
    with pytest.raises(ValueError, match="nothing to train"):
        apply_freezing(model, model.components(), [], 1e-3, 0.0)
    with pytest.raises(ValueError, match=r"parameter bridge\.weight belongs to no component"):
        apply_freezing(model, {"eye": [model.eye], "tongue": [model.tongue]}, ["eye"], 1e-3, 0.0)
