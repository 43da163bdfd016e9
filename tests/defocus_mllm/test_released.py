"""Wrong and hostile files: one clear line, exit code 2, nothing run and nothing written."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from defocus_mllm import cli
from defocus_mllm.convert import convert_released
from defocus_mllm.loading import CheckpointError
from defocus_mllm.released import MAXIMUM_NAMES, read_released

sys.path.insert(0, str(Path(__file__).parent))
from released_reference import Sizes, Tensors, random_state_dict, release_config

SIZES = Sizes()


class Payload:
    """What pickle runs when it reads this is whatever it was made with."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def refused(checkpoint: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The line that the command ends with; there must be just one, exit code 2, and no trace of an output."""
    before = sorted(path.name for path in checkpoint.parent.iterdir())
    output = checkpoint.parent / "new" / "model"
    with pytest.raises(SystemExit) as stopped, warnings.catch_warnings(record=True) as shown:
        cli.main(["convert", "--checkpoint", str(checkpoint), "--output", str(output), *options])
    assert stopped.value.code == 2
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert not shown, "a warning would be a second line"
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "weights_only" not in lines[0], "advice to read the file unsafely"
    return lines[0]


def saved(path: Path, tensors: Tensors, **more: Any) -> Path:
    torch.save({"model": tensors, "config": release_config(SIZES), **more}, path)
    return path


@pytest.mark.parametrize("where", ["beside the weights", "among the weights", "instead of a checkpoint", "bare pickle"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_code_is_named_and_never_run(
    where: str, protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "proof"
    payload = Payload(os.system, f"touch {proof}")
    tensors: dict[str, Any] = dict(random_state_dict(SIZES))
    content: Any = {"model": tensors, "lr_scheduler": payload}
    if where == "among the weights":
        content = {"model": tensors | {"blocks.0.mixer.D": payload}}
    elif where != "beside the weights":
        content = payload
    path = tmp_path / "evil.pth"
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol)
    told = refused(path, capsys)
    assert not proof.exists()
    if protocol == 2:
        assert "posix.system" in told
        assert "it was not run" in told
    pickle.loads(pickle.dumps(payload))
    assert proof.exists(), "the payload is one that works"


@pytest.mark.parametrize("function", [eval, exec, subprocess.Popen, getattr, torch.load, __import__, io.open])
def test_other_ways_to_run_code_are_refused(
    function: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(saved(tmp_path / "evil.pth", random_state_dict(SIZES), epoch=Payload(function, "1")), capsys)
    assert function.__name__ in told


def released_training_state(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the release's training saves beside the weights, its configuration being a node of (a stand-in for) yacs."""

    class CfgNode(dict):
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__(values)
            self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = CfgNode  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", yacs)
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return {
        "config": release_config(Sizes(delta_scale=2.0, rope_scale=4.0), CfgNode),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3], "t_in_epochs": False, "noise_range_t": None},
        "scaler": {},
        "max_accuracy": numpy.float64(82.9),
        "max_accuray_ema": 83.0,
        "epoch": 299,
        "args": argparse.Namespace(cfg="base.yaml"),
        "rng": numpy.arange(3),
    }


def test_what_the_released_training_saves_is_read_without_yacs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state = released_training_state(monkeypatch)
    tensors = {f"module.{name}": torch.nn.Parameter(tensor) for name, tensor in random_state_dict(SIZES).items()}
    torch.save({"model": tensors, **state, "model_ema": random_state_dict(SIZES)}, tmp_path / "released.pth")
    monkeypatch.undo()
    assert "yacs" not in sys.modules
    conversion = convert_released(tmp_path / "released.pth", tmp_path / "model")
    assert conversion.config.delta_scale_factor == 2.0
    assert conversion.config.rope_scale_factor == 4.0
    assert set(conversion.left) == (set(state) - {"config"}) | {"model_ema"}


def test_the_older_format_of_torch_is_read(tmp_path: Path) -> None:
    content = {"state_dict": random_state_dict(SIZES), "config": release_config(SIZES)}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    read = read_released(tmp_path / "old.pt")
    assert read.tensors.keys() == content["state_dict"].keys()
    assert read.weights == "state_dict"
    torch.save(content["state_dict"], tmp_path / "bare.pth")
    assert read_released(tmp_path / "bare.pth").weights == "all tensors"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1000, -1])
