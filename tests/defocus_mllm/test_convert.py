"""Released weights in and out: the same function, the same bits, and nothing written when anything is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from defocus_mllm import DefocusForImageClassification, DefocusVisionConfig, cli
from defocus_mllm.convert import convert_released, convert_to_released
from defocus_mllm.loading import CheckpointError, load_strictly

sys.path.insert(0, str(Path(__file__).parent))
from released_reference import Sizes, Tensors, forward, random_pixels, random_state_dict, release_config

ORACLE = Path(__file__).resolve().parents[2].parent / "shared" / "oracles" / "defocus_mamba_in1k.safetensors"
TOLERANCE = 1e-4

NETWORKS = {
    "as released": Sizes(),
    "22k head, one of them, scaled": Sizes(mlp=True, two_heads=False, delta_scale=2.0, rope_scale=4.0, patch=8),
    "wide and shallow": Sizes(
        hidden=10, depth=1, inner=64, states=2, rank=1, kernel=5, channels=1, group_norm=64, norm_eps=0.1
    ),
    "mean of the tokens, positions": Sizes(class_token=False, two_heads=False, positions=True),
    "sections with positions": Sizes(sections=True, positions=True, delta_scale=1.5, rope_scale=2.0),
    "no rotary, no group norm": Sizes(rotary=False, states=3, group_norm=0, classes=2, kernel=1),
}


def outputs_of(model: DefocusForImageClassification, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Residual stream after every block, final tokens and logits of both heads."""
    results: dict[str, torch.Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, inputs, output: results.__setitem__(name, output)

    for index, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(record(f"block_{index}"))
    model.encoder.norm.register_forward_hook(record("last_hidden_state"))
    with torch.no_grad():
        output = model.eval()(pixels)
    results["logits"] = output.logits
    if output.aux_logits is not None:
        results["aux_logits"] = output.aux_logits
    return results


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    return {name: (found[name].double() - expected[name].double()).abs().max().item() for name in found}


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def save_released(path: Path, sizes: Sizes, tensors: Tensors, **more: Any) -> Path:
    torch.save({"model": tensors, "config": release_config(sizes), **more}, path)
    return path


def test_the_oracle_is_reproduced_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    if not ORACLE.is_file():
        pytest.skip(f"{ORACLE} is absent (outputs of the released code); the networks below stand in for it")
    convert_released(ORACLE, tmp_path / "model", {"image_size": 64})
    convert_to_released(tmp_path / "model", tmp_path / "back.safetensors")
    oracle = load_file(ORACLE)
    model = load_strictly(AutoModelForImageClassification, tmp_path / "model")
    expected = {f"block_{index}": oracle[f"expected.block_{index}"] for index in range(2)}
    expected["last_hidden_state"] = oracle["expected.last_hidden_state"]
    *patches, token = oracle["expected.logits_all_tokens"].unbind(dim=1)
    expected |= {"logits": token, "aux_logits": torch.stack(patches, dim=1)}
    differences = largest_difference(outputs_of(model, oracle["pixel_values"]), expected)
    print(
        "\nlargest absolute difference from the released code: "
        f"{max(differences.values()):.1e} " + str({name: f"{value:.1e}" for name, value in differences.items()})
    )
    assert max(differences.values()) <= TOLERANCE
    prefix = "state_dict."
    released = {name.removeprefix(prefix): tensor for name, tensor in oracle.items() if name.startswith(prefix)}
    assert_same_bits(load_file(tmp_path / "back.safetensors"), released)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_computes_what_the_released_one_does(name: str, tmp_path: Path) -> None:
    sizes = NETWORKS[name]
    tensors = random_state_dict(sizes)
    save_released(tmp_path / "released.pth", sizes, tensors)
    convert_released(tmp_path / "released.pth", tmp_path / "model")
    model = load_strictly(DefocusForImageClassification, tmp_path / "model")
    pixels = random_pixels(sizes)
    differences = largest_difference(outputs_of(model, pixels), forward(tensors, sizes, pixels))
    assert max(differences.values()) <= TOLERANCE
    # In float64 only the arithmetic of the two could differ, and it must not.
    exact = outputs_of(model.double(), pixels.double())
    assert max(largest_difference(exact, forward(tensors, sizes, pixels)).values()) <= 1e-9


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_changes_no_bit(name: str, suffix: str, tmp_path: Path) -> None:
    sizes = NETWORKS[name]
    tensors = random_state_dict(sizes)
    tensors["norm.bias"][0], tensors["norm.bias"][1] = float("-0.0"), float("inf")  # not numbers to compute with
    tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].half()
    save_released(tmp_path / "released.pth", sizes, tensors)
    there = convert_released(tmp_path / "released.pth", tmp_path / "model")
    convert_to_released(tmp_path / "model", tmp_path / f"back{suffix}")
    back = tmp_path / f"back{suffix}"
    found = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)["model"]
    assert_same_bits(found, tensors)
    if suffix == ".pth":
        assert list(found) == list(tensors), "the release's order"
    again = convert_released(back, tmp_path / "again")
    assert again.config.to_dict() == there.config.to_dict()
    assert {setting.source for setting in again.settings[1:]} == {"config in the checkpoint"}


