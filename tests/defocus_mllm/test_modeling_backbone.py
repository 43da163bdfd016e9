"""The backbone: maps of any height and width, causal section by section; the pyramid; loading a classifier."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoBackbone, AutoModel

from defocus_mllm import DefocusBackbone, DefocusForImageClassification, DefocusVisionConfig, DefocusVisionModel

PATCH, SECTION = 8, 2  # pre-trained on 16 x 16 pixels: sections of 2 x 2 patches
PYRAMID = ["fpn1", "fpn2", "fpn3", "fpn4"]
MIXERS = ["attention", "retention", "mamba"]


def build_config(mixer="attention", **fields):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "fpn_channels": 12}
    of_mamba = {"state_size": 4, "time_step_rank": 4, "group_norm_size": 8} if mixer == "mamba" else {}
    images = {"image_size": PATCH * SECTION, "patch_size": PATCH, "initializer_range": 0.2}
    return DefocusVisionConfig(mixer=mixer, **{**sizes, **of_mamba, **images, "intermediate_size": 32, **fields})


def build_backbone(**fields):
    return DefocusBackbone(build_config(**fields)).eval()


def place_in_sections(row, column, columns):
    """The place of a patch in the sequence: the closed formula of the release, `columns` including the padding."""
    section = (row // SECTION) * (columns // SECTION) + column // SECTION
    return section * SECTION**2 + (row % SECTION) * SECTION + column % SECTION


@pytest.mark.parametrize(("height", "width"), [(16, 16), (64, 32), (40, 24), (35, 61), (1, 7), (8, 100)])
def test_a_map_covers_the_image_whatever_its_size(height, width):
    backbone = build_backbone(out_features=["stem", "stage1", "stage2", *PYRAMID])
    output = backbone(torch.randn(2, 3, height, width))
    cells = [PATCH, PATCH, PATCH, PATCH // 4, PATCH // 2, PATCH, 2 * PATCH]
    expected = [
        (2, channels, math.ceil(height / cell), math.ceil(width / cell))
        for channels, cell in zip(backbone.channels, cells, strict=True)
    ]
    assert [tuple(feature_map.shape) for feature_map in output.feature_maps] == expected
    assert backbone.channels == [16, 16, 16, 12, 12, 12, 12]
    assert output.hidden_states is None


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_map_of_an_image_of_the_trained_size_is_the_encoders_patch_tokens(mixer):
    backbone = build_backbone(mixer=mixer, num_registers=1, image_size=32, out_features=["stage2"])
    plain = DefocusVisionModel(build_config(mixer, num_registers=1, image_size=32)).eval()
    plain.load_state_dict(backbone.encoder.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    tokens = plain(pixels).last_hidden_state[:, :16]
    assert torch.equal(backbone(pixels).feature_maps[0].flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_larger_image_is_read_section_by_section(mixer):
    backbone = build_backbone(mixer=mixer, use_absolute_position_embeddings=False, out_features=["stage1", "stage2"])
    encoder = backbone.encoder
    pixels = torch.randn(1, 3, 30, 41)  # 4 x 6 patches with the padding, 2 x 3 sections; 4 x 6 cells remain
    patches = encoder.embeddings.patch_embed(F.pad(pixels, (0, 7, 0, 2)))[0]
    sequence = torch.zeros(1, 4 * 6 + 1, 16)
    for row in range(4):
        for column in range(6):
            sequence[0, place_in_sections(row, column, 6)] = patches[:, row, column]
    sequence[0, -1] = encoder.embeddings.cls_token[0, 0]
    for layer, feature_map in zip(encoder.layers, backbone(pixels).feature_maps, strict=True):
        sequence = layer(sequence)
        expected = encoder.norm(sequence)[0]
        for row in range(4):
            for column in range(6):
                cell = expected[place_in_sections(row, column, 6)]
                torch.testing.assert_close(feature_map[0, :, row, column], cell, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_cell_has_seen_the_patches_before_it_and_no_others(mixer):
    backbone = build_backbone(mixer=mixer, out_features=["stage2"])
    rows, columns = 3, 5  # of 4 x 6 with the padding
    pixels = torch.randn(1, 3, rows * PATCH, columns * PATCH)
    before = backbone(pixels).feature_maps[0]
    for row, column in [(0, 0), (0, 2), (1, 1), (2, 4)]:
        changed = pixels.clone()
        changed[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 3
        differs = (backbone(changed).feature_maps[0] != before).any(dim=1)[0]
        here = place_in_sections(row, column, 6)
        for y in range(rows):
            for x in range(columns):
                assert differs[y, x] == (place_in_sections(y, x, 6) >= here), (row, column, y, x)


def test_padding_is_zeros_below_and_to_the_right_and_no_cell_of_it_remains():
    backbone = build_backbone(out_features=["stage1", "stage2"])
    pixels = torch.randn(1, 3, 19, 42)
    padded = torch.zeros(1, 3, 32, 48)
    padded[..., :19, :42] = pixels
    for feature_map, whole in zip(backbone(pixels).feature_maps, backbone(padded).feature_maps, strict=True):
        assert torch.equal(feature_map, whole[..., :3, :6])


def test_the_size_of_a_section_is_that_of_the_configuration_or_of_the_trained_image():
    assert build_backbone(image_size=32).config.section_size == 4
    assert build_backbone(image_size=32, patch_order="sections", section_size=2).config.section_size == 2
    config = build_config(image_size=32)
    DefocusBackbone(config)
    assert (config.patch_order, config.section_size) == ("raster", 0), "the caller's configuration changed"


def channel_norm(feature_map, norm):
    return F.layer_norm(feature_map.movedim(1, -1), norm.weight.shape, norm.weight, norm.bias, norm.eps).movedim(-1, 1)


def doubled(feature_map, convolution):
    """A transposed convolution of width and stride 2 by its definition: every cell becomes 2 x 2."""
    cells = torch.einsum("bcyx,cdij->bdyixj", feature_map, convolution.weight) + convolution.bias.view(
        1, -1, 1, 1, 1, 1
    )
    return cells.flatten(4, 5).flatten(2, 3)


def test_the_pyramid_is_that_of_the_release():
    backbone = build_backbone(out_features=["stage2", *PYRAMID]).double()
    with torch.no_grad():
        for parameter in backbone.pyramid.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms count, too
    last, *maps = backbone(torch.randn(2, 3, 48, 64, dtype=torch.float64)).feature_maps
    first = backbone.pyramid["fpn1"].resample
    inputs = [
        doubled(F.gelu(channel_norm(doubled(last, first[0]), first[1])), first[3]),
        doubled(last, backbone.pyramid["fpn2"].resample),
        last,
        last.unflatten(2, (3, 2)).unflatten(4, (4, 2)).amax(dim=(3, 5)),
    ]
    assert [feature_map.shape[1] for feature_map in inputs] == [4, 8, 16, 16]
    for level, given, feature_map in zip(PYRAMID, inputs, maps, strict=True):
        module = backbone.pyramid[level]
        lateral = channel_norm(
            torch.einsum("bcyx,dc->bdyx", given, module.lateral.weight[..., 0, 0]), module.lateral_norm
        )
        expected = channel_norm(F.conv2d(lateral, module.output.weight, padding=1), module.output_norm)
        torch.testing.assert_close(feature_map, expected, rtol=1e-9, atol=1e-11)


def test_an_odd_number_of_patches_keeps_its_border():
    backbone = build_backbone(out_features=["fpn4"])
    pixels = torch.randn(1, 3, 24, 24)
    changed = pixels.clone()
    changed[..., 16:, 16:] += 3  # the patch in the corner, last in the sequence
    difference = (backbone(pixels).feature_maps[0] != backbone(changed).feature_maps[0]).any(dim=1)
    assert difference[0, 1, 1]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_learns_but_for_the_tail_that_no_patch_sees(mixer):
    backbone = build_backbone(mixer=mixer, num_registers=1, out_features=["stage1", "stage2", *PYRAMID]).train()
    sum((feature_map**3).sum() for feature_map in backbone(torch.randn(2, 3, 40, 40)).feature_maps).backward()
    still = {name for name, parameter in backbone.named_parameters() if not parameter.grad.any()}
    assert still == {"encoder.embeddings.cls_token", "encoder.embeddings.register_tokens"}


def test_without_causality_the_tail_learns_too():
    backbone = build_backbone(causal=False, num_registers=1).train()
    sum((feature_map**3).sum() for feature_map in backbone(torch.randn(2, 3, 40, 40)).feature_maps).backward()
    assert [name for name, parameter in backbone.named_parameters() if not parameter.grad.any()] == []


def test_hidden_states_come_when_asked_for():
    backbone = build_backbone(num_registers=1)
    output = backbone(torch.randn(1, 3, 30, 41), output_hidden_states=True)
    assert [tuple(tokens.shape) for tokens in output.hidden_states] == [(1, 24 + 1 + 1, 16)] * 3
    maps, *rest = backbone(torch.randn(1, 3, 30, 41), return_dict=False)
    assert len(maps) == 4
    assert rest == []


@pytest.mark.parametrize("saved", [DefocusForImageClassification, DefocusVisionModel])
@pytest.mark.parametrize("mixer", MIXERS)
def test_an_encoder_of_any_task_loads_and_only_the_pyramid_is_new(saved, mixer, tmp_path):
    trained = saved(build_config(mixer, num_labels=5))
    trained.save_pretrained(tmp_path)
    backbone, report = DefocusBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"pyramid"}
    assert len(report["missing_keys"]) == len(backbone.pyramid.state_dict())
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    encoder = getattr(trained, "encoder", trained)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, backbone.encoder.state_dict()[name]), name
    for name, parameter in backbone.pyramid.named_parameters():
        if parameter.ndim > 1:
            assert 0.1 < parameter.std() < 0.3, f"{name} is not initialised"
        else:
            assert (parameter == name.endswith(("norm.weight", "resample.1.weight"))).all(), (
                f"{name} is not initialised"
            )


def test_a_saved_backbone_comes_back_equal_by_its_own_and_the_auto_class(tmp_path, monkeypatch):
    backbone = build_backbone(out_features=["stage1", "fpn2"])
    backbone.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 30, 41)
    # Transformers 5.24 asks the Hub whether a backbone exists there, whatever the name: no folder would pass.
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *_, **__: True)
    for auto_class in (DefocusBackbone, AutoBackbone):
        loaded = auto_class.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, DefocusBackbone)
        assert loaded.out_features == ["stage1", "fpn2"]
        for before, after in zip(backbone(pixels).feature_maps, loaded(pixels).feature_maps, strict=True):
            assert torch.equal(before, after)
    fewer = AutoBackbone.from_pretrained(tmp_path, out_features=["stage2"])
    assert (fewer.out_indices, fewer.channels, len(fewer.pyramid)) == ([2], [16], 0)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).norm.weight, backbone.encoder.norm.weight)


def test_a_pyramid_that_was_not_built_is_refused():
    backbone = build_backbone(out_features=["fpn3"])
    backbone.out_features = ["fpn3", "fpn4"]
    with pytest.raises(ValueError, match=r"built without \['fpn4'\]"):
        backbone(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 16, 16), (1, 3, 0, 16)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(batch, 3, height, width\), not"):
        build_backbone()(torch.randn(shape))


def test_stages_are_named_by_the_configuration():
    config = build_config()
    assert config.stage_names == ["stem", "stage1", "stage2", *PYRAMID]
    assert config.out_features == PYRAMID
    assert config.out_indices == [3, 4, 5, 6]
    assert build_config(out_features=None, out_indices=None).out_features == ["fpn4"]
    assert build_config(out_indices=[0, 2]).out_features == ["stem", "stage2"]
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        build_config(out_features=["stage3"])
    with pytest.raises(ValueError, match="should correspond to the same stages"):
        build_config(out_features=["stem", "stage1"], out_indices=[0, 2])


SCRIPT = """
import sys
import torch
from huggingface_hub import HfApi
from transformers import AutoBackbone

sys.modules["defocus_mllm"] = None  # importing the package fails
HfApi.repo_exists = lambda *_, **__: True  # what Transformers 5.24 asks before it loads a backbone
folder, output = sys.argv[1:]
backbone = AutoBackbone.from_pretrained(folder, out_features=["stage1"], trust_remote_code=True).eval()
torch.save(backbone(torch.ones(1, 3, 30, 41)).feature_maps[0], output)
"""


def test_a_classifier_carries_the_code_of_its_backbone(tmp_path):
    classifier = DefocusForImageClassification(build_config(num_labels=5))
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "map.pt"
    classifier.save_pretrained(checkpoint)
    finished = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(checkpoint), str(output)],
        env={"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    backbone = DefocusBackbone.from_pretrained(checkpoint, out_features=["stage1"]).eval()
    expected = backbone(torch.ones(1, 3, 30, 41)).feature_maps[0]
    torch.testing.assert_close(torch.load(output, weights_only=True), expected.detach())