def test_a_truncated_file_is_refused(
    suffix: str, keep: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"released{suffix}"
    if suffix == ".pth":
        saved(path, random_state_dict(SIZES))
    else:
        save_file(random_state_dict(SIZES), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert ("is empty" if keep == 0 else "is damaged") in refused(path, capsys)


def test_a_flipped_bit_and_a_packed_archive_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "released.pth", random_state_dict(SIZES))
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    read = read_released(tmp_path / "packed.pth").tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in random_state_dict(SIZES).items())
    content = bytearray(path.read_bytes())
    place = content.index(random_state_dict(SIZES)["head.weight"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert re.search(r"checksum of released/data/\d+ in it is wrong", refused(path, capsys))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("text.pth", b"<html>404 Not Found</html>", "is damaged or no checkpoint"),
        ("text.safetensors", b"<html>404 Not Found</html>", "no safetensors file"),
        ("zip.pth", b"PK\x05\x06" + b"\0" * 18, "is damaged or no checkpoint"),
        ("weights.bin", b"0", "unknown kind of file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    name: str, content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert told in refused(path, capsys)
    assert "no such file" in refused(tmp_path / "absent.pth", capsys)
    assert "no such file" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "holds no tensors"),
        ({"model": {}}, "model holds no tensors"),
        ({"model": torch.ones(2)}, "model holds no tensors"),
        ({"model_ema": {"a": torch.ones(1)}}, "--use-ema converts them"),
        ({"epoch": 3}, "epoch (int)"),
        ({"model": {"a": torch.ones(2, dtype=torch.int64), 7: 1, "b": "x"}}, "a (torch.int64), 7 (int), b (str)"),
        ({"model": {"a": torch.ones(2).to_sparse(), "b": torch.ones(0)}}, "a (torch.sparse_coo on cpu), b (empty)"),
        ({"model": {"a": torch.ones(2, device="meta")}}, "a (torch.strided on meta)"),
        ({"model": {"a": torch.ones(1).expand(10**12)}}, "a (claims more values than the file holds)"),
    ],
)  # fmt: skip
def test_anything_but_plain_tensors_is_refused(
    content: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "odd.pth")
    assert told in refused(tmp_path / "odd.pth", capsys)


def test_averaged_weights_that_are_not_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no model_ema" in refused(saved(tmp_path / "a.pth", random_state_dict(SIZES)), capsys, "--use-ema")
    save_file(random_state_dict(SIZES), tmp_path / "b.safetensors")
    assert "has no model_ema" in refused(tmp_path / "b.safetensors", capsys, "--use-ema")


def test_all_missing_and_unknown_tensors_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_state_dict(SIZES)
    missing = ["patch_embed.proj.weight", "blocks.0.mixer.A_log", "blocks.1.norm.weight", "norm.bias", "head2.bias"]
    for name in missing:
        del tensors[name]
    unknown = ["blocks.0.mixer.out_norm.weight", "blocks.1.mixer.in_proj.bias", "fc_norm.weight", "module.x"]
    tensors |= {name: torch.ones(3) for name in unknown}
    told = refused(saved(tmp_path / "released.pth", tensors), capsys)
    assert f"{len(missing)} missing: {', '.join(missing)};" in told
    assert f"{len(unknown)} unknown: {', '.join(unknown)}" in told