def test_every_dimension_comes_from_the_tensors(tmp_path: Path) -> None:
    sizes = Sizes(mlp=True, group_norm=16)
    conversion = convert_released(
        save_released(tmp_path / "released.pth", sizes, random_state_dict(sizes)), tmp_path / "model"
    )
    config = DefocusVisionConfig.from_pretrained(tmp_path / "model")
    assert config.to_dict() == conversion.config.to_dict()
    expected = {
        "mixer": "mamba", "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 48, "state_size": 6,
        "time_step_rank": 5, "conv_kernel": 3, "patch_size": 4, "num_channels": 3, "head_type": "mlp",
        "aux_loss": "per_token", "class_token": True, "use_absolute_position_embeddings": False,
        "rotary": "learnable", "group_norm_size": 16, "image_size": 16,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert len(config.id2label) == 7
    assert conversion.tensors == len(random_state_dict(sizes))
    assert conversion.parameters == sum(tensor.numel() for tensor in random_state_dict(sizes).values())


def test_what_tensors_do_not_show_is_taken_in_order_and_its_source_is_told(tmp_path: Path) -> None:
    sizes = Sizes(delta_scale=2.0, rope_scale=4.0)
    released = save_released(tmp_path / "released.pth", sizes, random_state_dict(sizes))
    conversion = convert_released(released, tmp_path / "model", {"image_size": 32, "rope_scale_factor": None})
    told = {setting.name: (setting.value, setting.source) for setting in conversion.settings}
    assert told == {
        "image_size": (32, "command line"),
        "delta_scale_factor": (2.0, "config in the checkpoint"),
        "rope_scale_factor": (4.0, "config in the checkpoint"),
        "group_norm_size": (16, "config in the checkpoint"),
        "rms_norm_eps": (1e-5, "config in the checkpoint"),
    }
    assert {name: getattr(conversion.config, name) for name in told} == {
        name: value for name, (value, _) in told.items()
    }

    bare = tmp_path / "bare.safetensors"
    save_file(random_state_dict(sizes.but(inner=64)), bare)
    conversion = convert_released(bare, tmp_path / "bare")
    told = {setting.name: (setting.value, setting.source) for setting in conversion.settings}
    defaults = {"image_size": 224, "delta_scale_factor": 1.0, "rope_scale_factor": 1.0, "group_norm_size": 64}
    assert told == {name: (value, "default") for name, value in (defaults | {"rms_norm_eps": 1e-5}).items()}


def test_the_averaged_weights_are_converted_on_request(tmp_path: Path) -> None:
    sizes = Sizes()
    last, averaged = random_state_dict(sizes, seed=1), random_state_dict(sizes, seed=2)
    wrapped = {f"module.{name}": tensor for name, tensor in averaged.items()}
    released = save_released(tmp_path / "released.pth", sizes, last, model_ema=wrapped, epoch=299)
    conversion = convert_released(released, tmp_path / "last")
    assert (conversion.weights, conversion.left) == ("model", ("model_ema", "epoch"))
    assert torch.equal(load_file(tmp_path / "last" / "model.safetensors")["head.weight"], last["head.weight"])
    conversion = convert_released(released, tmp_path / "averaged", use_ema=True)
    assert (conversion.weights, conversion.left) == ("model_ema", ("model", "epoch"))
    assert torch.equal(load_file(tmp_path / "averaged" / "model.safetensors")["head.weight"], averaged["head.weight"])


def test_position_embeddings_tell_the_image_size(tmp_path: Path) -> None:
    sizes = Sizes(positions=True, group_norm=64, inner=64)
    save_file(random_state_dict(sizes), tmp_path / "released.safetensors")
    conversion = convert_released(tmp_path / "released.safetensors", tmp_path / "model")
    assert conversion.settings[0].source == "pos_embed"
    assert conversion.config.image_size == 16
    with pytest.raises(CheckpointError, match=r"image_size 32 \(command line\) contradicts pos_embed"):
        convert_released(tmp_path / "released.safetensors", tmp_path / "other", {"image_size": 32})
    tensors = random_state_dict(sizes)
    tensors["pos_embed"] = tensors["pos_embed"][:, :15].clone()
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="15 rows, which is no square"):
        convert_released(tmp_path / "odd.safetensors", tmp_path / "odd")