@pytest.mark.parametrize("name", random_state_dict(SIZES))
def test_every_tensor_is_needed_and_every_shape_is_checked(name: str, tmp_path: Path) -> None:
    tensors = random_state_dict(SIZES.but(depth=3))  # of two blocks that disagree, neither is in the majority

    def problem(changed: Tensors) -> str:
        with pytest.raises(CheckpointError) as raised:
            convert_released(saved(tmp_path / "released.pth", changed), tmp_path / "model")
        assert not (tmp_path / "model").exists()
        return str(raised.value)

    told = problem({n: t for n, t in tensors.items() if n != name})
    # Without its class token the file is taken for the release's other kind, which has no second head.
    assert ("aux_loss" if name == "cls_token" else f"1 missing: {name}") in told
    for axis in range(tensors[name].ndim):
        if (name, axis) != ("patch_embed.proj.weight", 1):  # any number of channels is right
            wrong = torch.cat([tensors[name]] * 2, dim=axis)
            assert f"1 of a wrong shape: {name} " in problem(tensors | {name: wrong})
    assert f"1 of a wrong shape: {name} " in problem(tensors | {name: tensors[name][None]})


def test_a_block_of_another_width_is_blamed_and_not_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_state_dict(SIZES.but(depth=3))
    other = random_state_dict(SIZES.but(depth=3, inner=32))
    tensors |= {name: tensor for name, tensor in other.items() if name.startswith("blocks.0.")}
    told = refused(saved(tmp_path / "released.pth", tensors), capsys)
    assert "blocks.0.mixer.A_log (32, 6) instead of (48, 6)" in told
    assert "blocks.0.mixer.in_proj.weight (64, 24) instead of (96, 24)" in told
    assert "blocks.1" not in told
    assert "blocks.2" not in told


def test_a_list_of_names_is_bounded_and_a_huge_index_builds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {f"layer{i}.weight": torch.ones(1) for i in range(500)}
    tensors["blocks.99999999999.norm.weight"] = torch.ones(24)
    told = refused(saved(tmp_path / "resnet.pth", tensors), capsys)
    assert f"and {501 - MAXIMUM_NAMES} more" in told
    assert "blocks.0.mixer.A_log" in told
    assert len(told) < 5000


@pytest.mark.parametrize(
    ("sizes", "options", "told"),
    [
        (SIZES.but(states=5), (), "state_size must be even, not 5"),
        (
            SIZES,
            ("--image-size", "30"),
            r"image_size 30 must be a multiple of patch_size 4.*image_size 30 \(command line\)",
        ),
        (SIZES, ("--group-norm", "7"), "group_norm_size 7 must be 0 or divide"),
        (SIZES, ("--rope-scale", "0"), "rope_scale_factor must be positive"),
        (SIZES.but(class_token=False), (), "aux_loss='per_token' trains beside a class token"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    sizes: Sizes, options: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "released.pth", random_state_dict(sizes))
    assert re.search(told, refused(path, capsys, *options))


@pytest.mark.parametrize("value", ["384", True, 384.5, [384], numpy.float64(384)])
def test_a_setting_of_the_checkpoint_that_is_no_number_is_refused(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = release_config(SIZES)
    config["DATA"]["IMG_SIZE"] = value
    path = tmp_path / "released.pth"
    torch.save({"model": random_state_dict(SIZES), "config": config}, path)
    assert "DATA.IMG_SIZE of its config is" in refused(path, capsys)


@pytest.mark.parametrize("kind", ["folder", "file", "link to nowhere"])
def test_an_output_that_exists_is_left_alone(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "model"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stopped:
        # The checkpoint is absent too: an output in the way is noticed before gigabytes are read.
        cli.main(["convert", "--checkpoint", str(tmp_path / "absent.pth"), "--output", str(output)])
    assert stopped.value.code == 2
    assert "exists already" in capsys.readouterr().err
    assert kind != "folder" or list(output.iterdir()) == []
    assert kind != "file" or output.read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    path = saved(tmp_path / "released.pth", random_state_dict(SIZES))
    monkeypatch.setattr("defocus_mllm.convert.DefocusImageProcessor.save_pretrained", full)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "--checkpoint", str(path), "--output", str(tmp_path / "model")])
    assert stopped.value.code == 2
    assert "no space left while writing" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["released.pth"]