def test_the_image_processor_is_the_release_s(tmp_path: Path) -> None:
    sizes = Sizes()
    convert_released(save_released(tmp_path / "released.pth", sizes, random_state_dict(sizes)), tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    grey = Image.new("RGB", (50, 30), (127, 127, 127))
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    expected = (127 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 8, 8], expected, atol=1e-5, rtol=0)
    assert processor.resample == Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_registers": 2}, "num_registers=2"),
        ({"aux_loss": "pooled"}, "aux_loss='pooled'"),
        ({"rotary": "fixed"}, "rotary='fixed'"),
        ({"decay": "learnable"}, "decay='learnable'"),
        ({"patch_order": "sections", "section_size": 1}, "section_size=1"),
        ({"mixer": "attention", "num_attention_heads": 2}, "mixer='attention'.*decay='learnable'"),
    ],
)
def test_what_the_release_cannot_express_is_not_written(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    fields = {
        "mixer": "mamba",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "aux_loss": "per_token",
    }
    fields |= {"image_size": 16, "patch_size": 4, "use_absolute_position_embeddings": False}
    DefocusForImageClassification(DefocusVisionConfig(**(fields | changes))).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"cannot express {told}"):
        convert_to_released(tmp_path / "model", tmp_path / "out" / "back.pth")
    assert not (tmp_path / "out").exists()


def test_a_trained_position_of_the_class_token_is_not_dropped(tmp_path: Path) -> None:
    sizes = Sizes(positions=True)
    convert_released(save_released(tmp_path / "released.pth", sizes, random_state_dict(sizes)), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["encoder.embeddings.pos_embed"][:, -1] = 1e-8
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="class token has a position embedding"):
        convert_to_released(tmp_path / "model", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_a_folder_that_does_not_fit_its_configuration_is_not_written(tmp_path: Path) -> None:
    sizes = Sizes()
    convert_released(save_released(tmp_path / "released.pth", sizes, random_state_dict(sizes)), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layers.1.mixer.D"]
    weights["encoder.surplus"] = torch.zeros(1)
    weights["head.bias"] = torch.zeros(8)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        convert_to_released(tmp_path / "model", tmp_path / "back.pth")
    for told in ("1 missing: blocks.1.mixer.D", "1 unknown: encoder.surplus", "head.bias (8) instead of (7)"):
        assert told in str(raised.value)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        convert_to_released(tmp_path / "model", tmp_path / "back.pth")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        convert_to_released(tmp_path / "model", tmp_path / "back.pth")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "vit", "auto_map": {}}))
    with pytest.raises(CheckpointError, match="model_type is 'vit'"):
        convert_to_released(tmp_path / "model", tmp_path / "back.pth")
    with pytest.raises(FileNotFoundError, match="holds no saved model"):
        convert_to_released(tmp_path / "nowhere", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def main(words: list[str]) -> int:
    """Exit code of the command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command_converts_both_ways_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = Sizes(image=32)
    tensors = random_state_dict(sizes)
    save_file(
        {f"state_dict.{name}": t for name, t in tensors.items()} | {"pixel_values": torch.ones(1)},
        tmp_path / "r.safetensors",
    )
    words = ["convert", "--checkpoint", str(tmp_path / "r.safetensors"), "--output", str(tmp_path / "new" / "model")]
    words += ["--image-size", "32", "--rope-scale", "4", "--delta-scale", "2", "--group-norm", "16"]
    assert main(words) == 0
    told = capsys.readouterr().out
    for line in (
        "image_size 32 (command line)", "rope_scale_factor 4.0 (command line)", "rms_norm_eps 1e-05 (default)",
        "not converted: pixel_values", f"{len(tensors)} tensors (state_dict)",
    ):  # fmt: skip
        assert line in told
    config = DefocusVisionConfig.from_pretrained(tmp_path / "new" / "model")
    assert (config.image_size, config.rope_scale_factor, config.delta_scale_factor) == (32, 4.0, 2.0)

    back = tmp_path / "back.safetensors"
    words = ["convert", "--to-released", "--checkpoint", str(tmp_path / "new" / "model"), "--output", str(back)]
    for option in (["--image-size", "32"], ["--use-ema"]):
        assert main([*words, *option]) == 2
        assert "--to-released takes" in capsys.readouterr().err
    assert main(words) == 0
    assert_same_bits(load_file(back), tensors)
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "back.bin")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "new", "r.safetensors"]


def test_the_presets_have_the_published_numbers_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    counted = {name: int(row[-1].replace(",", "")) for name, row in rows.items()}
    assert counted["defocus_mamba_small"] == 25_092_944
    assert counted["defocus_mamba_base"] == 92_650_832
    assert counted["defocus_mamba_large"] == 330_117_840
    assert abs(counted["defocus_vit_base"] - 87.3e6) < 0.1e6
    assert rows["defocus_mamba_large"][1:5] == ["mamba", "1024", "48", "384"]
    assert rows["defocus_mamba_base"][5] == "91,112,832"  # the encoder alone
